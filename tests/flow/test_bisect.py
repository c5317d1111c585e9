"""The tensors that carry the damage come first, what was found survives an interruption, and a repair loads and passes."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from certification import round_weights
from gguf_files import write_gguf
from invarlock.checkpoints.structure import layout_of, stored_names
from invarlock.core.exceptions import ConfigError, EditError
from invarlock.flow import bisect as search_flow
from invarlock.flow.bisect import Bisection, BisectRequest, Search, bisect, open_search, seconds
from invarlock.flow.damage import Damage, Trials
from invarlock.flow.diff import diff
from invarlock.flow.repair import choose, ignore_lists, repair, write_repaired
from invarlock.flow.sensitivity import sensitivity
from invarlock.stats.intervals import Interval
from invarlock.stats.studentised import studentised_interval

pytestmark = pytest.mark.slow

CULPRIT = "model.layers.1.mlp.down_proj.weight"
Opened = Callable[[Path], Search]


@pytest.fixture(scope="module")
def opened(llama_model: Path, text_file: Path) -> Opened:
    def _open(subject: Path) -> Search:
        data = {"provider": "local_jsonl", "file": str(text_file), "seq_len": 48}
        return open_search(BisectRequest(str(llama_model), str(subject), dataset=data, search=12, held=4), None)

    return _open


@pytest.fixture(scope="module")
def hurt(copy_model: Callable[..., Path], llama_model: Path) -> Path:
    """Every matrix slightly noisy, and one that is damaged."""

    def change(model: Any) -> None:
        torch.manual_seed(0)
        for name, tensor in model.named_parameters():
            if tensor.ndim == 2:
                tensor += torch.randn_like(tensor) * tensor.std() * (4 if name == CULPRIT else 0.005)

    return copy_model(llama_model, change)


def test_the_damaged_tensor_comes_first_and_giving_it_back_is_enough(opened: Opened, hurt: Path) -> None:
    search = opened(hurt)
    before = {name: value.clone() for name, value in search.subject.state_dict().items()}
    found = bisect(search)
    assert found.ranking[0].name == CULPRIT
    assert found.explained == [CULPRIT], found.lines
    assert not found.uniform
    assert found.parting == "model.layers.1"
    assert found.whole is not None
    assert (found.recovered(CULPRIT) or 0) > 0.8 * found.whole.kl.estimate
    assert json.loads(json.dumps(found.to_dict(), allow_nan=False))["explained"] == [CULPRIT]
    for name, value in search.subject.state_dict().items():
        assert torch.equal(value, before[name]), "trials leave the subject as it was"
    assert not any(parameter.grad is not None for parameter in search.baseline.parameters())
    places = {parameter.data_ptr() for parameter in search.baseline.parameters()}
    shared = {name for name, parameter in search.subject.named_parameters() if parameter.data_ptr() in places}
    assert shared == {name for name, _ in search.subject.named_parameters()} - {change.name for change in found.ranking}
    assert shared, "what is the same in both models stands in memory once"


def test_what_passes_by_enough_passes_on_other_documents_nine_times_in_ten() -> None:
    """Where a set of tensors just meets the demand on some documents, it passes on as many others as often as is said."""
    drawn = np.random.default_rng(0).normal(size=(600, 2, 60))
    documents, weights, again = range(60), np.ones(60), []
    for first, second in drawn:
        here, there = (studentised_interval(values, weights, documents, replicates=400) for values in (first, second))
        limit = 2.0 * here.hi - here.estimate  # the first sample meets it exactly
        easy = Interval(0.0, 0.0, 0.0, 0.95, "none", 0, 0, 60, False, 0.0)
        one, other = (Damage(found, easy, easy, (limit, 1.0, 1.0)) for found in (here, there))
        assert one.passes_again
        assert one.passes
        again.append(other.passes)
        assert not Damage(here, easy, easy, (limit * 0.99 - 1e-9, 1.0, 1.0)).passes_again or limit < 0
    assert np.mean(again) == pytest.approx(0.92, abs=0.03)


def test_a_second_fault_that_shows_nothing_beside_the_first_comes_second(
    opened: Opened, copy_model: Callable[..., Path], llama_model: Path
) -> None:
    faults = {"model.norm.weight", "model.layers.2.mlp.up_proj.weight"}

    def change(model: Any) -> None:
        round_weights(8)(model)
        for name, tensor in model.named_parameters():
            if name in faults:
                tensor.neg_()

    found = bisect(opened(copy_model(llama_model, change)))
    assert {change.name for change in found.ranking[:2]} == faults, found.lines


def test_damage_everywhere_is_called_uniform(
    opened: Opened, copy_model: Callable[..., Path], llama_model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def change(model: Any) -> None:
        torch.manual_seed(0)
        for tensor in model.parameters():
            tensor += torch.randn_like(tensor) * tensor.std() * 0.8

    monkeypatch.setattr(search_flow, "_ALONE", 1)
    found = bisect(opened(copy_model(llama_model, change)))
    assert found.uniform, (found.lines, found.together.keys(), found.explained)
    assert any(line.startswith("uniform") for line in found.lines)


def test_what_was_found_survives_an_interruption(opened: Opened, hurt: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupted(*_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(search_flow, "_together", interrupted)
    found = bisect(opened(hurt), Bisection("a", "b"))
    assert found.stopped == "interrupted"
    assert found.alone
    assert "stopped early" in found.lines[-1]


def test_the_same_weights_have_no_culprit(opened: Opened, llama_model: Path) -> None:
    found = bisect(opened(llama_model))
    assert (found.changed, found.ranking) == (0, [])
    assert "no parameter differs" in found.lines[0]


def test_a_repair_is_written_with_the_baseline_s_tensors_and_loads(
    opened: Opened, hurt: Path, llama_model: Path, tmp_path: Path
) -> None:
    search = opened(hurt)
    found = Bisection("a", "b")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(search_flow, "_together", lambda *_: None)
        bisect(search, found)
    made = choose(search, found)
    assert made.names == [CULPRIT]
    assert not made.everything
    out = tmp_path / "mended"
    lists = ignore_lists(made.names, llama_model)
    write_repaired(hurt, llama_model, set(made.names), None, out, lists)
    models = [AutoModelForCausalLM.from_pretrained(folder).state_dict() for folder in (out, llama_model, hurt)]
    mended, baseline, subject = models
    assert torch.equal(mended[CULPRIT], baseline[CULPRIT])
    assert all(torch.equal(mended[name], subject[name]) for name in mended if name != CULPRIT)
    assert lists["llm-compressor"]["ignore"] == [CULPRIT.removesuffix(".weight")]
    assert [path.name for path in tmp_path.iterdir()] == ["mended"]
    assert Trials(search.job, search.baseline, search.subject, search.windows.preview).damage(made.names).passes


def test_a_repaired_packed_checkpoint_holds_dense_tensors_and_lists_them(
    llama_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.syspath_prepend(str(Path(__file__).parents[2]))
    from benchmarks.diff_corpus import ROLES, write

    tensors = {name: value.float() for name, value in load_file(llama_model / "model.safetensors").items()}
    packed = write(tmp_path / "packed", tensors, "packed", llama_model, ROLES["llama"])
    names = {CULPRIT, "model.layers.0.self_attn.q_proj.weight"}
    other = "model.layers.0.mlp.down_proj.weight"
    told = {
        "note": "kept",
        CULPRIT: '{"_type": "Packed"}',
        other: '{"_type": "Packed"}',
    }  # as torchao's loader reads them
    save_file(load_file(packed / "model.safetensors"), packed / "model.safetensors", metadata=told)
    lists = ignore_lists(sorted(names), llama_model)
    out = tmp_path / "mended"
    write_repaired(packed, llama_model, names, None, out, lists)
    done = {change.name: change for change in diff(str(llama_model), str(out)).changes}
    assert all(done[name].identical for name in names)
    assert [op.name for op in done["model.layers.0.mlp.down_proj.weight"].operations] == ["rounded"]
    with safe_open(out / "model.safetensors", framework="pt") as file:
        assert file.metadata() == {**told, CULPRIT: '{"_type": "Tensor"}', "format": "pt"}
    settings = json.loads((out / "config.json").read_text())["quantization_config"]
    assert set(settings["ignore"]) == {name.removesuffix(".weight") for name in names}
    assert not any(
        name.startswith(CULPRIT.removesuffix("weight") + "weight_") for name in load_file(out / "model.safetensors")
    )


def test_a_repair_is_certified_on_several_kinds_of_text(
    llama_model: Path, hurt: Path, text_file: Path, tmp_path: Path
) -> None:
    """Where nothing else is asked for, the text is documentation and source code, each a slice."""
    slices = {"a": {"provider": "local_jsonl", "file": str(text_file)}, "b": {"provider": "python_docs"}}
    request = BisectRequest(str(llama_model), str(hurt), dataset={"slices": slices, "seq_len": 48}, search=12, held=24)
    search = open_search(request, None)
    made, outcome = repair(request, search, bisect(search), tmp_path / "mended", tmp_path / "runs")
    assert made.names == [CULPRIT] and outcome is not None
    assert outcome.status == "PASS", outcome.certificate["verdict"]["reasons"]
    assert set(outcome.certificate["slices"]) == {"a", "b"}


def test_sensitivity_ranks_an_edit_before_it_is_made(opened: Opened, llama_model: Path) -> None:
    found = sensitivity(opened(llama_model), "quant_rtn", {"bitwidth": 3}, 0.2)
    assert found.ranking[0].expected == max(change.expected for change in found.ranking)
    sizes = {change.name: change.bytes for change in found.ranking}
    assert 0 < sum(sizes[name] for name in found.keep) <= found.budget
    assert found.ignore["modules"] == [name.removesuffix(".weight") for name in found.keep]
    json.dumps(found.to_dict(), allow_nan=False)


def test_models_built_differently_are_refused_with_what_to_do(
    opened: Opened, copy_model: Callable[..., Path], llama_model: Path
) -> None:
    def widen(model: Any) -> None:
        model.resize_token_embeddings(model.config.vocab_size + 8, mean_resizing=False)

    with pytest.raises(EditError, match="invarlock diff"):
        bisect(opened(copy_model(llama_model, widen)))


def test_a_time_is_read_with_its_unit() -> None:
    assert [seconds(text) for text in ("90", "90s", "3m", "1h")] == [90, 90, 180, 3600]
    for text in ("", "m", "-3", "inf", "nan", "3 days"):
        with pytest.raises(ValueError):
            seconds(text)


def test_a_budget_that_is_no_time_is_refused() -> None:
    from invarlock.cli.bisect import bisect as command

    with pytest.raises(ConfigError, match="--budget"):
        command("a", "b", budget="soon", windows=8)


def test_what_the_certificate_names_is_given_back_though_no_text_shows_it(
    llama_model: Path, copy_model: Callable[..., Path], text_file: Path, tmp_path: Path
) -> None:
    """A column of zeros hides in a matrix whose change does nothing to the windows: the guard of weights names it."""
    hidden = "model.layers.0.mlp.down_proj.weight"

    def change(model: Any) -> None:
        torch.manual_seed(0)
        for name, tensor in model.named_parameters():
            if name == CULPRIT:
                tensor += torch.randn_like(tensor) * tensor.std() * 4
            if name == hidden:
                tensor[:, tensor.norm(dim=0).argmin()] = 0.0
            if name == "model.layers.1.self_attn.q_proj.weight":
                tensor *= 1.01

    data = {"provider": "local_jsonl", "file": str(text_file), "seq_len": 48}
    subject = str(copy_model(llama_model, change))
    search = open_search(BisectRequest(str(llama_model), subject, dataset=data, search=12, held=24), None)
    assert choose(search, found := bisect(search)).names == [CULPRIT]
    made, outcome = repair(
        BisectRequest(str(llama_model), subject, dataset=data), search, found, tmp_path / "mended", tmp_path / "runs"
    )
    assert outcome is not None
    assert made.names == [CULPRIT, hidden] and not made.everything
    assert made.verdict == "PASS", outcome.certificate["verdict"]["reasons"]


def test_experts_that_stand_one_by_one_in_the_files_are_given_back(llama_model: Path, tmp_path: Path) -> None:
    """The library stacks them while loading; under that name no file has a tensor, and a repair once gave nothing back."""
    from transformers import MixtralConfig, MixtralForCausalLM

    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4}
    config = MixtralConfig(vocab_size=64, num_key_value_heads=2, num_local_experts=4, **sizes)
    folders = [tmp_path / "baseline", tmp_path / "subject"]
    for folder in folders:
        MixtralForCausalLM(config).save_pretrained(folder)
    model = AutoModelForCausalLM.from_pretrained(folders[0])
    names = ["model.layers.0.mlp.experts.gate_up_proj", "model.layers.1.mlp.experts.down_proj", "model.norm.weight"]
    stored = stored_names(model, names)
    assert len(stored) == 4 * 2 + 4 + 1
    out = tmp_path / "mended"
    layout = layout_of(model.config, AutoModelForCausalLM)
    write_repaired(folders[1], folders[0], set(stored), layout, out, ignore_lists(stored, folders[0]))
    mended, old, new = (dict(AutoModelForCausalLM.from_pretrained(f).named_parameters()) for f in (out, *folders))
    for name, parameter in mended.items():
        assert torch.equal(parameter, (old if name in names else new)[name]), name
    with pytest.raises(EditError, match="cannot be given back"):
        write_repaired(folders[1], folders[0], {"model.layers.0.nowhere"}, layout, tmp_path / "other", {})
    assert not (tmp_path / "other").exists()


def test_a_tied_tensor_that_stands_under_its_other_name_is_given_back(llama_model: Path, tmp_path: Path) -> None:
    model = AutoModelForCausalLM.from_pretrained(llama_model)
    folders = [tmp_path / "baseline", tmp_path / "subject"]
    for number, folder in enumerate(folders):
        shutil.copytree(llama_model, folder)
        tensors = load_file(folder / "model.safetensors")
        tensors["lm_head.weight"] = tensors.pop("model.embed_tokens.weight") * (1 + number)
        save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    layout = layout_of(model.config, AutoModelForCausalLM)
    write_repaired(folders[1], folders[0], {"model.embed_tokens.weight"}, layout, tmp_path / "mended", {})
    before, after = (load_file(folder / "model.safetensors") for folder in (folders[0], tmp_path / "mended"))
    assert torch.equal(before["lm_head.weight"], after["lm_head.weight"])


def test_pickled_weights_are_repaired_as_safetensors(hurt: Path, llama_model: Path, tmp_path: Path) -> None:
    subject = Path(shutil.copytree(hurt, tmp_path / "subject"))
    model = AutoModelForCausalLM.from_pretrained(subject)
    torch.save(model.state_dict(), subject / "pytorch_model.bin")
    (subject / "model.safetensors").unlink()
    out = tmp_path / "mended"
    write_repaired(subject, llama_model, {CULPRIT}, layout_of(model.config, AutoModelForCausalLM), out, {})
    assert not list(out.glob("*.bin"))
    mended, old = (
        dict(AutoModelForCausalLM.from_pretrained(folder).named_parameters()) for folder in (out, llama_model)
    )
    for name, parameter in mended.items():
        assert torch.equal(parameter, (old[name] if name == CULPRIT else model.get_parameter(name))), name
    assert "lm_head.weight" not in load_file(out / "model.safetensors"), "tied to the embedding, and stored once"


def test_a_file_that_is_not_written_here_gets_the_list_for_its_own_tool(
    hurt: Path, llama_model: Path, text_file: Path, tmp_path: Path
) -> None:
    subject = write_gguf(hurt, tmp_path / "m.gguf")
    request = BisectRequest(
        str(llama_model),
        str(subject),
        dataset={"provider": "local_jsonl", "file": str(text_file), "seq_len": 48},
        search=12,
    )
    search = open_search(request, None)
    made, outcome = repair(request, search, bisect(search), tmp_path / "mended", tmp_path / "runs")
    assert outcome is None and made.verdict is None
    assert [path.name for path in (tmp_path / "mended").iterdir()] == ["not_quantized.json"]
    lists = json.loads((tmp_path / "mended" / "not_quantized.json").read_text())
    assert lists["llama-quantize"] == [r"--tensor-type blk\.1\.ffn_down=f16"]
    assert "quantize again" in made.lines[-1]
