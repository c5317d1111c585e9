"""What follows from recorded measurements, on seeded certificates."""

from __future__ import annotations

import pytest

from certificates import certify, make_cert, make_evidence
from invarlock.assurance import verify_certificate


@pytest.mark.slow
@pytest.mark.parametrize(
    ("kind", "status"),
    [
        ("pass", "PASS"),
        ("self", "PASS"),
        ("fail", "FAIL"),
        ("refused", "FAIL"),
        ("non_finite", "FAIL"),
        ("inconclusive", "INCONCLUSIVE"),
        ("accuracy", "INCONCLUSIVE"),
    ],
)
def test_certificate_derives_again_to_itself(kind: str, status: str) -> None:
    outcome = verify_certificate(make_cert(kind))
    assert (outcome.intact, outcome.problems, outcome.verdict) == (True, [], status)


def test_equal_accuracy_passes_without_a_divergence_of_next_tokens() -> None:
    certificate = certify(make_evidence(correct=0.7), make_evidence(correct=0.7))
    assert certificate["verdict"]["status"] == "PASS"
    assert not {"divergence_kl", "token_flips"} & {gate["name"] for gate in certificate["gates"]}


def test_language_model_without_divergence_is_inconclusive() -> None:
    certificate = certify(make_evidence(), make_evidence())
    assert certificate["verdict"]["status"] == "INCONCLUSIVE"
    assert {reason["gate"] for reason in certificate["verdict"]["reasons"]} == {"divergence_kl", "token_flips"}


def test_loss_that_is_no_number_is_named_with_its_windows() -> None:
    reason = make_cert("non_finite")["primary_metric"]["reason"]
    assert reason == "the ratio is not finite: the loss is NaN or infinite in 3 of 400 windows of the subject"
