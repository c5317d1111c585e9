"""`invarlock run`, and `invarlock report` on what it wrote: flags, output, exit codes."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from invarlock.assurance import validate_certificate
from invarlock.cli.certify import request_from
from invarlock.flow.run import RunOutcome
from invarlock.policy.config import load_config

Configure = Callable[..., Path]


@pytest.mark.slow
def test_a_run_is_summed_up_and_ends_with_0(cli: Any, configure: Configure, tmp_path: Path) -> None:
    result = cli("run", "-c", str(configure("mine")), "--out", str(tmp_path), "--timing")
    assert result.exit_code == 0, result.stderr
    lines = dict(line.split(maxsplit=1) for line in result.stdout.splitlines())
    assert lines["SUCCESS"] == "the edit is kept"
    assert lines["ratio"].startswith("1.0000")
    assert Path(lines["Report"]).parent.parent == tmp_path / "mine"
    assert lines["eval"].endswith(" s")
    assert lines["verdict"].startswith("PASS")
    assert "NOTE: no edit is named: the model is measured as it is (noop)" in result.stderr
    assert "TELEMETRY" not in result.stderr


@pytest.mark.slow
def test_flags_stand_above_the_configuration_and_json_is_one_line(
    cli: Any, configure: Configure, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("INVARLOCK_TELEMETRY", "1")
    path = configure(edit={"name": "noop"}, auto={"tier": "balanced"})
    flags = ["--edit", "quant_rtn", "--tier", "conservative", "--probes", "1", "--metric-kind", "ppl_causal"]
    result = cli("run", "-c", str(path), "--out", str(tmp_path), "--device", "cpu", "--json", *flags)
    assert result.exit_code == 0, result.stderr
    assert result.stdout.count("\n") == 1
    shown = json.loads(result.stdout)
    assert (shown["format_version"], shown["status"], shown["exit_code"]) == ("run-v1", "success", 0)
    report = json.loads(Path(shown["report"]).read_text())
    assert (report["edit"]["name"], report["meta"]["auto"]["tier"]) == ("quant_rtn", "conservative")
    assert report["metrics"]["probe"]["windows"] == 1
    assert shown["verdict"] == report["metrics"]["verdict"] and shown["verdict"]["status"]
    assert report["meta"]["policy"]["profile"] == "dev"
    (line,) = [line for line in result.stderr.splitlines() if line.startswith("TELEMETRY")]
    assert " MB; " in line and line.endswith(" tokens/s")


@pytest.mark.slow
def test_minimal_output_is_the_outcome_and_the_paths(
    cli: Any, configure: Configure, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("INVARLOCK_MINIMAL", "1")
    result = cli("run", "-c", str(configure()), "--out", str(tmp_path))
    assert [line.split()[0] for line in result.stdout.splitlines()] == ["SUCCESS", "Report"]
    assert result.stderr == ""


@pytest.mark.slow
def test_a_rolled_back_edit_ends_with_1_and_weakened_attempts_are_listed(
    cli: Any, configure: Configure, tmp_path: Path
) -> None:
    path = configure(edit={"name": "quant_rtn", "plan": {"bitwidth": 2}}, auto={"target_pm_ratio": 0.5})
    flags = ["--until-pass", "--max-attempts", "2", "--telemetry"]
    result = cli("run", "-c", str(path), "--out", str(tmp_path), *flags)
    assert result.exit_code == 1
    assert result.stdout.startswith("ROLLBACK     the edit is rolled back: primary_metric")
    attempts = [line for line in result.stdout.splitlines() if line.startswith("attempt ")]
    assert ["bitwidth=2" in attempts[0], "bitwidth=3" in attempts[1], len(attempts)] == [True, True, 2]
    assert "TELEMETRY: " in result.stderr


@pytest.mark.slow
def test_a_run_out_of_time_ends_with_5_and_without_a_verdict(cli: Any, configure: Configure, tmp_path: Path) -> None:
    arguments = ["run", "-c", str(configure()), "--out", str(tmp_path), "--timeout", "0.000001"]
    result = cli(*arguments)
    assert result.exit_code == 5
    assert result.stdout.startswith("FAILED       stopped after 1e-06 s, as --timeout asks")
    assert "verdict" not in result.stdout
    assert json.loads(cli(*arguments, "--json").stdout)["verdict"] is None


@pytest.mark.slow
def test_a_gate_that_is_switched_off_is_a_warning(cli: Any, configure: Configure, tmp_path: Path) -> None:
    held = ["primary_metric", "preview_final_drift", "divergence_kl", "token_flips"]
    chosen = {"edit": {"name": "quant_rtn", "plan": {"bitwidth": 2}}, "guards": {"order": ["invariants"]}}
    loose = {"max_pm_ratio": 100.0, "spike_threshold": 1000.0}
    kept = cli(
        "run", "-c", str(configure(eval={"gates_off": held, **loose}, **chosen)), "--out", str(tmp_path), "--json"
    )
    shown = json.loads(kept.stdout)
    assert (kept.exit_code, shown["status"], shown["verdict"]["status"]) == (0, "success", "FAIL"), shown["reason"]
    assert "failed and is switched off" in kept.stderr
    back = cli("run", "-c", str(configure(eval=loose, **chosen)), "--out", str(tmp_path / "back"))
    assert back.exit_code == 1 and "verdict      FAIL: " in back.stdout


@pytest.mark.slow
@pytest.mark.parametrize(
    ("sections", "flags", "message"),
    [
        ({"guards": {"order": ["spectrl"]}}, [], "did you mean 'spectral'?"),
        ({"eval": {"gates_off": ["token_flip"]}}, [], "unknown gate 'token_flip' (did you mean 'token_flips'?)"),
        ({"edit": {"name": "noop"}}, ["--until-pass"], "cannot weaken the edit 'noop'"),
        ({}, ["--edit", "quantrtn"], "did you mean 'quant_rtn'?"),
        ({}, ["--probes", "11"], "Invalid value for '--probes'"),
        ({"dataset": {"seq_len": 5000}}, [], "dataset.seq_len is 5000; the model takes at most"),
    ],
)
def test_a_wrong_configuration_is_one_line_and_ends_with_2(
    cli: Any, configure: Configure, tmp_path: Path, sections: Any, flags: list[str], message: str
) -> None:
    result = cli("run", "-c", str(configure(**sections)), "--out", str(tmp_path / "out"), *flags)
    assert (result.exit_code, result.stdout, result.stderr.count("\n")) == (2, "", 1)
    assert message in result.stderr
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(("flags", "code"), [([], 5), (["--profile", "ci_cpu"], 3)])
def test_sides_that_cannot_be_paired_are_a_hard_stop_in_ci_alone(
    cli: Any, configure: Configure, edited_run: RunOutcome, tmp_path: Path, flags: list[str], code: int
) -> None:
    shutil.copytree(edited_run.folder / "baseline", tmp_path / "other")
    report = json.loads((tmp_path / "other" / "report.json").read_text())
    report["evaluation_windows"]["preview"]["input_ids"][0][0] += 1
    (tmp_path / "other" / "report.json").write_text(json.dumps(report))
    result = cli(
        "run", "-c", str(configure()), "--out", str(tmp_path / "out"), "--baseline", str(tmp_path / "other"), *flags
    )
    assert result.exit_code == code
    assert result.stderr.startswith("ERROR [INVARLOCK:E006] the baseline report's windows")


@pytest.mark.slow
def test_too_little_text_is_a_hard_stop_in_ci(cli: Any, configure: Configure, tmp_path: Path) -> None:
    result = cli("run", "-c", str(configure()), "--out", str(tmp_path), "--profile", "ci")
    assert result.exit_code == 3
    assert result.stderr.startswith("ERROR [INVARLOCK:E001] ")


def test_a_stored_run_becomes_a_certificate_in_every_form(cli: Any, edited_run: RunOutcome, tmp_path: Path) -> None:
    run = str(edited_run.folder)
    result = cli("report", "--run", run, "--format", "all", "-o", str(tmp_path))
    certificate = json.loads((tmp_path / "evaluation.cert.json").read_text())
    validate_certificate(certificate)
    verdict = certificate["verdict"]["status"]
    assert result.exit_code == {"PASS": 0, "FAIL": 1, "INCONCLUSIVE": 4}[verdict]
    written = {line.rpartition("/")[2] for line in result.stdout.splitlines()}
    bundle = {"evaluation.cert.json", "evaluation_certificate.md", "evaluation.html", "manifest.json"}
    assert written == bundle | {"evaluation.junit.xml"} == {path.name for path in tmp_path.iterdir()}
    json_shown = cli("report", "--run", run, "--baseline", str(edited_run.folder / "baseline"), "--format", "json")
    assert json.loads(json_shown.stdout) == certificate
    for form, start in (("md", "# "), ("html", "<!doctype html>"), ("junit", "<?xml")):
        shown = cli("report", "--run", run, "--format", form)
        assert shown.stdout.lower().startswith(start), form
    assert cli("report", "verify", str(tmp_path)).exit_code == result.exit_code
    compared = cli("report", "--compare", str(tmp_path), "--compare", str(tmp_path / "evaluation.cert.json"))
    assert compared.exit_code == 0
    assert sum(verdict in line for line in compared.stdout.splitlines()) == 2


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "expected --run, --compare or a subcommand"),
        (["--compare", "a", "--run", "b"], "--run and --compare do not go together"),
        (["--compare", "a", "--format", "html"], "--compare makes md alone"),
        (["--run", "nowhere"], "has no report.json"),
        (["--run", "x", "explain", "y"], "do not go with explain"),
    ],
)
def test_a_report_that_cannot_be_made_is_one_line(cli: Any, arguments: list[str], message: str) -> None:
    result = cli("report", *arguments)
    assert (result.exit_code, result.stdout, result.stderr.count("\n")) == (2, "", 1)
    assert message in result.stderr


def test_a_run_without_a_baseline_of_its_own_needs_one_named(cli: Any, noop_run: RunOutcome) -> None:
    result = cli("report", "--run", str(noop_run.folder))
    assert result.exit_code == 2
    assert "name the baseline's run with --baseline" in result.stderr
    own = cli("report", "--run", str(noop_run.folder), "--baseline", str(noop_run.folder), "--format", "json")
    assert json.loads(own.stdout)["primary_metric"]["ratio_vs_baseline"] == 1.0


@pytest.mark.parametrize(
    ("text", "key"),
    [
        ("edit: {name: noop}", "edit"),
        ("auto: {probes: 2}", "auto.probes"),
        ("eval: {max_pm_ratio: 1.2}", "eval.max_pm_ratio"),
        ("eval: {spike_threshold: 3.0}", "eval.spike_threshold"),
        ("output: {save_model: true}", "output.save_model"),
        ("eval: {gates_off: [token_flips]}", "eval.gates_off"),
        ("context: {mine: 1}", "context"),
    ],
)
def test_certify_refuses_what_it_would_not_use(cli: Any, tmp_path: Path, text: str, key: str) -> None:
    (tmp_path / "p.yaml").write_text(text)
    result = cli("certify", "--baseline", "a", "--subject", "b", "--preset", str(tmp_path / "p.yaml"))
    assert (result.exit_code, result.stderr.count("\n")) == (2, 1)
    assert result.stderr.startswith(f"ERROR [CONFIG] p.yaml:1: {key} is refused: certify does not use it; ")


def test_certify_uses_the_models_section_and_says_what_gave_way(
    cli: Any, tmp_path: Path, demo_model: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    preset = tmp_path / "p.yaml"
    preset.write_text(
        "model: {revision: v2, dtype: bfloat16, options: {attn_implementation: eager}}\n"
        "dataset: {preview_n: 9, seq_len: 64}\noutput: {dir: elsewhere}\n"
    )
    chosen = load_config(preset, profile="ci", require_model=False)
    request = request_from(chosen, profile="ci", subject="s", baseline="b")
    assert (request.loading.revision, request.loading.dtype) == ("v2", "bfloat16")
    assert request.loading.options == {"attn_implementation": "eager"}
    assert request.out == Path("elsewhere")
    assert "dataset.preview_n: 9 of the configuration gives way to 200 of profile ci" in chosen.notes
