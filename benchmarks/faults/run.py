"""Run the matrix: make each subject, certify it, ask the oracle, and keep what came out, so that a run can be resumed.

A model serves several kinds of text, so each subject is certified on two, documentation and source code, as its owner
should: it may ship when both certificates say so. The second is not made where the first has failed.
"""

from __future__ import annotations

import gzip
import hashlib
import json
import logging
import os
import re
import shutil
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from types import MappingProxyType
from typing import Any

import torch
from benchmarks.faults.edits import EDITS, UNIFORM, Case, cases
from benchmarks.faults.oracle import Oracle, limits_of, load_model, other_windows, write_code

from invarlock.adapters import HF_Auto_Adapter
from invarlock.certificate.derive import derive
from invarlock.certificate.schema import Recorded
from invarlock.core.exceptions import InvarlockError
from invarlock.evidence.windows import Windows
from invarlock.flow.certify import CertifyOutcome, CertifyRequest, certify
from invarlock.policy.resolve import resolve_policy

TIER, PROFILE, SEQ_LEN = "balanced", "ci_cpu", 128
#: fewer windows than the profile, to save time, and a token floor that masked models reach: they score one token in seven
OVERRIDES: dict[str, Any] = {"sample": {"preview": 80, "final": 80, "min_tokens": 2000}}
TEXTS = ("docs", "code")
_TIMES = 10  # how many times the tokens of a certificate the oracle may look at, of each kind of text
_TOKENIZER = (
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "vocab.json",
    "merges.txt",
    "spiece.model",
)

log = logging.getLogger(__name__)


