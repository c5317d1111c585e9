"""What a request names is done or refused by its key: never recorded and passed over."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from invarlock.assurance.certification import request_from
from invarlock.certificate.reports import check_baseline, evidence_of
from invarlock.core.api import RunConfig
from invarlock.core.exceptions import CertificateError, ConfigError
from invarlock.flow.sampling import check_same_data
from invarlock.guards import InvariantsGuard, RMTGuard, SpectralGuard, VarianceGuard
from invarlock.policy.config import load_config

BASELINE = Path(__file__).parents[1] / "assets/certificates/pass_8bit.baseline.report.json"


@pytest.fixture(scope="module")
def stored() -> dict[str, Any]:
    """A baseline measured on python_docs in windows of 160 tokens, seed 42."""
    report: dict[str, Any] = json.loads(BASELINE.read_text(encoding="utf-8"))
    return report


@pytest.mark.parametrize(
    ("asked", "named"),
    [
        ({"provider": "synthetic"}, "dataset.provider is 'synthetic', and the stored baseline .* 'python_docs'"),
        ({"seq_len": 64}, "dataset.seq_len is 64"),
        ({"seed": 7}, "dataset.seed is 7"),
        ({"stride": 80}, "dataset.stride is 80"),
        ({"provider": "python_docs", "split": "train"}, "dataset.split is 'train'"),
        ({"slices": {"a": {"provider": "python_docs"}}}, "dataset.slices"),
        ({"provider": "local_jsonl", "file": "nowhere.jsonl"}, "dataset.provider"),
    ],
)
def test_a_stored_baseline_of_other_data_is_refused_by_key(
    stored: dict[str, Any], asked: dict[str, Any], named: str
) -> None:
    with pytest.raises(ConfigError, match=named):
        check_same_data(evidence_of(stored, "baseline").data, asked)


@pytest.mark.parametrize("asked", [{}, {"seed": 42}, {"provider": "python_docs", "seq_len": 160, "seed": 42}])
def test_a_stored_baseline_of_the_data_asked_for_is_taken(stored: dict[str, Any], asked: dict[str, Any]) -> None:
    check_same_data(evidence_of(stored, "baseline").data, asked)


def test_a_data_file_that_is_gone_is_refused(stored: dict[str, Any], tmp_path: Path) -> None:
    path = str(tmp_path / "gone.jsonl")
    evidence = stored["evidence"]
    data = {**evidence["data"], "provider": "local_jsonl", "options": {"file": path, "text_field": "text"}}
    report = {**stored, "evidence": {**evidence, "data": data}}
    with pytest.raises(ConfigError, match="does not exist; expected the data file"):
        check_same_data(evidence_of(report, "baseline").data, {"provider": "local_jsonl", "file": path})
    Path(path).touch()
    check_same_data(evidence_of(report, "baseline").data, {"provider": "local_jsonl", "file": path})


@pytest.mark.parametrize(
    ("report", "refused"),
    [
        ({"edit": {"name": "quant_rtn", "deltas": {"params_changed": 7}}}, True),
        ({"edit": {"name": "mine"}}, True),
        ({"edit": {"name": "checkpoint"}, "metrics": {"verdict": {"status": "PASS"}}}, True),
        ({"edit": {"name": "checkpoint"}}, False),
        ({"edit": {"name": "quant_rtn", "dry_run": True}}, False),
        ({"edit": {"name": "noop"}, "metrics": {"verdict": {}}}, False),
    ],
)
def test_the_run_of_an_edited_model_is_no_baseline(report: dict[str, Any], refused: bool) -> None:
    if refused:
        with pytest.raises(CertificateError, match="expected an unedited one"):
            check_baseline(report)
    else:
        check_baseline(report)


@pytest.mark.parametrize("flag", [None, "other"])
def test_one_preset_names_the_model_for_run_and_certify_and_flags_win(tmp_path: Path, flag: str | None) -> None:
    path = tmp_path / "preset.yaml"
    path.write_text("model: {id: base, dtype: float32}\ndataset: {provider: python_docs}\n")
    request = request_from(load_config(path, require_model=False), profile="dev", subject="s", baseline=flag)
    assert (request.baseline, request.loading.dtype) == (flag or "base", "float32")


@pytest.mark.parametrize(
    ("make", "named"),
    [
        (lambda: RunConfig(max_pm_rato=1.0), "RunConfig has no argument 'max_pm_rato' .did you mean 'max_pm_ratio'"),  # type: ignore[call-arg]
        (lambda: RunConfig(device="gpu"), "RunConfig.device is 'gpu'"),
        (lambda: RunConfig(max_pm_ratio=True), "RunConfig.max_pm_ratio is True"),
        (lambda: RunConfig(context=[]), "RunConfig.context is list"),  # type: ignore[arg-type]
        (lambda: SpectralGuard(deadbnd=0.1), "'deadbnd' .did you mean 'deadband'"),
        (lambda: SpectralGuard(deadband="wide"), "deadband='wide'; expected a number"),
        (lambda: RMTGuard(epsilon="a"), "epsilon='a'; expected a mapping"),
        (lambda: VarianceGuard(tapp=1), "'tapp' .did you mean 'tap'"),
        (lambda: InvariantsGuard(strict_mod=True), "'strict_mod' .did you mean 'strict_mode'"),
    ],
)
def test_arguments_from_python_are_held_to_names_and_types(make: Any, named: str) -> None:
    with pytest.raises(ConfigError, match=named):
        make()
