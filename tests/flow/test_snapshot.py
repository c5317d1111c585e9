"""Snapshots: chosen by memory, private, removed, and good for bringing a model back bit for bit."""

from __future__ import annotations

import stat
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from invarlock.adapters import HF_Causal_Adapter
from invarlock.core.exceptions import AdapterError, ConfigError
from invarlock.flow import snapshot as snapshots
from invarlock.flow.snapshot import SnapshotPlan, plan_snapshot, take_snapshot

State = Callable[[Any], dict[str, torch.Tensor]]
Same = Callable[[dict[str, torch.Tensor], dict[str, torch.Tensor]], bool]


def _noise(model: Any) -> None:
    for parameter in model.parameters():
        parameter.add_(torch.randn_like(parameter))


def _replace_parameters(model: Any) -> None:
    for module in model.modules():
        for name, parameter in list(module._parameters.items()):
            if parameter is not None:
                module._parameters[name] = torch.nn.Parameter(parameter * 2 + 1)


def _break_tie(model: Any) -> None:
    model.lm_head.weight = torch.nn.Parameter(model.lm_head.weight * 3)


def _other_type(model: Any) -> None:
    model.half()


def _other_shape(model: Any) -> None:
    model.resize_token_embeddings(120)


def _data_swapped(model: Any) -> None:
    for parameter in model.parameters():
        parameter.data = torch.zeros(2, 2, dtype=torch.float64)


def _change_buffers(model: Any) -> None:
    for _, buffer in model.named_buffers():
        buffer.fill_(7)
    model.register_buffer("extra", torch.ones(3))


def _delete_buffers(model: Any) -> None:
    for module in model.modules():
        for name in list(module._buffers):
            delattr(module, name)


def _parameter_to_buffer(model: Any) -> None:
    layer = model.get_input_embeddings()
    weight = layer.weight.detach().clone()
    del layer._parameters["weight"]
    layer.register_buffer("weight", weight)


def _new_nan(model: Any) -> None:
    model.get_input_embeddings().weight.fill_(float("nan"))


TENSOR_EDITS = [
    _noise,
    _replace_parameters,
    _break_tie,
    _other_type,
    _data_swapped,
    _change_buffers,
    _parameter_to_buffer,
    _new_nan,
]


class _Replacement(torch.nn.Module):
    def forward(self, states: torch.Tensor) -> torch.Tensor:
        return states * 0


def _replace_module(model: Any) -> None:
    first = next(name for name, _ in model.named_modules() if name.endswith("mlp"))
    parent, _, leaf = first.rpartition(".")
    setattr(model.get_submodule(parent), leaf, _Replacement())


def _add_hook(model: Any) -> None:
    model.get_input_embeddings().register_forward_hook(lambda module, inputs, output: output * 2)


def _parametrize(model: Any) -> None:
    torch.nn.utils.parametrizations.weight_norm(model.get_input_embeddings())


def _patch_forward(model: Any) -> None:
    model.get_input_embeddings().forward = lambda ids: torch.zeros(*ids.shape, 32)


def _change_settings(model: Any) -> None:
    model.config.update({"tie_word_embeddings": False, "layer_norm_epsilon": 1.0, "rms_norm_eps": 1.0})
    model.config.invented = True
    model.train()


OBJECT_EDITS = [
    _other_shape,
    _delete_buffers,
    _replace_module,
    _add_hook,
    _parametrize,
    _patch_forward,
    _change_settings,
]


@pytest.fixture(params=["bytes", "chunked"])
def plan(request: pytest.FixtureRequest, tmp_path: Path) -> SnapshotPlan:
    return SnapshotPlan(mode=request.param, temp_dir=tmp_path)


@pytest.mark.parametrize("kind", ["gpt2", "llama"])
@pytest.mark.parametrize("edit", TENSOR_EDITS + OBJECT_EDITS, ids=lambda edit: edit.__name__)
def test_restoring_brings_every_bit_every_tie_and_the_outputs_back(
    tiny_model: Callable[..., Any],
    state_of: State,
    same_state: Same,
    plan: SnapshotPlan,
    kind: str,
    edit: Callable[[Any], None],
) -> None:
    model = tiny_model(kind)
    ids = torch.arange(12)[None]
    with torch.no_grad():
        before, logits, config = state_of(model), model(input_ids=ids).logits, model.config.to_dict()
        kept = take_snapshot(model, HF_Causal_Adapter(), plan)
        edit(model)
        kept.restore(model)
        kept.release()
        assert same_state(before, state_of(model))
        assert model.lm_head.weight is model.get_input_embeddings().weight
        assert torch.equal(model(input_ids=ids).logits, logits)
    assert model.config.to_dict() == config
    assert not model.training


@pytest.mark.parametrize("edit", TENSOR_EDITS, ids=lambda edit: edit.__name__)
def test_an_adapter_alone_restores_what_happened_to_tensors(
    tiny_model: Callable[..., Any], state_of: State, same_state: Same, edit: Callable[[Any], None]
) -> None:
    model, adapter = tiny_model("llama"), HF_Causal_Adapter()
    before, blob = state_of(model), adapter.snapshot(model)
    with torch.no_grad():
        edit(model)
    adapter.restore(model, blob)
    assert same_state(before, state_of(model))


