"""A certification rehearsed: all that can be looked at before anything is measured, each as a finding of the doctor.

No tensor is read and no model is built with weights. The steps and their errors are those of `certify` itself.
"""

from __future__ import annotations

import math
import os
import shutil
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

from invarlock.checkpoints import lora
from invarlock.checkpoints.behaviour import load_config
from invarlock.checkpoints.files import FORMATS, open_checkpoint
from invarlock.checkpoints.headers import check_header
from invarlock.checkpoints.shards import SafetensorsFolder
from invarlock.checkpoints.side import Side, read_side
from invarlock.checkpoints.structure import layout_of
from invarlock.core.exceptions import ConfigError, DependencyError, InvarlockError
from invarlock.core.files import cache_folder
from invarlock.eval.sources.engines import Engine
from invarlock.evidence.windows import Windows
from invarlock.flow import steps
from invarlock.flow.certify import CertifyRequest, Source, encode_both, open_request
from invarlock.flow.job import Job, resolved_metric
from invarlock.flow.run_folder import require_writable
from invarlock.flow.sampling import check_same_data, cut_windows, reuse_windows

__all__ = ["rehearse"]

_Told = tuple[str, str]  # code of the finding, and what was found
_WEIGHTS = ("*.safetensors", "pytorch_model*.bin", "*.gguf")
_BYTES_A_TOKEN = 170  # of the baseline's distributions, once for the run and once for the cache
_REPORTS = 50_000_000  # what else a run writes
_IMPORTS = 800_000_000  # the libraries themselves
_REBUILT = ("restructure", "engine")


@dataclass
class _Rehearsal:
    """What is known so far."""

    request: CertifyRequest
    job: Job
    sides: dict[str, Side] = field(default_factory=dict)
    kinds: dict[str, str] = field(default_factory=dict)  # architecture, by side
    memory: float = 0.0  # bytes that the larger model takes
    disk: dict[Path, float] = field(default_factory=dict)  # bytes that are written below a folder
    windows: Windows | None = None


def rehearse(request: CertifyRequest, output: Path | None) -> Iterator[_Told]:
    """Look at a certification as far as that goes without measuring. `output`: folder of the certificate. A request without
    a subject is rehearsed for its baseline and its text. Raises ConfigError where nothing can be resolved."""
    for folder, what, how in ((request.out, "runs", "--out"), (output, "the certificate", "--cert-out")):
        try:
            if folder is not None:
                require_writable(folder, what, how)
        except ConfigError as error:
            yield "D047", str(error)
    try:
        found = _Rehearsal(request, open_request(request))
    except DependencyError as error:
        yield "D023", str(error)
        return
    yield from _side(found, "baseline", request.baseline, request.baseline_engine)
    if request.subject:
        yield from _side(found, "subject", request.subject, request.engine)
    yield from _text(found)
    yield from _pair(found)
    yield from _engines(found)
    yield from _room(found)


def _side(found: _Rehearsal, name: str, model: str | None, engine: str | None) -> Iterator[_Told]:
    """Look at the files of one side: what they are, and whether they can be read."""
    request, job = found.request, found.job
    try:
        if name == "baseline" and request.stored is not None:
            yield _stored(found, request.stored)
            return
        side = read_side(job.adapter, str(model), job.loading, tensors=False)
        job.metric = resolved_metric(request.metric_kind, job.adapter)
        found.sides[name] = side
        if side.folder is not None:
            yield _described(found, name, side, side.folder)
    except DependencyError as error:
        yield "D023", str(error)
    except (InvarlockError, OSError) as error:
        if engine is None:
            yield "D040", f"the {name} {model} cannot be used: {error}"
        else:
            yield "D041", f"the {name} {model}: its files are not at hand, so that its weights are not evaluated"


def _stored(found: _Rehearsal, place: Path) -> _Told:
    report, evidence, path = steps.stored_baseline(place)
    check_same_data(evidence.data, found.request.dataset)
    found.windows = reuse_windows(report)
    return "D041", f"the baseline is stored in {path}: {evidence.model.id}, {len(found.windows.all)} windows"


def _described(found: _Rehearsal, name: str, side: Side, folder: Path) -> _Told:
    """Say what a checkpoint is, by its headers; note what it takes."""
    job = found.job
    config = load_config(folder, trust_remote_code=job.loading.trusts)
    layout = layout_of(config, job.adapter.auto_class) if hasattr(job.adapter, "auto_class") else None
    open_checkpoint(folder, layout)
    if SafetensorsFolder.recognises(folder):
        for path in SafetensorsFolder(folder, layout).files():
            check_header(path)
    form = next(form.name for form in FORMATS if form.recognises(folder))
    files = [path for pattern in _WEIGHTS for path in folder.glob(pattern)]
    size, kind = sum(path.stat().st_size for path in files), str((side.usage or {}).get("architecture"))
    count = sum(math.prod(shape) for shape in layout.shapes.values()) if layout else 0
    found.kinds[name] = kind
    wide = 4 if job.loading.dtype == "float32" or (job.loading.dtype == "auto" and job.device == "cpu") else 2
    found.memory = max(found.memory, 1.25 * wide * count)
    own = Path(os.path.expanduser(side.id))
    adapter = ", merged with an adapter (LoRA)" if os.path.isdir(own) and lora.is_adapter(own) else ""
    if adapter:
        found.disk[Path(tempfile.gettempdir())] = found.disk.get(Path(tempfile.gettempdir()), 0.0) + 4.0 * count
    without = "" if side.tokenizer is not None else "; it has no tokenizer"
    held = f"{form}, {len(files)} file{'s' if len(files) != 1 else ''} of {_size(size)}"
    return "D041", f"the {name} {side.id}: {kind}, {count:,} parameters, {held}{adapter}{without}"


