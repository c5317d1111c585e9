"""`invarlock.certify`: two checkpoints in, one verdict and its files out. The command line is a thin layer over it."""

from __future__ import annotations

import contextlib
import inspect
import os
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from invarlock.checkpoints.side import Loading
from invarlock.core import registry
from invarlock.core.exceptions import ConfigError
from invarlock.core.ranks import follows
from invarlock.core.registry import nearest, no_argument
from invarlock.flow.certify import CertifyRequest
from invarlock.flow.certify import certify as run_certify
from invarlock.flow.job import INTENTS, Tick
from invarlock.flow.run_folder import require_writable
from invarlock.flow.sampling import dataset_options
from invarlock.policy.config import RunSettings, load_config, load_edit_config
from invarlock.policy.presets import preset_path
from invarlock.policy.resolve import PROFILES, TIERS
from invarlock.reporting.bundle import claimed, write_bundle
from invarlock.reporting.terminal import summary_lines

__all__ = ["REFUSED", "Certification", "certify", "request_from", "request_of"]

_Path = str | os.PathLike[str]
_LIMIT = "certify does not use it; the limit of a verdict is metrics.pm_ratio.limit"
#: keys of a configuration, or whole sections, that would have no effect here, so that nobody believes they had one
REFUSED = {
    "edit": "certify does not use it; give the edit apart (--edit-config, or edit=)",
    "eval.max_pm_ratio": _LIMIT,
    "eval.spike_threshold": _LIMIT,
    "eval.gates_off": "certify does not use it; a verdict holds every gate",
    **dict.fromkeys(
        ("auto.enabled", "auto.probes", "auto.target_pm_ratio", "context", "output.save_model", "output.model_dir",
         "output.model_subdir", "output.save_report"),
        "certify does not use it; remove it from the preset",
    ),
}  # fmt: skip


@dataclass(frozen=True)
class Certification:
    """A verdict and all that belongs to it. `certificate` is plain JSON data; `files` says where it was written.

    `source_report` and `edited_report` are the stored runs of the two sides; give the first as `baseline_report` to
    certify another subject at half the cost. `runs` is the folder of all runs, `timings` are seconds.
    """

    certificate: dict[str, Any]
    files: dict[str, Path] = field(default_factory=dict)
    source_report: Path | None = None
    edited_report: Path | None = None
    runs: Path = Path("runs")
    notes: list[str] = field(default_factory=list)
    timings: dict[str, float] = field(default_factory=dict)

    @property
    def status(self) -> str:
        """PASS, FAIL or INCONCLUSIVE."""
        return str(self.certificate["verdict"]["status"])

    @property
    def passed(self) -> bool:
        """Whether the verdict is PASS."""
        return self.status == "PASS"

    @property
    def reasons(self) -> list[str]:
        """Why the verdict is not PASS, one sentence each."""
        return [reason["message"] for reason in self.certificate["verdict"]["reasons"]]

    def __str__(self) -> str:
        """What the terminal would show."""
        return "\n".join(summary_lines(self.certificate))


def certify(
    *,
    subject: _Path,
    baseline: _Path | None = None,
    baseline_report: _Path | None = None,
    preset: _Path | None = None,
    output: _Path | None = None,
    runs: _Path | None = None,
    profile: str | None = None,
    tier: str | None = None,
    intent: str = "preserve",
    engine: str | None = None,
    baseline_engine: str | None = None,
    adapter: str | None = None,
    device: str | None = None,
    dataset: Mapping[str, Any] | None = None,
    edit: Mapping[str, Any] | _Path | None = None,
    edit_label: str | None = None,
    early_stop: bool = True,
    cache: bool = True,
    noise_floor: bool = False,
    tick: Tick | None = None,
    **unknown: object,
) -> Certification:
    """Certify an edited checkpoint against its baseline.

    subject, baseline: checkpoint folders or hub ids (a baseline may be a pack); baseline_report: a stored run of the
    baseline instead.
    preset: a YAML file, or the name of a packaged preset. dataset: {provider, seq_len, ...} in place of its section.
    output: folder of the certificate's files; None writes none. runs: folder of the two runs (default: runs).
    profile: dev, ci (default), ci_cpu or release; tier: conservative, balanced (default) or aggressive;
    intent: preserve, finetune, restructure or engine. engine, baseline_engine: served engines that score a side, such as
    vllm=http://127.0.0.1:8000. edit: {name, plan}, or a file that holds it, applied to the subject once
    loaded. early_stop: stop once the text decides; False measures all of it in one look. cache:
    find the baseline's measurement again where it was made before. noise_floor: also measure the baseline against itself
    in another batch shape, number of threads, attention and type. tick(what, done, total) is
    called as work proceeds.

    Returns for PASS, FAIL and INCONCLUSIVE alike. Raises ConfigError for arguments that make no sense, ModelLoadError for
    a checkpoint that cannot be read, DataError for text that cannot serve, PairingError (E001 ... E006) where the two
    sides cannot be compared.
    """
    asked = {name: value for name, value in locals().items() if name not in ("output", "tick", "unknown")}
    for name in unknown:
        known = [key for key in inspect.signature(certify).parameters if key != "unknown"]
        raise no_argument("certify", name, known)
    output = None if follows() else output  # under torchrun the leader alone writes
    with _output(output) as moved:
        request = request_of(asked)
        require_writable(request.out)
        outcome = run_certify(request, tick)
        outcome.notes[:0] = moved
        files = {} if output is None else write_bundle(outcome.certificate, Path(output))
        reports = outcome.source_report, outcome.edited_report
        return Certification(outcome.certificate, files, *reports, request.out, outcome.notes, outcome.timings)


