"""One way to look and one way to compare: `certify`, `run` and `execute` give the same certificate on every architecture."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from transformers import AutoTokenizer, Qwen2MoeConfig, Qwen2MoeForCausalLM

from certification import reread
from invarlock.adapters import HF_Auto_Adapter
from invarlock.assurance import make_certificate
from invarlock.core.api import RunConfig, RunReport
from invarlock.core.runner import CoreRunner
from invarlock.edits import NoopEdit, RTNQuantEdit
from invarlock.flow.certify import CertifyOutcome, CertifyRequest, certify
from invarlock.flow.run import RunRequest, run
from invarlock.flow.sampling import reuse_windows
from invarlock.flow.steps import create_guards
from invarlock.policy.config import load_config

ARCHITECTURES = ("gpt2", "llama", "bert", "t5", "moe")
GUARDS = ("invariants", "spectral", "rmt", "variance")
PLAN = {"bitwidth": 4, "group_size": 32}
#: what differs from one making of a certificate to the next: ids, times, and digests of what holds them
MOVING = {"run_id", "created", "timings", "evidence_digest"}


def _moe(folder: Path, demo_model: Path) -> Path:
    """A small random mixture of experts, stored in bfloat16 under the names that the library converts while loading."""
    torch.manual_seed(11)
    tokenizer = AutoTokenizer.from_pretrained(demo_model)
    config = Qwen2MoeConfig(
        vocab_size=len(tokenizer), hidden_size=32, intermediate_size=48, moe_intermediate_size=24,
        shared_expert_intermediate_size=32, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2,
        num_experts=4, num_experts_per_tok=2, max_position_embeddings=128,
    )  # fmt: skip
    Qwen2MoeForCausalLM(config).to(torch.bfloat16).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture(scope="module", params=ARCHITECTURES)
def subject(request: pytest.FixtureRequest, demo_model: Path, model_folder: Any, tmp_path_factory: Any) -> Path:
    if request.param == "gpt2":
        return demo_model
    if request.param == "moe":
        return _moe(tmp_path_factory.mktemp("moe"), demo_model)
    folder: Path = model_folder(request.param)
    return folder


@pytest.fixture(scope="module")
def settings(subject: Path, text_file: Path) -> dict[str, Any]:
    """The configuration that all three orders follow."""
    data: dict[str, Any] = {"provider": "local_jsonl", "file": str(text_file)}
    if "t5" in subject.name:
        data = {"provider": {"kind": "seq2seq", "task": "reverse"}}
    return {
        "dataset": {**data, "seq_len": 32, "preview_n": 10, "final_n": 10},
        "eval": {"bootstrap": {"replicates": 100}, "max_pm_ratio": 100.0, "spike_threshold": 1000.0},
    }


@pytest.fixture(scope="module")
def config(subject: Path, settings: dict[str, Any], tmp_path_factory: Any) -> Callable[[str], Path]:
    def _write(edit: str) -> Path:
        plan = {"name": edit, "plan": PLAN if edit == "quant_rtn" else {}}
        path: Path = tmp_path_factory.mktemp("config") / f"{edit}.yaml"
        gates = ["divergence_kl", "token_flips", "primary_metric", "sample_size", "preview_final_drift"]
        chosen = {**settings, "eval": {**settings["eval"], "gates_off": gates}}
        path.write_text(yaml.safe_dump({"model": {"id": str(subject)}, "edit": plan, **chosen}))
        return path

    return _write


def _certified(subject: Path, config: Path, edit: str, out: Path) -> CertifyOutcome:
    chosen = load_config(config)
    dataset = {**chosen.dataset.provider_options, "provider": chosen.dataset.provider_name, "seq_len": 32}
    plan = {"name": edit, "plan": PLAN if edit == "quant_rtn" else {}}
    return certify(
        CertifyRequest(
            subject=str(subject), baseline=str(subject), profile="dev", dataset=dataset, edit=plan,
            overrides=chosen.policy_overrides(), out=out,
        )
    )  # fmt: skip


def _executed(subject: Path, config: Path, edit: str, stored: Path) -> dict[str, Any]:
    """The Python path: load, execute, make_certificate."""
    chosen = load_config(config)
    adapter = HF_Auto_Adapter()
    model = adapter.load_model(str(subject), device="cpu")
    windows = reuse_windows(json.loads(stored.read_text()), reused=False)

    def execute(change: Any) -> RunReport:
        context = {"policy_overrides": chosen.policy_overrides()}
        limits = {"max_pm_ratio": 100.0, "spike_threshold": 1000.0}
        return CoreRunner().execute(
            model, adapter, change, create_guards(GUARDS, {}), RunConfig(device="cpu", context=context, **limits),
            calibration_data=windows, auto_config={"probes": 0},
        )  # fmt: skip

    baseline = execute(NoopEdit())
    report = execute(RTNQuantEdit(**PLAN) if edit == "quant_rtn" else NoopEdit())
    return make_certificate(report, baseline)


def _steady(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _steady(item) for key, item in value.items() if key not in MOVING and key != "evidence_digests"}
    return [_steady(item) for item in value] if isinstance(value, list) else value


def _differences(one: Any, other: Any, path: str = "") -> Iterator[str]:
    if isinstance(one, dict) and isinstance(other, dict):
        for key in sorted(one.keys() | other.keys()):
            if key not in one or key not in other:
                yield f"{path}.{key}: only in {'the second' if key not in one else 'the first'}"
            else:
                yield from _differences(one[key], other[key], f"{path}.{key}")
    elif isinstance(one, list) and isinstance(other, list) and len(one) == len(other):
        for index, pair in enumerate(zip(one, other, strict=True)):
            yield from _differences(*pair, f"{path}[{index}]")
    elif one != other:
        yield f"{path}: {str(one)[:80]} != {str(other)[:80]}"


def _without_remarks_on_text(certificate: dict[str, Any]) -> dict[str, Any]:
    """Leave out what a provider said as it read its text: `execute` is handed windows, and reads none."""
    notes = [note for note in certificate.get("notes") or () if "they count as one document" not in note]
    return {**certificate, "notes": notes}


@pytest.mark.slow
@pytest.mark.parametrize("edit", ["quant_rtn", "noop"])
def test_three_orders_of_the_same_steps_give_the_same_certificate(
    subject: Path, config: Callable[[str], Path], edit: str, tmp_path: Path
) -> None:
    path = config(edit)
    first = _certified(subject, path, edit, tmp_path / "certify")
    assert first.source_report is not None
    ran = run(RunRequest(settings=load_config(path), out=tmp_path / "run"))
    assert ran.status == "success", ran.report["meta"].get("rollback_reason")
    stored = ran.folder / "baseline" / "report.json" if edit == "quant_rtn" else ran.folder / "report.json"
    second = make_certificate(ran.report, json.loads(stored.read_text()))
    third = _executed(subject, path, edit, first.source_report)
    certificates = [_steady(reread(c)) for c in (first.certificate, second, third)]
    assert list(_differences(certificates[0], certificates[1])) == []
    one, other = (_without_remarks_on_text(certificate) for certificate in (certificates[0], certificates[2]))
    assert list(_differences(one, other)) == []


@pytest.mark.slow
def test_a_noop_gives_exactly_nothing_in_every_guard_figure(
    subject: Path, config: Callable[[str], Path], tmp_path: Path
) -> None:
    certificate = _certified(subject, config("noop"), "noop", tmp_path).certificate
    assert certificate["primary_metric"]["ratio_vs_baseline"] == 1.0
    assert certificate["weights"]["identical"]
    assert (certificate["divergence"]["kl_max"], certificate["divergence"]["flip_rate"]) == (0.0, 0.0)
    for name in GUARDS:
        section = certificate[name]
        assert (section["passed"], section["warnings"], section["errors"]) == (True, [], [])
    assert certificate["spectral"]["metrics"]["max_growth"] == 0.0
    assert {row["change"] for row in certificate["rmt"]["metrics"]["families"].values()} == {0.0}
    assert certificate["variance"]["metrics"]["proposed"] == {}
    for module in certificate["rmt"]["facts"]["modules"]:
        assert module["ratio"][0] == module["ratio"][1]
    assert {row["rel_change"] for row in certificate["weights"]["changes"]} == {0.0}
    shutil.rmtree(tmp_path)
