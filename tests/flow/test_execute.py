"""`CoreRunner.execute`: phases, outcomes, and a model that is as it was whenever the edit is not kept."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from executions import Edit, Execute
from invarlock.adapters import HF_Causal_Adapter
from invarlock.core.api import Guard, ModelAdapter, RunConfig, RunReport
from invarlock.core.exceptions import ConfigError, DataError, GuardError
from invarlock.guards import InvariantsGuard, SpectralGuard

State = Callable[[Any], dict[str, torch.Tensor]]
Same = Callable[[dict[str, torch.Tensor], dict[str, torch.Tensor]], bool]


class Probe(Guard):
    """A guard that returns what it is told to and keeps a diary."""

    def __init__(self, *returned: Any, name: str = "probe", diary: list[str] | None = None) -> None:
        self.name = name
        self.returned = list(returned or [{"passed": True}])
        self.diary = [] if diary is None else diary

    def validate(self, model: Any, adapter: Any, context: dict[str, Any]) -> Any:
        self.diary.append(f"{self.name}.validate")
        value = self.returned.pop(0) if len(self.returned) > 1 else self.returned[0]
        if isinstance(value, BaseException):
            raise value
        return value


class PreparedProbe(Probe):
    def __init__(self, *returned: Any, prepare: Any = None, **options: Any) -> None:
        super().__init__(*returned, **options)
        self.on_prepare = prepare

    def set_run_context(self, report: RunReport) -> None:
        self.diary.append(f"{self.name}.context")
        self.report = report

    def prepare(self, model: Any, adapter: Any, calib: Any, policy: Any) -> dict[str, Any]:
        self.diary.append(f"{self.name}.prepare")
        self.calib, self.policy = calib, policy
        if isinstance(self.on_prepare, BaseException):
            raise self.on_prepare
        if self.on_prepare is not None:
            self.on_prepare(model)
        return {"ready": True}


def _small(model: Any) -> None:
    model.transformer.h[0].mlp.c_fc.weight.mul_(1.001)


def _nan(model: Any) -> None:
    model.transformer.h[1].mlp.c_fc.weight[3, 5] = float("nan")


def _wreck(model: Any) -> None:
    for parameter in model.parameters():
        parameter.mul_(40)


# -- outcomes ---------------------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_a_kept_edit_stays_in_the_model(execute: Execute, tiny_model: Any, state_of: State, same_state: Same) -> None:
    model = tiny_model()
    before = state_of(model)
    report = execute(_small, [InvariantsGuard()], model=model)
    assert (report.status, report.error) == ("success", None)
    assert "rollback_reason" not in report.meta
    assert not same_state(before, state_of(model))
    metric = report.metrics["primary_metric"]
    assert metric["ratio_vs_baseline"] == pytest.approx(1, abs=0.05) and metric["ratio_vs_baseline"] != 1
    assert (metric["source"], metric["mock"]) == ("calibration_data", False)


@pytest.mark.slow
def test_a_model_against_itself_is_exactly_one_without_findings(execute: Execute, tiny_model: Any) -> None:
    for kind in ("gpt2", "llama"):
        report = execute(guards=[InvariantsGuard(), SpectralGuard()], model=tiny_model(kind))
        assert report.status == "success"
        metric = report.metrics["primary_metric"]
        assert (metric["ratio_vs_baseline"], metric["ci"], metric["display_ci"]) == (1.0, [0.0, 0.0], [1.0, 1.0])
        assert all(result["passed"] and not result["warnings"] for result in report.guards.values())
        assert set(report.evidence["preview"]["kl_sum"]) == {0.0}
        assert set(report.evidence["final"]["flips"]) == {0}


@pytest.mark.slow
@pytest.mark.parametrize(
    ("returned", "status", "reason"),
    [
        ({"passed": True}, "success", None),
        ({"passed": True, "action": "warn", "message": "close"}, "success", None),
        ({"passed": False, "action": "warn", "message": "close"}, "success", None),
        ({"passed": False, "message": "too far"}, "rollback", "guard_failed: guard 'probe': too far"),
        ({"passed": False, "action": "none", "message": "too far"}, "rollback", "guard_failed: guard 'probe': too far"),
        ({"passed": True, "action": "rollback", "message": "no"}, "rollback", "guard_failed: guard 'probe': no"),
    ],
)
def test_the_action_of_a_guard_decides(
    execute: Execute,
    tiny_model: Any,
    state_of: State,
    same_state: Same,
    returned: dict[str, Any],
    status: str,
    reason: str | None,
) -> None:
    model = tiny_model()
    before = state_of(model)
    report = execute(_small, [Probe(returned)], model=model)
    assert (report.status, report.error, report.meta.get("rollback_reason")) == (status, None, reason)
    assert same_state(before, state_of(model)) == (status == "rollback")
    assert report.guards["probe"]["passed"] is returned["passed"]
    assert any("close" in warning for warning in report.meta["warnings"]) == (returned.get("action") == "warn")
    assert report.metrics["primary_metric"]["ratio_vs_baseline"] is not None


@pytest.mark.slow
@pytest.mark.parametrize(
    ("returned", "message"),
    [
        ({"passed": False, "action": "abort", "message": "NaN in 1 parameter"}, "guard 'probe': NaN in 1 parameter"),
        ({"action": "warn", "message": "?"}, "guard 'probe' returned no 'passed' (keys: action, message)"),
        ({"passed": float("nan")}, "guard 'probe' returned passed=nan"),
        (None, "guard 'probe' returned NoneType"),
        (ValueError("boom\nsecond line"), "guard 'probe' failed in validate: ValueError: boom"),
    ],
)
def test_abort_and_broken_guards_fail_the_run_and_restore_the_model(
    execute: Execute, tiny_model: Any, state_of: State, same_state: Same, returned: Any, message: str
) -> None:
    model = tiny_model()
    before = state_of(model)
    report = execute(_small, [Probe(name="first"), Probe(returned)], model=model)
    assert report.status == "failed"
    assert report.error is not None and report.error.startswith(message)
    assert "\n" not in report.error
    assert report.guards["first"]["passed"] is True
    assert same_state(before, state_of(model))


def _raise(model: Any) -> None:
    _small(model)
    raise RuntimeError("half way")


def test_an_edit_that_raises_fails_the_run_and_is_undone(
    execute: Execute, tiny_model: Any, state_of: State, same_state: Same
) -> None:
    model = tiny_model()
    before = state_of(model)
    report = execute(_raise, model=model)
    assert (report.status, report.error) == ("failed", "RuntimeError: half way")
    assert same_state(before, state_of(model))


@pytest.mark.slow
def test_a_model_that_cannot_be_restored_is_reported_and_not_hidden(execute: Execute) -> None:
    class Forgetful(HF_Causal_Adapter):
        def restore(self, model: Any, snapshot: bytes) -> None:
            raise OSError("gone")

    report = execute(_small, [Probe({"passed": False})], adapter=Forgetful())
    assert report.status == "failed"
    assert report.error is not None and "could not be restored, load it again" in report.error


@pytest.mark.slow
@pytest.mark.parametrize("probes", [0, 2])
@pytest.mark.parametrize("edit", [_nan, _wreck], ids=["nan", "wreck"])
def test_a_wrecked_model_is_a_spike(
    execute: Execute, tiny_model: Any, state_of: State, same_state: Same, edit: Any, probes: int
) -> None:
    model, guard = tiny_model(), Probe()
    before = state_of(model)
    report = execute(edit, [guard], model=model, auto_config={"probes": probes})
    assert report.status == "rollback"
    assert report.meta["rollback_reason"].startswith("primary_metric_spike")
    assert same_state(before, state_of(model))
    stopped_early = "primary_metric" not in report.metrics
    assert stopped_early == (probes > 0) == (guard.diary == [])
    assert ("guard_validate" in report.meta["timings"]) == (probes == 0)


@pytest.mark.slow
def test_a_metric_that_is_nan_is_recorded_as_missing_and_never_acceptable(execute: Execute) -> None:
    report = execute(_nan, auto_config={"probes": 0}, max_pm_ratio=1e9, spike_threshold=float("inf"))
    metric = report.metrics["primary_metric"]
    assert report.status == "rollback"
    assert (metric["ratio_vs_baseline"], metric["final"], metric["decision"]) == (None, None, "fail")


@pytest.mark.slow
def test_a_ratio_above_the_limit_rolls_back(execute: Execute, tiny_model: Any) -> None:
    def worse(model: Any) -> None:
        model.lm_head.weight.mul_(2.0)

    loose = execute(worse, max_pm_ratio=10.0, spike_threshold=20.0)
    ratio = loose.metrics["primary_metric"]["ratio_vs_baseline"]
    assert loose.status == "success" and ratio > 1.01
    strict = execute(worse, max_pm_ratio=(1 + ratio) / 2, spike_threshold=20.0)
    assert strict.status == "rollback"
    assert strict.meta["rollback_reason"].startswith(f"primary_metric_ratio: {ratio:.4f} is above max_pm_ratio")
    spike = execute(worse, spike_threshold=(1 + ratio) / 2, auto_config={"probes": 0})
    assert spike.meta["rollback_reason"].startswith("primary_metric_spike")


@pytest.mark.slow
def test_accuracy_that_rises_is_no_spike_and_accuracy_that_falls_is(execute: Execute, tiny_model: Any) -> None:
    """After its first token every window says 3, 3, 3 ...: a model that always says 3 is right, one that says 7 wrong."""
    data = [{"input_ids": [first, *[3] * 15, 7]} for first in range(8)]
    options: dict[str, Any] = {"data": data, "context": {"metric_kind": "accuracy"}, "auto_config": {"probes": 0}}

    def says(token: int) -> Any:
        def edit(model: Any) -> None:
            model.transformer.ln_f.weight.zero_()
            model.transformer.ln_f.bias.copy_(100 * model.transformer.wte.weight[token])

        return edit

    def saying(token: int) -> Any:
        model = tiny_model()
        with torch.no_grad():
            says(token)(model)
        return model

    better = execute(says(3), model=saying(7), **options)
    assert better.metrics["primary_metric"]["ratio_vs_baseline"] == pytest.approx(15)
    assert better.status == "success"
    worse = execute(says(7), model=saying(3), **options)
    assert worse.metrics["primary_metric"]["ratio_vs_baseline"] == pytest.approx(1 / 15)
    assert worse.meta["rollback_reason"].startswith("primary_metric_spike: the ratio on all windows is 15")
    mute = execute(lambda model: model.transformer.wte.weight.zero_(), model=saying(3), **options)
    assert mute.metrics["primary_metric"]["final"] == 0.0, "a model that finds all tokens alike is never right"
    assert mute.status == "rollback"


# -- prepare ----------------------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_context_comes_before_prepare_and_prepare_before_validate(execute: Execute) -> None:
    diary: list[str] = []
    guards = [PreparedProbe(name="a", diary=diary), Probe(name="b", diary=diary)]
    report = execute(_small, guards, context={"note": "hello"})
    assert diary == ["a.context", "a.prepare", "a.validate", "b.validate"]
    assert guards[0].report is report  # type: ignore[attr-defined]
    assert report.context == {"note": "hello"}
    batch = guards[0].calib[0]  # type: ignore[attr-defined]
    assert len(guards[0].calib) == 8  # type: ignore[attr-defined]
    assert np.shape(batch["input_ids"]) == np.shape(batch["attention_mask"]) == (1, 20)


@pytest.mark.slow
def test_guards_see_the_unedited_model_in_prepare(execute: Execute, tiny_model: Any) -> None:
    model = tiny_model()
    first = model.transformer.h[0].mlp.c_fc.weight.detach().clone()
    seen: list[bool] = []
    guard = PreparedProbe(prepare=lambda m: seen.append(torch.equal(m.transformer.h[0].mlp.c_fc.weight, first)))
    execute(_small, [guard], model=model)
    assert seen == [True]
    assert not torch.equal(model.transformer.h[0].mlp.c_fc.weight, first)


@pytest.mark.slow
def test_prepare_that_raises_fails_the_run(execute: Execute, monkeypatch: pytest.MonkeyPatch) -> None:
    report = execute(_small, [PreparedProbe(prepare=KeyError("rows"))])
    assert report.status == "failed"
    assert report.error == "guard 'probe' failed in prepare: KeyError: 'rows'"


@pytest.mark.slow
def test_lenient_prepare_marks_the_guard_not_evaluated(execute: Execute, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("INVARLOCK_GUARD_PREPARE_STRICT", "0")
    broken = PreparedProbe(prepare=KeyError("rows"))
    report = execute(_small, [broken, Probe(name="other")])
    assert report.status == "success"
    assert broken.diary == ["probe.context", "probe.prepare"]
    result = report.guards["probe"]
    assert (result["passed"], result["evaluated"]) == (False, False)
    assert any("not evaluated" in warning for warning in report.meta["warnings"])
    assert report.meta["env_flags"]["INVARLOCK_GUARD_PREPARE_STRICT"] == "0"


@pytest.mark.slow
def test_a_guard_that_runs_twice_keeps_both_results_and_its_worst(execute: Execute) -> None:
    guard = Probe({"passed": True, "message": "fine"}, {"passed": False, "message": "bad"})
    report = execute(_small, [guard, Probe(name="between"), guard])
    assert report.status == "rollback"
    assert report.guards["probe"]["message"] == "bad"
    assert [run["message"] for run in report.guards["probe"]["runs"]] == ["fine", "bad"]
    assert list(report.guards) == ["probe", "between"]
    twice = execute(_small, [InvariantsGuard(), SpectralGuard(), InvariantsGuard()])
    assert (twice.status, len(twice.guards["invariants"]["runs"])) == ("success", 2)


@pytest.mark.slow
def test_finetune_intent_lets_a_changed_configuration_warn(execute: Execute, tiny_model: Any) -> None:
    def edit(model: Any) -> None:
        model.config.layer_norm_epsilon = 2e-5

    kept = execute(edit, [InvariantsGuard()], context={"intent": "finetune"})
    assert kept.status == "success"
    assert [w["key"] for w in kept.guards["invariants"]["warnings"]] == ["layer_norm_epsilon"]
    model = tiny_model()
    refused = execute(edit, [InvariantsGuard()], model=model)
    assert refused.status == "rollback" and "layer_norm_epsilon" in refused.meta["rollback_reason"]
    assert model.config.layer_norm_epsilon == 1e-5


# -- interruption -----------------------------------------------------------------------------------------------------


class _Interrupting(HF_Causal_Adapter):
    """Ctrl-C at a named moment."""

    def __init__(self, moment: str) -> None:
        self.moment = moment
        self.calls = 0

    def _maybe(self, moment: str) -> None:
        if self.moment == moment:
            raise KeyboardInterrupt

    def describe(self, model: Any) -> dict[str, Any]:
        self.calls += 1
        self._maybe(f"describe-{self.calls}")  # 1: prepare, 2: baseline, 3: eval
        return super().describe(model)

    def snapshot_chunked(self, model: Any, folder: Path) -> Path:
        path = super().snapshot_chunked(model, folder)
        self._maybe("snapshot")
        return path

    def restore_chunked(self, model: Any, path: Path) -> None:
        if self.moment == "restore":
            self.moment = ""
            raise KeyboardInterrupt
        super().restore_chunked(model, path)


@pytest.mark.slow
@pytest.mark.parametrize("ending", [KeyboardInterrupt, SystemExit])
@pytest.mark.parametrize(
    "moment",
    ["snapshot", "describe-1", "describe-2", "guard_prepare", "edit", "guard_validate", "describe-3", "restore"],
)
def test_an_interrupted_run_restores_the_model_and_leaves_no_files(
    execute: Execute,
    tiny_model: Any,
    state_of: State,
    same_state: Same,
    tmp_path: Path,
    moment: str,
    ending: type[BaseException],
) -> None:
    model = tiny_model()
    before = state_of(model)

    def edit(edited: Any) -> None:
        _small(edited)
        if moment == "edit":
            raise ending

    guard = PreparedProbe(
        ending() if moment == "guard_validate" else {"passed": moment != "restore"},
        prepare=ending() if moment == "guard_prepare" else None,
    )
    context = {"snapshot": {"mode": "chunked", "temp_dir": str(tmp_path / "temp")}}
    (tmp_path / "temp").mkdir()
    with pytest.raises((KeyboardInterrupt, ending)):
        execute(
            edit,
            [guard],
            model=model,
            adapter=_Interrupting(moment),
            context=context,
            event_path=tmp_path / "events.jsonl",
        )
    assert list((tmp_path / "temp").iterdir()) == []
    assert same_state(before, state_of(model))
    assert "interrupted" in (tmp_path / "events.jsonl").read_text().splitlines()[-1]


# -- reports ----------------------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_dry_run_changes_nothing_and_reports_all(
    execute: Execute, tiny_model: Any, state_of: State, same_state: Same
) -> None:
    model = tiny_model()
    before = state_of(model)
    report = execute(_wreck, [InvariantsGuard()], model=model, dry_run=True)
    assert report.status == "success"
    assert report.edit == {
        "name": "test_edit",
        "dry_run": True,
        "deltas": {"params_changed": 0, "layers_modified": 0},
    }
    assert report.metrics["primary_metric"]["ratio_vs_baseline"] == 1.0
    assert report.guards["invariants"]["passed"] is True
    assert same_state(before, state_of(model))


@pytest.mark.slow
def test_the_event_log_tells_the_phases_in_order(execute: Execute, tmp_path: Path) -> None:
    path = tmp_path / "log" / "events.jsonl"
    returned = {"deltas": {"params_changed": 1}, "note": "x"}
    context = {"hub": {"token": "hf_abcdefghijkl"}}
    report = execute(lambda model: returned, [PreparedProbe()], event_path=path, context=context)
    events = [json.loads(line, parse_constant=pytest.fail) for line in path.read_text().splitlines()]
    assert {event["run_id"] for event in events} == {report.meta["run_id"]}
    assert [event["ts"] for event in events] == sorted(event["ts"] for event in events)
    assert [(event["phase"], event["event"]) for event in events] == [
        ("prepare", "start"),
        ("prepare", "snapshot"),
        ("prepare", "end"),
        ("guard_prepare", "start"),
        ("run", "warning"),  # the model of these tests is random: no better than guessing
        ("guard_prepare", "prepared"),
        ("guard_prepare", "end"),
        ("edit", "start"),
        ("edit", "applied"),
        ("edit", "probe"),
        ("edit", "end"),
        ("guard_validate", "start"),
        ("guard_validate", "validated"),
        ("guard_validate", "end"),
        ("eval", "start"),
        ("eval", "primary_metric"),
        ("eval", "end"),
        ("finalize", "start"),
        ("finalize", "kept"),
        ("finalize", "end"),
    ]
    assert "hf_abcdefghijkl" not in path.read_text()
    assert list(report.meta["timings"]) == ["prepare", "guard_prepare", "edit", "guard_validate", "eval", "finalize"]


@pytest.mark.slow
def test_a_failed_run_closes_its_log_with_the_error(execute: Execute, tmp_path: Path) -> None:
    path = tmp_path / "events.jsonl"
    execute(_raise, event_path=path)
    last = [json.loads(line) for line in path.read_text().splitlines()][-2:]
    assert [(e["phase"], e["event"]) for e in last] == [("finalize", "rollback"), ("finalize", "failed")]
    assert last[1]["error"] == "RuntimeError: half way"


@pytest.mark.slow
def test_checkpoints_hold_the_report_after_every_nth_phase(execute: Execute, tmp_path: Path) -> None:
    odd = {"deltas": {}, "worst": float("nan"), "when": np.float32(1.5), "model": object()}
    report = execute(
        lambda model: odd, event_path=tmp_path / "events.jsonl", checkpoint_interval=2, context={"progress": print}
    )
    assert report.status == "success"
    names = sorted(path.name for path in tmp_path.glob("checkpoint-*.json"))
    assert names == [
        "checkpoint-02-guard_prepare.json",
        "checkpoint-04-guard_validate.json",
        "checkpoint-06-finalize.json",
    ]
    stored = [json.loads((tmp_path / name).read_text()) for name in names]
    assert [s["status"] for s in stored] == ["running", "running", "success"]
    assert RunReport.from_dict(stored[2]).metrics == report.to_dict()["metrics"]


@pytest.mark.slow
def test_checkpoints_without_a_place_for_them_are_said_to_be_missing(execute: Execute) -> None:
    report = execute(checkpoint_interval=1)
    assert any("no checkpoints" in warning for warning in report.meta["warnings"])


def _stable(report: RunReport) -> str:
    data = report.to_dict()
    for key in ("run_id", "created", "timings"):
        data["meta"].pop(key)
    return json.dumps(data, allow_nan=False)


@pytest.mark.slow
def test_two_runs_give_the_same_report_but_for_ids_and_timings(execute: Execute) -> None:
    first, second = (execute(_small, [InvariantsGuard(), SpectralGuard()], context={"f": print}) for _ in range(2))
    assert _stable(first) == _stable(second)


@pytest.mark.slow
def test_the_report_records_what_a_reader_needs(execute: Execute, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("INVARLOCK_OMP_THREADS", str(torch.get_num_threads()))
    monkeypatch.delenv("INVARLOCK_CACHE")  # set for all tests
    report = execute(_small, auto_config={"tier": "conservative", "probes": 3, "target_pm_ratio": 1.2, "enabled": True})
    assert report.meta["auto"] == {"tier": "conservative", "probes": 3, "target_pm_ratio": 1.2, "enabled": True}
    assert report.meta["policy"]["values"]["metrics"]["pm_ratio"]["limit"] == 1.05
    assert (report.meta["device"], report.meta["seeds"]["torch"]) == ("cpu", 42)
    assert report.meta["env_flags"].keys() == {"INVARLOCK_OMP_THREADS"}
    assert report.meta["model"]["n_layer"] == 2
    assert report.metrics["probe"]["windows"] == 3
    stats = report.dataset["windows"]["stats"]
    assert (stats["window_match_fraction"], stats["window_overlap_fraction"], stats["coverage"]) == (1.0, 0.0, 1.0)
    assert len(report.evaluation_windows["preview"]["input_ids"]) == 4
    monkeypatch.setenv("INVARLOCK_STORE_EVAL_WINDOWS", "0")
    assert execute(_small).evaluation_windows == {}


@pytest.mark.slow
def test_the_same_text_in_preview_and_final_counts_as_overlap(execute: Execute, tiny_data: list[Any]) -> None:
    report = execute(data=tiny_data[:4] + tiny_data[:1] + tiny_data[5:8])
    assert report.dataset["windows"]["stats"]["window_overlap_fraction"] == 0.25


@pytest.mark.slow
def test_a_baseline_given_in_the_context_is_what_the_ratio_refers_to(execute: Execute, tiny_model: Any) -> None:
    worse = tiny_model()
    with torch.no_grad():
        worse.lm_head.weight.mul_(1.5)
    baseline = execute()
    report = execute(model=worse, context={"baseline": baseline.to_dict()})
    ratio = report.metrics["primary_metric"]["ratio_vs_baseline"]
    perplexities = [r.metrics["primary_metric"]["final"] for r in (report, baseline)]
    assert ratio > 1.001 and perplexities[0] > perplexities[1]
    assert "baseline" not in report.context
    other = [{"input_ids": [1, 2, 3]}, {"input_ids": [4, 5, 6]}]
    mismatch = execute(data=other, context={"baseline": baseline})
    assert mismatch.status == "failed" and "windows are paired" in str(mismatch.error)


@pytest.mark.slow
def test_failing_evaluation_fails_the_run_unless_told_otherwise(
    execute: Execute, monkeypatch: pytest.MonkeyPatch
) -> None:
    options: dict[str, Any] = {"auto_config": {"probes": 0}}
    assert execute(lambda m: setattr(m.transformer, "forward", None), **options).status == "failed"
    monkeypatch.setenv("INVARLOCK_EVAL_STRICT", "0")
    report = execute(lambda m: setattr(m.transformer, "forward", None), **options)
    assert "primary_metric" not in report.metrics and report.evidence == {}
    assert any("no metric was measured" in warning for warning in report.meta["warnings"])


# -- arguments --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "error", "named"),
    [
        ({"auto_config": {"probe": 1}}, ConfigError, "'probe'"),
        ({"auto_config": {"probes": 11}}, ConfigError, "0 to 10"),
        ({"auto_config": {"tier": "brave"}}, ConfigError, "brave"),
        ({"preview_n": 9, "final_n": 1}, DataError, "8 windows"),
        ({"preview_n": 0, "final_n": 1}, DataError, "at least one preview"),
        ({"data": [{"input_ids": [1, 2]}]}, DataError, "1 windows"),
        ({"data": "text"}, DataError, "list of batches"),
        ({"data": iter([{"input_ids": [1, 2]}])}, DataError, "INVARLOCK_ALLOW_CALIBRATION_MATERIALIZE=1"),
    ],
)
def test_arguments_that_cannot_be_used_are_refused_before_anything_happens(
    execute: Execute, options: dict[str, Any], error: type[Exception], named: str
) -> None:
    touched: list[Any] = []
    with pytest.raises(error, match=named):
        execute(touched.append, **options)
    assert touched == []


@pytest.mark.parametrize(
    "fields", [{"max_pm_ratio": 0}, {"spike_threshold": float("nan")}, {"checkpoint_interval": -1}], ids=str
)
def test_run_config_refuses_what_makes_no_sense(fields: dict[str, Any]) -> None:
    with pytest.raises(ConfigError, match=next(iter(fields))):
        RunConfig(**fields)


@pytest.mark.slow
def test_iterators_are_materialized_when_that_is_allowed(
    execute: Execute, tiny_data: list[Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("INVARLOCK_ALLOW_CALIBRATION_MATERIALIZE", "1")
    report = execute(data=(batch for batch in tiny_data), preview_n=3, final_n=2)
    assert [len(report.evidence[split]["loss"]) for split in ("preview", "final")] == [3, 2]


def test_tokens_that_the_model_does_not_know_are_named(execute: Execute) -> None:
    report = execute(data=[{"input_ids": [1, 2, 5000]}, {"input_ids": [1, 2, 3]}])
    assert report.status == "failed"
    assert "token id 5000, but the model knows 0 to 95" in str(report.error)


def test_an_unusable_edit_is_refused(execute: Execute) -> None:
    from invarlock.flow.execute import CoreRunner

    with pytest.raises(ConfigError, match=r"expected an object with name and apply"):
        CoreRunner().execute(None, HF_Causal_Adapter(), object(), [], RunConfig())  # type: ignore[arg-type]


@pytest.mark.slow
def test_edit_config_reaches_the_edit(execute: Execute) -> None:
    class Recorder(Edit):
        def apply(self, model: Any, adapter: Any, **config: Any) -> dict[str, Any]:
            return {"given": config}

    assert execute(Recorder(_small), edit_config={"bits": 3}).edit["given"] == {"bits": 3}


# -- without data, and with strange models ----------------------------------------------------------------------------


@pytest.mark.slow
def test_without_data_the_metric_is_marked_synthetic_and_decides_nothing(execute: Execute) -> None:
    report = execute(_wreck, data=None, max_pm_ratio=0.001)
    metric = report.metrics["primary_metric"]
    assert report.status == "success"
    assert (metric["source"], metric["mock"], metric["ratio_vs_baseline"]) == ("synthetic", True, None)
    assert metric["final"] > 1
    assert any("No calibration data provided" in warning for warning in report.meta["warnings"])
    again = execute(_wreck, data=None)
    assert again.metrics["primary_metric"] == metric


class PlainAdapter(ModelAdapter):
    """A plugin's adapter that knows next to nothing about its model."""

    name = "plain"

    def load_model(self, model_id: str, device: str = "auto", **kwargs: Any) -> Any:
        return torch.nn.Linear(3, 3)

    def describe(self, model: Any) -> dict[str, Any]:
        return {"model_type": "custom"}

    def snapshot(self, model: Any) -> bytes:
        return bytes(model.weight.detach().numpy().tobytes())

    def restore(self, model: Any, snapshot: bytes) -> None:
        with torch.no_grad():
            model.weight.copy_(torch.frombuffer(bytearray(snapshot), dtype=torch.float32).view(3, 3))


def test_an_adapter_and_a_model_that_offer_nothing_more_still_work(execute: Execute) -> None:
    adapter = PlainAdapter()
    model = adapter.load_model("x")
    before = model.weight.detach().clone()
    guard = Probe({"passed": False})
    report = execute(lambda m: m.weight.zero_(), [guard], model=model, data=None, adapter=adapter)
    assert report.status == "rollback"
    assert torch.equal(model.weight, before)
    assert report.metrics["primary_metric"]["final"] is None
    assert "vocabulary" in report.metrics["primary_metric"]["reason"]


@pytest.mark.slow
def test_measuring_leaves_training_mode_as_it_was(execute: Execute, tiny_model: Any) -> None:
    model = tiny_model()
    model.train()
    model.transformer.h[0].eval()
    before = {name: module.training for name, module in model.named_modules()}
    report = execute(model=model)
    assert report.metrics["primary_metric"]["ratio_vs_baseline"] == 1.0  # dropout was off while measuring
    assert {name: module.training for name, module in model.named_modules()} == before


@pytest.mark.slow
def test_guard_errors_are_ours(execute: Execute) -> None:
    report = execute(guards=[Probe(GuardError("no baseline"))])
    assert report.error == "no baseline"
