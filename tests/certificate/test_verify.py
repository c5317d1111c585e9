"""Verification: what is authentic holds, whatever is altered does not, and what a forger could do is said."""

from __future__ import annotations

import copy
import itertools
from collections.abc import Callable
from typing import Any

import pytest

from certificates import make_cert
from certification import reread
from invarlock.certificate.reports import certificate_json
from invarlock.certificate.schema import Recorded
from invarlock.certificate.verify import (
    SIGNATURE_ONLY,
    STEPS,
    Verification,
    validate_certificate,
    verify_certificate,
)
from invarlock.core.exceptions import CertificateError, InvarlockError
from invarlock.core.files import read_json
from invarlock.flow.certify import CertifyOutcome
from invarlock.policy.resolve import merge

from .tampering import alterations, replaced

Document = dict[str, Any]


@pytest.fixture(scope="module")
def authentic(passed: CertifyOutcome, failed: CertifyOutcome, refused: CertifyOutcome) -> dict[str, Document]:
    return {
        "passed": reread(passed.certificate),
        "failed": reread(failed.certificate),
        "refused": reread(refused.certificate),
        "accuracy": reread(make_cert("accuracy")),
        "inconclusive": reread(make_cert("inconclusive")),
        "not finite": reread(make_cert("non_finite")),
    }


@pytest.mark.parametrize(
    ("kind", "verdict"),
    [
        ("passed", "PASS"),
        ("failed", "FAIL"),
        ("refused", "FAIL"),
        ("accuracy", None),
        ("inconclusive", "INCONCLUSIVE"),
        ("not finite", "FAIL"),
    ],
)
def test_an_authentic_certificate_is_intact_whatever_its_verdict(
    kind: str, verdict: str | None, authentic: dict[str, Document]
) -> None:
    outcome = verify_certificate(authentic[kind])
    verdict = verdict or authentic[kind]["verdict"]["status"]
    assert (outcome.intact, outcome.verdict, outcome.problems) == (True, verdict, [])
    assert outcome.passed is (verdict == "PASS")
    assert outcome.steps == ["schema", *(step.name for step in STEPS)]


def _holds(document: Document) -> bool:
    try:
        return verify_certificate(document).intact
    except CertificateError:
        return False


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["failed", "refused"])
def test_no_value_can_be_changed(kind: str, authentic: dict[str, Document]) -> None:
    tried = 0
    every_other = itertools.islice(alterations(authentic[kind]), 0, None, 2)  # to save time
    for path, what, altered in every_other:
        tried += 1
        assert not _holds(altered), f"{'.'.join(map(str, path))} {what} is not noticed"
    assert tried > 250


def test_a_number_has_one_spelling(authentic: dict[str, Document]) -> None:
    document = authentic["passed"]
    gate = next(i for i, gate in enumerate(document["gates"]) if gate["name"] == "pairing")
    path = ("gates", gate, "measured")
    assert type(document["gates"][gate]["measured"]) is int
    outcome = verify_certificate(replaced(document, path, 1.0))
    assert (outcome.failed_step, outcome.problems) == (
        "spelling of numbers",
        [f"gates.{gate}.measured is spelled 1.0; expected 1"],
    )


def _forge(document: Document, change: Callable[[Document], None]) -> Verification:
    """Change what was recorded and derive all that follows from it again, run id included, as a forger would."""
    forged = copy.deepcopy(document)
    change(forged)
    return verify_certificate(reread(certificate_json(Recorded.model_validate(forged))))


def _set(*path: str | int, to: Any) -> Callable[[Document], None]:
    def change(document: Document) -> None:
        inner = document
        for key in path[:-1]:
            inner = inner[key]
        inner[path[-1]] = to

    return change


def _lift_limits(document: Document) -> None:
    document["resolved_policy"]["metrics"]["pm_ratio"]["limit"] = 3.0
    document["resolved_policy"]["metrics"]["divergence"].update(kl_max=9.0, flip_max=1.0)


def _soften_guard(document: Document) -> None:
    document["resolved_policy"]["guards"]["spectral"]["max_caps"] = 99


def _shrink_kl(document: Document) -> None:
    for rows in document["evaluation_windows"].values():
        rows["kl_sum"] = [value / 100 for value in rows["kl_sum"]]
        rows["kl_max"] = [value / 100 for value in rows["kl_max"]]


def _shrink_kl_sums_only(document: Document) -> None:
    rows = document["evaluation_windows"]["final"]
    rows["kl_sum"] = [value / 1000 for value in rows["kl_sum"]]


