"""Findings about the environment, a configuration and stored reports, before anything long is started.

Nothing here loads a model, and torch is imported only where it is installed. `CODES` is the whole list of findings.
"""

from __future__ import annotations

import importlib.util
import json
import os
import shutil
import sys
import tempfile
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import Any, Literal, NamedTuple

from invarlock.core import registry, settings
from invarlock.core.exceptions import ConfigError, InvarlockError
from invarlock.core.network import network_allowed
from invarlock.core.registry import nearest

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
    "D020": ("ERROR", "the configuration is wrong"),
    "D021": ("ERROR", "a file or folder that the configuration names is not there"),
    "D022": ("WARNING", "the network would be needed and is off"),
    "D023": ("ERROR", "what the configuration names cannot be loaded"),
    "D024": ("ERROR", "this machine lacks the device"),
    "D025": ("WARNING", "the sample is below the floor"),
    "D026": ("NOTE", "a value of the configuration has no effect"),
    "D030": ("ERROR", "a report cannot be read"),
    "D031": ("ERROR", "the reports were not measured on the same windows"),
}

_MINIMUM_PYTHON = (3, 11)
_MINIMUM = {"torch": ("2.6", "adapters"), "transformers": ("4.48", "adapters"), "datasets": ("3.0", "eval")}
_FREE_BYTES = 1_000_000_000
_WEAKENING = ("INVARLOCK_SKIP_OVERHEAD_CHECK", "INVARLOCK_TINY_RELAX", "INVARLOCK_PM_ACCEPTANCE_MAX")
_STRICT_BY_DEFAULT = ("INVARLOCK_EVAL_STRICT", "INVARLOCK_GUARD_PREPARE_STRICT")
_LOCAL_KEYS = ("file", "path", "data_files")
#: places in the evidence that both sides must share, and the error that a comparison would raise
_PAIRED = {
    "metric_kind": "E001",
    "data.seq_len": "E001",
    "model.tokenizer_digest": "E002",
    "preview.tokens": "E003",
    "final.tokens": "E003",
    "preview.window_ids": "E006",
    "final.window_ids": "E006",
    "data.digest": "E006",
}


class Request(NamedTuple):
    """What to look at besides the environment."""

    config: Path | None = None
    profile: str | None = None
    tier: str | None = None
    baseline_report: Path | None = None
    subject_report: Path | None = None


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
    checks: list[Callable[[Request], Iterator[Finding]]] = [
        _environment_variables,
        _libraries,
        _temporary_folder,
        _plugins,
        _configuration,
        _reports,
    ]
    found: list[Finding] = []
    for check in checks:
        try:
            found += check(request)
        except ConfigError as error:  # a malformed variable or profile also stops the checks that read it
            found.append(Finding("D020", str(error)))
    order = {"ERROR": 0, "WARNING": 1, "NOTE": 2}
    unique = {finding.message: finding for finding in reversed(found)}
    return sorted(reversed(unique.values()), key=lambda finding: (order[finding.level], finding.code))


def _environment_variables(request: Request) -> Iterator[Finding]:
    known = {setting.name: setting for setting in settings.SETTINGS}
    for name, text in sorted(os.environ.items()):
        if name in known:
            try:
                known[name].parse(text)
            except ConfigError as error:
                yield Finding("D006", str(error))
        elif name.startswith("INVARLOCK_"):
            yield Finding(
                "D007", f"environment variable {name} is not one of InvarLock's{nearest(name, known)}; unset it"
            )
    for name in _WEAKENING:
        if name in os.environ and settings.get(name):
            yield Finding("D008", f"{name} is set: it weakens or skips a check, and certificates record it")
    for name in _STRICT_BY_DEFAULT:
        if not settings.flag(name):
            yield Finding("D008", f"{name}=0 turns failures into warnings; unset it for results that others rely on")


