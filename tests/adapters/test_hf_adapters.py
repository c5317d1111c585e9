"""The Hugging Face adapters: loading, types, description, tokenizers, and choosing by configuration."""

from __future__ import annotations

import copy
import gc
import shutil
import weakref
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from invarlock.adapters import HF_Auto_Adapter, HF_Causal_Adapter, HF_Causal_Auto_Adapter, HF_MLM_Adapter
from invarlock.adapters import HF_Seq2Seq_Adapter as Seq2Seq
from invarlock.adapters.hf import HF_Adapter
from invarlock.checkpoints.side import Loading, Origin, read_side
from invarlock.checkpoints.structure import live_structure
from invarlock.checkpoints.tokenizer import tokenizer_facts
from invarlock.core.api import ModelAdapter
from invarlock.core.exceptions import AdapterError, ConfigError, ModelLoadError

Copy = Callable[..., Path]
BUILT_IN = (HF_Causal_Adapter, HF_MLM_Adapter, Seq2Seq, HF_Auto_Adapter, HF_Causal_Auto_Adapter)


@pytest.mark.slow
@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16"])
@pytest.mark.parametrize("sharded", [False, True])
def test_checkpoints_of_any_type_load_single_or_sharded(
    llama_model: Path, copy_model: Copy, dtype: str, sharded: bool
) -> None:
    wanted = getattr(torch, dtype)
    folder = copy_model(llama_model, lambda m: m.to(wanted), **({"max_shard_size": "1MB"} if sharded else {}))
    assert (folder / "model.safetensors.index.json").is_file() == sharded
    adapter = HF_Causal_Adapter()
    model = adapter.load_model(str(folder), device="cpu")
    assert not model.training
    assert {p.dtype for p in model.parameters()} == {torch.float32}  # half precision is coarse and slow on a CPU
    kept = adapter.load_model(str(folder), device="cpu", dtype=dtype)
    assert {p.dtype for p in kept.parameters()} == {wanted}
    for (name, one), two in zip(kept.named_parameters(), model.parameters(), strict=True):
        assert torch.equal(one.float(), two), name
    assert model.lm_head.weight is model.model.embed_tokens.weight


@pytest.mark.parametrize("options", [{"dtype": "int8"}, {"torch_dtype": "float7"}])
def test_unknown_types_are_refused(llama_model: Path, options: dict[str, str]) -> None:
    with pytest.raises(ConfigError, match="expected auto, stored, float32, float16 or bfloat16"):
        HF_Causal_Adapter().load_model(str(llama_model), device="cpu", **options)


@pytest.mark.parametrize("device", ["tpu", "cuda:7"])
def test_devices_that_are_not_there_are_refused(llama_model: Path, device: str) -> None:
    if device.startswith("cuda") and torch.cuda.is_available():
        pytest.skip("this machine has CUDA")
    with pytest.raises(ConfigError, match=device):
        HF_Causal_Adapter().load_model(str(llama_model), device=device)


@pytest.mark.slow
@pytest.mark.parametrize("adapter", [HF_Causal_Adapter(), HF_Auto_Adapter(), HF_Causal_Auto_Adapter()])
def test_describe_gives_the_promised_facts(adapter: Any, demo_model: Path, llama_model: Path) -> None:
    for folder, kind, name in ((demo_model, "gpt2", "GPT2LMHeadModel"), (llama_model, "llama", "LlamaForCausalLM")):
        model = adapter.load_model(str(folder), device="cpu")
        facts = adapter.describe(model)
        layers = facts["n_layer"]
        assert (facts["model_type"], facts["model_class"], layers) == (kind, name, model.config.num_hidden_layers)
        assert facts["heads_per_layer"] == [model.config.num_attention_heads] * layers
        assert len(facts["mlp_dims"]) == layers and facts["mlp_dims"][0] > facts["hidden_size"]
        assert [sorted([first, *others]) for first, others in facts["tying"].items()] == [
            sorted(n for n, p in model.named_parameters(remove_duplicate=False) if p is model.lm_head.weight)
        ]
        assert facts["parameters"] == sum(p.numel() for p in model.parameters())