def _drop_half_of_the_baseline(document: Document) -> None:
    rows = document["evaluation_windows"]["final"]
    rows["baseline_loss"] = rows["baseline_loss"][: len(rows["baseline_loss"]) // 2]


def _repeat_a_window(document: Document) -> None:
    rows = document["evaluation_windows"]["final"]
    rows["window_ids"][1] = rows["window_ids"][0]


FORGERIES_CAUGHT: dict[str, tuple[Callable[[Document], None], str]] = {
    "limits lifted": (_lift_limits, "policy"),
    "guard softened": (_soften_guard, "policy"),
    "guard left out": (_set("resolved_policy", "guards", "order", to=["invariants"]), "policy"),
    "tier renamed": (_set("meta", "tier", to="aggressive"), "policy"),
    "profile renamed": (_set("meta", "profile", to="release"), "policy"),
    "tier that is none": (_set("policy_provenance", "tier", to=None), "policy"),
    "tiers of another release": (_set("policy_provenance", "tiers_digest", to="0" * 16), "policy"),
    "KL made small": (_shrink_kl, "window rows and metrics"),
    "KL sums under their maxima": (_shrink_kl_sums_only, "pairing and counts"),
    "rows left out": (_drop_half_of_the_baseline, "window rows and metrics"),
    "window repeated": (_repeat_a_window, "pairing and counts"),
    "no scored tokens": (_set("evaluation_windows", "final", "tokens", 0, to=0), "window rows and metrics"),
    "more flips than tokens": (_set("evaluation_windows", "final", "flips", 0, to=10**6), "window rows and metrics"),
    "configuration in one place": (_set("meta", "subject_model", "behaviour", to={}), "names and run id"),
    "tokenizer in one place": (_set("structure", "subject_tokenizer", to=("0" * 32, 4096)), "names and run id"),
    "provider digest in one place": (_set("provenance", "provider_digest", to="0" * 64), "names and run id"),
    "device in one place": (_set("meta", "device", to="cuda"), "names and run id"),
    "adapter in one place": (_set("meta", "adapter", to="hf_mlm"), "names and run id"),
}


@pytest.mark.slow
@pytest.mark.parametrize("name", FORGERIES_CAUGHT)
def test_a_forger_who_derives_everything_again_is_still_caught(name: str, authentic: dict[str, Document]) -> None:
    change, step = FORGERIES_CAUGHT[name]
    try:
        outcome = _forge(authentic["failed"], change)
    except (InvarlockError, ValueError, TypeError):
        # nothing follows from what was recorded then: the best that is left to a forger is the altered document
        forged = copy.deepcopy(authentic["failed"])
        change(forged)
        outcome = verify_certificate(forged)
    assert not outcome.intact
    assert outcome.failed_step == step, outcome.problems


def test_sides_measured_under_other_contracts_fail_even_when_all_is_derived_again(
    authentic: dict[str, Document],
) -> None:
    outcome = _forge(authentic["passed"], _set("provenance", "contracts", "subject", "spectral", to="0" * 16))
    assert (outcome.intact, outcome.verdict) == (True, "FAIL")


def _copy_losses(document: Document) -> None:
    for rows in document["evaluation_windows"].values():
        rows["subject_loss"] = list(rows["baseline_loss"])


def _other_digest(document: Document) -> None:
    document["structure"]["subject"]["tensors"][0]["digest"] = "0" * 32


def _calm_spectra(document: Document) -> None:
    for module in document["spectral"]["facts"]["modules"]:
        module["sigma"][1] = module["sigma"][0]


def _rename_windows(document: Document) -> None:
    for split, rows in document["evaluation_windows"].items():
        rows["window_ids"] = [f"{split}-{i}" for i in range(len(rows["window_ids"]))]


def _loosen_by_override(document: Document) -> None:
    wanted = {"metrics": {"pm_ratio": {"limit": 3.0}}}
    document["policy_provenance"]["overrides"] = merge(document["policy_provenance"]["overrides"], wanted)
    document["resolved_policy"]["metrics"]["pm_ratio"]["limit"] = 3.0


#: what only a signature binds -> the words under which SIGNATURE_ONLY says so
FORGERIES_OPEN: dict[str, tuple[Callable[[Document], None], str]] = {
    "losses": (_copy_losses, "per-window losses"),
    "digest of a tensor": (_other_digest, "tables of tensors"),
    "spectra": (_calm_spectra, "spectra"),
    "window ids": (_rename_windows, "window ids"),
    "limit by an override that the certificate shows": (_loosen_by_override, "overrides"),
    "intent": (_set("meta", "intent", to="finetune"), "intent"),
    "name of a model": (_set("meta", "subject_model", "id", to="another"), "names of models"),
    "label of the edit": (_set("edit", "label", to="another"), "edit"),
    "another baseline's distributions": (_set("divergence", "reference_matches", to=False), "reference_matches"),
    "versions": (_set("provenance", "versions", "torch", to="9.9"), "versions"),
    "guard overhead": (_set("guard_overhead", "skipped", to="no reason"), "guard_overhead"),
    "evidence digests": (_set("provenance", "evidence_digests", "subject", to="0" * 64), "evidence digests"),
}


@pytest.mark.slow
@pytest.mark.parametrize("name", FORGERIES_OPEN)
def test_what_a_forger_can_still_do_is_listed_as_bound_by_a_signature_only(
    name: str, authentic: dict[str, Document]
) -> None:
    change, words = FORGERIES_OPEN[name]
    assert not verify_certificate(_changed(authentic["failed"], change)).intact  # without deriving again it shows
    assert _forge(authentic["failed"], change).intact
    assert any(words in entry for entry in SIGNATURE_ONLY)


def _changed(document: Document, change: Callable[[Document], None]) -> Document:
    altered = copy.deepcopy(document)
    change(altered)
    return altered


def test_the_baselines_report_shows_what_was_made_of_its_rows(
    authentic: dict[str, Document], passed: CertifyOutcome
) -> None:
    assert passed.source_report is not None
    report = read_json(passed.source_report, "the baseline's report")
    assert verify_certificate(authentic["failed"], baseline=report).intact

    def flatter(document: Document) -> None:
        rows = document["evaluation_windows"]["final"]
        rows["baseline_loss"] = list(rows["subject_loss"])

    forged = reread(certificate_json(Recorded.model_validate(_changed(authentic["failed"], flatter))))
    assert verify_certificate(forged).intact
    outcome = verify_certificate(forged, baseline=report)
    assert outcome.failed_step == "pairing and counts"
    assert "evaluation_windows.final differs from the baseline report" in outcome.problems[0]


@pytest.mark.parametrize("side", ["baseline", "subject"])
def test_weights_are_held_against_the_files_that_are_given(side: str, authentic: dict[str, Document]) -> None:
    document = authentic["passed"]
    digest = document["weights"][f"{side}_digest"]
    assert verify_certificate(document, weights={side: digest}).intact
    outcome = verify_certificate(document, weights={side: "0" * 64})
    assert (outcome.intact, outcome.failed_step) == (False, "weights")
    assert side in outcome.problems[0]


def test_verification_needs_nothing_of_the_environment_it_was_made_in(
    authentic: dict[str, Document], monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, value in (
        ("CONFIG_ROOT", "/nowhere"),
        ("CI_PREVIEW", "3"),
        ("TINY_RELAX", "1"),
        ("BOOTSTRAP_BCA", "0"),
        ("PM_ACCEPTANCE_MAX", "9"),
    ):
        monkeypatch.setenv(f"INVARLOCK_{name}", value)
    assert verify_certificate(authentic["passed"]).intact


@pytest.mark.parametrize("tolerance", [-1.0, 0.001, float("nan")])
def test_a_tolerance_that_would_hide_changes_is_refused(tolerance: float, authentic: dict[str, Document]) -> None:
    with pytest.raises(CertificateError, match="tolerance"):
        verify_certificate(authentic["passed"], tolerance=tolerance)


@pytest.mark.parametrize(
    ("document", "message"),
    [
        ([], "is list; expected a JSON object"),
        ("v1", "is str"),
        ({}, "schema v1 at schema_version: Field required"),
        ({"schema_version": "v2"}, "Input should be 'v1'"),
    ],
)
def test_what_is_no_certificate_is_a_certificate_error(document: Any, message: str) -> None:
    with pytest.raises(CertificateError, match=message):
        validate_certificate(document)


def test_a_schema_error_names_the_place(authentic: dict[str, Document]) -> None:
    altered = replaced(authentic["passed"], ("primary_metric", "ci"), [0.0])
    with pytest.raises(CertificateError, match=r"at primary_metric\.ci\.1"):
        validate_certificate(altered)
    assert validate_certificate(authentic["passed"]) is None
