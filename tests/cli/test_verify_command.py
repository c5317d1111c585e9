"""`invarlock verify`: exit codes, the JSON envelope, and certificates held against models and reports."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from certificates import make_cert
from certification import CertifyOutcome, reread

from .conftest import Cli, Script

NAME = "evaluation.cert.json"


@pytest.fixture(scope="module")
def shelf(
    tmp_path_factory: pytest.TempPathFactory, passed: CertifyOutcome, failed: CertifyOutcome, refused: CertifyOutcome
) -> Path:
    """One folder a certificate."""
    folder = tmp_path_factory.mktemp("shelf")
    documents: dict[str, Any] = {
        "pass": passed.certificate,
        "fail": failed.certificate,
        "refused": refused.certificate,
        "inconclusive": make_cert("inconclusive"),
    }
    documents["altered"] = reread(passed.certificate)
    documents["altered"]["primary_metric"]["ratio_vs_baseline"] *= 0.99
    documents["flattered"] = reread(failed.certificate)
    documents["flattered"]["verdict"] = {"status": "PASS", "reasons": []}
    frozen = Path(__file__).parents[1] / "assets" / "certificates" / "pass_8bit.json"
    documents["earlier"] = json.loads(frozen.read_text(encoding="utf-8"))
    documents["foreign"] = {"hello": "world"}
    for name, document in documents.items():
        (folder / name).mkdir()
        (folder / name / NAME).write_text(json.dumps(document), encoding="utf-8")
    (folder / "notes.txt").write_text("not JSON", encoding="utf-8")
    return folder


@pytest.mark.parametrize(
    ("name", "code", "words"),
    [
        ("pass", 0, "INTACT"),
        (f"pass/{NAME}", 0, "verdict PASS"),
        ("earlier", 0, "  note: made by release"),
        ("fail", 1, "verdict FAIL"),
        ("refused", 1, "verdict FAIL"),
        ("inconclusive", 4, "verdict INCONCLUSIVE"),
        ("altered", 1, "step 'ratio, interval and decision' failed"),
        ("flattered", 1, "step 'gates and verdict' failed"),
        ("foreign", 2, "INVALID"),
        ("notes.txt", 2, "is not JSON"),
        ("nowhere.json", 2, "no such file"),
    ],
)
def test_each_outcome_has_its_exit_code(name: str, code: int, words: str, cli: Cli, shelf: Path) -> None:
    result = cli("verify", str(shelf / name))
    assert (result.exit_code, words in result.stdout) == (code, True), result.output


def test_people_read_sentences_and_scripts_the_recorded_reasons(cli: Cli, shelf: Path) -> None:
    shown = cli("verify", str(shelf / "fail")).stdout
    assert "worse than the baseline (10% worse is allowed)." in shown
    assert not [word for word in ("hysteresis", "z = ", "interval [") if word in shown]
    (result,) = json.loads(cli("verify", "--json", str(shelf / "fail")).stdout)["results"]
    assert any("hysteresis" in reason for reason in result["reasons"])


def test_the_installed_command_verifies_without_torch(script: Script, shelf: Path) -> None:
    result = script("verify", str(shelf / "pass"), INVARLOCK_LIGHT_IMPORT="1")
    assert (result.returncode, result.stderr) == (0, "")
    assert script("verify", str(shelf / "fail"), INVARLOCK_LIGHT_IMPORT="1").returncode == 1


def test_the_json_envelope(cli: Cli, shelf: Path) -> None:
    result = cli("verify", "--json", str(shelf / "pass"), str(shelf / "inconclusive"), str(shelf / "fail"))
    assert len(result.stdout.strip().splitlines()) == 1
    shown = json.loads(result.stdout)
    assert set(shown) == {
        "format_version", "kind", "summary", "certificate", "results", "resolution", "component", "ts"
    }  # fmt: skip
    assert (shown["format_version"], shown["component"]) == ("verify-v1", "verify")
    assert shown["certificate"]["count"] == 3
    assert shown["summary"] == {"ok": False, "passed": 1, "failed": 2}
    assert shown["resolution"]["exit_code"] == result.exit_code == 1
    assert [entry["exit_code"] for entry in shown["results"]] == [0, 4, 1]
    assert [entry["intact"] for entry in shown["results"]] == [True] * 3
    assert shown["results"][0]["not_checked"] and shown["results"][0]["notes"] == []
    assert shown["results"][2]["reasons"]


def test_the_json_envelope_holds_what_could_not_be_read_too(cli: Cli, shelf: Path) -> None:
    result = cli("verify", "--json", str(shelf / "pass"), str(shelf / "notes.txt"))
    shown = json.loads(result.stdout)
    assert result.exit_code == shown["resolution"]["exit_code"] == 2
    assert shown["results"][1]["verdict"] is None and "not JSON" in shown["results"][1]["problems"][0]


def test_the_worst_of_several_decides_the_exit_code(cli: Cli, shelf: Path) -> None:
    pairs = {("pass", "pass"): 0, ("pass", "inconclusive"): 4, ("inconclusive", "fail"): 1, ("fail", "foreign"): 2}
    for names, code in pairs.items():
        assert cli("verify", *(str(shelf / name) for name in names)).exit_code == code


def test_model_folders_are_held_against_the_digests(
    cli: Cli, shelf: Path, demo_model: Path, harmless: Path, tmp_path: Path
) -> None:
    certificate = str(shelf / "pass")
    right = cli("verify", certificate, "--baseline-model", str(demo_model), "--subject-model", str(harmless))
    assert right.exit_code == 0, right.output
    wrong = cli("verify", certificate, "--baseline-model", str(harmless))
    assert wrong.exit_code == 1 and wrong.stdout.startswith("MISMATCH")
    assert "step 'weights' failed" in wrong.stdout and "baseline_digest" in wrong.stdout
    absent = cli("verify", certificate, "--subject-model", str(tmp_path / "nowhere"))
    assert absent.exit_code == 5 and "no such folder" in absent.stderr


def test_the_baselines_report_is_held_against_the_rows(
    cli: Cli, shelf: Path, passed: CertifyOutcome, refused: CertifyOutcome, tmp_path: Path
) -> None:
    assert passed.source_report is not None
    given = ["--baseline", str(passed.source_report)]
    assert cli("verify", str(shelf / "pass"), *given).exit_code == 0
    assert cli("verify", str(shelf / "fail"), *given).exit_code == 1
    report = json.loads(passed.source_report.read_text(encoding="utf-8"))
    report["evidence"]["final"]["loss"][0] += 0.5
    other = tmp_path / "report.json"
    other.write_text(json.dumps(report), encoding="utf-8")
    result = cli("verify", str(shelf / "pass"), "--baseline", str(other))
    assert result.exit_code == 1 and result.stdout.startswith("MISMATCH")
    assert "differs from the baseline report" in result.stdout
    assert cli("verify", str(shelf / "pass"), "--baseline", str(tmp_path / "none.json")).exit_code == 2


def test_another_profile_than_the_one_expected_is_refused(cli: Cli, shelf: Path) -> None:
    assert cli("verify", str(shelf / "pass"), "--profile", "dev").exit_code == 0
    result = cli("verify", str(shelf / "pass"), "--profile", "release")
    assert result.exit_code == 1 and result.stdout.startswith("MISMATCH")
    assert "made under profile dev; expected release" in result.stdout


def test_a_tolerance_that_hides_changes_is_refused(cli: Cli, shelf: Path) -> None:
    result = cli("verify", str(shelf / "pass"), "--tolerance", "0.5")
    assert result.exit_code == 2
    assert "tolerance" in result.stderr
