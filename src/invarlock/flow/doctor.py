"""Findings about the environment, a configuration and stored reports, before anything long is started.

Nothing here loads a model, and torch is imported only where it is installed. `CODES` is the whole list of findings.
"""

from __future__ import annotations

import importlib.util
import os
import platform
import shutil
import sys
import tempfile
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from importlib import metadata
from itertools import starmap
from pathlib import Path
from typing import Any, Literal, NamedTuple, get_args

from packaging.version import Version

from invarlock.core import registry, settings
from invarlock.core.exceptions import ConfigError, DependencyError, InvarlockError
from invarlock.core.files import home, read_json
from invarlock.core.inventory import inventory
from invarlock.core.leftovers import find_leftovers
from invarlock.core.network import network_allowed
from invarlock.core.registry import nearest
from invarlock.eval.data import Wikitext2Provider
from invarlock.flow.certify import CertifyRequest
from invarlock.flow.rehearsal import rehearse
from invarlock.flow.run_folder import REPORT
from invarlock.policy.config import RunSettings, load_config
from invarlock.policy.limits import Sample
from invarlock.policy.resolve import resolve_policy

__all__ = ["CODES", "Finding", "Level", "Request", "examine"]

Level = Literal["ERROR", "WARNING", "NOTE"]

#: code → level and what it is about
CODES: dict[str, tuple[Level, str]] = {
    "D001": ("ERROR", "Python is older than supported"),
    "D002": ("NOTE", "an extra is not installed"),
    "D003": ("ERROR", "an installed library is older than supported"),
    "D004": ("NOTE", "no accelerator"),
    "D005": ("NOTE", "which evaluation text stands in where none is named"),
    "D006": ("ERROR", "an environment variable has a value that cannot be read"),
    "D007": ("WARNING", "an environment variable of ours that does not exist"),
    "D008": ("WARNING", "an environment variable weakens or skips a check"),
    "D009": ("ERROR", "the temporary folder cannot be written, or is nearly full"),
    "D010": ("WARNING", "a plugin is broken, or two claim one name"),
    "D011": ("NOTE", "a killed run left files behind"),
    "D020": ("ERROR", "the configuration is wrong"),
    "D021": ("ERROR", "a file or folder that the configuration names is not there"),
    "D022": ("WARNING", "the network would be needed and is off"),
    "D023": ("ERROR", "what the configuration names cannot be loaded"),
    "D024": ("ERROR", "this machine lacks the device"),
    "D025": ("WARNING", "the sample is below the floor"),
    "D026": ("NOTE", "a value of the configuration has no effect"),
    "D030": ("ERROR", "a report cannot be read"),
    "D031": ("ERROR", "the reports were not measured on the same windows"),
    "D040": ("ERROR", "a checkpoint cannot be read"),
    "D041": ("NOTE", "what a checkpoint is"),
    "D042": ("ERROR", "the two checkpoints cannot be compared as they are"),
    "D043": ("ERROR", "the text does not serve"),
    "D044": ("NOTE", "how much text there is, and how much is asked for"),
    "D045": ("WARNING", "memory or disk may not be enough"),
    "D046": ("NOTE", "how much memory and disk it takes"),
    "D047": ("ERROR", "a folder that is written to cannot be"),
    "D048": ("ERROR", "a served engine does not answer"),
    "D049": ("NOTE", "a served engine answers"),
}

_MINIMUM_PYTHON = "3.11"
_MINIMUM = {"torch": ("2.6", "adapters"), "transformers": ("4.48", "adapters"), "datasets": ("3.0", "eval")}
_FREE_BYTES = 1_000_000_000
_WEAKENING = ("INVARLOCK_SKIP_OVERHEAD_CHECK", "INVARLOCK_TINY_RELAX", "INVARLOCK_PM_ACCEPTANCE_MAX")
_STRICT_BY_DEFAULT = ("INVARLOCK_EVAL_STRICT", "INVARLOCK_GUARD_PREPARE_STRICT")
_LOCAL_KEYS = ("file", "path", "data_files")
#: the error that a comparison would raise, and places in the evidence that both sides must share
_PAIRED = {
    "E001": ("metric_kind", "data.seq_len"),
    "E002": ("model.tokenizer_digest",),
    "E003": ("preview.tokens", "final.tokens"),
    "E006": ("preview.window_ids", "final.window_ids", "data.digest"),
}


class Request(NamedTuple):
    """What to look at besides the environment."""

    config: Path | None = None
    profile: str | None = None
    tier: str | None = None
    baseline_report: Path | None = None
    subject_report: Path | None = None
    certification: Callable[[], CertifyRequest] | None = None  # what `certify` is to be asked for
    output: Path | None = None  # folder of its certificate