def _libraries(request: Request) -> Iterator[Finding]:
    from packaging.version import Version

    if sys.version_info < _MINIMUM_PYTHON:
        yield Finding(
            "D001", f"Python is {sys.version.split()[0]}; expected {'.'.join(map(str, _MINIMUM_PYTHON))} or later"
        )
    for package, (minimum, extra) in _MINIMUM.items():
        try:
            version = metadata.version(package)
        except metadata.PackageNotFoundError:
            yield Finding("D002", f'{package} is not installed; to measure models: pip install "invarlock[{extra}]"')
            continue
        if Version(version) < Version(minimum):
            yield Finding(
                "D003", f'{package} is {version}; expected {minimum} or later: pip install -U "invarlock[{extra}]"'
            )
    if _has_torch() and not _accelerators():
        yield Finding("D004", "neither CUDA nor MPS is available; models are measured on the CPU")
    if request.config is None and not network_allowed():
        from invarlock.eval.data import Wikitext2Provider

        if not Wikitext2Provider.is_cached():
            yield Finding(
                "D005", "the network is off and wikitext2 is not cached; without a preset, python_docs stands in"
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
    except OSError as error:
        yield Finding("D009", f"temporary files cannot be written: {error}; set TMPDIR to a folder that can")
        return
    if free < _FREE_BYTES:
        yield Finding(
            "D009", f"{folder} has {free / 1e9:.1f} GB free; snapshots need more: set TMPDIR to a larger disk"
        )


def _plugins(request: Request) -> Iterator[Finding]:
    from invarlock.core.inventory import inventory

    for status in inventory():
        if status.state in ("broken", "shadowed"):
            yield Finding("D010", f"{status.entry.kind} {status.entry.name!r}: {status.reason}; {status.hint}")


def _configuration(request: Request) -> Iterator[Finding]:
    from invarlock.policy.resolve import resolve_policy

    if request.config is None:
        if request.profile or request.tier:
            resolve_policy(request.tier or "balanced", request.profile or "ci")
        return
    from invarlock.policy.config import load_config

    overrides = {"auto.tier": request.tier}
    resolved = load_config(request.config, cli_overrides=overrides, profile=request.profile, require_model=False)
    for note in resolved.notes:
        yield Finding("D026", note)
    yield from _names(resolved)
    yield from _places(resolved)
    yield from _device(resolved)
    profile = request.profile or "ci"
    packaged = resolve_policy(resolved.auto.tier, profile).values
    values = resolve_policy(resolved.auto.tier, profile, overrides=resolved.policy_overrides()).values
    yield from _sample(resolved, values["sample"], packaged["sample"])
    order = values["guards"]["order"]
    for name in resolved.guards.by_name:
        if name not in order:
            yield Finding("D026", f"guards.{name} has no effect: {name!r} does not stand in guards.order")


def _names(resolved: Any) -> Iterator[Finding]:
    wanted = [registry.adapters.entry(resolved.model.adapter)]
    if resolved.edit.name:
        wanted.append(registry.edits.entry(resolved.edit.name))
    if resolved.dataset.provider_name:
        wanted.append(registry.providers.entry(resolved.dataset.provider_name))
    wanted += [registry.guards.entry(name) for name in dict.fromkeys(resolved.guards.order or ())]
    for entry in wanted:
        if entry.origin == "Core" and entry.missing_extra() is None:
            continue
        try:
            entry.load()
        except InvarlockError as error:
            yield Finding("D023", str(error))


def _places(resolved: Any) -> Iterator[Finding]:
    identifier = resolved.model.id
    if identifier is not None and not Path(identifier).exists():
        if identifier.startswith((".", "/", "~")):
            yield Finding("D021", f"model.id {identifier!r} does not exist; expected a folder, or a hub id")
        elif not network_allowed() and not _is_cached(identifier):
            yield Finding(
                "D022", f"model.id {identifier!r} is neither a folder nor cached; set INVARLOCK_ALLOW_NETWORK=1"
            )
    options = resolved.dataset.provider_options
    for key in _LOCAL_KEYS:
        value = options.get(key)
        if isinstance(value, str) and not any(c in value for c in "*?[") and not Path(value).exists():
            yield Finding("D021", f"dataset.{key} {value!r} does not exist; expected a file")
    if resolved.dataset.provider_name == "wikitext2" and not network_allowed():
        from invarlock.eval.data import Wikitext2Provider

        if not Wikitext2Provider.is_cached():
            yield Finding("D022", "wikitext2 is not cached; set INVARLOCK_ALLOW_NETWORK=1, or use python_docs")


def _is_cached(identifier: str) -> bool:
    home = Path(os.environ.get("HF_HOME") or Path.home() / ".cache" / "huggingface")
    hub = Path(os.environ.get("HF_HUB_CACHE") or home / "hub")
    return (hub / f"models--{identifier.replace('/', '--')}" / "snapshots").is_dir()


def _device(resolved: Any) -> Iterator[Finding]:
    device = str(settings.get("INVARLOCK_EVAL_DEVICE") or resolved.model.device)
    kind = device.partition(":")[0]
    if kind in ("cuda", "mps") and _has_torch() and kind not in _accelerators():
        yield Finding("D024", f"model.device is {device!r}, which this machine does not have; use auto or cpu")


def _sample(resolved: Any, sample: Mapping[str, Any], packaged: Mapping[str, Any]) -> Iterator[Finding]:
    for key, part in (("preview_n", "preview"), ("final_n", "final")):
        if sample[part] < packaged[part]:
            yield Finding("D025", f"dataset.{key} is {sample[part]}; tier and profile ask for {packaged[part]} or more")
    windows, length = sample["preview"] + sample["final"], resolved.dataset.seq_len
    if length is not None and windows * length < sample["min_tokens"]:
        yield Finding(
            "D025",
            f"{windows} windows of at most {length} tokens give fewer than the {sample['min_tokens']} tokens asked for; "
            "raise dataset.preview_n and dataset.final_n, or dataset.seq_len",
        )


def _reports(request: Request) -> Iterator[Finding]:
    sides: dict[str, dict[str, Any]] = {}
    for name, path in (("baseline", request.baseline_report), ("subject", request.subject_report)):
        if path is None:
            continue
        try:
            sides[name] = _evidence(path)
        except (OSError, ValueError) as error:
            yield Finding("D030", f"the {name} report {path} cannot be used: {error}")
    if len(sides) < 2:
        return
    for place, code in _PAIRED.items():
        values = [_at(side, place) for side in sides.values()]
        if None in values or values[0] != values[1]:
            shown = [f"{len(value)} entries" if isinstance(value, list) else repr(value) for value in values]
            yield Finding("D031", f"{place} differs ({shown[0]} and {shown[1]}): a comparison would stop with {code}")


def _evidence(path: Path) -> dict[str, Any]:
    """Return the evidence in a report.json or in the run folder that holds one. Raises ValueError with the reason."""
    file = path / "report.json" if path.is_dir() else path
    data = json.loads(file.read_text(encoding="utf-8"))
    if not isinstance(data, dict):
        raise ValueError("it holds no JSON object; expected a report.json")
    if data.get("status") == "failed":
        raise ValueError(f"its run failed: {data.get('error')}")
    evidence = data.get("evidence")
    if not isinstance(evidence, dict) or not evidence:
        raise ValueError("it holds no evidence; expected the report of a run with calibration data")
    return evidence


def _at(value: Any, place: str) -> Any:
    for part in place.split("."):
        value = value.get(part) if isinstance(value, Mapping) else None
    return value
