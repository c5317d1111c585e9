"""The schema that ships is the one that the typed models give, and real certificates follow it."""

from __future__ import annotations

import json
from importlib import resources
from typing import Any

import pytest
from jsonschema import Draft202012Validator

from certificates import KINDS, make_cert
from certification import reread
from invarlock.certificate.schema import json_schema
from invarlock.certificate.verify import validate_certificate
from invarlock.core.exceptions import CertificateError
from invarlock.flow.certify import CertifyOutcome

from .tampering import replaced

REQUIRED = ("schema_version", "run_id", "meta", "dataset", "primary_metric", "artifacts", "plugins")
BOOLEANS = {
    "primary_metric_acceptable",
    "primary_metric_tail_acceptable",
    "preview_final_drift_acceptable",
    "guard_overhead_acceptable",
    "invariants_pass",
    "spectral_stable",
    "rmt_stable",
    "hysteresis_applied",
    "moe_observed",
    "moe_identity_ok",
}


@pytest.fixture(scope="module")
def shipped() -> dict[str, Any]:
    text = resources.files("invarlock.data").joinpath("certificate.schema.json").read_text(encoding="utf-8")
    loaded: dict[str, Any] = json.loads(text)
    return loaded


@pytest.mark.slow
def test_the_shipped_schema_is_current_and_of_the_2020_draft(shipped: dict[str, Any]) -> None:
    assert shipped == json_schema(), "write json.dumps(json_schema(), indent=1) to data/certificate.schema.json"
    assert shipped["$schema"] == "https://json-schema.org/draft/2020-12/schema"
    Draft202012Validator.check_schema(shipped)
    assert set(REQUIRED) <= set(shipped["required"])


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["passed", "failed", "refused"])
def test_real_certificates_follow_the_shipped_schema(
    kind: str, shipped: dict[str, Any], request: pytest.FixtureRequest
) -> None:
    outcome: CertifyOutcome = request.getfixturevalue(kind)
    certificate = reread(outcome.certificate)
    assert list(Draft202012Validator(shipped).iter_errors(certificate)) == []
    validate_certificate(certificate)
    assert set(certificate["validation"]) <= BOOLEANS
    assert {type(value) for value in certificate["validation"].values()} == {bool}


@pytest.mark.slow
@pytest.mark.parametrize("kind", [kind for kind in KINDS if kind != "hostile"])
def test_made_certificates_follow_the_shipped_schema(kind: str, shipped: dict[str, Any]) -> None:
    assert list(Draft202012Validator(shipped).iter_errors(reread(make_cert(kind)))) == []


@pytest.mark.parametrize("key", REQUIRED)
def test_every_required_section_is_required_by_both(key: str, shipped: dict[str, Any], passed: CertifyOutcome) -> None:
    certificate = {name: value for name, value in reread(passed.certificate).items() if name != key}
    with pytest.raises(CertificateError, match=key):
        validate_certificate(certificate)
    assert not Draft202012Validator(shipped).is_valid(certificate)


@pytest.mark.parametrize(
    ("path", "value"),
    [
        (("schema_version",), "v2"),
        (("primary_metric", "decision"), "maybe"),
        (("validation", "looks_good"), True),
        (("verdict", "status"), "OK"),
        (("evaluation_windows", "final", "tokens"), "many"),
        (("unheard_of",), 1),
    ],
)
def test_what_the_schema_forbids_is_refused_by_both(
    path: tuple[str, ...], value: Any, shipped: dict[str, Any], passed: CertifyOutcome
) -> None:
    certificate = replaced(reread(passed.certificate), path, value)
    with pytest.raises(CertificateError, match="schema v1"):
        validate_certificate(certificate)
    assert not Draft202012Validator(shipped).is_valid(certificate)
