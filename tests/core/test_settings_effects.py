"""Every environment variable does what its line in the table says; without it, the same call does otherwise."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from certification import Certify, CertifyOutcome
from invarlock.certificate.figures import Comparison, figures
from invarlock.certificate.schema import PrimaryMetric
from invarlock.core import settings
from invarlock.core.exceptions import ConfigError, ModelLoadError, PairingError
from invarlock.core.settings import SETTINGS
from invarlock.eval.metrics import METRICS
from invarlock.evidence.rows import PairedRows, Rows
from invarlock.flow.run import RunOutcome
from invarlock.policy.resolve import Policy, merge, resolve_policy

TESTS = Path(__file__).parents[1]
#: what is shown by the tests beside the code that reads the variable
ELSEWHERE = {
    "INVARLOCK_ALLOW_NETWORK": "cli/test_app.py",
    "INVARLOCK_ALLOW_CALIBRATION_MATERIALIZE": "evidence/test_windows.py",
    "INVARLOCK_ALLOW_CONFIG_INCLUDE_OUTSIDE": "policy/test_config.py",
    "INVARLOCK_DEBUG_TRACE": "cli/test_errors.py",
    "INVARLOCK_DEDUP_TEXTS": "eval/data/test_window_cutting.py",
    "INVARLOCK_DISABLE_PLUGIN_DISCOVERY": "core/test_registry.py",
    "INVARLOCK_ENGINE_KEY": "eval/sources/test_served.py",
    "INVARLOCK_ENGINE_TIMEOUT": "eval/sources/test_served.py",
    "INVARLOCK_RANK_TIMEOUT": "flow/test_ranks.py",
    "INVARLOCK_EVAL_STRICT": "flow/test_execute.py",
    "INVARLOCK_GUARD_PREPARE_STRICT": "flow/test_execute.py",
    "INVARLOCK_ASSERT_GUARDS": "guards/test_boundary.py",
    "INVARLOCK_LIGHT_IMPORT": "cli/test_app.py",
    "INVARLOCK_MINIMAL": "cli/test_run_command.py",
    "INVARLOCK_TELEMETRY": "cli/test_run_command.py",
    "INVARLOCK_PLUGINS_DRY_RUN": "core/test_inventory.py",
    "INVARLOCK_SNAPSHOT_AUTO_RAM_FRACTION": "flow/test_snapshot.py",
    "INVARLOCK_SNAPSHOT_MODE": "flow/test_snapshot.py",
    "INVARLOCK_SNAPSHOT_THRESHOLD_MB": "flow/test_snapshot.py",
    "INVARLOCK_CACHE": "flow/test_cache.py",
    "INVARLOCK_READ_LIMITS": "core/test_reading.py",
    "HF_DATASETS_OFFLINE": "cli/conftest.py",  # theirs; we only switch it on, see test_the_hub_switches_follow_ours
    "HF_HOME": "flow/test_doctor.py",  # theirs
}

Environment = pytest.MonkeyPatch


def test_every_variable_is_tested_here_or_where_it_is_read() -> None:
    here = Path(__file__).read_text(encoding="utf-8")
    for setting in SETTINGS:
        text = (TESTS / ELSEWHERE[setting.name]).read_text(encoding="utf-8") if setting.name in ELSEWHERE else here
        assert setting.name in text, setting.name


@pytest.mark.parametrize("variable", ["INVARLOCK_CI_PREVIEW", "INVARLOCK_CI_FINAL"])
def test_counts_of_windows_hold_in_the_ci_profiles_alone_and_are_recorded(
    monkeypatch: Environment, variable: str
) -> None:
    key = variable.rpartition("_")[2].lower()
    assert resolve_policy("balanced", "ci").values["sample"][key] == 200
    monkeypatch.setenv(variable, "7")
    policy = resolve_policy("balanced", "ci")
    assert policy.values["sample"][key] == 7
    assert policy.overrides == {"sample": {key: 7}}
    assert resolve_policy("balanced", "dev").values["sample"][key] == 32


@pytest.mark.parametrize("variable", ["INVARLOCK_CI_PREVIEW", "INVARLOCK_CI_FINAL", "INVARLOCK_OMP_THREADS"])
@pytest.mark.parametrize("value", ["0", "-3"])
def test_counts_below_one_are_refused(monkeypatch: Environment, variable: str, value: str) -> None:
    monkeypatch.setenv(variable, value)
    with pytest.raises(ConfigError, match=f"{variable} is '{value}'; expected 1 or more"):
        settings.get(variable)


def _compared(documents: int, shift: float, policy: Policy) -> PrimaryMetric:
    """Compare rows of one window a document whose loss rises by `shift` and a little noise."""
    noise = np.random.default_rng(3).normal(0, 0.01, documents)
    names = [f"d{i}" for i in range(documents)]
    whole = {"window_ids": names, "document_ids": names, "tokens": [50] * documents}
    whole |= {"baseline_loss": [3.0] * documents, "subject_loss": list(3.0 + shift + noise)}
    half = documents // 2
    first, second = (
        {key: list(values[part]) for key, values in whole.items()} for part in (slice(half), slice(half, None))
    )
    rows = Rows.of(PairedRows(**first), PairedRows(**second))
    return figures(Comparison(METRICS["ppl_causal"], rows, policy.limits), None).metric


@pytest.mark.parametrize(("value", "method"), [(None, "bca"), ("1", "bca"), ("0", "percentile")])
def test_bca_can_be_turned_off_and_that_is_recorded(monkeypatch: Environment, value: str | None, method: str) -> None:
    if value is not None:
        monkeypatch.setenv("INVARLOCK_BOOTSTRAP_BCA", value)
    policy = resolve_policy("balanced", "ci")
    assert policy.values["bootstrap"]["bca"] is (value != "0")
    assert policy.overrides == ({"bootstrap": {"bca": False}} if value == "0" else {})
    assert _compared(120, 0.01, policy).method == method


@pytest.mark.parametrize(
    ("variable", "value", "shift", "key"),
    [("INVARLOCK_PM_ACCEPTANCE_MAX", "1.02", 0.05, "limit"), ("INVARLOCK_PM_ACCEPTANCE_MIN", "0.97", -0.05, "min")],
)
def test_acceptance_limits_decide_and_are_recorded(
    monkeypatch: Environment, variable: str, value: str, shift: float, key: str
) -> None:
    assert _compared(60, shift, resolve_policy("balanced", "ci")).decision == "pass"
    monkeypatch.setenv(variable, value)
    policy = resolve_policy("balanced", "ci")
    assert policy.overrides == {"metrics": {"pm_ratio": {key: float(value)}}}
    assert _compared(60, shift, policy).decision == "fail"


def test_sample_floors_are_lowered_in_dev_alone(monkeypatch: Environment) -> None:
    monkeypatch.setenv("INVARLOCK_TINY_RELAX", "1")
    dev, ci = resolve_policy("balanced", "dev"), resolve_policy("balanced", "ci")
    assert (dev.relaxed, dev.values["sample"]["min_tokens"]) == (True, 0)
    assert (ci.relaxed, ci.values["sample"]["min_tokens"] > 0) == (False, True)


def test_tiers_may_come_from_a_folder(monkeypatch: Environment, tmp_path: Path) -> None:
    import yaml

    from invarlock import data

    document = yaml.safe_load((Path(data.__file__).parent / "tiers.yaml").read_text(encoding="utf-8"))
    tiers = merge(document["tiers"], {"balanced": {"metrics": {"pm_ratio": {"limit": 1.01}}}})
    (tmp_path / "runtime").mkdir()
    (tmp_path / "runtime" / "tiers.yaml").write_text(yaml.safe_dump({"version": 9, "tiers": tiers}))
    assert resolve_policy().values["metrics"]["pm_ratio"]["limit"] == 1.10
    monkeypatch.setenv("INVARLOCK_CONFIG_ROOT", str(tmp_path))
    policy = resolve_policy()
    assert (policy.values["metrics"]["pm_ratio"]["limit"], policy.tiers_version) == (1.01, 9)


@pytest.mark.slow
def test_reading_stops_early_where_speed_is_asked_for(
    monkeypatch: Environment, text_file: Path, demo_tokenizer: Any
) -> None:
    from invarlock.eval.data import get_provider

    def documents() -> tuple[int, int]:
        provider = get_provider("local_jsonl", file=str(text_file))
        preview, final = provider.windows(demo_tokenizer, preview_n=8, final_n=8, seq_len=24, stride=24)
        ids = preview.document_ids + final.document_ids
        return len(ids), len(set(ids))

    assert documents() == (16, 16)
    monkeypatch.setenv("INVARLOCK_CAPACITY_FAST", "1")
    count, used = documents()
    assert count == 16 and used < 16


def test_the_device_of_the_environment_wins(monkeypatch: Environment) -> None:
    from invarlock.core.device import resolve_device

    with pytest.raises(ConfigError, match="device is 'tpu'"):
        resolve_device("tpu")
    monkeypatch.setenv("INVARLOCK_EVAL_DEVICE", "cpu")
    assert resolve_device("tpu") == "cpu"


def test_threads_follow_the_environment(monkeypatch: Environment) -> None:
    import torch

    from invarlock.core.device import make_deterministic, thread_count

    before = thread_count()
    monkeypatch.setenv("INVARLOCK_OMP_THREADS", str(before + 1))
    try:
        make_deterministic(1)
        assert thread_count() == before + 1
    finally:
        torch.set_num_threads(before)


@pytest.mark.slow
def test_overhead_is_measured_where_required_unless_skipped(
    monkeypatch: Environment, certify_models: Certify, passed: CertifyOutcome, demo_model: Path
) -> None:
    required = {"metrics": {"guard_overhead": {"required": True, "max_ratio": 1.01}}}

    def overhead() -> dict[str, Any]:
        outcome = certify_models(demo_model, baseline_report=passed.source_report, overrides=required)
        found: dict[str, Any] = outcome.certificate["guard_overhead"]
        return found

    measured = overhead()
    assert measured["evaluated"] and measured["ratio"] == pytest.approx(1.0, abs=1e-4)
    monkeypatch.setenv("INVARLOCK_SKIP_OVERHEAD_CHECK", "1")
    skipped = overhead()
    assert not skipped["evaluated"] and skipped["skipped"] == "INVARLOCK_SKIP_OVERHEAD_CHECK is set"


@pytest.mark.slow
def test_a_run_obeys_what_concerns_its_folder(
    monkeypatch: Environment, run_small: Callable[..., RunOutcome], edited_run: RunOutcome, tmp_path: Path
) -> None:
    assert not (edited_run.folder / "guard_measurements.json").exists()
    assert edited_run.report["evaluation_windows"]
    monkeypatch.setenv("INVARLOCK_EXPORT_MODEL", "1")
    monkeypatch.setenv("INVARLOCK_EXPORT_DIR", str(tmp_path / "kept"))
    monkeypatch.setenv("INVARLOCK_EVIDENCE_DEBUG", "1")
    monkeypatch.setenv("INVARLOCK_STORE_EVAL_WINDOWS", "0")
    outcome = run_small()
    assert outcome.model_folder == tmp_path / "kept"
    assert (tmp_path / "kept" / "model.safetensors").is_file() and (tmp_path / "kept" / "tokenizer.json").is_file()
    debug = json.loads((outcome.folder / "guard_measurements.json").read_text())
    assert debug["results"]["invariants"]["passed"] and debug["sketches"]
    assert outcome.report["evaluation_windows"] == {}
    assert outcome.report["meta"]["env_flags"]["INVARLOCK_STORE_EVAL_WINDOWS"] == "0"
    monkeypatch.delenv("INVARLOCK_EXPORT_MODEL")
    with pytest.raises(PairingError, match="INVARLOCK_STORE_EVAL_WINDOWS=1") as caught:
        run_small(baseline=outcome.folder)
    assert caught.value.code == "E001"


@pytest.mark.slow
def test_code_of_a_checkpoint_runs_only_where_it_is_trusted(
    monkeypatch: Environment, demo_model: Path, tmp_path: Path
) -> None:
    import transformers

    from invarlock.adapters import HF_Auto_Adapter

    folder = tmp_path / "foreign"
    shutil.copytree(demo_model, folder)
    config = json.loads((folder / "config.json").read_text())
    config |= {"model_type": "foreign", "architectures": ["ForeignForCausalLM"]}
    config["auto_map"] = {
        "AutoConfig": "foreign.ForeignConfig",
        "AutoModelForCausalLM": "foreign.ForeignForCausalLM",
    }
    (folder / "config.json").write_text(json.dumps(config))
    (folder / "foreign.py").write_text(
        "from transformers import GPT2Config, GPT2LMHeadModel\n\n\n"
        "class ForeignConfig(GPT2Config):\n    model_type = 'foreign'\n\n\n"
        "class ForeignForCausalLM(GPT2LMHeadModel):\n    config_class = ForeignConfig\n"
    )
    monkeypatch.setattr(transformers.dynamic_module_utils, "HF_MODULES_CACHE", str(tmp_path / "modules"))
    monkeypatch.syspath_prepend(str(tmp_path / "modules"))
    with pytest.raises(ModelLoadError):
        HF_Auto_Adapter().load_model(str(folder), device="cpu")
    monkeypatch.setenv("INVARLOCK_TRUST_REMOTE_CODE", "1")
    assert type(HF_Auto_Adapter().load_model(str(folder), device="cpu")).__name__ == "ForeignForCausalLM"


def test_the_hub_switches_follow_ours(monkeypatch: Environment) -> None:
    import os
    import socket

    from invarlock.core.network import enforce_network_policy

    for name in ("connect", "connect_ex", "sendto"):
        monkeypatch.setattr(socket.socket, name, getattr(socket.socket, name))
    for name in ("getaddrinfo", "gethostbyname", "gethostbyname_ex", "gethostbyaddr"):
        monkeypatch.setattr(socket, name, getattr(socket, name))
    for name in ("HF_HUB_OFFLINE", "TRANSFORMERS_OFFLINE", "HF_DATASETS_OFFLINE"):
        monkeypatch.setenv(name, "0")
    enforce_network_policy()
    assert {os.environ[name] for name in ("HF_HUB_OFFLINE", "TRANSFORMERS_OFFLINE", "HF_DATASETS_OFFLINE")} == {"1"}