@dataclass(frozen=True)
class Finding:
    """One finding: a code of `CODES`, and what was found and to be done, in one line."""

    code: str
    message: str

    @property
    def level(self) -> Level:
        """How grave it is."""
        return CODES[self.code][0]

    def line(self) -> str:
        """Return `LEVEL: [INVARLOCK:Dnnn] message`."""
        return f"{self.level}: [INVARLOCK:{self.code}] {self.message}"


def examine(request: Request) -> list[Finding]:
    """Run every check and return what was found, gravest first; an empty list means that nothing is remarkable."""
    found: list[Finding] = []
    for check in (
        _environment_variables,
        _libraries,
        _temporary_folder,
        _leftovers,
        _plugins,
        _configuration,
        _reports,
        _certification,
    ):
        try:
            found += check(request)
        except ConfigError as error:  # a malformed variable or profile also stops the checks that read it
            found.append(Finding("D020", str(error)))
    unique = {finding.message: finding for finding in reversed(found)}
    levels = get_args(Level)
    return sorted(reversed(unique.values()), key=lambda finding: (levels.index(finding.level), finding.code))


def _environment_variables(request: Request) -> Iterator[Finding]:
    known = {setting.name: setting for setting in settings.SETTINGS}
    for name, text in sorted(os.environ.items()):
        if name in known:
            try:
                known[name].parse(text)
            except ConfigError as error:
                yield Finding("D006", str(error))
        elif name.startswith("INVARLOCK_"):
            yield Finding("D007", f"{name} is no variable of InvarLock's{nearest(name, known)}; unset it")
    for name in _WEAKENING:
        if name in os.environ and settings.get(name):
            yield Finding("D008", f"{name} is set: it weakens or skips a check, and certificates record it")
    for name in _STRICT_BY_DEFAULT:
        if not settings.flag(name):
            yield Finding("D008", f"{name}=0 turns failures into warnings; unset it for results that others rely on")


def _libraries(request: Request) -> Iterator[Finding]:
    if Version(platform.python_version()) < Version(_MINIMUM_PYTHON):
        yield Finding("D001", f"Python is {platform.python_version()}; expected {_MINIMUM_PYTHON} or later")
    for package, (minimum, extra) in _MINIMUM.items():
        try:
            version, install = metadata.version(package), f'"invarlock[{extra}]"'
        except metadata.PackageNotFoundError:
            yield Finding("D002", f'{package} is not installed; to measure models: pip install "invarlock[{extra}]"')
            continue
        if Version(version) < Version(minimum):
            yield Finding("D003", f"{package} is {version}; expected {minimum} or later: pip install -U {install}")
    if _has_torch() and not _accelerators():
        yield Finding("D004", "neither CUDA nor MPS is available; models are measured on the CPU")
    if request.config is None and not (network_allowed() or Wikitext2Provider.is_cached()):
        yield Finding(
            "D005",
            "the network is off, wikitext2 is not cached: without a preset, python_docs and python_code stand in",
        )


def _has_torch() -> bool:
    return sys.modules.get("torch") is not None or importlib.util.find_spec("torch") is not None


def _accelerators() -> list[str]:
    import torch

    return [name for name, backend in (("cuda", torch.cuda), ("mps", torch.backends.mps)) if backend.is_available()]


def _temporary_folder(request: Request) -> Iterator[Finding]:
    try:
        folder = tempfile.gettempdir()
        with tempfile.TemporaryFile():
            free = shutil.disk_usage(folder).free
        if free < _FREE_BYTES:
            raise OSError(f"{folder} has {free / 1e9:.1f} GB free, and snapshots need more")
    except OSError as error:
        yield Finding("D009", f"temporary files have no place: {error}; set TMPDIR to a folder on a larger disk")


def _leftovers(request: Request) -> Iterator[Finding]:
    found = [*find_leftovers(Path(tempfile.gettempdir()), depth=1), *find_leftovers(Path("runs"))]
    for path in found:
        yield Finding("D011", f"{path} is left of a run that was killed; the next run under the same folder removes it")


def _plugins(request: Request) -> Iterator[Finding]:
    for status in inventory():
        if status.state in ("broken", "shadowed"):
            yield Finding("D010", f"{status.entry.kind} {status.entry.name!r}: {status.reason}; {status.hint}")


def _configuration(request: Request) -> Iterator[Finding]:
    profile = request.profile or "ci"
    if request.config is None:
        resolve_policy(request.tier or "balanced", profile)
        return
    overrides = {"auto.tier": request.tier}
    resolved = load_config(request.config, cli_overrides=overrides, profile=request.profile, require_model=False)
    yield from (Finding("D026", note) for note in resolved.notes)
    yield from _names(resolved)
    yield from _places(resolved)
    device = str(settings.get("INVARLOCK_EVAL_DEVICE") or resolved.model.device)
    kind = device.partition(":")[0]
    if kind in ("cuda", "mps") and _has_torch() and kind not in _accelerators():
        yield Finding("D024", f"model.device is {device!r}, which this machine does not have; use auto or cpu")
    limits = resolve_policy(resolved.auto.tier, profile, overrides=resolved.policy_overrides()).limits
    yield from _sample(resolved, limits.sample, resolve_policy(resolved.auto.tier, profile).limits.sample)
    for name in resolved.guards.by_name:
        if name not in limits.order:
            yield Finding("D026", f"guards.{name} has no effect: {name!r} does not stand in guards.order")


