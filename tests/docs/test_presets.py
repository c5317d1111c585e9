"""The presets and example configurations in `configs/`."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from invarlock.cli.certify import request_from
from invarlock.policy.config import load_config, load_edit_config

from .pages import ROOT

CONFIGS = ROOT / "configs"
KINDS = {"causal": "ppl_causal", "masked": "ppl_mlm", "seq2seq": "ppl_seq2seq"}


def test_there_is_a_preset_for_each_kind_of_model() -> None:
    assert set(KINDS) <= {path.stem for path in CONFIGS.glob("*.yaml")}


@pytest.mark.parametrize(("name", "kind"), KINDS.items())
def test_a_preset_makes_a_request_of_its_kind(name: str, kind: str) -> None:
    settings = load_config(CONFIGS / f"{name}.yaml", require_model=False)
    request = request_from(settings, profile="ci", subject="s", baseline="b")
    assert request.metric_kind == kind
    assert request.overrides["guards"]["order"] == ["invariants", "spectral", "rmt", "variance"]


@pytest.mark.parametrize("path", sorted(CONFIGS.glob("run_*.yaml")), ids=lambda path: path.stem)
def test_a_run_configuration_names_a_model_and_an_edit(path: Path) -> None:
    settings = load_config(path)
    assert settings.model.id is not None and settings.edit.name in ("quant_rtn", "noop")


@pytest.mark.parametrize("path", sorted(CONFIGS.glob("edit_*.yaml")), ids=lambda path: path.stem)
def test_an_edit_configuration_stands_alone(path: Path) -> None:
    assert load_edit_config(path).name == "quant_rtn"


@pytest.mark.slow
def test_the_causal_preset_certifies(
    demo_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    from invarlock.cli.app import app

    monkeypatch.chdir(tmp_path)
    quick = tmp_path / "quick.yaml"
    quick.write_text((CONFIGS / "causal.yaml").read_text().replace("seed: 42", "seed: 42\n  seq_len: 48"))
    model = str(demo_model)
    arguments = ["--baseline", model, "--subject", model, "--preset", str(quick), "--profile", "dev", "--json"]
    assert app(["certify", *arguments], standalone_mode=False) == 0
    said = json.loads(capsys.readouterr().out)
    assert said["verdict"]["status"] == "PASS" and said["primary_metric"]["ratio_vs_baseline"] == 1.0
