"""A baseline measured once, in one file: all that a comparison with it needs, so that its weights may stay elsewhere.

The file (`evidence.pack`) holds the report with its windows, the evidence with spectra, sketches and digests of every
tensor, and the distributions of every scored token. The same model, text and software give the same address.
"""

from __future__ import annotations

import json
import os
from dataclasses import dataclass, field
from pathlib import Path

from invarlock.checkpoints.side import Side
from invarlock.core.exceptions import ConfigError
from invarlock.evidence.pack import write_pack
from invarlock.evidence.plain import canonical
from invarlock.evidence.reference import reference_bytes, token_file
from invarlock.flow import cache, steps
from invarlock.flow.certify import CertifyRequest, open_certification
from invarlock.flow.job import Job, Tick
from invarlock.flow.measure import Measurement, followed, measure
from invarlock.flow.run_folder import EVIDENCE, REPORT, require_writable
from invarlock.flow.sampling import cut_windows

__all__ = ["MadePack", "make_pack"]

#: of what a report says of a command
_KEPT = ("tier", "profile", "policy", "plugins", "device", "intent", "env_flags", "warnings")


@dataclass(frozen=True)
class MadePack:
    """Where the pack is, its address, and what it holds. `reference_bytes_per_token`: of the distributions alone."""

    path: Path
    address: str
    size: int
    tokens: int
    windows: int
    reference_bytes_per_token: float | None
    notes: list[str] = field(default_factory=list)
    timings: dict[str, float] = field(default_factory=dict)


def make_pack(request: CertifyRequest, path: Path, tick: Tick | None = None) -> MadePack:
    """Measure `request.baseline` on the whole text and write the pack.

    The text is measured in the parts that the looks of `certify` take, so that the figures are those of a certification
    with the model at hand. Raises what `certify` raises for a baseline.
    """
    if os.path.exists(path):
        raise ConfigError(f"{path} is there already; expected a new file: remove it or name another")
    require_writable(path.parent, "the pack", "-o")
    job, source = open_certification(request, tick)
    with job.timed("data"):
        job.windows = cut_windows(job, source.side, request.dataset)
    with job.timed("baseline"):
        key = cache.key_of(job, source.side) if request.cache else None
        measured = cache.find(key, source.side)
        if measured is None or measured.reach != (len(job.windows.preview), len(job.windows.final)):
            measured = _measure(job, source.side, measured)
            cache.keep(key, measured)
    return _write(job, measured, path)


def _measure(job: Job, side: Side, measured: Measurement | None) -> Measurement:
    model = steps.load(job, side, "the baseline")
    early = job.policy.limits.sample.early_stop and len(job.cuts) > 1
    for cut in job.cuts if early else [None]:
        if measured is None:
            measured = measure(job, model, side, "the baseline", cut=cut)
        elif cut is not None and any(a < b for a, b in zip(measured.reach, cut, strict=True)):
            measured = followed(job, model, side, measured, "the baseline", cut)
    assert measured is not None
    return measured


def _write(job: Job, measured: Measurement, path: Path) -> MadePack:
    report = steps.report(job, measured, steps.NOOP, f"pack-{measured.evidence.digest()[:16]}").to_dict()
    meta = {name: value for name, value in report["meta"].items() if name in (*_KEPT, "run_id")}
    blob = None if measured.reference is None else reference_bytes(measured.reference)
    report = {**report, "meta": meta}
    members = {} if blob is None else {EVIDENCE: blob}
    tokens = sum(sum(rows.tokens) for rows in (measured.evidence.preview, measured.evidence.final))
    if blob is not None:
        report["evidence"]["token_file"] = token_file(blob, EVIDENCE, tokens).model_dump()
    members[REPORT] = json.dumps(canonical(report), ensure_ascii=False, allow_nan=False).encode()
    about = {"model": measured.evidence.model.id, "tokens": tokens, "text": measured.evidence.data.digest}
    with job.timed("write"):
        address = write_pack(path, about, members)
    share = None if blob is None else len(blob) / max(tokens, 1)
    return MadePack(path, address, path.stat().st_size, tokens, sum(measured.reach), share, job.notes, job.timings)
