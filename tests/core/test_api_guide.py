"""The examples of the API guide, run as printed; only the model's id and the provider's name differ."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from invarlock.core.api import Guard, GuardChain, ModelEdit


@pytest.fixture(scope="module")
def quick_start(demo_model: Path, calibration: list[dict[str, Any]]) -> dict[str, Any]:
    from invarlock.adapters import HF_Causal_Auto_Adapter
    from invarlock.core.api import RunConfig
    from invarlock.edits import NoopEdit, RTNQuantEdit
    from invarlock.flow.execute import CoreRunner
    from invarlock.guards import InvariantsGuard, SpectralGuard

    adapter = HF_Causal_Auto_Adapter()
    edit = RTNQuantEdit(bitwidth=8, per_channel=True, group_size=128, clamp_ratio=0.005)
    reports: dict[str, Any] = {}
    for name, data, chosen in (
        ("bare", None, edit),
        ("real", calibration, edit),
        ("baseline", calibration, NoopEdit()),
    ):
        model = adapter.load_model(str(demo_model), device="auto")
        guards = [InvariantsGuard(), SpectralGuard(sigma_quantile=0.95, deadband=0.10)]
        config = RunConfig(device="auto")
        reports[name] = CoreRunner().execute(model, adapter, chosen, guards, config, calibration_data=data)
    return reports


@pytest.mark.slow
def test_the_quick_start_finishes_with_a_marked_metric(quick_start: dict[str, Any]) -> None:
    report = quick_start["bare"]
    metric = report.metrics.get("primary_metric")
    assert (report.status, report.error) == ("success", None)
    assert (metric["mock"], metric["source"]) == (True, "synthetic")
    assert {name: result["passed"] for name, result in report.guards.items()} == {"invariants": True, "spectral": True}


def test_with_calibration_data_the_metric_is_real(quick_start: dict[str, Any]) -> None:
    metric = quick_start["real"].metrics["primary_metric"]
    assert quick_start["real"].status == "success"
    assert (metric["mock"], metric["source"]) == (False, "calibration_data")
    assert metric["display_ci"][0] <= metric["ratio_vs_baseline"] <= metric["display_ci"][1]
    assert metric["ratio_vs_baseline"] == pytest.approx(1.0, abs=0.02)


def test_the_certificate_example(quick_start: dict[str, Any]) -> None:
    from invarlock.assurance import make_certificate, render_certificate_markdown, validate_certificate
    from invarlock.core.exceptions import CertificateError

    certificate = make_certificate(quick_start["real"], quick_start["baseline"])
    assert validate_certificate(certificate) is None
    assert certificate["verdict"]["status"] in render_certificate_markdown(certificate)
    with pytest.raises(CertificateError, match="synthetic"):
        make_certificate(quick_start["bare"], quick_start["baseline"])


class CustomGuard(Guard):
    name = "custom_guard"

    def prepare(self, model, adapter, calib, policy):  # type: ignore[no-untyped-def]
        return {"ready": True}

    def validate(self, model, adapter, context):  # type: ignore[no-untyped-def]
        return {"passed": True, "action": "warn", "metrics": {"ok": 1}}


@pytest.mark.slow
def test_the_custom_guard_and_the_calibration_format(demo_model: Path) -> None:
    from invarlock.adapters import HF_Causal_Adapter
    from invarlock.core.api import RunConfig
    from invarlock.edits import NoopEdit
    from invarlock.flow.execute import CoreRunner

    batch = {"input_ids": [[101, 102, 103]], "attention_mask": [[1, 1, 1]], "labels": [[101, 102, 103]]}
    adapter = HF_Causal_Adapter()
    report = CoreRunner().execute(
        adapter.load_model(str(demo_model)),
        adapter,
        NoopEdit(),
        [CustomGuard()],
        RunConfig(),
        calibration_data=[batch, batch],
        auto_config={"tier": "balanced"},
        edit_config={},
        preview_n=1,
        final_n=1,
    )
    assert report.status == "success"
    assert report.guards["custom_guard"]["metrics"] == {"ok": 1}
    assert any("custom_guard" in warning for warning in report.meta["warnings"])


def test_the_guard_chain_example() -> None:
    class Full(CustomGuard):
        def before_edit(self, model: Any) -> str:
            return "before"

        def after_edit(self, model: Any) -> str:
            return "after"

        def finalize(self, model: Any) -> str:
            return "end"

    class Bare(Guard):
        name = "bare"

        def validate(self, model: Any, adapter: Any, context: dict[str, Any]) -> dict[str, Any]:
            return {"passed": True}

    chain = GuardChain([Full(), Bare()])
    assert chain.prepare_all(None, None, None, {"custom_guard": {}}) == {"custom_guard": {"ready": True}}
    assert chain.before_edit_all(None) == {"custom_guard": "before"}
    assert chain.after_edit_all(None) == {"custom_guard": "after"}
    assert chain.validate_all(None, None)["bare"] == {"passed": True}
    assert chain.finalize_all(None) == {"custom_guard": "end"}


def test_an_edit_needs_apply() -> None:
    with pytest.raises(TypeError, match="abstract"):
        ModelEdit()  # type: ignore[abstract]
