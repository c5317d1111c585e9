"""`invarlock calibrate`: measure how guards react to harmless edits of a model, and derive thresholds from it."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any, NamedTuple

import yaml
from typer import Option

from invarlock.cli.console import emit_json, note, progress, say
from invarlock.cli.options import DeviceOption, JsonOption, ProfileOption, plain_typer
from invarlock.core.device import library_versions
from invarlock.core.files import write_json
from invarlock.evidence.windows import WindowBatches
from invarlock.flow.run import open_model
from invarlock.flow.run_folder import require_writable
from invarlock.policy.config import load_config

__all__ = ["app"]


class _Sweep(NamedTuple):
    """`sweep` and, for each guard, the function of `flow.calibration` that derives its thresholds."""

    sweep: str
    guards: dict[str, str]
    seeds: int
    help: str


_SWEEPS = {
    "null-sweep": _Sweep(
        "null_sweep",
        {"spectral": "spectral_thresholds", "rmt": "rmt_thresholds"},
        3,
        "Spectral and rmt: derive deadband, tau, kappa and epsilon, in the shape of `guards` in a configuration or a tier.",
    ),
    "ve-sweep": _Sweep(
        "ve_sweep",
        {"variance": "ve_thresholds"},
        1,
        "Variance equalisation: derive min_effect_lognll, what scaling gains where nothing needs repair.",
    ),
}

app = plain_typer(no_args_is_help=True)


@app.callback()
def _calibrate() -> None:
    """Measure how guards react to harmless edits, and derive thresholds from it."""


def _add(name: str, chosen: _Sweep) -> None:
    @app.command(name, help=chosen.help)
    def sweep(
        config: Annotated[Path, Option("--config", "-c", help="A configuration with `model` and `dataset`.")],
        seeds: Annotated[int, Option(min=1, help="Repetitions of each edit that draws random numbers.")] = chosen.seeds,
        out: Annotated[Path, Option(help="Folder of the sweep's JSON file.")] = Path("calibration"),
        device: DeviceOption = None,
        profile: ProfileOption = None,
        json: JsonOption = False,
    ) -> int:
        require_writable(out, "the sweep", "--out")
        found = _measured(chosen, config, seeds, device, profile)
        path = out / f"{chosen.sweep}.json"
        write_json(path, {"format_version": "calibration-v1", "sweep": chosen.sweep, **found})
        guards, runs = found["guards"], len(found["rows"])
        if json:
            emit_json(format_version="calibration-v1", sweep=chosen.sweep, runs=runs, guards=guards, file=str(path))
        else:
            say(yaml.safe_dump({"guards": guards}, sort_keys=False).rstrip("\n"))
            say(f"# {runs} harmless runs: {path}")
        return 0


for _name, _chosen in _SWEEPS.items():
    _add(_name, _chosen)


def _measured(chosen: _Sweep, config: Path, seeds: int, device: str | None, profile: str | None) -> dict[str, Any]:
    """Load the model and sweep it: the rows, the thresholds, and what they were measured on."""
    from invarlock.flow import calibration  # needs torch

    settings = load_config(config, cli_overrides={"model.device": device}, profile=profile)
    with progress("calibrate") as tick:
        opened = open_model(settings, profile or "dev", tick)
        for text in opened.notes:
            note(f"NOTE: {text}")
        batches = WindowBatches(opened.windows.all)
        rows = getattr(calibration, chosen.sweep)(opened.model, opened.adapter, batches, seeds=seeds, progress=note)
    return {
        "model": {"id": opened.side.id, "weights": opened.side.structure.weights_digest()},
        "data": opened.windows.facts().model_dump(mode="json"),
        "seeds": seeds,
        "versions": library_versions(),
        "rows": rows,
        "guards": {name: getattr(calibration, derive)(rows) for name, derive in chosen.guards.items()},
    }
