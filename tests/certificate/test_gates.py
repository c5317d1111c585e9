"""Gates pass on measured, finite values within their limits only, and the verdict follows from the gates."""

from __future__ import annotations

from typing import Any

import pytest

from certificates import certify, make_evidence, make_weights
from certification import gates, reasons, reread
from invarlock.certificate.gates import verdict_of
from invarlock.certificate.schema import Certificate
from invarlock.certificate.verify import verify_certificate

Document = dict[str, Any]
STRICT = {"sample": {"preview": 180, "final": 180, "min_tokens": 0}}


def _certificate(overrides: Document | None = None, facts: Document | None = None, **subject: Any) -> Document:
    subject.setdefault("kl", 0.003)
    baseline = make_evidence()
    return reread(
        certify(baseline, make_evidence(**subject), overrides={**STRICT, **(overrides or {})}, **(facts or {}))
    )


@pytest.mark.slow
@pytest.mark.parametrize(
    ("shift", "spread", "decision", "status"),
    [
        (0.0, 0.0, "pass", "PASS"),
        (0.05, 0.02, "pass", "PASS"),
        (0.0953, 0.2, "inconclusive", "INCONCLUSIVE"),  # ln 1.10
        (0.15, 0.02, "fail", "FAIL"),
    ],
)
def test_the_ratio_is_judged_by_its_interval(shift: float, spread: float, decision: str, status: str) -> None:
    certificate = _certificate(shift=shift, spread=spread)
    metric = certificate["primary_metric"]
    assert (metric["decision"], certificate["verdict"]["status"]) == (decision, status)
    assert certificate["validation"]["primary_metric_acceptable"] is (decision == "pass")
    assert metric["windows_needed"] is None
    if decision == "inconclusive":
        assert metric["documents_needed"] > metric["clusters"]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("kl", "flips", "gate", "decision"),
    [
        (0.004, 0.03, "divergence_kl", "pass"),
        (0.15, 0.03, "divergence_kl", "fail"),
        (0.004, 0.03, "token_flips", "pass"),
        (0.004, 0.30, "token_flips", "fail"),
    ],
)
def test_divergence_fails_where_the_ratio_sees_nothing(kl: float, flips: float, gate: str, decision: str) -> None:
    certificate = _certificate(kl=kl, flips=flips)
    assert gates(certificate)["primary_metric"] == "pass"
    assert gates(certificate)[gate] == decision
    assert certificate["verdict"]["status"] == ("PASS" if decision == "pass" else "FAIL")


@pytest.mark.slow
@pytest.mark.parametrize(
    ("limit", "decision"),
    [
        (0.9, "fail"),
        (0.98, "inconclusive"),
        (1.002, "inconclusive"),
        (1.05, "pass"),
        (1.2, "pass"),
    ],  # times the estimate
)
def test_flips_are_decided_by_their_interval_on_both_sides_of_the_limit(limit: float, decision: str) -> None:
    rate = _certificate(flips=0.1)["divergence"]["flip_rate"]
    certificate = _certificate({"metrics": {"divergence": {"flip_max": rate * limit}}}, flips=0.1)
    assert gates(certificate)["token_flips"] == decision
    low, high = certificate["divergence"]["flip_ci"]
    assert low < rate < high < rate * 1.05


@pytest.mark.slow
def test_intent_finetune_turns_divergence_into_a_warning_and_says_so() -> None:
    certificate = _certificate(kl=0.3, flips=0.4, facts={"intent": "finetune"})
    gate = next(gate for gate in certificate["gates"] if gate["name"] == "divergence_kl")
    assert (gate["decision"], certificate["verdict"]["status"]) == ("warn", "PASS")
    assert "finetune" in gate["reason"]


@pytest.mark.slow
def test_divergence_that_was_not_measured_is_inconclusive_and_off_only_by_policy() -> None:
    assert _certificate(kl=None)["verdict"]["status"] == "INCONCLUSIVE"
    off = _certificate({"metrics": {"divergence": {"mode": "off"}}}, kl=None)
    assert (gates(off)["divergence_kl"], off["verdict"]["status"]) == ("off", "PASS")


@pytest.mark.slow
@pytest.mark.parametrize("lost", [1, 200])
def test_a_loss_that_is_not_finite_fails_every_gate_that_needs_it(lost: int) -> None:
    certificate = _certificate(lost=lost)
    decided = gates(certificate)
    assert decided["primary_metric"] == decided["preview_final_drift"] == "fail"
    assert decided["primary_metric_tail"] == "fail"
    assert certificate["verdict"]["status"] == "FAIL"
    good = ("primary_metric_acceptable", "preview_final_drift_acceptable", "primary_metric_tail_acceptable")
    assert [certificate["validation"][name] for name in good] == [False] * 3


