"""Certification look by look: it ends where all gates are decided, and what each look showed can be derived again."""

from __future__ import annotations

import copy
import json
import shutil
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from certification import Certify, reread, round_weights
from invarlock.assurance import verify_certificate
from invarlock.core.exceptions import CertificateError, PairingError
from invarlock.evidence.plan import GLANCE, cuts, document_order, glance
from invarlock.evidence.windows import TextOrigin, Window, Windows
from invarlock.flow import certify as certifying
from invarlock.flow.certify import CertifyOutcome
from invarlock.flow.run import RunRequest, run
from invarlock.flow.run_folder import find_report
from invarlock.policy.config import load_config
from invarlock.stats.sequential import spending_levels

SAMPLE: dict[str, Any] = {"preview": 30, "final": 30, "min_documents": 5, "early_documents": 8}
SMALL: dict[str, Any] = {"dataset": {"seq_len": 24}, "overrides": {"sample": SAMPLE}}
#: a limit of the flips so near to what four bits show that no look decides
NEAR: dict[str, Any] = {"metrics": {"divergence": {"flip_max": 0.14}}}


@pytest.fixture(scope="module")
def rounded(copy_model: Callable[..., Path], demo_model: Path) -> Path:
    return copy_model(demo_model, round_weights(4))


@pytest.fixture(scope="module")
def baseline(demo_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A baseline that a test may take away."""
    folder = tmp_path_factory.mktemp("baseline") / "model"
    shutil.copytree(demo_model, folder)
    return folder


@pytest.fixture(scope="module")
def early(certify_models: Certify, harmless: Path, baseline: Path) -> CertifyOutcome:
    return certify_models(harmless, baseline, **SMALL)


@pytest.fixture(scope="module")
def undecided(certify_models: Certify, rounded: Path, baseline: Path) -> CertifyOutcome:
    return certify_models(rounded, baseline, **{**SMALL, "overrides": {"sample": SAMPLE, **NEAR}})


def _documents(outcome: CertifyOutcome) -> list[int]:
    return [look["documents"] for look in outcome.certificate["looks"]["made"]]


def test_a_clear_subject_is_decided_at_the_first_look_and_the_rest_is_not_measured(early: CertifyOutcome) -> None:
    c = reread(early.certificate)
    (look,) = c["looks"]["made"]
    assert (c["verdict"]["status"], look["decision"]) == ("PASS", "pass")
    share = look["documents"] / c["looks"]["planned_documents"]
    assert share == pytest.approx(0.2, abs=0.01)  # whole documents
    assert look["level"] == pytest.approx(spending_levels([share])[0], rel=1e-3) == pytest.approx(0.001, rel=0.05)
    assert c["primary_metric"]["ci_level"] == 1 - 2 * look["level"]
    rows = c["evaluation_windows"]
    assert sum(len(rows[split]["window_ids"]) for split in rows) == sum(look["windows"]) < 60
    assert c["looks"]["share_used"] < 0.3 and min(look["windows"]) > 0
    assert c["coverage"]["tokens"] == look["tokens"] and c["coverage"]["documents"] == look["documents"]
    assert c["coverage"]["smallest_share"] == pytest.approx(3.689 / look["tokens"], rel=1e-3)
    assert verify_certificate(c).intact


# --- the glance before the looks


@pytest.fixture(scope="module")
def lost(certify_models: Certify, wrecked: Path, baseline: Path) -> CertifyOutcome:
    """Both sides were measured on a few documents first, as they are where models are larger than these."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(certifying, "_pays", lambda loading, scoring: True)
        return certify_models(wrecked, baseline, **SMALL)


def test_a_wrecked_subject_fails_at_a_glance_and_the_certificate_says_what_was_not_measured(
    lost: CertifyOutcome,
) -> None:
    c = reread(lost.certificate)
    (look,) = c["looks"]["made"]
    assert (c["verdict"]["status"], look["decision"], look["documents"], look["level"]) == (
        "FAIL",
        "fail",
        GLANCE,
        1e-4,
    )
    assert c["looks"]["reached"] == [c["looks"]["glance"]["windows"]] and c["looks"]["share_used"] < 0.2
    assert {reason["gate"] for reason in c["verdict"]["reasons"]} >= {"divergence_kl"}
    decisions = {gate["name"]: gate["decision"] for gate in c["gates"]}
    assert {decisions[name] for name in ("spectral", "rmt", "variance")} == {"not_evaluated"}
    assert decisions["invariants"] == "pass" and decisions["sample_size"] == "off"
    assert c["weights"]["changes"] and c["confidence"]["label"] == "Medium"
    assert verify_certificate(c).intact


def test_a_subject_that_is_wrecked_on_few_documents_is_not_lost_where_it_may_differ(
    certify_models: Certify, wrecked: Path, early: CertifyOutcome
) -> None:
    """Where a limit of the divergence only warns, nothing of it can end a measurement."""
    softer = ({"intent": "finetune"}, {"overrides": {"sample": SAMPLE, "metrics": {"divergence": {"mode": "warn"}}}})
    for options in softer:
        outcome = certify_models(wrecked, baseline_report=early.source_report, **{**SMALL, **options})
        assert "glance" not in outcome.certificate["looks"] and _documents(outcome)[0] > GLANCE


@pytest.mark.slow
def test_fresh_and_stored_baselines_and_slow_loading_give_one_certificate_of_a_lost_subject(
    certify_models: Certify, wrecked: Path, early: CertifyOutcome, lost: CertifyOutcome, baseline: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    stored = certify_models(wrecked, baseline_report=early.source_report, **SMALL)
    monkeypatch.setattr(certifying, "_pays", lambda loading, scoring: False)
    slow = certify_models(wrecked, baseline, **SMALL)
    reached = [find_report(one.source_report) for one in (lost, slow) if one.source_report is not None]
    few, more = (json.loads(path.read_text(encoding="utf-8"))["evidence"]["plan"]["reached"] for path in reached)
    assert few == [lost.certificate["looks"]["glance"]["windows"]] and more[0] > few[0]
    apart = {"meta", "run_id", "baseline_ref", "provenance", "telemetry", "edit"}  # times, ids and digests of evidence
    for other in (stored, slow):
        assert other.certificate.keys() == lost.certificate.keys()
        for section in lost.certificate.keys() - apart - ({"data", "structure"} if other is stored else set()):
            assert other.certificate[section] == lost.certificate[section], section
        assert verify_certificate(reread(other.certificate)).intact


def test_a_baseline_that_a_lost_subject_left_behind_serves_a_good_one(
    certify_models: Certify, harmless: Path, lost: CertifyOutcome, early: CertifyOutcome, baseline: Path
) -> None:
    """It ends at the glance and its guards saw nothing, so that it is measured anew, or refused without its weights."""
    outcome = certify_models(harmless, baseline_report=lost.source_report, **SMALL)
    assert outcome.status == "PASS" and verify_certificate(reread(outcome.certificate)).intact
    for section in ("evaluation_windows", "primary_metric", "gates", "rmt", "looks"):
        assert outcome.certificate[section] == early.certificate[section], section
    away = baseline.rename(baseline.parent / "away")
    try:
        with pytest.raises(PairingError, match="before the first look ends, .* give --baseline its folder"):
            certify_models(harmless, baseline_report=lost.source_report, **SMALL)
    finally:
        away.rename(baseline)


def test_a_harmless_subject_is_glanced_at_in_passing(early: CertifyOutcome) -> None:
    """What was scored at the glance is not scored again by the subject, and the looks are those of before."""
    looks = early.certificate["looks"]
    assert looks["glance"]["windows"] != looks["reached"][0] and sum(looks["glance"]["windows"]) >= GLANCE
    largest = max(Counter(_tokens_by_document(early)).values())
    assert largest <= looks["glance"]["largest"] <= looks["planned_tokens"]


def _tokens_by_document(outcome: CertifyOutcome) -> dict[str, int]:
    sizes: Counter[str] = Counter()
    for rows in outcome.certificate["evaluation_windows"].values():
        sizes.update(dict.fromkeys(rows["document_ids"], 0))
        for document, tokens in zip(rows["document_ids"], rows["tokens"], strict=True):
            sizes[document] += tokens
    return sizes


GLANCE_FORGERIES: dict[str, Callable[[dict[str, Any]], None]] = {
    "no glance": lambda c: c["looks"].pop("glance"),
    "smaller documents planned": lambda c: c["looks"]["glance"].update(largest=1),
    "documents so large that it shows nothing": lambda c: c["looks"]["glance"].update(largest=10**9),
    "more windows": lambda c: c["looks"]["glance"].update(windows=[n + 1 for n in c["looks"]["glance"]["windows"]]),
    "a look after it": lambda c: c["looks"]["reached"].append(c["looks"]["planned_windows"]),
    "its level": lambda c: c["looks"]["made"][0].update(level=0.001),
    "a window less": lambda c: c["looks"].update(reached=[[n - 1 for n in c["looks"]["reached"][0]]]),
}


@pytest.mark.parametrize("name", GLANCE_FORGERIES)
def test_a_glance_that_was_another_one_is_noticed(name: str, lost: CertifyOutcome) -> None:
    altered = copy.deepcopy(reread(lost.certificate))
    GLANCE_FORGERIES[name](altered)
    assert not verify_certificate(altered).intact


def test_a_glance_takes_whole_documents_of_both_halves_and_leaves_something_to_look_at() -> None:
    preview, final = [f"p{i // 2}" for i in range(200)], [f"f{i // 2}" for i in range(50)]
    windows = _windows(preview, final)
    cut = glance(windows)
    assert cut is not None and min(cut) > 0
    reached, rest = windows.between((0, 0), cut).all, windows.between(cut, (200, 50)).all
    assert len({w.document for w in reached}) == GLANCE and not {w.document for w in reached} & {
        w.document for w in rest
    }
    few = [f"d{i}" for i in range(3)]
    assert glance(_windows(few, [f"f{i}" for i in range(3)])) is None
    assert glance(Windows(windows.preview[::-1], windows.final, 2, (200, 50), windows.origin)) is None


# --- looks


def test_what_lies_at_a_limit_is_looked_at_until_the_text_ends(undecided: CertifyOutcome) -> None:
    looks = undecided.certificate["looks"]
    assert undecided.status == "INCONCLUSIVE" and looks["share_used"] == 1.0
    shares = [look["documents"] / looks["planned_documents"] for look in looks["made"]]
    assert shares == pytest.approx([0.2, 0.4, 0.7, 1.0], abs=0.02) and shares[-1] == 1.0  # whole documents
    levels = [look["level"] for look in looks["made"]]
    assert levels == pytest.approx(spending_levels(shares), rel=1e-3)
    assert levels == pytest.approx([0.00100, 0.00332, 0.00990, 0.01903], rel=0.06)
    assert {look["decision"] for look in looks["made"]} == {"inconclusive"}
    assert verify_certificate(reread(undecided.certificate)).intact


@pytest.mark.slow
def test_looks_measure_what_one_look_at_all_of_the_text_does(
    certify_models: Certify, undecided: CertifyOutcome, rounded: Path, baseline: Path
) -> None:
    sample = {**SAMPLE, "early_stop": False}
    whole = certify_models(rounded, baseline, **{**SMALL, "overrides": {"sample": sample, **NEAR}}).certificate
    assert "looks" not in whole and whole["primary_metric"]["ci_level"] == 0.95
    for split, rows in whole["evaluation_windows"].items():
        looked = undecided.certificate["evaluation_windows"][split]
        assert looked["window_ids"] == rows["window_ids"] and looked["flips"] == rows["flips"]
        for name in ("baseline_loss", "subject_loss", "kl_sum"):
            assert looked[name] == pytest.approx(rows[name], rel=1e-5)
    changes = [c["rmt"]["metrics"]["worst"][0]["change"] for c in (undecided.certificate, whole)]
    assert changes[0] == pytest.approx(changes[1], rel=1e-4)
    assert sum(undecided.certificate["divergence"]["histogram"]) == undecided.certificate["divergence"]["tokens"]


@pytest.mark.slow
def test_a_stored_baseline_that_ends_early_goes_on_from_its_model_and_ends_without(
    certify_models: Certify, early: CertifyOutcome, rounded: Path, baseline: Path, undecided: CertifyOutcome
) -> None:
    request = {**SMALL, "overrides": {"sample": SAMPLE, **NEAR}, "baseline_report": early.source_report}
    again = certify_models(rounded, **request)
    assert _documents(again) == _documents(undecided)
    for split, rows in undecided.certificate["evaluation_windows"].items():
        assert rows == again.certificate["evaluation_windows"][split]
    away = baseline.rename(baseline.parent / "away")
    try:
        ended = certify_models(rounded, **request)
    finally:
        away.rename(baseline)
    assert (ended.status, _documents(ended)) == ("INCONCLUSIVE", _documents(undecided)[:1])
    assert "the stored baseline ends" in ended.notes[-1]
    assert verify_certificate(reread(ended.certificate)).intact


def test_a_run_asks_for_a_whole_baseline(early: CertifyOutcome, demo_model: Path, tmp_path: Path) -> None:
    settings = load_config(None, cli_overrides={"model.id": str(demo_model), "output.dir": str(tmp_path)})
    with pytest.raises(PairingError, match="of 60 windows, since certify decided early; .*--no-early-stop"):
        run(RunRequest(settings, profile="dev", baseline=early.source_report))


FORGERIES: dict[str, Callable[[dict[str, Any]], None]] = {
    "one look, as if all of the text": lambda c: c.pop("looks"),
    "more text planned": lambda c: c["looks"].update(planned_documents=2 * c["looks"]["planned_documents"]),
    "less text planned": lambda c: c["looks"].update(planned_documents=c["looks"]["planned_documents"] - 7),
    "more tokens planned": lambda c: c["looks"].update(planned_tokens=c["looks"]["planned_tokens"] + 1),
    "the level": lambda c: c["looks"]["made"][-1].update(level=0.025),
    "the decision of a look": lambda c: c["looks"]["made"][0].update(decision="warn"),
    "a look left out": lambda c: (c["looks"]["reached"].pop(0), c["looks"]["made"].pop(0)),
    "a look at other windows": lambda c: c["looks"]["reached"].insert(0, [1, 1]),
}


@pytest.mark.parametrize("name", FORGERIES)
def test_a_look_that_was_another_one_is_noticed(name: str, early: CertifyOutcome, undecided: CertifyOutcome) -> None:
    for outcome in (early, undecided):
        altered = copy.deepcopy(reread(outcome.certificate))
        FORGERIES[name](altered)
        assert not verify_certificate(altered).intact


def test_text_cannot_be_added_after_a_look_that_decided(undecided: CertifyOutcome) -> None:
    """Going on until a look passes is what the levels forbid: the limit is raised here so that the first look decides."""
    from invarlock.certificate.derive import derive
    from invarlock.certificate.schema import Recorded

    altered = copy.deepcopy(reread(undecided.certificate))
    altered["resolved_policy"]["metrics"]["divergence"]["flip_max"] = 0.5
    with pytest.raises(CertificateError, match="look 2 was made although the one before had decided"):
        derive(Recorded.model_validate(altered))


# --- the order of documents


def _windows(preview: list[str], final: list[str], seed: int = 1) -> Windows:
    order = document_order([preview, final], seed)
    splits = [sorted(split, key=order.__getitem__) for split in (preview, final)]
    made = [
        tuple(Window(f"{n}{i}", name, (1, 2)) for i, name in enumerate(s)) for n, s in zip("pf", splits, strict=True)
    ]
    return Windows(made[0], made[1], 2, (len(preview), len(final)), TextOrigin(seed=seed))


def test_both_halves_grow_together_and_no_look_splits_a_document() -> None:
    preview, final = [f"p{i // 2}" for i in range(200)], [f"f{i // 2}" for i in range(50)]
    windows = _windows(preview, final)
    found = cuts(windows, 1)
    assert found[-1] == (200, 50)
    for a, b in found:
        assert a / 200 == pytest.approx(b / 50, abs=0.05)
        reached = windows.between((0, 0), (a, b)).all
        rest = windows.between((a, b), (200, 50)).all
        assert not {w.document for w in reached} & {w.document for w in rest}


def test_another_seed_takes_documents_in_another_order_and_an_unordered_text_has_one_look() -> None:
    names = [f"d{i}" for i in range(100)]
    assert document_order([names], 1) != document_order([names], 2)
    windows = _windows(names, [f"f{i}" for i in range(100)])
    assert len(cuts(windows, 1)) == 4 and len(cuts(windows, 60)) == 4 and len(cuts(windows, 200)) == 1
    turned = Windows(windows.preview[::-1], windows.final, 2, (100, 100), windows.origin)
    assert cuts(turned, 1) == [(100, 100)]
