"""A configuration is read as written, resolved in order, and refused with the key, its line and the nearest valid one."""

from __future__ import annotations

import json
from collections.abc import Callable
from importlib import resources
from pathlib import Path

import jsonschema
import pytest
import yaml

from invarlock.core.exceptions import ConfigError
from invarlock.policy.config import config_schema, load_config, load_edit_config
from invarlock.policy.resolve import resolve_policy

Write = Callable[..., Path]

FULL = """
model: {id: gpt2, adapter: hf_causal, device: cpu, torch_dtype: float32, trust_remote_code: false, revision: main}
dataset:
  provider: {kind: local_jsonl, file: texts.jsonl}
  split: validation
  seq_len: 128
  stride: 128
  preview_n: 16
  final_n: 24
  seed: 7
  text_field: body
edit: {name: quant_rtn, parameters: {bitwidth: 8}}
guards:
  order: [invariants, hello_guard, spectral, invariants]
  spectral: {deadband: 1e-2, kappa: {ffn: 4}, multiple_testing: {alpha: 0.01}}
  hello_guard: {message: hi}
auto: {enabled: true, tier: conservative, probes: 2, target_pm_ratio: 1.2}
eval:
  max_pm_ratio: 1.3
  spike_threshold: 3
  metric: {kind: auto, reps: 500, ci_level: 0.9}
  bootstrap: {seed: 3}
  loss: {type: causal}
metrics: {pm_tail: {mode: fail}}
context: {snapshot: {mode: chunked}, run_name: nightly}
output: {dir: out, save_model: true, model_dir: keep, model_subdir: m, save_report: true}
"""


@pytest.fixture
def write(tmp_path: Path) -> Write:
    def _write(text: str, name: str = "config.yaml") -> Path:
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text, encoding="utf-8")
        return path

    return _write


def _refused(path: Path, **arguments: object) -> str:
    with pytest.raises(ConfigError) as caught:
        load_config(path, **arguments)  # type: ignore[arg-type]
    message = str(caught.value)
    assert "\n" not in message
    return message


def test_every_documented_key_is_read(write: Write) -> None:
    settings = load_config(write(FULL))
    assert (settings.model.id, settings.model.dtype, settings.model.revision) == ("gpt2", "float32", "main")
    assert settings.dataset.provider_name == "local_jsonl"
    assert settings.dataset.provider_options == {"file": "texts.jsonl", "text_field": "body"}
    assert (settings.edit.name, settings.edit.plan) == ("quant_rtn", {"bitwidth": 8})
    assert settings.plugin_arguments("hello_guard") == {"message": "hi"}
    assert settings.plugin_arguments("spectral") == {}
    assert settings.eval.metric_kind == "ppl_causal"
    assert settings.eval.spike_threshold == 3.0
    assert settings.context.model_dump()["run_name"] == "nightly"
    assert settings.output.model_subdir == "m"


def test_policy_overrides_have_the_shape_of_a_tier(write: Write) -> None:
    settings = load_config(write(FULL))
    assert settings.policy_overrides() == {
        "metrics": {"pm_tail": {"mode": "fail"}, "pm_ratio": {"ci_level": 0.9}},
        "sample": {"preview": 16, "final": 24},
        "bootstrap": {"replicates": 500, "seed": 3},
        "guards": {
            "order": ["invariants", "hello_guard", "spectral", "invariants"],
            "spectral": {"deadband": 0.01, "kappa": {"ffn": 4}, "multiple_testing": {"alpha": 0.01}},
        },
    }
    policy = resolve_policy("conservative", "ci", overrides=settings.policy_overrides())
    assert policy.values["guards"]["spectral"]["multiple_testing"] == {"method": "bonferroni", "alpha": 0.01}
    assert policy.values["sample"]["preview"] == 16


def test_an_empty_wish_overrides_nothing(write: Write) -> None:
    assert load_config(write("model: {id: gpt2}\nguards:\n")).policy_overrides() == {}