def _names(resolved: RunSettings) -> Iterator[Finding]:
    wanted = [(registry.guards, name) for name in dict.fromkeys(resolved.guards.order or ())]
    wanted += [(registry.adapters, resolved.model.adapter), (registry.edits, resolved.edit.name or "")]
    wanted += [(registry.providers, resolved.dataset.provider_name or "")]
    for entry in [names.entry(name) for names, name in wanted if name]:
        if entry.origin != "Core" or entry.missing_extra() is not None:
            try:
                entry.load()
            except InvarlockError as error:
                yield Finding("D023", str(error))


def _places(resolved: RunSettings) -> Iterator[Finding]:
    identifier, dataset = resolved.model.id, resolved.dataset
    if identifier is not None and not os.path.exists(identifier):
        if identifier.startswith((".", "/", "~")):
            yield Finding("D021", f"model.id {identifier!r} does not exist; expected a folder, or a hub id")
        elif not network_allowed() and not _is_cached(identifier):
            yield Finding("D022", f"model.id {identifier!r} is no folder and not cached; set INVARLOCK_ALLOW_NETWORK=1")
    for key in _LOCAL_KEYS:
        value = dataset.provider_options.get(key)
        if isinstance(value, str) and not any(c in value for c in "*?[") and not os.path.exists(value):
            yield Finding("D021", f"dataset.{key} {value!r} does not exist; expected a file")
    if dataset.provider_name == "wikitext2" and not (network_allowed() or Wikitext2Provider.is_cached()):
        yield Finding("D022", "wikitext2 is not cached; set INVARLOCK_ALLOW_NETWORK=1, or use python_docs")


def _is_cached(identifier: str) -> bool:
    own = Path(os.environ.get("HF_HOME") or home() / ".cache" / "huggingface")
    hub = Path(os.environ.get("HF_HUB_CACHE") or own / "hub")
    return os.path.isdir(hub / f"models--{identifier.replace('/', '--')}" / "snapshots")


def _sample(resolved: RunSettings, sample: Sample, packaged: Sample) -> Iterator[Finding]:
    for part in ("preview", "final"):
        asked, floor = getattr(sample, part), getattr(packaged, part)
        if asked < floor:
            yield Finding("D025", f"dataset.{part}_n is {asked}; tier and profile ask for {floor} or more")
    windows, length = sample.preview + sample.final, resolved.dataset.seq_len
    if length is not None and windows * length < sample.min_tokens:
        few = f"{windows} windows of at most {length} tokens give fewer than the {sample.min_tokens} tokens asked for"
        yield Finding("D025", f"{few}; raise dataset.preview_n and dataset.final_n, or dataset.seq_len")


def _reports(request: Request) -> Iterator[Finding]:
    sides: list[dict[str, Any]] = []
    for name, path in (("baseline", request.baseline_report), ("subject", request.subject_report)):
        try:
            sides += [_evidence(path)] if path is not None else []
        except (InvarlockError, ValueError) as error:
            yield Finding("D030", f"the {name} report {path} cannot be used: {error}")
    pairs = [(place, code) for code, places in _PAIRED.items() for place in places]
    for place, code in pairs if len(sides) == 2 else ():
        old, new = (_at(side, place) for side in sides)
        if old is None or old != new:
            shown = " and ".join(f"{len(v)} entries" if isinstance(v, list) else repr(v) for v in (old, new))
            yield Finding("D031", f"{place} differs ({shown}): a comparison would stop with {code}")


def _evidence(path: Path) -> dict[str, Any]:
    """Return the evidence in a report.json or in the run folder that holds one. Raises ValueError with the reason."""
    file = path / REPORT if os.path.isdir(path) else path
    data = read_json(file, "a report.json")
    if not isinstance(data, dict):
        raise ValueError("it holds no JSON object; expected a report.json")
    if data.get("status") == "failed":
        raise ValueError(f"its run failed: {data.get('error')}")
    evidence = data.get("evidence")
    if not isinstance(evidence, dict) or not evidence:
        raise ValueError("it holds no evidence; expected the report of a run with calibration data")
    return evidence


def _certification(request: Request) -> Iterator[Finding]:
    if request.certification is None:
        return
    if not _has_torch():
        yield Finding("D023", str(DependencyError("measuring models", "hf")))
        return
    yield from starmap(Finding, rehearse(request.certification(), request.output))


def _at(value: Any, place: str) -> Any:
    for part in place.split("."):
        value = value.get(part) if isinstance(value, Mapping) else None
    return value
