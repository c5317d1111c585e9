"""The doctor finds what would stop a run, says how to mend it, and is silent about what is in order."""

from __future__ import annotations

import copy
import json
import os
import re
from pathlib import Path
from typing import Any

import pytest

from invarlock.flow import doctor, rehearsal
from invarlock.flow.doctor import CODES, Finding, Request, examine

EVIDENCE: dict[str, Any] = {
    "metric_kind": "ppl_causal",
    "model": {"tokenizer_digest": "t"},
    "data": {"seq_len": 64, "digest": "d"},
    "preview": {"window_ids": ["a", "b"], "tokens": [63, 63]},
    "final": {"window_ids": ["c"], "tokens": [63]},
}


@pytest.fixture(autouse=True)
def _clean(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    for name in os.environ:
        if name.startswith("INVARLOCK_"):
            monkeypatch.delenv(name)
    monkeypatch.setenv("HF_HOME", str(tmp_path / "hf"))


def _codes(found: list[Finding]) -> set[str]:
    return {finding.code for finding in found}


def _config(folder: Path, text: str) -> Path:
    path = folder / "config.yaml"
    path.write_text(text)
    return path


def _report(folder: Path, name: str, evidence: dict[str, Any] | None, **more: Any) -> Path:
    run = folder / name
    run.mkdir()
    (run / "report.json").write_text(json.dumps({"status": "success", "evidence": evidence, **more}))
    return run


def test_every_code_is_described_and_used() -> None:
    text = "".join(Path(str(module.__file__)).read_text(encoding="utf-8") for module in (doctor, rehearsal))
    named = re.findall(r'"(D\d{3})"', text)
    assert set(named) == set(CODES) and all(named.count(code) > 1 for code in CODES)


def test_a_finding_reads_as_level_code_message() -> None:
    assert Finding("D007", "what").line() == "WARNING: [INVARLOCK:D007] what"


def test_findings_come_gravest_first(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("INVARLOCK_CI_FINAL", "x")
    monkeypatch.setenv("INVARLOCK_ALOW_NETWORK", "1")
    levels = [finding.level for finding in examine(Request())]
    assert levels == sorted(levels, key=["ERROR", "WARNING", "NOTE"].index)
    assert levels[:2] == ["ERROR", "WARNING"]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "value", "code", "message"),
    [
        ("INVARLOCK_CI_FINAL", "x", "D006", "INVARLOCK_CI_FINAL is 'x'; expected a whole number"),
        ("INVARLOCK_ALOW_NETWORK", "1", "D007", "did you mean 'INVARLOCK_ALLOW_NETWORK'?"),
        ("INVARLOCK_TINY_RELAX", "1", "D008", "weakens or skips a check"),
        ("INVARLOCK_EVAL_STRICT", "0", "D008", "turns failures into warnings"),
        ("INVARLOCK_DISABLE_PLUGIN_DISCOVERY", "perhaps", "D006", "expected 1 or 0"),
    ],
)
def test_environment_variables_are_judged(
    monkeypatch: pytest.MonkeyPatch, name: str, value: str, code: str, message: str
) -> None:
    assert code not in _codes(examine(Request()))
    monkeypatch.setenv(name, value)
    (finding,) = [finding for finding in examine(Request()) if finding.code == code]
    assert message in finding.message


def test_a_missing_and_an_old_library_are_told_apart(monkeypatch: pytest.MonkeyPatch) -> None:
    real = doctor.metadata.version

    def version(name: str) -> str:
        if name == "transformers":
            raise doctor.metadata.PackageNotFoundError(name)
        return "2.1.0+cpu" if name == "torch" else real(name)

    monkeypatch.setattr(doctor.metadata, "version", version)
    found = {finding.code: finding.message for finding in examine(Request())}
    assert found["D002"].endswith('pip install "invarlock[adapters]"')
    assert found["D003"].startswith("torch is 2.1.0+cpu; expected 2.6 or later")