def test_precedence_is_command_line_profile_file_defaults(write: Write) -> None:
    text = """
    defaults: {model: {device: mps, dtype: float32}, dataset: {seq_len: 64, preview_n: 5}, output: {dir: low}}
    model: {id: gpt2, device: cuda}
    dataset: {preview_n: 10, final_n: 11}
    output: {dir: high}
    """
    path = write(text)
    plain = load_config(path)
    assert (plain.model.device, plain.model.dtype, plain.dataset.seq_len) == ("cuda", "float32", 64)
    assert (plain.dataset.preview_n, plain.output.dir) == (10, "high")

    profiled = load_config(path, profile="ci_cpu")
    assert (profiled.model.device, profiled.dataset.preview_n) == ("cpu", None)
    assert resolve_policy(profile="ci_cpu", overrides=profiled.policy_overrides()).values["sample"]["preview"] == 120
    assert profiled.notes == (
        "model.device: cuda of the configuration gives way to cpu of profile ci_cpu",
        "dataset.preview_n: 10 of the configuration gives way to 120 of profile ci_cpu",
        "dataset.final_n: 11 of the configuration gives way to 120 of profile ci_cpu",
    )

    called = load_config(
        path, profile="ci_cpu", cli_overrides={"model.device": "mps", "dataset.preview_n": 3, "output.dir": None}
    )
    assert (called.model.device, called.dataset.preview_n, called.output.dir) == ("mps", 3, "high")


def test_a_wrong_value_of_the_command_line_is_said_to_come_from_there(write: Write) -> None:
    message = _refused(write("model: {id: gpt2}"), cli_overrides={"auto.probes": 11})
    assert message == "command line: auto.probes is 11; expected less than or equal to 10"


