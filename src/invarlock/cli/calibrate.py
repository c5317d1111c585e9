"""`invarlock calibrate`: measure how guards react to harmless edits of a model, and derive thresholds from it."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any

import typer

from invarlock.cli.console import emit_json, note, progress, say
from invarlock.cli.options import DeviceOption, JsonOption, ProfileOption, plain_typer

__all__ = ["app"]

ConfigOption = Annotated[Path, typer.Option("--config", "-c", help="A configuration with `model` and `dataset`.")]
SeedsOption = Annotated[int, typer.Option(min=1, help="Repetitions of each edit that draws random numbers.")]
OutOption = Annotated[Path, typer.Option(help="Folder of the sweep's JSON file.")]

app = plain_typer(no_args_is_help=True)


@app.callback()
def _calibrate() -> None:
    """Measure how guards react to harmless edits, and derive thresholds from it."""


@app.command("null-sweep")
def null_sweep(
    config: ConfigOption,
    seeds: SeedsOption = 3,
    out: OutOption = Path("calibration"),
    device: DeviceOption = None,
    profile: ProfileOption = None,
    json: JsonOption = False,
) -> int:
    """Spectral and rmt: derive tau, kappa and epsilon, in the shape of `guards` in a configuration or a tier."""
    from invarlock import calibration

    def derive(rows: list[dict[str, Any]]) -> dict[str, Any]:
        return {"spectral": calibration.spectral_thresholds(rows), "rmt": calibration.rmt_thresholds(rows)}

    return _sweep("null_sweep", calibration.null_sweep, derive, config, seeds, out, device, profile, json)


@app.command("ve-sweep")
def ve_sweep(
    config: ConfigOption,
    seeds: SeedsOption = 1,
    out: OutOption = Path("calibration"),
    device: DeviceOption = None,
    profile: ProfileOption = None,
    json: JsonOption = False,
) -> int:
    """Variance equalisation: derive min_effect_lognll, what scaling gains where nothing needs repair."""
    from invarlock import calibration

    def derive(rows: list[dict[str, Any]]) -> dict[str, Any]:
        return {"variance": calibration.ve_thresholds(rows)}

    return _sweep("ve_sweep", calibration.ve_sweep, derive, config, seeds, out, device, profile, json)


def _sweep(
    name: str,
    sweep: Callable[..., list[dict[str, Any]]],
    derive: Callable[[list[dict[str, Any]]], dict[str, Any]],
    config: Path,
    seeds: int,
    out: Path,
    device: str | None,
    profile: str | None,
    json: bool,
) -> int:
    """Load the model, sweep it, and write rows and thresholds with what they were measured on."""
    import yaml

    from invarlock.core.device import library_versions
    from invarlock.core.files import write_json
    from invarlock.flow.execute import CalibrationBatches
    from invarlock.flow.run import open_model
    from invarlock.policy.config import load_config

    chosen = load_config(config, cli_overrides={"model.device": device}, profile=profile)
    with progress() as tick:
        opened = open_model(chosen, profile or "dev", tick)
        for text in opened.notes:
            note(f"NOTE: {text}")
        rows = sweep(
            opened.model, opened.adapter, CalibrationBatches(opened.sample.windows.all), seeds=seeds, progress=note
        )
    guards = derive(rows)
    path = out / f"{name}.json"
    write_json(
        path,
        {
            "format_version": "calibration-v1",
            "sweep": name,
            "model": {"id": opened.side.id, "weights": opened.side.structure.weights_digest()},
            "data": opened.sample.data.model_dump(mode="json"),
            "seeds": seeds,
            "versions": library_versions(),
            "rows": rows,
            "guards": guards,
        },
    )
    if json:
        emit_json(
            {"format_version": "calibration-v1", "sweep": name, "runs": len(rows), "guards": guards, "file": str(path)}
        )
    else:
        say(yaml.safe_dump({"guards": guards}, sort_keys=False).rstrip("\n"))
        say(f"# {len(rows)} harmless runs: {path}")
    return 0
