"""`run` from the library: what a run's folder holds, how it is held to a stored baseline, and how an edit is weakened."""

from __future__ import annotations

import copy
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from invarlock.assurance import make_certificate, validate_certificate, verify_certificate
from invarlock.core.exceptions import CertificateError, ConfigError, PairingError
from invarlock.flow.run import RunOutcome, RunRequest, weaker_plan
from invarlock.flow.run_folder import find_report, staged_folder
from invarlock.policy.config import load_config

Change = Callable[[dict[str, Any]], Any]


def _files(folder: Path) -> set[str]:
    return {str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file()}


def _stored(outcome: RunOutcome) -> dict[str, Any]:
    data: dict[str, Any] = json.loads((outcome.folder / "report.json").read_text(encoding="utf-8"))
    return data


def test_an_unedited_run_passes_exactly_and_holds_its_evidence(noop_run: RunOutcome) -> None:
    report = _stored(noop_run)
    assert report["status"] == "success"
    assert report["metrics"]["primary_metric"]["ratio_vs_baseline"] == 1.0
    assert all(result["passed"] and not result["warnings"] for result in report["guards"].values())
    assert list(report["guards"]) == report["meta"]["policy"]["values"]["guards"]["order"]
    assert _files(noop_run.folder) == {"report.json", "events.jsonl", "evidence.safetensors"}
    assert report["evidence"]["structure"]["source"] == "file"


def test_the_folder_is_named_after_the_configuration_and_no_temporary_name_is_recorded(noop_run: RunOutcome) -> None:
    assert noop_run.folder.parent.name == "baseline"
    assert find_report(noop_run.folder.parent) == noop_run.report_path
    text = (noop_run.folder / "report.json").read_text(encoding="utf-8")
    assert ".part" not in text and "progress" not in json.loads(text)["context"]


def test_events_tell_the_phases(noop_run: RunOutcome) -> None:
    events = [json.loads(line) for line in (noop_run.folder / "events.jsonl").read_text().splitlines()]
    phases = ["prepare", "guard_prepare", "edit", "guard_validate", "eval", "finalize"]
    assert [event["phase"] for event in events if event["event"] == "start"] == phases


def test_an_edited_run_holds_its_own_baseline_and_can_be_certified(edited_run: RunOutcome) -> None:
    baseline = json.loads((edited_run.folder / "baseline" / "report.json").read_text())
    certificate = make_certificate(_stored(edited_run), baseline)
    validate_certificate(certificate)
    ratio = edited_run.report["metrics"]["primary_metric"]["ratio_vs_baseline"]
    assert certificate["primary_metric"]["ratio_vs_baseline"] == ratio != 1.0
    assert certificate["divergence"]["kl_mean"] > 0
    assert verify_certificate(json.loads(json.dumps(certificate))).intact


def test_an_unedited_run_serves_certify_as_baseline(
    noop_run: RunOutcome, certify_models: Callable[..., Any], demo_model: Path, harmless: Path
) -> None:
    same = certify_models(demo_model, baseline_report=noop_run.folder, dataset={"seq_len": 32})
    assert same.certificate["primary_metric"]["ratio_vs_baseline"] == 1.0
    assert same.certificate["weights"]["identical"]
    assert {gate["decision"] for gate in same.certificate["gates"] if gate["basis"] == "guard"} == {"pass"}


def test_a_run_against_a_stored_baseline_measures_the_other_model_on_its_windows(
    noop_run: RunOutcome, run_small: Callable[..., RunOutcome], harmless: Path
) -> None:
    outcome = run_small(model={"id": str(harmless)}, baseline=noop_run.folder, dataset={"final_n": 2})
    report = outcome.report
    assert report["evidence"]["final"]["window_ids"] == noop_run.report["evidence"]["final"]["window_ids"]
    assert report["dataset"]["reused"] and not (outcome.folder / "baseline").exists()
    assert report["meta"]["baseline"]["run_id"] == noop_run.report["meta"]["run_id"]
    ratio = report["metrics"]["primary_metric"]["ratio_vs_baseline"]
    assert 0.98 < ratio < 1.02 and ratio != 1.0
    certificate = make_certificate(report, _stored(noop_run))
    assert certificate["primary_metric"]["ratio_vs_baseline"] == ratio
    assert certificate["baseline_ref"]["run_id"] == noop_run.report["meta"]["run_id"]
    assert not certificate["weights"]["identical"]


