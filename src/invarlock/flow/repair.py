"""A subject mended: the fewest tensors given back in the baseline's precision so that it passes, as a checkpoint.

1. choose: order the changed tensors by expected damage a byte, find the shortest beginning of that order that passes so
   well on the windows of the search that it should on others too, then take out what is not needed
2. write: the subject's files with those tensors dense and the configuration's list of what is not quantized; the same
   list for the tools that quantize
3. certify: again, on windows that chose nothing
"""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any

from invarlock.checkpoints.base import readers
from invarlock.checkpoints.behaviour import load_config
from invarlock.checkpoints.files import format_of, open_checkpoint
from invarlock.checkpoints.headers import open_tensors
from invarlock.checkpoints.packed import PackedFolder
from invarlock.checkpoints.shards import SafetensorsFolder
from invarlock.checkpoints.structure import Layout, layout_of, stored_names
from invarlock.core.exceptions import EditError, ModelLoadError
from invarlock.core.files import plain, read_json, write_json, write_whole
from invarlock.flow import steps
from invarlock.flow.bisect import Bisection, BisectRequest, Search
from invarlock.flow.certify import CertifyOutcome, CertifyRequest, certify
from invarlock.flow.damage import Changed, Damage, Trials
from invarlock.flow.job import Tick, open_job, resolved_metric
from invarlock.flow.measure import measure
from invarlock.flow.run_folder import require_free, staged_folder
from invarlock.policy.resolve import resolve_policy

__all__ = ["Repair", "choose", "ignore_lists", "repair", "write_repaired"]

_REMOVALS = 24
_ROUNDS = 3  # of writing and certifying, where the certificate names a tensor that was not given back
_INDEX = "model.safetensors.index.json"
_WEIGHTS = (".safetensors", ".bin")
_WRITTEN = ("safetensors", "packed", "pickled")  # formats of a subject that can be written
_RECIPE = "not_quantized.json"
_PLAIN = json.dumps({"_type": "Tensor"})  # what torchao's metadata say of a tensor that is not packed
#: `quant_method` -> the key of its configuration that lists modules that stay dense
_IGNORES = {
    "compressed-tensors": "ignore", "awq": "modules_to_not_convert", "bitsandbytes": "llm_int8_skip_modules",
    "fp8": "modules_to_not_convert", "fbgemm_fp8": "modules_to_not_convert", "torchao": "modules_to_not_convert",
    "mxfp4": "modules_to_not_convert",
}  # fmt: skip


@dataclass
class Repair:
    """What was chosen. `everything` says that nothing short of all changed tensors was enough."""

    names: list[str]
    left: Damage | None
    changed: int
    out: Path | None = None
    bytes: dict[str, int] = field(default_factory=dict)
    ignore: dict[str, Any] = field(default_factory=dict)
    verdict: str | None = None
    report: Path | None = None

    @property
    def everything(self) -> bool:
        """Say whether all changed tensors would have to be given back."""
        return len(self.names) >= self.changed

    @property
    def lines(self) -> list[str]:
        """Return it in words."""
        if self.everything:
            return [f"no repair: nothing short of giving back all {self.changed} changed tensors makes it pass"]
        size = {key: f"{value / 2**20:.1f} MB" for key, value in self.bytes.items()}
        named = ", ".join(self.names[:4]) + (f" and {len(self.names) - 4} more" if len(self.names) > 4 else "")
        if self.out is not None and not size:
            return [
                f"it should pass with {len(self.names)} of {self.changed} changed tensors left as they were: {named}",
                f"a checkpoint of this format is not written here: {self.out / _RECIPE} lists what not to quantize, by tool; "
                "quantize again, and certify",
            ]
        lines = [f"repaired with {len(self.names)} of {self.changed} changed tensors given back: {named}"]
        if size:
            lines.append(f"size {size['repaired']} (subject {size['subject']}, baseline {size['baseline']})")
        if self.out is not None:
            lines.append(f"written to {self.out}; {_RECIPE} there lists what not to quantize, by tool")
        if self.verdict is not None:
            lines.append(f"certified again on other windows: {self.verdict}")
        return lines

    def to_dict(self) -> dict[str, Any]:
        """Return it as plain data."""
        kept = ("names", "changed", "everything", "bytes", "ignore", "verdict", "lines")
        found: dict[str, Any] = plain({key: getattr(self, key) for key in kept})
        return {**found, "out": self.out and str(self.out), "left": self.left and self.left.to_dict()}


def choose(search: Search, found: Bisection) -> Repair:
    """Choose the tensors: greedily by damage a byte, then without those that prove needless."""
    trials = Trials(search.job, search.baseline, search.subject, search.windows.preview)
    order = sorted(found.ranking, key=lambda change: -_worth(found, change))
    names = [change.name for change in order]

    def passes(chosen: Sequence[str]) -> bool:
        search.job.tick("choosing what to give back", trials.count, 0)
        return trials.damage(chosen).passes_again

    below, above = 0, len(names)
    while above - below > 1:
        middle = (below + above) // 2
        below, above = (below, middle) if passes(names[:middle]) else (middle, above)
    chosen = names[:above]
    if len(chosen) < len(names):
        sizes = {change.name: change.bytes for change in found.ranking}
        for name in sorted(chosen, key=lambda name: -sizes[name])[:_REMOVALS]:
            if search.late():
                break
            without = [other for other in chosen if other != name]
            if without and passes(without):
                chosen = without
    return Repair(chosen, trials.damage(chosen), found.changed)