class Bench:
    """One baseline: its reports, one a kind of text, its live copy and its oracle."""

    def __init__(
        self,
        name: str,
        folder: Path,
        work: Path,
        *,
        texts: Sequence[str] = TEXTS,
        overrides: Mapping[str, Any] = MappingProxyType(OVERRIDES),
        seq_len: int = SEQ_LEN,
    ) -> None:
        self.name, self.folder, self.overrides, self.seq_len = name, folder, dict(overrides), seq_len
        self.adapter = HF_Auto_Adapter()
        self.adapter.select(str(folder))
        self.task = str(self.adapter.task)
        digest = hashlib.sha256((folder / "model.safetensors").read_bytes()).hexdigest()[:12]
        self.work = work / f"{name}-{digest}"
        self.work.mkdir(parents=True, exist_ok=True)
        self.scratch = Path(tempfile.mkdtemp(dir=self.work))
        docs = {"provider": "seq2seq" if self.task == "seq2seq" else "python_docs", "split": "test"}
        self.datasets = {"docs": docs, "code": write_code(self.scratch, self.task)}
        self.reports = {text: self._baseline(text) for text in texts}
        self.used = {text: _windows_of(report) for text, report in self.reports.items()}
        windows = [window for found in self.used.values() for window in found.all]
        self.seen = frozenset(token for w in windows for token in (*w.input_ids, *(w.labels or ())))
        self.live = load_model(self.adapter, folder)
        self.state = {key: value.clone() for key, value in self.live.state_dict().items()}
        config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
        self.dtype = config.get("dtype") or config.get("torch_dtype") or "float32"
        self._oracle: Oracle | None = None

    @property
    def oracle(self) -> Oracle:
        if self._oracle is None:
            tokenizer = self.adapter.tokenizer(str(self.folder))
            used = [window for windows in self.used.values() for window in windows.all]
            tokens = _TIMES * sum(len(window.input_ids) for window in self.used["docs"].all)
            found = other_windows(tokenizer, self.task, used, self.seq_len, tokens)
            self._oracle = Oracle(load_model(self.adapter, self.folder), self.task, found, limits_of(TIER))
        return self._oracle

    def _baseline(self, text: str) -> Path:
        report = self._certify(self.folder, text, baseline=str(self.folder)).source_report
        assert report is not None
        return report

    def _certify(self, subject: Path, text: str, **source: Any) -> CertifyOutcome:
        return certify(
            CertifyRequest(
                subject=str(subject),
                **source,
                adapter="auto",
                device="cpu",
                profile=PROFILE,
                tier=TIER,
                dataset={**self.datasets[text], "seq_len": self.seq_len},
                overrides=self.overrides,
                edit_label="fault",
                out=self.scratch / "runs" / text,
            )
        )

    def close(self) -> None:
        shutil.rmtree(self.scratch, ignore_errors=True)

    def run(self, case: Case) -> dict[str, Any] | None:
        """Make the subject, certify it, ask the oracle; None where the model has no place for the edit."""
        subject = Path(tempfile.mkdtemp(dir=self.scratch)) / "subject"
        try:
            culprits = self._make(case, subject)
            if culprits is None:
                return None
            record = self._certified(case, subject)
            record |= {"model": self.name, "case": case.name, "expected": sorted(culprits)}
            if case.edit.kind == "behaviour":
                record["oracle"] = self._asked(case, subject)
            return record
        finally:
            shutil.rmtree(subject.parent)

    def _make(self, case: Case, folder: Path) -> set[str] | None:
        place = case.place(self.live, self.seen)
        culprits: set[str] | None = set()
        if case.edit.name == "self":
            shutil.copytree(self.folder, folder)
            return culprits
        with torch.no_grad():
            self.live.load_state_dict(self.state)
            if case.edit.change is not None:
                culprits = case.edit.change(place)
            if culprits is None:
                return None
            saved = self.live.to(getattr(torch, case.edit.dtype or self.dtype))
            saved.save_pretrained(folder, **case.edit.save)
            self.live.float()
        for name in _TOKENIZER:
            if (self.folder / name).is_file():
                shutil.copyfile(self.folder / name, folder / name)
        if case.edit.files is not None:
            culprits = case.edit.files(folder, place)
        return culprits

    def _certified(self, case: Case, subject: Path) -> dict[str, Any]:
        started = time.perf_counter()
        certificates: dict[str, Any] = {}
        try:
            for text, report in self.reports.items():
                certificates[text] = self._certify(subject, text, baseline_report=report).certificate
                if _status(certificates[text]) == "FAIL":
                    break
        except InvarlockError as error:
            code = str(getattr(error, "code", None) or type(error).__name__)
            return {
                "refusal": code,
                "message": str(error),
                "seconds": time.perf_counter() - started,
                "certificates": {},
            }
        return {"refusal": None, "seconds": time.perf_counter() - started, "certificates": certificates}

    def _asked(self, case: Case, subject: Path) -> dict[str, Any]:
        """Ask the oracle, or recall what it said of the same subject: that does not change with the library."""
        path = self.work / "oracle" / f"{file_name(case)}.json"
        if not path.is_file():
            found = self.oracle.judge(load_model(self.adapter, subject))
            path.parent.mkdir(exist_ok=True)
            path.write_text(json.dumps(found), encoding="utf-8")
        answer: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
        return answer


def _windows_of(report: Path) -> Windows:
    return Windows.from_dict(json.loads(report.read_text(encoding="utf-8"))["evaluation_windows"])


def _status(certificate: Mapping[str, Any]) -> str:
    return str(certificate["verdict"]["status"])


def file_name(case: Case) -> str:
    return case.name.replace(" ", "_").replace("/", "_")


def run_model(name: str, folder: Path, work: Path, only: str | None = None, *, backwards: bool = False) -> None:
    """Run every case of one model that has no record yet; a second process may come from the other end."""
    bench = Bench(name, folder, work)
    try:
        for case in list(cases(EDITS))[:: -1 if backwards else 1]:
            path = bench.work / f"{file_name(case)}.json.gz"
            if path.is_file() or (only and not re.search(only, case.name)):
                continue
            record = bench.run(case)
            with gzip.open(path.with_suffix(f".{os.getpid()}"), "wt", encoding="utf-8") as stream:
                json.dump(record, stream)
            path.with_suffix(f".{os.getpid()}").rename(path)
            if record is not None:
                row = summary(record, case)
                log.info("%s %s: %s, named %s, %.1f s", name, case.name, row["verdict"], row["named"], row["seconds"])
    finally:
        bench.close()