def test_views_of_one_storage_are_kept(state_of: State, same_state: Same) -> None:
    model = torch.nn.Linear(4, 4)
    flat = torch.arange(20.0)
    model.weight, model.bias = torch.nn.Parameter(flat[:16].view(4, 4)), torch.nn.Parameter(flat[16:])
    before, adapter = state_of(model), HF_Causal_Adapter()
    blob = adapter.snapshot(model)
    with torch.no_grad():
        flat.zero_()
        model.weight.zero_()
    adapter.restore(model, blob)
    assert same_state(before, state_of(model))


def test_an_adapter_says_when_the_module_is_gone(tiny_model: Callable[..., Any]) -> None:
    model, adapter = tiny_model(), HF_Causal_Adapter()
    blob = adapter.snapshot(model)
    del model.transformer.h[1]
    with pytest.raises(AdapterError, match=r"transformer\.h\.1.*load the model again"):
        adapter.restore(model, blob)


def test_chunked_writes_shards_into_a_private_folder_and_removes_it(
    tiny_model: Callable[..., Any], state_of: State, same_state: Same, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("invarlock.adapters.state._SHARD_BYTES", 5000)
    model = tiny_model()
    before = state_of(model)
    kept = take_snapshot(model, HF_Causal_Adapter(), SnapshotPlan(mode="chunked", temp_dir=tmp_path))
    (folder,) = tmp_path.iterdir()
    assert stat.S_IMODE(folder.stat().st_mode) == 0o700
    assert len(list(folder.rglob("*.safetensors"))) > 3
    with torch.no_grad():
        _noise(model)
    kept.restore(model)
    assert same_state(before, state_of(model))
    kept.release()
    kept.release()
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("error", [KeyboardInterrupt, OSError])
def test_a_snapshot_that_is_cut_short_leaves_no_files(
    tiny_model: Callable[..., Any], tmp_path: Path, error: type[BaseException]
) -> None:
    class Cut(HF_Causal_Adapter):
        def snapshot_chunked(self, model: Any, folder: Path) -> Path:
            (folder / "half").write_bytes(b"x")
            raise error

    with pytest.raises(error):
        take_snapshot(tiny_model(), Cut(), SnapshotPlan(mode="chunked", temp_dir=tmp_path))
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("plan", "free", "expected"),
    [
        (SnapshotPlan(), 2**33, "bytes"),
        (SnapshotPlan(), None, "bytes"),
        (SnapshotPlan(), 2**20, "chunked"),
        (SnapshotPlan(threshold_mb=1.0), 2**33, "chunked"),
        (SnapshotPlan(ram_fraction=0.001), 2**30, "chunked"),
        (SnapshotPlan(mode="bytes"), 1, "bytes"),
        (SnapshotPlan(mode="chunked"), 2**33, "chunked"),
    ],
)
def test_memory_decides_where_a_snapshot_of_two_megabytes_goes(
    monkeypatch: pytest.MonkeyPatch, plan: SnapshotPlan, free: int | None, expected: str
) -> None:
    monkeypatch.setattr(snapshots, "_free_memory", lambda: free)
    assert snapshots._choose(plan, 2 * 2**20) == expected


def test_a_disk_without_room_is_refused_with_both_sizes(tiny_model: Callable[..., Any], tmp_path: Path) -> None:
    plan = SnapshotPlan(mode="chunked", temp_dir=tmp_path, disk_free_margin_ratio=1e12)
    with pytest.raises(ConfigError, match=r"MB free for a snapshot of.*context\.snapshot\.temp_dir"):
        take_snapshot(tiny_model(), HF_Causal_Adapter(), plan)
    assert list(tmp_path.iterdir()) == []


def test_the_context_wins_over_the_environment(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("INVARLOCK_SNAPSHOT_MODE", "chunked")
    monkeypatch.setenv("INVARLOCK_SNAPSHOT_AUTO_RAM_FRACTION", "0.1")
    monkeypatch.setenv("INVARLOCK_SNAPSHOT_THRESHOLD_MB", "5")
    assert plan_snapshot({}) == SnapshotPlan("chunked", 0.1, 5.0)
    given = {"mode": "bytes", "ram_fraction": 0.2, "threshold_mb": 6, "temp_dir": str(tmp_path)}
    assert plan_snapshot({"snapshot": given}) == SnapshotPlan("bytes", 0.2, 6.0, 1.2, tmp_path)


@pytest.mark.parametrize(("given", "named"), [({"mood": 1}, "mood"), ({"mode": "zip"}, "'zip'")])
def test_wrong_settings_are_refused_by_name(given: dict[str, Any], named: str) -> None:
    with pytest.raises(ConfigError, match=named):
        plan_snapshot({"snapshot": given})