def _text(found: _Rehearsal) -> Iterator[_Told]:
    """Cut the text as `certify` would, and say how much there is against what is asked for."""
    job, baseline = found.job, found.sides.get("baseline")
    try:
        if found.windows is None and baseline is not None:
            found.windows = job.windows = cut_windows(job, baseline, found.request.dataset)
    except (InvarlockError, OSError) as error:
        yield "D043", f"[{getattr(error, 'code', 'DATA')}] {error}"
    if found.windows is None:
        return
    sample, windows, tokens = job.policy.limits.sample, found.windows, job.scored(found.windows)
    documents = len({window.document for window in windows.all})
    asked = f"profile {job.policy.profile} and tier {job.policy.tier} ask for {sample.preview} + {sample.final}"
    held = f"{len(windows.preview)} + {len(windows.final)} windows of {documents:,} documents, {tokens:,} scored tokens"
    yield (
        "D044",
        f"the text gives {held}; {asked} windows, {sample.min_documents} documents, {sample.min_tokens:,} tokens",
    )
    if documents < sample.min_documents and sample.shortfall == "stop":
        yield "D025", f"the text has {documents} documents, and PASS needs {sample.min_documents}; give more of them"
    yield from (("D044", note) for note in job.notes)
    place = cache_folder() if found.request.cache else None
    for folder in filter(None, (found.request.out, place)):
        found.disk[folder] = found.disk.get(folder, 0.0) + _BYTES_A_TOKEN * tokens + _REPORTS


def _pair(found: _Rehearsal) -> Iterator[_Told]:
    """Hold the two sides against one another: what they are, and how they cut text."""
    if len(found.sides) < 2:
        return
    baseline, subject = found.sides["baseline"], found.sides["subject"]
    kinds = {found.kinds.get(name) for name in found.sides}
    if None not in kinds and len(kinds) > 1 and found.request.intent not in _REBUILT:
        told = " and ".join(f"the {name} is a {kind}" for name, kind in found.kinds.items())
        yield "D042", f"{told}: not the same model; to certify one built differently on purpose: --intent restructure"
    if subject.tokenizer is None and found.request.engine is None:
        yield "D042", f"the subject {subject.id} has no tokenizer; copy the baseline's beside it"
        return
    try:
        encode_both(found.job, Source(baseline), subject)
    except (InvarlockError, OSError) as error:
        yield "D042", str(error)
    encoded = (subject.usage or {}).get("encoded") or {}
    if encoded.get("differing"):
        many = f"{encoded['differing']} of {encoded['documents']} documents (the first: {encoded['first']})"
        yield (
            "D042",
            f"the tokenizers encode {many} differently (E002); put the baseline's tokenizer beside the subject",
        )


def _engines(found: _Rehearsal) -> Iterator[_Told]:
    baseline = found.sides.get("baseline")
    for name, address in (("baseline", found.request.baseline_engine), ("subject", found.request.engine)):
        try:
            if address is not None:
                engine = Engine.open(address, None if baseline is None else baseline.tokenizer)
                yield "D049", f"the engine of the {name} answers: {engine.facts()['model']} at {engine.host}"
        except InvarlockError as error:
            yield "D048", f"the engine of the {name}: {error}"


def _room(found: _Rehearsal) -> Iterator[_Told]:
    """Hold memory and disk that it takes against what is there."""
    free = _free_memory()
    if found.memory and found.job.device == "cpu" and free is not None:
        yield _against(
            "memory", found.memory + _IMPORTS, free, "; model.dtype: bfloat16 halves it, device_map offloads"
        )
    for folder, needed in found.disk.items():
        above = next(path for path in (folder, *folder.absolute().parents) if path.is_dir())
        yield _against(f"disk under {folder}", needed, shutil.disk_usage(above).free, "; name a folder on a larger one")


def _against(what: str, needed: float, free: float, advice: str) -> _Told:
    enough = needed <= free
    told = f"{what}: about {_size(needed)} of {_size(free)} that are free"
    return "D046" if enough else "D045", told if enough else f"{told}, which may not be enough{advice}"


def _free_memory() -> float | None:
    """Return what programs can still have, in bytes, where the system tells."""
    try:
        lines = Path("/proc/meminfo").read_text(encoding="ascii").splitlines()
        return next(1024.0 * int(line.split()[1]) for line in lines if line.startswith("MemAvailable"))
    except (OSError, ValueError, StopIteration):
        return None


def _size(count: float) -> str:
    return f"{count / 1e9:.1f} GB" if count >= 1e9 else f"{count / 1e6:.1f} MB"