def _worth(found: Bisection, change: Changed) -> float:
    recovered = found.recovered(change.name)
    expected = change.expected if change.expected == change.expected else 0.0
    return max(expected, recovered or 0.0) / max(change.bytes, 1)


def repair(
    request: BisectRequest, search: Search, found: Bisection, out: Path, runs: Path, tick: Tick | None = None
) -> tuple[Repair, CertifyOutcome | None]:
    """Choose, write and certify. The models of the search are let go before the certification loads its own."""
    require_free(out)
    made = choose(search, found)
    if made.everything:
        return made, None
    folders = [side.folder for side in search.sides]
    if folders[0] is None or folders[1] is None:
        raise EditError("a repaired checkpoint can be written only where both sides are folders of weights")
    layout = layout_of(load_config(folders[0]), search.job.adapter.auto_class)  # type: ignore[attr-defined]  # read as files
    if format_of(folders[1]) not in _WRITTEN:
        made.ignore, made.out = ignore_lists(stored_names(search.baseline, made.names), folders[0]), out
        with staged_folder(out) as staging:
            write_json(staging / _RECIPE, made.ignore)
        return made, None
    sizes = (("repaired", out), ("subject", folders[1]), ("baseline", folders[0]))
    for left in reversed(range(_ROUNDS)):
        stored = stored_names(search.baseline, made.names)
        made.ignore = ignore_lists(stored, folders[0])
        write_repaired(folders[1], folders[0], set(stored), layout, out, made.ignore)
        made.out = out
        made.bytes = {what: _size(folder) for what, folder in sizes}
        outcome = _certified(request, search, out, runs, tick)
        made.verdict, made.report = outcome.status, outcome.edited_report
        named = _still_named(outcome, found, made.names)
        if not named or not left:
            break
        made.names += named
        shutil.rmtree(out)
    return made, outcome


def _size(folder: Path) -> int:
    return sum(path.stat().st_size for path in folder.iterdir() if path.suffix in _WEIGHTS)


def _still_named(outcome: CertifyOutcome, found: Bisection, given_back: Sequence[str]) -> list[str]:
    """Return the changed tensors that a FAIL names for what they hold: no text shows a column of zeros for certain."""
    reasons = outcome.certificate["verdict"]["reasons"] if outcome.status == "FAIL" else ()
    named = {str(reason.get("tensor")).partition("[")[0] for reason in reasons}  # of a stack one matrix is named
    return [change.name for change in found.ranking if change.name in named and change.name not in given_back]


def _certified(request: BisectRequest, search: Search, out: Path, runs: Path, tick: Tick | None) -> CertifyOutcome:
    """Certify the repaired checkpoint on the windows that were held back."""
    held = search.windows.final
    half = len(held) // 2
    windows = replace(search.windows, preview=held[:half], final=held[half:], requested=(half, len(held) - half))
    sample = {"sample": {"preview": len(windows.preview), "final": len(windows.final)}}
    overrides = {**request.overrides, **sample}
    policy = resolve_policy(request.tier, "dev", overrides=overrides)
    guards = steps.create_guards(tuple(dict.fromkeys(policy.values["guards"]["order"])), {})
    job = open_job(policy, request.adapter, request.device, guards, tick, loading=request.loading)
    side = steps.read(job, request.baseline)
    job.metric, job.windows = resolved_metric("auto", job.adapter), windows
    measured = measure(job, search.baseline, side, "the baseline")
    report = steps.report(job, measured, steps.NOOP, f"source-{job.stamp}").to_dict()
    path = steps.write_measured(report, measured.reference, runs / "source" / job.stamp)
    again = CertifyRequest(
        subject=str(out), baseline_report=path, adapter=request.adapter, device=request.device, loading=request.loading,
        profile="dev", tier=request.tier, overrides=overrides, out=runs,
    )  # fmt: skip
    return certify(again, tick)


def write_repaired(
    subject: Path, baseline: Path, names: set[str], layout: Layout | None, out: Path, ignore: Mapping[str, Any]
) -> None:
    """Write the subject's checkpoint with the baseline's values of `names`, whole or not at all. Raises EditError where the
    files of both do not hold one of them."""
    from safetensors.torch import save_file

    known = layout.canonical if layout is not None else str
    given = {known(stored): (stored, read) for stored, read in readers(open_checkpoint(baseline)).items()}
    alias = layout.alias if layout is not None else {}
    own = {known(name) for name in names}
    wanted = own | {other for other, name in alias.items() if name in own}
    with staged_folder(out) as staging:
        for path in subject.iterdir():
            if path.is_file() and path.suffix not in _WEIGHTS and not path.name.endswith(".index.json"):
                shutil.copyfile(path, staging / path.name)
        dense = _dense_names(subject, known)
        where: dict[str, str] = {}
        done: set[str] = set()
        for file, told, stored in _files(subject, alias):
            kept = _rewritten(stored, wanted, dense, known, given, done)
            where |= dict.fromkeys(kept, file)
            plain_now = dict.fromkeys((name for name in kept if name in told and name not in stored), _PLAIN)
            save_file(kept, staging / file, metadata={"format": "pt", **told, **plain_now})
        if lost := sorted(own - done - {alias.get(name, name) for name in done}):
            raise EditError(
                f"{lost[0]} stands in the files of the two under other names ({len(lost)} of {len(own)} tensors), and cannot "
                "be given back; save both with one version of the library"
            )
        if len(set(where.values())) > 1:
            write_json(staging / _INDEX, {"metadata": {}, "weight_map": where})
        _list_ignored(staging / "config.json", ignore)
        write_json(staging / _RECIPE, ignore)


