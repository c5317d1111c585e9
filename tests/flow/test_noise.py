"""The noise floor: what arithmetic alone does to the figures, recorded with its condition, and deciding nothing."""

from __future__ import annotations

import math
from pathlib import Path

import pytest

from certification import Certify, reread
from invarlock.assurance import verify_certificate
from invarlock.core.exceptions import ConfigError
from invarlock.flow.certify import CertifyOutcome, CertifyRequest
from invarlock.reporting.terminal import summary_lines


@pytest.fixture(scope="module")
def measured(certify_models: Certify, harmless: Path, demo_model: Path) -> CertifyOutcome:
    return certify_models(harmless, demo_model, noise_floor=True)


def test_each_way_to_compute_is_recorded_with_what_it_moved(measured: CertifyOutcome) -> None:
    floors = {row["name"]: row for row in measured.certificate["noise_floor"]}
    assert set(floors) == {"batch", "threads", "attention", "dtype"}
    assert {floors["attention"]["usual"], floors["attention"]["other"]} == {"sdpa", "eager"}
    assert (floors["dtype"]["usual"], floors["dtype"]["other"]) == ("float32", "bfloat16")
    for name in ("batch", "threads", "attention"):
        assert abs(floors[name]["log_ratio"]) < 1e-5 and floors[name]["flip_rate"] < 0.01
    assert abs(floors["dtype"]["log_ratio"]) > 1e-5 and floors["dtype"]["kl_mean"] > 1e-6
    assert all(row["tokens"] >= row["windows"] >= row["documents"] > 0 for row in floors.values())


def test_the_distance_is_in_standard_errors_of_both(measured: CertifyOutcome) -> None:
    c = measured.certificate
    floor = max(c["noise_floor"], key=lambda row: abs(row["log_ratio"]))
    metric, found = c["primary_metric"], c["noise_distance"]
    both = math.sqrt(metric["std_error"] ** 2 + floor["std_error"] ** 2)
    assert found["name"] == floor["name"] and found["floor"] == pytest.approx(abs(floor["log_ratio"]))
    assert found["distance"] == pytest.approx((abs(metric["log_ratio"]) - abs(floor["log_ratio"])) / both)
    assert any(line.startswith("noise ") for line in summary_lines(c))


def test_verify_derives_the_distance_again(measured: CertifyOutcome) -> None:
    c = reread(measured.certificate)
    assert verify_certificate(c).intact
    c["noise_distance"]["distance"] += 1.0
    assert not verify_certificate(c).intact


def test_it_changes_no_verdict_and_no_figure(
    certify_models: Certify, wrecked: Path, harmless: Path, demo_model: Path, measured: CertifyOutcome
) -> None:
    assert certify_models(wrecked, baseline_report=measured.source_report, noise_floor=True).status == "FAIL"
    without = certify_models(harmless, demo_model).certificate
    assert "noise_floor" not in without and "noise_distance" not in without
    assert without["evaluation_windows"] == measured.certificate["evaluation_windows"]
    assert without["gates"] == measured.certificate["gates"]


def test_a_served_engine_has_none() -> None:
    with pytest.raises(ConfigError, match="noise floor"):
        CertifyRequest(subject="a", baseline="b", engine="openai=http://127.0.0.1:1", noise_floor=True)