@pytest.mark.parametrize("kind", BUILT_IN)
def test_built_in_adapters_are_complete(kind: type[ModelAdapter]) -> None:
    adapter = kind()
    assert isinstance(adapter, ModelAdapter)
    assert adapter.name.startswith("hf_")
    assert adapter.module_families(None) == {}


@pytest.mark.slow
@pytest.mark.parametrize(("name", "kind"), [("llama", "hf_causal"), ("bert", "hf_mlm"), ("t5", "hf_seq2seq")])
def test_the_configuration_chooses_the_adapter(model_folder: Callable[[str], Path], name: str, kind: str) -> None:
    folder = str(model_folder(name))
    chosen = HF_Auto_Adapter().select(folder)
    assert chosen.name == kind
    assert [a.name for a in (HF_Causal_Adapter(), HF_MLM_Adapter(), Seq2Seq()) if a.can_handle(folder)] == [kind]
    if kind != "hf_causal":
        with pytest.raises(AdapterError, match="hf_causal_auto expects a model for one of: hf_causal"):
            HF_Causal_Auto_Adapter().load_model(folder, device="cpu")
        with pytest.raises(ModelLoadError):
            HF_Causal_Adapter().load_model(folder, device="cpu")


def test_can_handle_says_no_instead_of_raising(tmp_path: Path) -> None:
    assert not HF_Causal_Adapter().can_handle(str(tmp_path))
    assert not HF_Auto_Adapter().can_handle(str(tmp_path / "nothing"))


@pytest.mark.slow
def test_a_saved_model_loads_again_bit_for_bit(demo_model: Path, tmp_path: Path) -> None:
    for adapter in (HF_Causal_Adapter(), HF_Auto_Adapter()):
        model = adapter.load_model(str(demo_model), device="cpu")
        adapter.save(model, tmp_path / adapter.name)
        again = adapter.load_model(str(tmp_path / adapter.name), device="cpu")
        assert all(torch.equal(a, b) for a, b in zip(model.parameters(), again.parameters(), strict=True))
    with pytest.raises(AdapterError, match="Linear has no save_pretrained"):
        HF_Causal_Adapter().save(torch.nn.Linear(1, 1), tmp_path)


# -- where a model came from ------------------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.parametrize("kind", [HF_Causal_Adapter, HF_Auto_Adapter, HF_Causal_Auto_Adapter])
def test_a_loaded_model_remembers_where_it_came_from(kind: type[HF_Adapter], llama_model: Path, tmp_path: Path) -> None:
    adapter = kind()
    model = adapter.load_model(str(llama_model), device="cpu", torch_dtype="float16", attn_implementation="eager")
    origin = adapter.origin(model)
    assert origin == Origin(str(llama_model), llama_model, Loading("float16", options={"attn_implementation": "eager"}))
    side = read_side(adapter, origin.model_id, origin.loading)
    assert live_structure(model, side.structure) is side.structure and side.tokenizer is not None
    again = origin.loading.load(adapter, side, "cpu")
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), again.parameters(), strict=True))
    state, kept = adapter.snapshot(model), adapter.snapshot_chunked(model, tmp_path)
    for restore in (lambda: adapter.restore(model, state), lambda: adapter.restore_chunked(model, kept)):
        with torch.no_grad():
            model.model.norm.weight += 1
        restore()
        assert adapter.origin(model) == origin == HF_MLM_Adapter().origin(model)
        assert live_structure(model, side.structure) is side.structure


@pytest.mark.slow
def test_a_model_made_elsewhere_has_no_origin_and_a_freed_one_is_forgotten(llama_model: Path) -> None:
    adapter = HF_Causal_Adapter()
    model = adapter.load_model(str(llama_model), device="cpu")
    assert adapter.origin(copy.deepcopy(model)) is None and adapter.origin(torch.nn.Linear(1, 1)) is None
    kept = weakref.ref(model)
    del model
    gc.collect()
    assert kept() is None


# -- tokenizers -------------------------------------------------------------------------------------------------------