def stored(name: str, folder: Path, work: Path, *, rejudge: bool) -> Iterator[dict[str, Any]]:
    """Yield the row of every stored run of a model, judged again under today's tiers when asked."""
    digest = hashlib.sha256((folder / "model.safetensors").read_bytes()).hexdigest()[:12]
    known = {file_name(case): case for case in cases(EDITS)}
    for path in sorted((work / f"{name}-{digest}").glob("*.json.gz")):
        case = known.get(path.name.removesuffix(".json.gz"))
        with gzip.open(path, "rt", encoding="utf-8") as stream:
            record = json.load(stream)
        if record is None or case is None:
            continue
        if rejudge:
            record["certificates"] = {text: judged_again(c) for text, c in record["certificates"].items()}
        yield summary(record, case)


def judged_again(certificate: dict[str, Any]) -> dict[str, Any]:
    """Derive a certificate again from what it recorded, under today's tiers: no model is measured."""
    values = resolve_policy(TIER, PROFILE, overrides=OVERRIDES).values
    recorded = Recorded.model_validate({**certificate, "resolved_policy": values})
    return derive(recorded).model_dump(mode="json")


_WORST = ("FAIL", "INCONCLUSIVE", "PASS")


def summary(record: dict[str, Any], case: Case) -> dict[str, Any]:
    """Reduce a record to what the table and faults.json hold; the verdict is the worse of the two certificates'."""
    certificates, oracle = record["certificates"], record.get("oracle")
    kind = case.edit.kind
    harmful = oracle["harmful"] if kind == "behaviour" and oracle else kind != "harmless"
    row: dict[str, Any] = {
        "model": record["model"],
        "edit": case.edit.name,
        "severity": case.edit.severity,
        "place": case.at,
        "seed": case.seed,
        "kind": kind,
        "harmful": harmful,
        "oracle": oracle,
        "seconds": round(record["seconds"], 2),
    }
    if not certificates:
        said = (name for name in record["expected"] if name in record["message"])
        named = "tokenizer" if record["refusal"] == "E002" else next(said, None)
        row |= {
            "verdict": "FAIL",
            "verdicts": {},
            "refusal": record["refusal"],
            "failed": ["invariants"],
            "reasons": [record["message"]],
            "figures": {},
            "culprits": [],
        }
    else:
        text = min(certificates, key=lambda text: _WORST.index(_status(certificates[text])))
        certificate = certificates[text]
        gates = {gate["name"]: gate for gate in certificate["gates"]}
        named = named_by(certificate)
        row |= {
            "verdict": _status(certificate),
            "verdicts": {text: _status(found) for text, found in certificates.items()},
            "failed": [name for name, gate in gates.items() if gate["decision"] == "fail"],
            "undecided": [n for n, gate in gates.items() if gate["decision"] in ("inconclusive", "not_evaluated")],
            "reasons": [reason["message"] for reason in certificate["verdict"]["reasons"]][:4],
            "figures": {
                text: {gate["name"]: gate["measured"] for gate in found["gates"] if gate["name"] in _FIGURES}
                for text, found in certificates.items()
            },
            "culprits": certificate["weights"]["culprits"][:4],
        }
    row["named"] = named
    row["named_rightly"] = named in record["expected"] or (set(record["expected"]) == UNIFORM and named == "uniform")
    row["expected"] = record["expected"][:4]
    return row


_FIGURES = ("primary_metric", "preview_final_drift", "primary_metric_tail", "divergence_kl", "token_flips")


def named_by(certificate: dict[str, Any]) -> str | None:
    """Return the module that a FAIL names: the first reason's tensor, else the first culprit, else `uniform`."""
    reasons = certificate["verdict"]["reasons"]
    if not reasons:
        return None
    if reasons[0]["code"] in ("config_changed", "role_changed"):
        return str(certificate["invariants"]["errors"][0]["key"])
    weights = certificate["weights"]
    if reasons[0].get("tensor"):
        return str(reasons[0]["tensor"])
    if weights["culprits"]:
        return str(weights["culprits"][0])
    if weights["uniform"]:
        return "uniform"
    return next((str(r["tensor"]) for r in reasons if r.get("tensor")), None)