def test_an_unwritable_temporary_folder_is_an_error(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(doctor.tempfile, "tempdir", str(tmp_path / "none"))
    assert "D009" in _codes(examine(Request()))


def test_the_text_that_stands_in_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert "D005" in _codes(examine(Request()))
    monkeypatch.setenv("INVARLOCK_ALLOW_NETWORK", "1")
    assert "D005" not in _codes(examine(Request()))


def test_a_sound_configuration_finds_nothing(tmp_path: Path) -> None:
    (tmp_path / "model").mkdir()
    (tmp_path / "texts.jsonl").write_text('{"text": "a"}\n')
    text = f"model: {{id: {tmp_path}/model, device: cpu}}\n"
    text += f"dataset: {{provider: local_jsonl, file: {tmp_path}/texts.jsonl}}\n"
    assert _codes(examine(Request(config=_config(tmp_path, text)))) <= {"D004", "D010"}


@pytest.mark.parametrize(
    ("text", "code", "message"),
    [
        ("modle: {}", "D020", "unknown key 'modle' (did you mean 'model'?)"),
        ("guards: {order: [spectrl]}", "D020", "did you mean 'spectral'?"),
        ("model: {id: ./nowhere}", "D021", "model.id './nowhere' does not exist"),
        ("dataset: {provider: local_jsonl, file: none.jsonl}", "D021", "dataset.file 'none.jsonl' does not exist"),
        ("dataset: {provider: {kind: local_jsonl, path: none}}", "D021", "dataset.path 'none' does not exist"),
        ("model: {id: someone/model}", "D022", "set INVARLOCK_ALLOW_NETWORK=1"),
        ("dataset: {provider: wikitext2}", "D022", "wikitext2 is not cached"),
        ("model: {device: 'cuda:7'}", "D024", "model.device is 'cuda:7', which this machine does not have"),
        ("dataset: {preview_n: 8}", "D025", "dataset.preview_n is 8; tier and profile ask for 200 or more"),
        ("dataset: {seq_len: 64}", "D025", "400 windows of at most 64 tokens give fewer than the 50000 tokens"),
        ("guards: {hello_guard: {message: hi}}", "D026", "guards.hello_guard has no effect"),
    ],
)
def test_a_configuration_is_judged(tmp_path: Path, text: str, code: str, message: str) -> None:
    found = [finding for finding in examine(Request(config=_config(tmp_path, text))) if finding.code == code]
    assert [message in finding.message for finding in found] == [True]


@pytest.mark.slow
def test_the_profile_decides_what_is_enough(tmp_path: Path) -> None:
    path = _config(tmp_path, "dataset: {preview_n: 8, seq_len: 64}")
    assert "D025" not in _codes(examine(Request(config=path, profile="dev")))
    found = {finding.code: finding.message for finding in examine(Request(config=path, profile="ci"))}
    assert found["D026"] == "dataset.preview_n: 8 of the configuration gives way to 200 of profile ci"


def test_an_extra_that_the_configuration_needs_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(doctor.sys.modules, "torch", None)
    found = {
        finding.code: finding.message for finding in examine(Request(config=_config(tmp_path, "edit: {name: noop}")))
    }
    assert 'pip install "invarlock[' in found["D023"]


@pytest.mark.parametrize(("profile", "tier"), [("nightly", None), (None, "strict")])
def test_an_unknown_profile_or_tier_is_an_error(profile: str | None, tier: str | None) -> None:
    assert "D020" in _codes(examine(Request(profile=profile, tier=tier)))


def test_reports_of_the_same_windows_pair(tmp_path: Path) -> None:
    request = Request(
        baseline_report=_report(tmp_path, "old", EVIDENCE),
        subject_report=_report(tmp_path, "new", EVIDENCE) / "report.json",
    )
    assert not _codes(examine(request)) & {"D030", "D031"}


@pytest.mark.parametrize(
    ("place", "value", "code"),
    [
        ("model.tokenizer_digest", "other", "E002"),
        ("final.tokens", [62], "E003"),
        ("preview.window_ids", ["a", "x"], "E006"),
        ("data.digest", None, "E006"),
        ("data.seq_len", 32, "E001"),
    ],
)
def test_reports_of_other_windows_do_not(tmp_path: Path, place: str, value: object, code: str) -> None:
    changed = copy.deepcopy(EVIDENCE)
    section, _, key = place.partition(".")
    changed[section][key] = value
    request = Request(
        baseline_report=_report(tmp_path, "old", EVIDENCE), subject_report=_report(tmp_path, "new", changed)
    )
    (finding,) = [finding for finding in examine(request) if finding.code == "D031"]
    assert finding.message.startswith(f"{place} differs (")
    assert finding.message.endswith(f"a comparison would stop with {code}")


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (None, "no such file"),
        ("{", "Expecting property name"),
        ("[]", "it holds no JSON object"),
        ('{"status": "failed", "error": "boom"}', "its run failed: boom"),
        ('{"status": "success"}', "it holds no evidence"),
    ],
)
def test_a_report_that_cannot_be_used_says_why(tmp_path: Path, content: str | None, message: str) -> None:
    path = tmp_path / "report.json"
    if content is not None:
        path.write_text(content)
    (finding,) = [finding for finding in examine(Request(baseline_report=path)) if finding.code == "D030"]
    assert message in finding.message