def test_structure_is_held_against_the_stored_baseline_and_not_against_the_model_itself(
    noop_run: RunOutcome, run_small: Callable[..., RunOutcome], copy_model: Callable[..., Path], demo_model: Path
) -> None:
    def soften(model: Any) -> None:
        model.config.layer_norm_epsilon = 1e-3

    outcome = run_small(model={"id": str(copy_model(demo_model, soften))}, baseline=noop_run.folder)
    assert outcome.status == "rollback"
    assert "layer_norm_epsilon" in outcome.report["meta"]["rollback_reason"]


def test_a_plugin_guard_that_did_not_see_the_stored_baseline_is_not_evaluated(
    edited_run: RunOutcome, run_small: Callable[..., RunOutcome], harmless: Path, demo_model: Path
) -> None:
    order = {"order": ["hello_guard"], "hello_guard": {"message": "hi"}}
    baseline = edited_run.folder / "baseline"
    same = run_small(guards=order, baseline=baseline)
    assert same.report["guards"]["hello_guard"]["evaluated"]
    other = run_small(guards=order, baseline=baseline, model={"id": str(harmless)})
    assert not other.report["guards"]["hello_guard"]["evaluated"]
    assert not other.report["guards"]["hello_guard"]["passed"]


def _no_windows(report: dict[str, Any]) -> None:
    report["evaluation_windows"] = {}


def _other_tokenizer(report: dict[str, Any]) -> None:
    report["evidence"]["model"]["tokenizer_digest"] = "0" * 32


def _no_digest(report: dict[str, Any]) -> None:
    report["evidence"]["data"]["digest"] = ""


def _other_window(report: dict[str, Any]) -> None:
    report["evaluation_windows"]["final"]["input_ids"][0][3] += 1


def _other_metric(report: dict[str, Any]) -> None:
    report["evidence"]["metric_kind"] = "ppl_mlm"


@pytest.mark.parametrize(
    ("change", "code"),
    [
        (_no_windows, "E001"),
        (_other_metric, "E001"),
        (_other_tokenizer, "E002"),
        (_no_digest, "E004"),
        (_other_window, "E006"),
    ],
)
def test_a_baseline_that_cannot_be_paired_is_named_and_nothing_is_written(
    noop_run: RunOutcome, run_small: Callable[..., RunOutcome], tmp_path: Path, change: Change, code: str
) -> None:
    report = copy.deepcopy(_stored(noop_run))
    change(report)
    path = tmp_path / "report.json"
    path.write_text(json.dumps(report))
    with pytest.raises(PairingError) as caught:
        run_small(baseline=path, out=tmp_path / "out")
    assert caught.value.code == code
    assert not (tmp_path / "out").exists()


def test_an_edited_run_is_no_baseline(edited_run: RunOutcome, run_small: Callable[..., RunOutcome]) -> None:
    with pytest.raises(CertificateError, match="edited by 'quant_rtn'"):
        run_small(baseline=edited_run.folder)


@pytest.mark.parametrize(
    ("plan", "argument", "value"),
    [
        ({"bitwidth": 2}, "bitwidth", 3),
        ({"bitwidth": 8, "group_size": None, "scope": "all"}, "group_size", 128),
        ({"bitwidth": 8, "group_size": 100, "scope": "all"}, "group_size", 64),
        ({"bitwidth": 8, "group_size": 16, "scope": "all"}, "scope", "ffn"),
        ({"bitwidth": 8, "group_size": 8, "scope": "ffn"}, "scope", "attn"),
    ],
)
def test_an_edit_weakens_in_bits_then_groups_then_scope(plan: dict[str, Any], argument: str, value: Any) -> None:
    assert weaker_plan("quant_rtn", plan) == {**plan, argument: value}


def test_the_weakest_plan_has_no_weaker_one() -> None:
    assert weaker_plan("quant_rtn", {"bitwidth": 8, "group_size": 16, "scope": "attn"}) is None


def test_until_pass_weakens_the_edit_from_the_same_start_until_it_passes(run_small: Callable[..., RunOutcome]) -> None:
    goal = {"target_pm_ratio": 1.02}
    plan = {"name": "quant_rtn", "plan": {"bitwidth": 3}}
    outcome = run_small(edit=plan, auto=goal, until_pass=True, max_attempts=6)
    rows = outcome.report["meta"]["attempts"]
    assert [row["status"] for row in rows] == ["rollback"] * (len(rows) - 1) + ["success"]
    assert [row["plan"]["bitwidth"] for row in rows] == list(range(3, 3 + len(rows)))
    assert len(rows) > 1 and rows[-1]["ratio"] <= 1.02 < rows[0]["ratio"]
    assert all(row["seconds"] > 0 for row in rows)
    alone = run_small(edit={"name": "quant_rtn", "plan": rows[-1]["plan"]})
    digests = [
        {tensor["name"]: tensor["digest"] for tensor in run.report["evidence"]["structure"]["tensors"]}
        for run in (outcome, alone)
    ]
    assert digests[0] == digests[1]