@pytest.mark.slow
@pytest.mark.parametrize(("shortfall", "status"), [("stop", "INCONCLUSIVE"), ("warn", "PASS")])
def test_too_small_a_sample_never_passes_outside_dev(shortfall: str, status: str) -> None:
    wanted = {"sample": {"preview": 500, "final": 500, "min_tokens": 0, "shortfall": shortfall}}
    certificate = _certificate(wanted, weights={n: w * 1.001 for n, w in make_weights().items()}, shift=0.001)
    assert certificate["verdict"]["status"] == status
    assert "200 preview windows, 500 needed" in next(
        gate["reason"] for gate in certificate["gates"] if gate["name"] == "sample_size"
    )


@pytest.mark.slow
@pytest.mark.parametrize(
    ("ratio", "required", "decision", "status"),
    [
        (1.0, True, "pass", "PASS"),
        (1.02, True, "fail", "FAIL"),
        (None, True, "fail", "FAIL"),
        ("skipped", True, "not_evaluated", "INCONCLUSIVE"),
        ("skipped", False, "off", "PASS"),
    ],
)
def test_guard_overhead(ratio: Any, required: bool, decision: str, status: str) -> None:
    skipped = ratio == "skipped"
    overhead = {"evaluated": not skipped, "ratio": None if skipped else ratio, "windows": 0 if skipped else 8}
    wanted = {"metrics": {"guard_overhead": {"required": required}}}
    certificate = _certificate(wanted, facts={"guard_overhead": overhead})
    assert (gates(certificate)["guard_overhead"], certificate["verdict"]["status"]) == (decision, status)


@pytest.mark.parametrize(
    ("passed", "evaluated", "warnings", "decision", "status"),
    [
        (True, True, [], "pass", "PASS"),
        (True, True, ["careful"], "warn", "PASS"),
        (False, True, [], "fail", "FAIL"),
        (False, False, [], "not_evaluated", "INCONCLUSIVE"),
        (True, False, [], "not_evaluated", "INCONCLUSIVE"),
    ],
)
def test_a_plugin_guard_is_a_gate(
    passed: bool, evaluated: bool, warnings: list[str], decision: str, status: str
) -> None:
    found = {"passed": passed, "evaluated": evaluated, "action": "warn", "message": "said so", "warnings": warnings}
    certificate = _certificate(facts={"guards": {"mine": found}})
    assert (gates(certificate)["plugin:mine"], certificate["verdict"]["status"]) == (decision, status)
    assert certificate["plugin_guards"]["mine"]["message"] == "said so"
    assert verify_certificate(certificate).intact


@pytest.mark.slow
def test_a_guard_asked_for_and_not_measured_is_inconclusive() -> None:
    baseline, subject = make_evidence(), make_evidence(kl=0.001)
    stats = {name: value for name, value in subject.guards.items() if name != "rmt"}
    certificate = reread(certify(baseline, subject.model_copy(update={"guards": stats}), overrides=STRICT))
    assert gates(certificate)["rmt"] == "not_evaluated"
    assert certificate["validation"]["rmt_stable"] is False
    assert certificate["verdict"]["status"] == "INCONCLUSIVE"


@pytest.mark.slow
def test_variance_without_anything_to_equalise_is_off_and_decides_nothing() -> None:
    """Not every architecture has a place where variance could be equalised."""
    baseline, subject = make_evidence(), make_evidence(kl=0.001)
    nothing = {"taps": []}
    old, new = (x.model_copy(update={"guards": {**x.guards, "variance": nothing}}) for x in (baseline, subject))
    wanted = {**STRICT, "guards": {"order": ["invariants", "spectral", "rmt", "variance"]}}
    certificate = reread(certify(old, new, overrides=wanted))
    assert (gates(certificate)["variance"], certificate["verdict"]["status"]) == ("off", "PASS")


def test_contracts_that_differ_fail() -> None:
    subject = make_evidence(kl=0.001)
    contracts = {**subject.contracts, "spectral": "another"}
    certificate = reread(
        certify(make_evidence(), subject.model_copy(update={"contracts": contracts}), overrides=STRICT)
    )
    assert ("MEASUREMENT_CONTRACTS", None) in reasons(certificate)
    assert certificate["verdict"]["status"] == "FAIL"


def test_no_gates_at_all_do_not_pass() -> None:
    assert verdict_of([], None).status == "INCONCLUSIVE"  # type: ignore[arg-type]  # nothing is read without gates


def test_a_failure_outranks_what_is_open() -> None:
    certificate = _certificate(shift=0.3, kl=None)
    assert {"fail", "not_evaluated"} <= set(gates(certificate).values())
    assert certificate["verdict"]["status"] == "FAIL"


@pytest.mark.slow
def test_reasons_name_the_tensor_and_are_few() -> None:
    weights = {name: value * 9 for name, value in make_weights().items()}
    certificate = _certificate(weights=weights)
    named = [tensor for code, tensor in reasons(certificate) if code.startswith("spectral")]
    assert 0 < len(named) <= 5
    assert set(named) <= set(weights)


@pytest.mark.slow
def test_every_gate_has_one_shape() -> None:
    certificate = Certificate.model_validate(_certificate())
    names = [gate.name for gate in certificate.gates]
    assert len(names) == len(set(names)) >= 10
    for gate in certificate.gates:
        assert gate.basis and gate.reason, gate.name
