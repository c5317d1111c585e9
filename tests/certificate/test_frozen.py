"""Certificates that an earlier release made: this release derives the same from them, and still sees a change."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from invarlock.assurance import verify_certificate

FOLDER = Path(__file__).parents[1] / "assets" / "certificates"
BASELINE_REPORT = FOLDER / "pass_8bit.baseline.report.json"
VERDICTS = {
    "accuracy_fail": "FAIL",
    "accuracy_inconclusive": "INCONCLUSIVE",
    "accuracy_pass": "PASS",
    "aggressive": "PASS",
    "bert_8bit": "PASS",
    "conservative": "PASS",
    "fail_2bit": "FAIL",
    "fail_shuffled": "FAIL",
    "fail_zeroed": "FAIL",
    "finetune": "PASS",
    "fourth_fail": "FAIL",
    "fourth_looks": "PASS",
    "fourth_packs": "PASS",
    "fourth_slices": "FAIL",
    "fourth_whole": "PASS",
    "inconclusive": "INCONCLUSIVE",
    "inconclusive_ratio": "INCONCLUSIVE",
    "llama_8bit": "PASS",
    "overrides": "PASS",
    "pass_8bit": "PASS",
    "plugin_guard": "PASS",
    "python": "PASS",
    "refused_nan": "FAIL",
    "second_accuracy": "INCONCLUSIVE",
    "second_fail": "FAIL",
    "second_inconclusive": "INCONCLUSIVE",
    "second_packed": "PASS",
    "second_pass": "PASS",
    "second_plugin_guard": "PASS",
    "second_refused": "FAIL",
    "second_restructure": "PASS",
    "self": "PASS",
    "t5_8bit": "PASS",
    "third_accuracy": "INCONCLUSIVE",
    "third_fail": "FAIL",
    "third_inconclusive": "INCONCLUSIVE",
    "third_looks": "PASS",
    "third_packed": "PASS",
    "third_packs": "PASS",
    "third_pairs": "PASS",
    "third_pass": "PASS",
    "third_plugin_guard": "PASS",
    "third_refused": "FAIL",
    "third_restructure": "PASS",
    "third_slices": "FAIL",
    "third_whole": "PASS",
}
MEASURED = sorted(set(VERDICTS) - {"refused_nan", "second_refused", "third_refused"})


def _load(path: Path) -> dict[str, Any]:
    document: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    return document


def _frozen(name: str) -> dict[str, Any]:
    return _load(FOLDER / f"{name}.json")


def test_every_file_has_its_verdict_here_and_in_the_readme() -> None:
    files = {path.stem for path in FOLDER.glob("*.json") if path != BASELINE_REPORT}
    assert files == set(VERDICTS)
    readme = (FOLDER / "README.md").read_text(encoding="utf-8")
    cells = [[cell.strip() for cell in line.split("|")] for line in readme.splitlines() if line.startswith("| `")]
    assert {row[1].strip("`").removesuffix(".json"): row[3] for row in cells if row[3] != "-"} == VERDICTS


@pytest.mark.parametrize("name", VERDICTS)
def test_a_frozen_certificate_is_intact_with_its_verdict(name: str) -> None:
    outcome = verify_certificate(_frozen(name))
    assert (outcome.intact, outcome.verdict, outcome.problems) == (True, VERDICTS[name], [])


@pytest.mark.slow
@pytest.mark.parametrize("name", MEASURED)
def test_a_ratio_off_by_a_millionth_is_noticed(name: str) -> None:
    altered = _frozen(name)
    altered["primary_metric"]["ratio_vs_baseline"] *= 1 + 1e-6
    outcome = verify_certificate(altered)
    assert (outcome.intact, outcome.failed_step) == (False, "ratio, interval and decision")


@pytest.mark.slow
@pytest.mark.parametrize("name", MEASURED)
def test_a_loss_off_by_a_millionth_is_noticed(name: str) -> None:
    altered = _frozen(name)
    altered["evaluation_windows"]["final"]["subject_loss"][0] *= 1 + 1e-6
    assert not verify_certificate(altered).intact


@pytest.mark.slow
@pytest.mark.parametrize("name", [name for name, verdict in VERDICTS.items() if verdict != "PASS"])
def test_a_verdict_turned_into_pass_is_noticed(name: str) -> None:
    altered = _frozen(name)
    altered["verdict"] = {"status": "PASS", "reasons": []}
    outcome = verify_certificate(altered)
    assert (outcome.intact, outcome.failed_step) == (False, "gates and verdict")


@pytest.mark.parametrize("name", ["pass_8bit", "fail_2bit"])
def test_the_baselines_report_is_still_readable_and_fits(name: str) -> None:
    assert verify_certificate(_frozen(name), baseline=_load(BASELINE_REPORT)).intact


def test_the_baselines_report_does_not_fit_another_certificate() -> None:
    outcome = verify_certificate(_frozen("self"), baseline=_load(BASELINE_REPORT))
    assert (outcome.intact, outcome.failed_step) == (False, "pairing and counts")
