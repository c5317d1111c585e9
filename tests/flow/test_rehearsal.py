"""The doctor rehearses a certification: what `certify` would stumble over is said before anything is measured."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from certification import CertifyOutcome
from invarlock.flow import doctor, rehearsal
from invarlock.flow.certify import CertifyRequest
from invarlock.flow.doctor import Request, examine

Found = dict[str, list[str]]
_SMALL = {"sample": {"preview": 4, "final": 4, "min_tokens": 100, "min_documents": 2}}


def _rehearsed(subject: Path | str, baseline: Path | str | None, output: Path | None = None, **request: Any) -> Found:
    """What the doctor says of a certification, by code."""
    data = {"provider": "python_docs", "seq_len": 48}
    chosen: dict[str, Any] = {"profile": "ci", "overrides": _SMALL, "dataset": data, "cache": False, **request}
    given = None if baseline is None else str(baseline)
    asked = Request(certification=lambda: CertifyRequest(str(subject), given, **chosen), output=output)
    found: Found = {}
    for finding in examine(asked):
        found.setdefault(finding.code, []).append(finding.message)
    return found


@pytest.mark.slow
def test_a_sound_certification_is_described_and_nothing_is_read_or_written(
    demo_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("invarlock.checkpoints.side.read_structure", lambda *_: pytest.fail("tensors were read"))
    found = _rehearsed(demo_model, demo_model, tmp_path / "cert", out=tmp_path / "runs")
    assert not {code for code in found if doctor.CODES[code][0] == "ERROR"}
    assert [line.split(": ")[1].split(",")[0] for line in found["D041"]] == ["GPT2LMHeadModel"] * 2
    assert all(line.endswith("MB") and "parameters, safetensors, 1 file of" in line for line in found["D041"])
    assert (
        "4 + 4 windows of" in found["D044"][0] and "ask for 4 + 4 windows, 2 documents, 100 tokens" in found["D044"][0]
    )
    assert found["D046"][0].startswith("memory: about") and found["D046"][1].startswith("disk under")
    assert not list(tmp_path.iterdir())


@pytest.mark.slow
def test_every_fault_of_the_request_is_a_finding(demo_model: Path, tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    (tmp_path / "empty").mkdir()
    found = _rehearsed(tmp_path / "empty", tmp_path / "none", tmp_path / "file/cert", out=tmp_path / "file")
    assert len(found["D047"]) == 2 and len(found["D040"]) == 2
    assert "is empty" in found["D040"][1] and "no such folder" in found["D040"][0]
    found = _rehearsed(demo_model, demo_model, dataset={"provider": "local_jsonl", "file": "none.jsonl"})
    assert "no data file at 'none.jsonl'" in found["D043"][0]
    found = _rehearsed(demo_model, demo_model, overrides={"sample": {"preview": 10**5, "final": 10**5}})
    assert found["D043"][0].startswith("[E001] too little text")
    assert _rehearsed(demo_model, None)["D020"][0].startswith("got neither of baseline and baseline report")


@pytest.mark.slow
def test_two_architectures_and_two_tokenizers_are_named(
    demo_model: Path, model_folder: Callable[[str], Path], tmp_path: Path
) -> None:
    other = _rehearsed(model_folder("llama"), demo_model)["D042"]
    assert other[0].startswith("the baseline is a GPT2LMHeadModel and the subject is a Llama")
    shutil.copytree(demo_model, tmp_path / "m")
    state = json.loads((tmp_path / "m/tokenizer.json").read_text(encoding="utf-8"))
    state["model"]["merges"] = state["model"]["merges"][: len(state["model"]["merges"]) // 2]
    (tmp_path / "m/tokenizer.json").write_text(json.dumps(state), encoding="utf-8")
    assert "documents (the first:" in _rehearsed(tmp_path / "m", demo_model)["D042"][0]
    (tmp_path / "m/tokenizer.json").unlink()
    (tmp_path / "m/tokenizer_config.json").unlink()
    assert "has no tokenizer" in _rehearsed(tmp_path / "m", demo_model)["D042"][0]


@pytest.mark.slow
def test_too_little_room_is_a_warning(demo_model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(rehearsal, "_free_memory", lambda: 1e6)
    assert "of 1.0 MB that are free, which may not be enough" in _rehearsed(demo_model, demo_model)["D045"][0]


@pytest.mark.slow
def test_an_engine_that_does_not_answer_is_named(demo_model: Path) -> None:
    found = _rehearsed(demo_model, demo_model, engine="vllm=http://127.0.0.1:9", intent="engine")
    assert found["D048"][0].startswith("the engine of the subject: vllm at 127.0.0.1:9")


def test_a_stored_baseline_serves(passed: CertifyOutcome, demo_model: Path) -> None:
    found = _rehearsed(demo_model, None, baseline_report=passed.source_report, dataset={})
    assert found["D041"][0].startswith("the baseline is stored in") and "D044" in found