def _dense_names(subject: Path, known: Callable[[str], str]) -> dict[str, str]:
    """Map every stored tensor of a packed weight to the weight's own name; {} for a folder of plain weights."""
    if not PackedFolder.recognises(subject):
        return {}
    return {part: known(name) for part, name in PackedFolder(subject, None).parts().items()}


def _files(
    subject: Path, alias: Mapping[str, str]
) -> Iterator[tuple[str, Mapping[str, str], Mapping[str, Callable[[], Any]]]]:
    """Yield what each file is to be called, its metadata and how its tensors are read; pickled ones become one file of
    safetensors, in which a tensor that is tied to another does not stand twice."""
    if not SafetensorsFolder.recognises(subject):
        every = readers(open_checkpoint(subject))
        tied = {name for name, other in alias.items() if name in every and other in every}
        twice = {name for name in tied if every[name]().equal(every[alias[name]]())}
        yield "model.safetensors", {}, {name: read for name, read in every.items() if name not in twice}
        return
    for file in SafetensorsFolder(subject, None).files():
        with open_tensors(file) as stored:
            tensors = {name: partial(stored.get_tensor, name) for name in stored.keys()}  # noqa: SIM118
            yield file.name, stored.metadata() or {}, tensors


def _rewritten(
    stored: Mapping[str, Callable[[], Any]],
    wanted: set[str],
    dense: Mapping[str, str],
    known: Callable[[str], str],
    given: Mapping[str, tuple[str, Callable[[], Any]]],
    done: set[str],
) -> dict[str, Any]:
    """Return the tensors of one file, those given back in the baseline's values; parts of a packed one make room for it.
    The names of those are added to `done`."""
    kept: dict[str, Any] = {}
    for name, read in stored.items():
        own = dense.get(name) or known(name)
        source = given.get(own)
        if own not in wanted or source is None:
            kept[name] = read().clone()
        else:
            kept[source[0] if name in dense else name] = source[1]().clone()
            done.add(own)
    return kept


def _list_ignored(path: Path, ignore: Mapping[str, Any]) -> None:
    """Add the modules that are dense now to the list of the configuration's own quantizer."""
    config = read_json(path, "a model's configuration", ModelLoadError, "checkpoint")
    settings = config.get("quantization_config")
    if not settings or not ignore:
        return
    method = str(settings.get("quant_method"))
    if method in ("gptq", "auto-round"):
        key = "dynamic" if method == "gptq" else "extra_config"
        settings[key] = {**(settings.get(key) or {}), **ignore["GPTQModel" if method == "gptq" else "auto-round"][key]}
    elif method in _IGNORES:
        key = _IGNORES[method]
        settings[key] = list(dict.fromkeys([*(settings.get(key) or []), *ignore["modules"]]))
    write_whole(path, json.dumps(config, indent=2) + "\n")


def ignore_lists(names: Sequence[str], baseline: Path) -> dict[str, Any]:
    """Return what not to quantize in the form that each tool takes."""
    modules = [name.removesuffix(".weight") for name in names]
    lists: dict[str, Any] = {
        "modules": modules,
        "llm-compressor": {"ignore": modules},
        "GPTQModel": {"dynamic": {f"-:^{re.escape(module)}$": {} for module in modules}},
        "auto-round": {"extra_config": {module: {"bits": 16, "data_type": "float"} for module in modules}},
    }
    types = _gguf_names(modules, baseline)
    if types:
        lists["llama-quantize"] = [f"--tensor-type {re.escape(name)}=f16" for name in types]
    return lists


def _gguf_names(modules: Sequence[str], baseline: Path) -> list[str]:
    """Return the names that llama.cpp has for these modules; [] without the gguf package or for another architecture."""
    try:
        from gguf import MODEL_ARCH_NAMES, get_tensor_name_map
    except ImportError:
        return []
    config = read_json(baseline / "config.json", "a model's configuration", ModelLoadError, "checkpoint")
    arch = next((key for key, name in MODEL_ARCH_NAMES.items() if name == config.get("model_type")), None)
    layers = config.get("num_hidden_layers") or config.get("n_layer") or 0
    if arch is None:
        return []
    table = get_tensor_name_map(arch, layers)
    found = [table.get_name(module, try_suffixes=(".weight",)) for module in modules]
    return [name for name in found if name]