def test_until_pass_ends_after_its_attempts(run_small: Callable[..., RunOutcome]) -> None:
    edit = {"name": "quant_rtn", "plan": {"bitwidth": 2}}
    outcome = run_small(edit=edit, auto={"target_pm_ratio": 0.5}, until_pass=True, max_attempts=2)
    assert (outcome.status, len(outcome.report["meta"]["attempts"])) == ("rollback", 2)
    assert "no attempt of 2 passed; allow more with --max-attempts" in outcome.notes


def test_until_pass_refuses_an_edit_that_it_cannot_weaken(run_small: Callable[..., RunOutcome], tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="cannot weaken the edit 'noop'; expected one of: quant_rtn"):
        run_small(edit={"name": "noop"}, until_pass=True, out=tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_a_run_that_takes_too_long_fails_with_a_whole_report(run_small: Callable[..., RunOutcome]) -> None:
    outcome = run_small(timeout=1e-6)
    assert _stored(outcome)["status"] == "failed"
    assert _stored(outcome)["error"] == "stopped after 1e-06 s, as --timeout asks"


def test_an_edit_beyond_the_limit_is_rolled_back_and_reported(run_small: Callable[..., RunOutcome]) -> None:
    outcome = run_small(edit={"name": "quant_rtn", "plan": {"bitwidth": 2}}, output={"save_model": True})
    assert outcome.status == "rollback" and outcome.model_folder is None
    assert _stored(outcome)["meta"]["rollback_reason"].startswith("primary_metric")


def test_the_kept_model_is_the_one_that_was_measured(edited_run: RunOutcome, load_model: Callable[[Path], Any]) -> None:
    from invarlock.checkpoints.structure import live_structure

    folder = edited_run.folder / "model"
    assert edited_run.model_folder == folder
    assert {"config.json", "model.safetensors", "tokenizer.json"} <= _files(folder)
    measured = {t["name"]: t["digest"] for t in edited_run.report["evidence"]["structure"]["tensors"]}
    kept = {tensor.name: tensor.digest for tensor in live_structure(load_model(folder)).tensors}
    assert kept == measured


def test_a_folder_that_is_not_free_is_refused_before_the_run(
    run_small: Callable[..., RunOutcome], tmp_path: Path
) -> None:
    (tmp_path / "mine").write_text("keep me")
    with pytest.raises(ConfigError, match="is there already"):
        run_small(output={"save_model": True, "model_dir": str(tmp_path)}, out=tmp_path / "out")
    assert _files(tmp_path) == {"mine"}


@pytest.mark.parametrize("subdir", ["..", "../elsewhere", "."])
def test_a_model_subfolder_outside_the_run_is_refused(run_small: Callable[..., RunOutcome], subdir: str) -> None:
    with pytest.raises(ConfigError, match="expected a folder within the run's"):
        run_small(output={"save_model": True, "model_subdir": subdir})


@pytest.mark.parametrize(("cleanup", "left"), [(True, 0), (False, 1)])
def test_an_interrupted_run_leaves_no_folder_of_its_name(
    run_small: Callable[..., RunOutcome], tmp_path: Path, cleanup: bool, left: int
) -> None:
    def interrupt(what: str, done: int, total: int) -> None:
        if what == "measuring":
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        run_small(interrupt, out=tmp_path, name="x", cleanup=cleanup)
    assert [path.name.endswith(".part") for path in (tmp_path / "x").iterdir()] == [True] * left


def test_a_staged_folder_appears_whole_or_not_at_all(tmp_path: Path) -> None:
    with staged_folder(tmp_path / "new") as folder:
        (folder / "a").write_text("a")
        assert not (tmp_path / "new").exists()
    assert _files(tmp_path) == {"new/a"}
    with pytest.raises(OSError, match="disk full"), staged_folder(tmp_path / "other") as folder:
        (folder / "a").write_text("a")
        raise OSError("disk full")
    assert _files(tmp_path) == {"new/a"}


@pytest.mark.parametrize(("option", "value"), [("max_attempts", 0), ("timeout", 0.0), ("timeout", float("nan"))])
def test_a_request_that_makes_no_sense_is_refused(configure: Callable[..., Path], option: str, value: Any) -> None:
    with pytest.raises(ConfigError, match=f"{option} is {value}; expected"):
        RunRequest(settings=load_config(configure()), **{option: value})


def test_a_configuration_may_do_without_the_report(run_small: Callable[..., RunOutcome]) -> None:
    outcome = run_small(output={"save_report": False})
    assert outcome.report_path is None
    assert _files(outcome.folder) == {"events.jsonl"}