def test_a_profile_outranks_the_limits_that_it_sets(write: Write) -> None:
    path = write("model: {id: gpt2}\nmetrics: {guard_overhead: {required: false}, drift: {max: 1.1}}\n")
    settings = load_config(path, profile="release")
    assert settings.policy_overrides() == {"metrics": {"drift": {"max": 1.1}}}
    policy = resolve_policy(profile="release", overrides=settings.policy_overrides())
    assert policy.values["metrics"]["guard_overhead"]["required"] is True


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (
            "modle: {id: x}",
            "config.yaml:1: unknown key 'modle' (did you mean 'model'?); expected one of: model, dataset",
        ),
        ("model:\n  id: x\n  devise: cpu", "config.yaml:3: unknown key 'model.devise' (did you mean 'device'?)"),
        ("model: {id: x}\npreview_n: 3", "config.yaml:2: unknown key 'preview_n' (did you mean 'dataset.preview_n'?)"),
        ("eval:\n  metric:\n    kid: auto", "config.yaml:3: unknown key 'eval.metric.kid' (did you mean 'kind'?)"),
        (
            "context: {snapshot: {mod: auto}}",
            "config.yaml:1: unknown key 'context.snapshot.mod' (did you mean 'mode'?)",
        ),
        ("dataset: {seqlen: 3}", "config.yaml:1: unknown key 'dataset.seqlen' (did you mean 'seq_len'?)"),
        (
            "dataset: {provider: local_jsonl, fil: x}",
            "config.yaml:1: unknown key 'dataset.fil' (did you mean 'file'?); expected one of: provider, split",
        ),
        (
            "dataset: {provider: {kind: local_jsonl, fil: x}}",
            "config.yaml:1: unknown key 'dataset.provider.fil' (did you mean 'file'?)",
        ),
        ("dataset: {provider: {name: x}}", "config.yaml:1: dataset.provider has no `kind`"),
        (
            "dataset: {provider: wikitext}",
            "config.yaml:1: dataset.provider: unknown data provider 'wikitext' (did you mean 'wikitext2'?)",
        ),
        ("dataset: {provider: 3}", "config.yaml:1: dataset.provider is 3; expected a provider's name, or a mapping"),
        (
            "dataset: {slices: {a: {provider: python_docs}, b: {provider: local_jsonl, fil: x}}}",
            "config.yaml:1: unknown key 'dataset.slices.b.fil' (did you mean 'file'?)",
        ),
        (
            "dataset: {slices: {a: {provider: python_docs}, b: {split: x}}}",
            "config.yaml:1: dataset.slices.b has no provider",
        ),
        (
            "dataset: {provider: wikitext2, slices: {a: {provider: python_docs}, b: {provider: python_code}}}",
            "config.yaml:1: dataset.provider stands beside dataset.slices",
        ),
        ("dataset: {slices: {a: {provider: python_docs}}}", "config.yaml:1: dataset.slices is {'a': "),
        ("dataset: {slices: {a: 3, b: 4}}", "config.yaml:1: dataset.slices.a is 3; expected a mapping"),
        (
            "dataset: {slices: {a: {provider: python_docs}, b: {provider: python_code, preview_n: 3}}}",
            "config.yaml:1: unknown key 'dataset.slices.b.preview_n'",
        ),
        ("dataset: {preview_n: '8'}", "config.yaml:1: dataset.preview_n is '8'; expected a valid integer"),
        ("dataset: {preview_n: 0}", "config.yaml:1: dataset.preview_n is 0; expected greater than or equal to 1"),
        ("dataset: {preview_n: true}", "config.yaml:1: dataset.preview_n is True; expected a valid integer"),
        ("model: {device: tpu}", "config.yaml:1: model.device is 'tpu'; expected"),
        ("model: [1]", "config.yaml:1: model is [1]; expected a mapping"),
        (
            "model: {dtype: float32, torch_dtype: float32}",
            "config.yaml:1: model.dtype and model.torch_dtype are one key",
        ),
        ("auto: {probes: 11}", "config.yaml:1: auto.probes is 11; expected less than or equal to 10"),
        ("auto: {tier: strict}", "config.yaml:1: auto.tier is 'strict'; expected 'conservative', 'balanced' or"),
        ("eval: {max_pm_ratio: .nan}", "config.yaml:1: eval.max_pm_ratio is nan; expected a finite number"),
        (
            "eval: {loss: casual}",
            "config.yaml:1: eval.loss is 'casual' (did you mean 'causal'?); expected auto, causal",
        ),
        ("eval: {metric: {ci_level: 1}}", "config.yaml:1: eval.metric.ci_level is 1; expected less than 1"),
        ("assurance: {mode: strict}", "config.yaml:1: assurance is refused: "),
        ("guards:\n  spectral:\n    mode: x", "config.yaml:3: guards.spectral.mode is refused: "),
        ("guards: {invariants: {intent: finetune}}", "config.yaml:1: guards.invariants.intent is refused: "),
        ("guards: {rmt: {mode: x}}", "config.yaml:1: guards.rmt.mode is refused: "),
        ("guards: {spectral: {kapa: {}}}", "config.yaml:1: unknown key 'guards.spectral.kapa' (did you mean 'kappa'?)"),
        (
            "guards: {spectral: {deadband: wide}}",
            "config.yaml:1: guards.spectral.deadband is 'wide'; expected a number",
        ),
        ("guards: {spectral: {kappa: 3}}", "config.yaml:1: guards.spectral.kappa is 3; expected a mapping"),
        (
            "guards: {invariants: {strict_mode: 1}}",
            "config.yaml:1: guards.invariants.strict_mode is 1; expected true or",
        ),
        ("guards: {spectrl: {}}", "config.yaml:1: guards.spectrl: unknown guard 'spectrl' (did you mean 'spectral'?)"),
        (
            "guards:\n  order:\n    - invariant",
            "config.yaml:3: guards.order.0: unknown guard 'invariant' (did you mean",
        ),
        ("guards: {order: spectral}", "config.yaml:1: guards.order is 'spectral'; expected a valid list"),
        (
            "metrics: {pm_tail: {kl_max: 1}}",
            "config.yaml:1: unknown key 'metrics.pm_tail.kl_max' (did you mean 'metrics.divergence.kl_max'?)",
        ),
        ("metrics: {pm_tale: {}}", "config.yaml:1: unknown key 'metrics.pm_tale' (did you mean 'pm_tail'?)"),
        ("model: {adapter: hf_casual}", "config.yaml:1: model.adapter: unknown adapter 'hf_casual' (did you mean"),
        ("edit: {name: quant}", "config.yaml:1: edit.name: unknown edit 'quant' (did you mean 'quant_rtn'?)"),
        ("edit: {plan: {}, parameters: {}}", "config.yaml:1: edit.plan and edit.parameters are one key"),
        ("dataset: 3", "config.yaml:1: dataset is 3; expected a mapping"),
        ("defaults: 3", "config.yaml:1: defaults is not a mapping"),
        ("defaults:\n  modle: {}", "config.yaml:2: unknown key 'modle'"),
        ("output: {dir: x}", "config.yaml: model.id is missing; expected a folder or a hub id"),
        ("a: 1\nb: [", "config.yaml:2: not valid YAML: "),
        ("model: {id: a}\nmodel: {id: b}", "config.yaml:2: key 'model' stands there twice"),
        ("1: 2", "config.yaml:1: key 1 is not text"),
        ("[a]: 2", "config.yaml:1: a key is not text"),
        ("model: !!python/object:os.system {}", "config.yaml:1: tag tag:yaml.org,2002:python/object:os.system is not"),
        ("context: {a: !!binary aGk=}", "config.yaml:1: tag tag:yaml.org,2002:binary is not supported"),
        ("a: &a [*a]", "config.yaml:1: aliases nest without end"),
    ],
)
def test_what_is_wrong_is_named_with_its_line(write: Write, text: str, message: str) -> None:
    assert _refused(write(text)).startswith(message)