def request_of(asked: Mapping[str, Any]) -> CertifyRequest:
    """Return the request that arguments of `certify` (by name, all of them but `output` and `tick`) stand for, with what
    the preset says. Raises ConfigError for arguments that make no sense."""
    profile, tier, intent, runs = (asked[name] for name in ("profile", "tier", "intent", "runs"))
    _choose(profile=(profile, PROFILES), intent=(intent, INTENTS), tier=(tier, TIERS))
    flags = {"model.adapter": asked["adapter"], "model.device": asked["device"], "auto.tier": tier}
    flags |= {"dataset": asked["dataset"], "eval.early_stop": None if asked["early_stop"] else False}
    flags["output.dir"] = None if runs is None else os.fspath(runs)
    path = None if asked["preset"] is None else preset_path(asked["preset"])
    config = load_config(path, cli_overrides=flags, profile=profile, require_model=False, refused=REFUSED)
    baseline, report = asked["baseline"], asked["baseline_report"]
    return request_from(
        config,
        profile=profile or "ci",
        subject=os.fspath(asked["subject"]),
        baseline=None if baseline is None else os.fspath(baseline),
        baseline_report=None if report is None else Path(report),
        edit=_edit(asked["edit"]),
        **{name: asked[name] for name in ("intent", "engine", "baseline_engine", "edit_label", "cache", "noise_floor")},
    )


def _edit(given: Mapping[str, Any] | _Path | None) -> Mapping[str, Any] | None:
    """Return an edit's name and plan, read where a file holds them. Raises ConfigError for a name that nobody knows."""
    edit = load_edit_config(Path(given)).model_dump() if isinstance(given, str | os.PathLike) else given
    if edit is not None:
        registry.edits.entry(str(edit.get("name")))
    return edit


def _choose(**asked: tuple[object, tuple[str, ...]]) -> None:
    for name, (value, known) in asked.items():
        if value is not None and value not in known:
            raise ConfigError(f"{name} is {value!r}{nearest(str(value), known)}; expected {' or '.join(known)}")


@contextlib.contextmanager
def _output(folder: _Path | None) -> Iterator[list[str]]:
    """Hold the output folder, where there is one; yield what is to be said of it."""
    if folder is None:
        yield []
        return
    with claimed(Path(folder)) as moved:
        yield [] if moved is None else [f"the earlier certificate in {os.fspath(folder)} is now in {moved}"]


def request_from(config: RunSettings, *, profile: str, subject: str, **asked: Any) -> CertifyRequest:
    """Return the request that a preset and what was asked for besides make together; `asked` are fields of it."""
    if asked.get("baseline") is None and asked.get("baseline_report") is None:
        asked["baseline"] = config.model.id  # one preset serves run and certify; what is named besides wins
    return CertifyRequest(
        subject=subject,
        notes=config.notes,
        adapter=config.model.adapter,
        device=config.model.device,
        loading=Loading.of(config.model),
        profile=profile,
        tier=config.auto.tier,
        metric_kind=config.eval.metric_kind,
        dataset=dataset_options(config.dataset),
        overrides=config.policy_overrides(),
        guard_arguments={name: config.plugin_arguments(name) for name in config.guards.by_name},
        out=Path(config.output.dir),
        **asked,
    )