def test_a_tokenizer_belongs_to_its_checkpoint(demo_model: Path, tmp_path: Path) -> None:
    adapter = HF_Causal_Adapter()
    tokenizer = adapter.tokenizer(str(demo_model))
    assert tokenizer.decode(tokenizer("hello world")["input_ids"]).strip() == "hello world"
    folder = tmp_path / "bare"
    shutil.copytree(demo_model, folder, ignore=shutil.ignore_patterns("tokenizer*"))
    assert adapter.tokenizer(str(folder)) is None
    (folder / "tokenizer.json").write_text("{")
    with pytest.raises(ModelLoadError, match="tokenizer"):
        adapter.tokenizer(str(folder))


@pytest.mark.slow
def test_the_tokenizer_digest_ignores_the_form_of_the_files_and_sees_their_content(
    demo_model: Path, demo_tokenizer: Any, tmp_path: Path
) -> None:
    adapter = HF_Causal_Adapter()
    facts = tokenizer_facts(demo_tokenizer)
    demo_tokenizer.save_pretrained(tmp_path / "again")
    shutil.copyfile(demo_model / "config.json", tmp_path / "again" / "config.json")
    assert tokenizer_facts(adapter.tokenizer(str(tmp_path / "again"))) == facts
    other = adapter.tokenizer(str(demo_model))
    other.add_tokens(["<new>"])
    assert tokenizer_facts(other)[0] != facts[0] and tokenizer_facts(other)[1] == (facts[1] or 0) + 1
    assert tokenizer_facts(None) == (None, None)


# -- plugins ----------------------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_the_adapter_of_the_plugin_guide_works_as_printed(demo_model: Path) -> None:
    class CustomFormatAdapter(ModelAdapter):
        name = "custom_format"

        def load_model(self, model_id: str, device: str = "auto", **kwargs: Any) -> Any:
            if not Path(model_id).exists():
                raise FileNotFoundError(f"Model not found: {model_id}")
            raise NotImplementedError("Replace with actual loading logic")

        def describe(self, model: Any) -> dict[str, Any]:
            return {
                "model_type": "custom",
                "model_class": type(model).__name__,
                "n_layer": getattr(model, "n_layer", None),
                "n_head": getattr(model, "n_head", None),
            }

        def snapshot(self, model: Any) -> bytes:
            import io

            buffer = io.BytesIO()
            torch.save(model.state_dict(), buffer)
            return buffer.getvalue()

        def restore(self, model: Any, snapshot: bytes) -> None:
            import io

            buffer = io.BytesIO(snapshot)
            state_dict = torch.load(buffer, map_location="cpu")
            model.load_state_dict(state_dict)

    from invarlock.core.api import RunConfig
    from invarlock.edits import RTNQuantEdit
    from invarlock.flow.execute import CoreRunner
    from invarlock.guards import InvariantsGuard

    adapter = CustomFormatAdapter()
    assert not adapter.can_handle("x") and adapter.tokenizer("x") is None
    with pytest.raises(AdapterError, match="custom_format"):
        adapter.save(None, Path("x"))
    model = HF_Causal_Adapter().load_model(str(demo_model), device="cpu")
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    data = [{"input_ids": [10, 20, 30, 40 + i]} for i in range(4)]
    for mode in ("bytes", "chunked"):
        report = CoreRunner().execute(
            model,
            adapter,
            RTNQuantEdit(bitwidth=2),
            [InvariantsGuard()],
            RunConfig(device="cpu", max_pm_ratio=1e-6, context={"snapshot": {"mode": mode}}),
            calibration_data=data,
        )
        assert (report.status, report.error) == ("rollback", None)
        assert report.meta["snapshot"]["mode"] == mode
        assert all(torch.equal(before[name], tensor) for name, tensor in model.state_dict().items())


def test_an_adapter_without_a_required_method_cannot_be_made() -> None:
    class Half(ModelAdapter):
        name = "half"

    with pytest.raises(TypeError, match="abstract"):
        Half()  # type: ignore[abstract]