@pytest.mark.parametrize(("text", "expected"), [("", "is empty"), ("# nothing", "is empty"), ("- a", "holds a list")])
def test_a_file_that_holds_no_mapping_is_refused(write: Write, text: str, expected: str) -> None:
    assert expected in _refused(write(text))


def test_a_file_that_is_not_there_or_no_text_is_refused(tmp_path: Path) -> None:
    assert "no such file" in _refused(tmp_path / "none.yaml")
    (tmp_path / "binary.yaml").write_bytes(b"\xff\xfe\x00")
    assert "UTF-8" in _refused(tmp_path / "binary.yaml")
    assert "cannot be read" in _refused(tmp_path)


def test_a_section_that_is_none_is_named_under_a_profile_too(write: Write) -> None:
    assert _refused(write("dataset: 3"), profile="ci") == "config.yaml:1: dataset is 3; expected a mapping"


def test_an_unknown_gate_is_named_with_the_nearest(write: Write) -> None:
    path = write("model: {id: x}\neval:\n  gates_off:\n    - pairing\n    - token_flip\n")
    assert load_config(path).eval.gates_off == ["pairing", "token_flip"]
    assert _refused(path, gates=("pairing", "token_flips")) == (
        "config.yaml:5: eval.gates_off: unknown gate 'token_flip' (did you mean 'token_flips'?); expected one of: pairing, "
        "token_flips"
    )


def test_several_errors_are_counted(write: Write) -> None:
    assert _refused(write("modle: {}\nauto: {probes: 11}")).endswith("(and 1 more)")


@pytest.mark.slow
def test_aliases_that_multiply_are_stopped(write: Write) -> None:
    lines = ["a0: &a0 [x, x, x, x, x, x, x, x, x, x]"]
    lines += [f"a{i}: &a{i} [{', '.join([f'*a{i - 1}'] * 10)}]" for i in range(1, 9)]
    assert "more than 100000 values" in _refused(write("\n".join(lines)))


def test_merge_keys_and_includes_work(write: Write) -> None:
    write("{seq_len: 32, preview_n: 4}", "parts/data.yaml")
    text = "model: {id: gpt2}\ndataset: !include parts/data.yaml\ncontext: {a: &a {x: 1, y: 1}, b: {<<: *a, x: 2}}\n"
    settings = load_config(write(text))
    assert (settings.dataset.seq_len, settings.dataset.preview_n) == (32, 4)
    assert settings.context.model_dump()["b"] == {"x": 2, "y": 1}


def test_an_error_in_an_included_file_names_that_file(write: Write) -> None:
    write("seq_len: 32\npreviewn: 4\n", "parts/data.yaml")
    message = _refused(write("model: {id: gpt2}\ndataset: !include parts/data.yaml\n"))
    assert message.startswith("data.yaml:2: unknown key 'dataset.previewn' (did you mean 'preview_n'?)")


@pytest.mark.parametrize("disguise", ["../secret.yaml", "absolute", "link"])
def test_an_include_outside_the_folder_is_refused_unless_allowed(
    write: Write, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, disguise: str
) -> None:
    secret = write("seq_len: 32\n", "secret.yaml")
    (tmp_path / "inner").mkdir()
    (tmp_path / "inner" / "link.yaml").symlink_to(secret)
    name = {"absolute": str(secret), "link": "link.yaml"}.get(disguise, disguise)
    path = write(f"model: {{id: gpt2}}\ndataset: !include {name}\n", "inner/config.yaml")
    assert "INVARLOCK_ALLOW_CONFIG_INCLUDE_OUTSIDE=1" in _refused(path)
    monkeypatch.setenv("INVARLOCK_ALLOW_CONFIG_INCLUDE_OUTSIDE", "1")
    assert load_config(path).dataset.seq_len == 32


def test_includes_that_circle_or_go_too_deep_are_refused(write: Write) -> None:
    write("x: !include config.yaml\n", "b.yaml")
    assert "config.yaml -> b.yaml -> config.yaml" in _refused(write("context: !include b.yaml\n"))
    for i in range(12):
        write(f"x: !include d{i + 1}.yaml\n", f"d{i}.yaml")
    assert "deeper than" in _refused(write("context: !include d0.yaml\n"))
    assert "no such file" in _refused(write("context: !include nowhere.yaml\n"))


def test_numbers_and_dates_are_what_they_look_like(write: Write) -> None:
    context = load_config(
        write("model: {id: x}\ncontext: {a: 1e-3, b: 2024-01-02, c: 1E5, d: '1e-3', e: 0x10}\n")
    ).context
    values = {"a": 0.001, "b": "2024-01-02", "c": 100000.0, "d": "1e-3", "e": 16}
    assert {key: context.model_dump()[key] for key in values} == values


def test_a_preset_needs_no_model(write: Write) -> None:
    assert load_config(write("dataset: {seq_len: 64}"), require_model=False).model.id is None


@pytest.mark.parametrize(
    "text",
    ["edit: {name: quant_rtn, plan: {bitwidth: 4}}", "name: quant_rtn\nparameters: {bitwidth: 4}"],
)
def test_an_edit_alone_is_read_in_both_forms(write: Write, text: str) -> None:
    edit = load_edit_config(write(text))
    assert (edit.name, edit.plan) == ("quant_rtn", {"bitwidth": 4})


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("edit: {name: noop}\nmodel: {id: x}", "config.yaml:2: 'model' has no place in an edit configuration"),
        ("plan: {}", "config.yaml: edit.name is missing"),
        ("edit: {name: nop}", "config.yaml:1: edit.name: unknown edit 'nop' (did you mean 'noop'?)"),
    ],
)
def test_an_edit_configuration_that_is_wrong_says_so(write: Write, text: str, message: str) -> None:
    with pytest.raises(ConfigError) as caught:
        load_edit_config(write(text))
    assert str(caught.value).startswith(message)


@pytest.mark.slow
def test_the_shipped_schema_is_current_and_valid() -> None:
    shipped = json.loads(resources.files("invarlock.data").joinpath("config.schema.json").read_text(encoding="utf-8"))
    assert shipped == config_schema(), "write json.dumps(config_schema(), indent=2) to data/config.schema.json"
    jsonschema.Draft202012Validator.check_schema(shipped)


def test_the_schema_accepts_what_is_accepted_and_refuses_unknown_keys() -> None:
    validator = jsonschema.Draft202012Validator(config_schema())
    data = yaml.safe_load(FULL.replace("1e-2", "0.01"))
    assert list(validator.iter_errors({**data, "defaults": {"auto": {"probes": 1}}})) == []
    for wrong in ({"modle": {}}, {"model": {"devise": "cpu"}}, {"auto": {"probes": 11}}, {"defaults": {"x": 1}}):
        assert list(validator.iter_errors(wrong)) != []
