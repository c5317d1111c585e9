"""Is what was done to a checkpoint named right? Edits x formats x architectures, each told by `diff` from the files alone.

    python -m benchmarks.diff_corpus [--only EDIT] [--model NAME ...] [--form NAME ...] [--every N]

Every edit changes tensors of one or several roles and says by which operations, with their figures; it is named right
where each changed tensor has exactly these operations in order, and every other tensor none. Forms of storage:

- dense: both sides safetensors; pickled: the subject as pickled float32; cast: the subject in bfloat16
- packed: both sides 8-bit integers in groups; packed subject: the baseline dense, so that 8-bit rounding comes on top
- gguf, gguf8: the subject as GGUF in float16 or Q8_0 (Llama alone: the writer of the tests knows no other)
"""

from __future__ import annotations

import argparse
import json
import shutil
import tempfile
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file

from invarlock.checkpoints.fingerprints import Change
from invarlock.flow.diff import Diff, diff

ROOT = Path(__file__).resolve().parents[1]
MODELS = {"gpt2": ROOT / "src/invarlock/data/demo_model"} | {
    name: ROOT / "tests/assets/models" / name for name in ("llama", "neox", "bert", "t5", "qwen")
}
Tensor = torch.Tensor
Tensors = dict[str, Tensor]
Operations = list[tuple[str, dict[str, Any]]]
Expected = dict[str, Operations]
GROUP = 32


@dataclass(frozen=True)
class Roles:
    """Names of tensors of one architecture, with {} for the layer. `twin` has the shape of `square`."""

    up: str
    down: str
    square: str
    twin: str
    norm: str
    fed: str  # the matrix that takes what `norm` gives
    embed: str
    bias: str | None = None
    layers: int = 4
    wide: str | None = None  # rows of whole groups of 128
    turned: bool = False  # matrices stand as [in, out]
    heads: tuple[int, int] = (5, 32)


_LLAMA = Roles(
    "model.layers.{}.mlp.up_proj.weight", "model.layers.{}.mlp.down_proj.weight",
    "model.layers.{}.self_attn.q_proj.weight", "model.layers.{}.self_attn.o_proj.weight",
    "model.layers.{}.input_layernorm.weight", "model.layers.{}.self_attn.q_proj.weight", "model.embed_tokens.weight",
)  # fmt: skip
ROLES = {
    "gpt2": Roles(
        "transformer.h.{}.mlp.c_fc.weight", "transformer.h.{}.mlp.c_proj.weight", "transformer.h.{}.attn.c_proj.weight",
        "transformer.h.{}.attn.c_proj.weight", "transformer.h.{}.ln_2.weight", "transformer.h.{}.mlp.c_fc.weight",
        "transformer.wte.weight", "transformer.h.{}.mlp.c_fc.bias", wide="transformer.h.{}.mlp.c_fc.weight", turned=True,
    ),
    "llama": _LLAMA,
    "qwen": Roles(
        _LLAMA.up, _LLAMA.down, _LLAMA.square, _LLAMA.twin, _LLAMA.norm, _LLAMA.fed, _LLAMA.embed,
        "model.layers.{}.self_attn.q_proj.bias", wide=_LLAMA.down, layers=5, heads=(4, 32),
    ),
    "neox": Roles(
        "gpt_neox.layers.{}.mlp.dense_h_to_4h.weight", "gpt_neox.layers.{}.mlp.dense_4h_to_h.weight",
        "gpt_neox.layers.{}.attention.dense.weight", "gpt_neox.layers.{}.attention.dense.weight",
        "gpt_neox.layers.{}.post_attention_layernorm.weight", "gpt_neox.layers.{}.mlp.dense_h_to_4h.weight",
        "gpt_neox.embed_in.weight", "gpt_neox.layers.{}.mlp.dense_h_to_4h.bias",
        wide="gpt_neox.layers.{}.mlp.dense_4h_to_h.weight", layers=5, heads=(4, 32),
    ),
    "bert": Roles(
        "bert.encoder.layer.{}.intermediate.dense.weight", "bert.encoder.layer.{}.output.dense.weight",
        "bert.encoder.layer.{}.attention.self.query.weight", "bert.encoder.layer.{}.attention.output.dense.weight",
        "bert.encoder.layer.{}.attention.output.LayerNorm.weight", "bert.encoder.layer.{}.intermediate.dense.weight",
        "bert.embeddings.word_embeddings.weight", "bert.encoder.layer.{}.intermediate.dense.bias",
        wide="bert.encoder.layer.{}.output.dense.weight",
    ),
    "t5": Roles(
        "decoder.block.{}.layer.2.DenseReluDense.wi.weight", "decoder.block.{}.layer.2.DenseReluDense.wo.weight",
        "decoder.block.{}.layer.0.SelfAttention.q.weight", "decoder.block.{}.layer.0.SelfAttention.o.weight",
        "decoder.block.{}.layer.0.layer_norm.weight", "decoder.block.{}.layer.0.SelfAttention.q.weight",
        "shared.weight", wide="decoder.block.{}.layer.2.DenseReluDense.wo.weight", layers=2,
    ),
}  # fmt: skip


@dataclass
class Place:
    """A checkpoint's tensors in single precision, to be changed, and what was expected of the change."""

    tensors: Tensors
    roles: Roles
    seed: int = 0

    def named(self, role: str) -> list[str]:
        """Return the names of a role in all layers."""
        found = getattr(self.roles, role)
        return [] if found is None else list(dict.fromkeys(found.format(i) for i in range(self.roles.layers)))

    def drawn(self, *shape: int, seed: int = 0) -> Tensor:
        """Return a matrix of standard normal values that depends on the seed alone."""
        return torch.randn(*shape, generator=torch.Generator().manual_seed(1000 * self.seed + seed))


EditOf = Callable[[Place], Expected]


def each(role: str, change: Callable[[Tensor, Place], Tensor], *operations: tuple[str, dict[str, Any]]) -> EditOf:
    """An edit that does the same to a role in every layer."""

    def edit(place: Place) -> Expected:
        for name in place.named(role):
            place.tensors[name] = change(place.tensors[name], place)
        return dict.fromkeys(place.named(role), list(operations))

    return edit


def rounded(
    w: Tensor, bits: int, group: int | None = None, *, per: str = "row", symmetric: bool = True, mse: float = 1.0
) -> Tensor:
    """Round to the nearest level, written anew here: nothing of the library takes part."""
    if per == "column":
        return rounded(w.T.contiguous(), bits, group, symmetric=symmetric, mse=mse).T.contiguous()
    x = w.reshape(1, -1) if per == "tensor" else w.reshape(-1, group or w.shape[1])
    if symmetric:
        most = 2 ** (bits - 1) - 1
        step = (x.abs().amax(1, keepdim=True) * mse / most).clamp_min(1e-9)
        return ((x / step).round().clamp(-most - 1, most) * step).reshape(w.shape)
    low, high = x.amin(1, keepdim=True).clamp_max(0), x.amax(1, keepdim=True).clamp_min(0)
    step = ((high - low) / (2**bits - 1)).clamp_min(1e-9)
    zero = (-low / step).round()
    return ((((x / step).round() + zero).clamp(0, 2**bits - 1) - zero) * step).reshape(w.shape)


def pruned(w: Tensor, share: float) -> Tensor:
    return torch.where(w.abs() > w.abs().flatten().kthvalue(int(share * w.numel())).values, w, 0.0)


def n_of_m(w: Tensor, n: int, m: int) -> Tensor:
    x = w.reshape(-1, m)
    kept = x.abs().topk(n, dim=1).indices
    return torch.zeros_like(x).scatter(1, kept, x.gather(1, kept)).reshape(w.shape)


def update(w: Tensor, place: Place, rank: int, size: float = 0.2) -> Tensor:
    change = place.drawn(w.shape[0], rank, seed=1) @ place.drawn(rank, w.shape[1], seed=2)
    return w + change / change.norm() * w.norm() * size


def dora(w: Tensor, place: Place, rank: int) -> Tensor:
    """A rank update whose rows are given norms of their own (columns, where matrices stand as [in, out])."""
    if place.roles.turned:
        return _dora(w.T, place, rank).T.contiguous()
    return _dora(w, place, rank)


def _dora(w: Tensor, place: Place, rank: int) -> Tensor:
    new = update(w, place, rank)
    norms = w.norm(dim=1, keepdim=True) * (1 + 0.05 * place.drawn(len(w), 1, seed=3))
    return new / new.norm(dim=1, keepdim=True) * norms


def slerp(w: Tensor, place: Place) -> Tensor:
    other = w + 0.3 * w.std() * place.drawn(*w.shape, seed=5)
    angle = torch.arccos((w * other).sum() / (w.norm() * other.norm()))
    return (torch.sin(0.5 * angle) * w + torch.sin(0.5 * angle) * other) / torch.sin(angle)


def shuffled(w: Tensor, place: Place, axis: int = 0) -> Tensor:
    return w.index_select(axis, torch.randperm(w.shape[axis], generator=torch.Generator().manual_seed(4)))


def turn(w: Tensor, place: Place, axis: int = 0) -> Tensor:
    turned = torch.linalg.qr(place.drawn(w.shape[axis], w.shape[axis], seed=6))[0]
    return turned @ w if axis == 0 else w @ turned


def part(rows: slice, columns: slice, change: Callable[[Tensor, Place], Tensor]) -> Callable[[Tensor, Place], Tensor]:
    def only(w: Tensor, place: Place) -> Tensor:
        w = w.clone()
        w[rows, columns] = change(w[rows, columns], place)
        return w

    return only


def positive(place: Place, size: int, seed: int) -> Tensor:
    return place.drawn(size, seed=seed).mul(0.3).exp()


def swapped(place: Place, one: str, two: str) -> Expected:
    tensors = place.tensors
    tensors[one], tensors[two] = tensors[two], tensors[one]
    return {one: [("swapped", {"with": two})], two: [("swapped", {"with": one})]}


def swap_layers(place: Place) -> Expected:
    return swapped(place, *place.named("up")[:2])


def swap_within(place: Place) -> Expected:
    return swapped(
        place, place.named("square")[0], place.named("twin")[-1 if place.roles.square == place.roles.twin else 0]
    )


def swap_and_scale(place: Place) -> Expected:
    found = swap_layers(place)
    for name in found:
        place.tensors[name] = place.tensors[name] * 1.5
        found[name] = [*found[name], ("scaled", {"by": 1.5})]
    return found


def move_scales(place: Place) -> Expected:
    """Scale the neurons of the first matrix of the feed-forward part, and take it back in the second."""
    found: Expected = {}
    for up, down in zip(place.named("up"), place.named("down"), strict=True):
        out, into = (1, 0) if place.roles.turned else (0, 1)
        by = positive(place, place.tensors[up].shape[out], 7)
        for name, axis, factor in ((up, out, by), (down, into, 1 / by)):
            place.tensors[name] = place.tensors[name] * (factor[:, None] if axis == 0 else factor)
            found[name] = [("lines_scaled", {"axis": ("rows", "columns")[axis]})]
    return found


def fold_gains(place: Place) -> Expected:
    """Move gains of a norm into the matrix that follows it."""
    found: Expected = {}
    for norm, fed in zip(place.named("norm"), place.named("fed"), strict=True):
        by = positive(place, len(place.tensors[norm]), 8)
        place.tensors[norm] = place.tensors[norm] * by
        axis = 0 if place.roles.turned else 1
        place.tensors[fed] = place.tensors[fed] / (by[:, None] if axis == 0 else by)
        found |= {norm: [("lines_scaled", {})], fed: [("lines_scaled", {"axis": ("rows", "columns")[axis]})]}
    return found


def permute_neurons(place: Place) -> Expected:
    found: Expected = {}
    for up, down in zip(place.named("up"), place.named("down"), strict=True):
        out, into = (1, 0) if place.roles.turned else (0, 1)
        for name, axis in ((up, out), (down, into)):
            place.tensors[name] = shuffled(place.tensors[name], place, axis)
            found[name] = [("permuted", {"axis": ("rows", "columns")[axis]})]
    return found


def zero_head(place: Place) -> Expected:
    """Zero one head's rows of the queries' matrix (its columns, where matrices stand as [in, out])."""
    name, size = place.named("twin")[0], place.roles.heads[1]
    rows = place.roles.turned
    w = place.tensors[name].clone()
    if rows:
        w[size : 2 * size] = 0
    else:
        w[:, size : 2 * size] = 0
    place.tensors[name] = w
    return {name: [("rows" if rows else "columns", {"heads": [1]}), ("zeroed", {})]}


def rename(place: Place) -> Expected:
    for name in list(place.tensors):
        place.tensors[f"_orig_mod.{name}"] = place.tensors.pop(name)
    return {}


def new_rows(place: Place) -> Expected:
    (name,) = place.named("embed")
    w = place.tensors[name].clone()
    w[40:44] = 0.02 * place.drawn(4, w.shape[1], seed=9)
    place.tensors[name] = w
    return {name: [("rows", {"first": 40, "last": 43, "count": 4}), ("unrelated", {})]}


def _round(bits: int, group: int | None = None, role: str = "up", mse: float = 1.0, **how: Any) -> EditOf:
    facts: dict[str, Any] = {"bits": bits, "group": group, "symmetric": True, "axis": "row"}
    facts |= {"axis": how.get("per", "row"), "symmetric": how.get("symmetric", True)}
    return each(role, lambda w, p: rounded(w, bits, group, mse=mse, **how), ("rounded", facts))


CHANGED = ("changed", {})
EDITS: dict[str, EditOf] = {
    **{f"{bits} bits a row": _round(bits) for bits in range(2, 9)},
    **{f"{bits} bits in groups of 32": _round(bits, 32, "square") for bits in range(2, 9)},
    **{f"{bits} bits in groups of 64": _round(bits, 64, "wide") for bits in (2, 3, 4, 8)},
    "4 bits in groups of 128": _round(4, 128, "wide"),
    **{f"{bits} bits a tensor": _round(bits, per="tensor") for bits in (3, 4, 8)},
    **{f"{bits} bits a column": _round(bits, per="column") for bits in (3, 4, 8)},
    **{f"{bits} bits asymmetric": _round(bits, 32, "square", symmetric=False) for bits in (2, 3, 4, 5, 8)},
    "4 bits a row asymmetric": _round(4, symmetric=False),
    "4 bits clipped": _round(4, 32, "square", mse=0.8),
    "pruned 20 %": each("up", lambda w, p: pruned(w, 0.2), ("pruned", {"share": 0.2, "pattern": ""})),
    "pruned 60 %": each("up", lambda w, p: pruned(w, 0.6), ("pruned", {"share": 0.6, "pattern": ""})),
    **{
        f"pruned {n}:{m}": each("up", lambda w, p, n=n, m=m: n_of_m(w, n, m), ("pruned", {"pattern": f"{n}:{m}"}))
        for n, m in ((2, 4), (1, 4), (4, 8), (1, 2), (3, 4), (2, 8))
    },
    "whole rows pruned": each(
        "up", part(slice(0, 40), slice(None), lambda w, p: 0 * w), ("rows", {"first": 0, "last": 39}), ("zeroed", {})
    ),
    "a head zeroed": zero_head,
    **{
        f"rank {rank}": each("square", lambda w, p, r=rank: update(w, p, r), ("low_rank", {"rank": rank}))
        for rank in (1, 2, 8, 16, 32, 64)
    },
    "a small rank 8": each("up", lambda w, p: update(w, p, 8, 0.02), ("low_rank", {"rank": 8})),
    "DoRA of rank 4": each("up", lambda w, p: dora(w, p, 4), ("lines_scaled", {}), ("low_rank", {"rank": 4})),
    "DoRA of rank 16": each("square", lambda w, p: dora(w, p, 16), ("lines_scaled", {}), ("low_rank", {"rank": 16})),
    "scaled": each("up", lambda w, p: w * 1.5, ("scaled", {"by": 1.5})),
    "scaled a little": each("square", lambda w, p: w * 1.03, ("scaled", {"by": 1.03})),
    "rows scaled": each("up", lambda w, p: w * positive(p, len(w), 7)[:, None], ("lines_scaled", {"axis": "rows"})),
    "columns scaled": each("up", lambda w, p: w * positive(p, w.shape[1], 7), ("lines_scaled", {"axis": "columns"})),
    "sign": each("down", lambda w, p: -w, ("sign", {})),
    "rows of another sign": each("up", lambda w, p: w * p.drawn(len(w), 1, seed=3).sign(), ("rows", {}), ("sign", {})),
    "transposed": each("square", lambda w, p: w.T.contiguous(), ("transposed", {})),
    "rows in another order": each("up", shuffled, ("permuted", {"axis": "rows"})),
    "columns in another order": each("up", lambda w, p: shuffled(w, p, 1), ("permuted", {"axis": "columns"})),
    "rows shifted by one": each("down", lambda w, p: w.roll(1, 0), ("permuted", {"axis": "rows"})),
    "swapped across layers": swap_layers,
    "swapped within a layer": swap_within,
    "re-initialised": each("up", lambda w, p: 0.02 * p.drawn(*w.shape, seed=9), ("unrelated", {})),
    "zeroed": each("square", lambda w, p: 0 * w, ("zeroed", {})),
    "constant": each("up", lambda w, p: torch.full_like(w, 0.01), ("constant", {})),
    "a block constant": each(
        "up",
        part(slice(16, 48), slice(32, 64), lambda w, p: torch.full_like(w, 0.5)),
        ("rows", {"first": 16, "last": 47}),
        ("columns", {"first": 32, "last": 63}),
        ("constant", {"value": 0.5}),
    ),
    "a block empty": each(
        "up",
        part(slice(16, 48), slice(32, 64), lambda w, p: 0 * w),
        ("rows", {"first": 16, "last": 47}),
        ("columns", {"first": 32, "last": 63}),
        ("zeroed", {}),
    ),
    "biases zeroed": each("bias", lambda w, p: 0 * w, ("zeroed", {})),
    "biases scaled": each("bias", lambda w, p: 0.5 * w, ("scaled", {"by": 0.5})),
    "gains plus one": each("norm", lambda w, p: w + 1, ("shifted", {"by": 1.0})),
    "gains scaled": each("norm", lambda w, p: w * 2, ("scaled", {"by": 2.0})),
    "new rows": new_rows,
    "some rows scaled": each(
        "up",
        part(slice(8, 72), slice(None), lambda w, p: w * 1.4),
        ("rows", {"first": 8, "last": 71}),
        ("scaled", {"by": 1.4}),
    ),
    "scales moved": move_scales,
    "gains folded": fold_gains,
    "neurons in another order": permute_neurons,
    "rows turned": each("up", turn, ("rotated", {"axis": "rows"})),
    "columns turned": each("up", lambda w, p: turn(w, p, 1), ("rotated", {"axis": "columns"})),
    "cut to rank 24": each(
        "up",
        lambda w, p: (lambda u, s, v: u[:, :24] * s[:24] @ v[:24])(*torch.linalg.svd(w, full_matrices=False)),
        ("rank_cut", {"rank": 24}),
    ),
    "bfloat16": each("up", lambda w, p: w.bfloat16().float(), ("cast", {"to": "BF16"})),
    "float8": each("up", lambda w, p: w.to(torch.float8_e4m3fn).float(), ("cast", {"to": "F8_E4M3"})),
    "fine-tuned": each("up", lambda w, p: w + 0.05 * w.std() * p.drawn(*w.shape, seed=5), CHANGED),
    "merged by slerp": each("up", slerp, CHANGED),
    "merged by mean": each("up", lambda w, p: w + 0.15 * w.std() * p.drawn(*w.shape, seed=5), CHANGED),
    "another prefix": rename,
    # two at once
    "pruned 2:4 and 4 bits": each(
        "square",
        lambda w, p: rounded(n_of_m(w, 2, 4), 4, 32),
        ("pruned", {"pattern": "2:4"}),
        ("rounded", {"bits": 4, "group": 32}),
    ),
    "pruned 50 % and 8 bits": each(
        "up",
        lambda w, p: rounded(pruned(w, 0.5), 8),
        ("pruned", {"share": 0.5}),
        ("rounded", {"bits": 8, "axis": "row"}),
    ),
    "pruned and scaled": each("up", lambda w, p: 2 * pruned(w, 0.5), ("pruned", {}), ("scaled", {"by": 2.0})),
    "scaled and 4 bits": each(
        "square", lambda w, p: rounded(1.5 * w, 4, 32), ("scaled", {"by": 1.5}), ("rounded", {"bits": 4})
    ),
    "rank 8 and 4 bits": each(
        "square", lambda w, p: rounded(update(w, p, 8, 0.4), 4, 32), ("low_rank", {"rank": 8}), ("rounded", {"bits": 4})
    ),
    "rank 8 and 8 bits": each(
        "up", lambda w, p: rounded(update(w, p, 8), 8), ("low_rank", {"rank": 8}), ("rounded", {"bits": 8})
    ),
    "columns scaled and 4 bits": each(
        "square",
        lambda w, p: rounded(w * positive(p, w.shape[1], 7), 4, 32),
        ("lines_scaled", {"axis": "columns"}),
        ("rounded", {"bits": 4}),
    ),
    "rows in another order and scaled": each(
        "up", lambda w, p: 3 * shuffled(w, p), ("permuted", {"axis": "rows"}), ("scaled", {"by": 3.0})
    ),
    "columns in another order and 4 bits": each(
        "square",
        lambda w, p: rounded(shuffled(w, p, 1), 4, 32),
        ("permuted", {"axis": "columns"}),
        ("rounded", {"bits": 4}),
    ),
    "transposed and scaled": each(
        "square", lambda w, p: 2 * w.T.contiguous(), ("transposed", {}), ("scaled", {"by": 2.0})
    ),
    "sign and 4 bits": each("square", lambda w, p: rounded(-w, 4, 32), ("sign", {}), ("rounded", {"bits": 4})),
    "swapped and scaled": swap_and_scale,
    "columns turned and 4 bits": each(
        "square", lambda w, p: rounded(turn(w, p, 1), 4, 32), ("rotated", {"axis": "columns"}), ("rounded", {"bits": 4})
    ),
    "rank 4 and sign": each("up", lambda w, p: -update(w, p, 4), ("sign", {}), ("low_rank", {"rank": 4})),
    "rank 4 and scaled": each(
        "up", lambda w, p: 2 * update(w, p, 4), ("scaled", {"by": 2.0}), ("low_rank", {"rank": 4})
    ),
    "rank 4 and pruned": each(
        "up", lambda w, p: pruned(update(w, p, 4), 0.5), ("low_rank", {"rank": 4}), ("pruned", {"share": 0.5})
    ),
}
FORMS = ("dense", "pickled", "cast", "packed", "packed subject", "gguf", "gguf8")
#: edits whose values an 8-bit grid on both sides changes again, or which are of no use on one
NOT_PACKED = (
    "bits",
    "bfloat16",
    "float8",
    "merged",
    "fine-tuned",
    "turned",
    "cut to",
    "rank",
    "another prefix",
    "scaled a little",
)


def packable(name: str, tensor: Tensor, roles: Roles) -> bool:
    return name in {
        role.format(i) for role in (roles.up, roles.down, roles.square, roles.twin) for i in range(roles.layers)
    }


def pack(tensors: Tensors, roles: Roles, bits: int = 8) -> Tensors:
    """Store the matrices as compressed-tensors does: codes in groups of 32 (a row where 32 does not divide it), and those
    of a Conv1D as the linear layer's."""
    stored: Tensors = {}
    for name, w in tensors.items():
        if not packable(name, w, roles):
            stored[name] = w.half()
            continue
        w = w.T.contiguous() if name.startswith("transformer.h.") else w
        base, group = name.removesuffix(".weight"), group_of(w)
        x = w.reshape(len(w), -1, group)
        step = (x.abs().amax(2) / (2 ** (bits - 1) - 1)).clamp_min(1e-9)
        codes = ((x / step[..., None]).round().long() + 2 ** (bits - 1)).reshape(len(w), -1, 32 // bits)
        words = sum(codes[..., i] << (bits * i) for i in range(32 // bits))
        words = torch.as_tensor(words)
        stored[f"{base}.weight_packed"] = torch.where(words >= 2**31, words - 2**32, words).int()
        stored[f"{base}.weight_scale"] = step.contiguous()
        stored[f"{base}.weight_shape"] = torch.tensor(w.shape)
    return stored


def group_of(w: Tensor) -> int:
    return GROUP if w.shape[1] % GROUP == 0 else w.shape[1]


def write(folder: Path, tensors: Tensors, form: str, model: Path, roles: Roles) -> Path:
    """Write a checkpoint in a form of storage."""
    folder.mkdir(parents=True)
    for file in model.iterdir():
        if file.suffix == ".json":
            shutil.copyfile(file, folder / file.name)
    if form == "pickled":
        torch.save({name: value.float() for name, value in tensors.items()}, folder / "pytorch_model.bin")
        return folder
    if form == "packed":
        config = json.loads((folder / "config.json").read_text())
        config["quantization_config"] = {"quant_method": "compressed-tensors", "format": "pack-quantized"}
        (folder / "config.json").write_text(json.dumps(config))
        save_file(pack(tensors, roles), folder / "model.safetensors", metadata={"format": "pt"})
        return folder
    dtype = torch.bfloat16 if form == "cast" else torch.float16
    values = {name: value.to(dtype).contiguous() for name, value in tensors.items()}
    save_file(values, folder / "model.safetensors", metadata={"format": "pt"})
    if form.startswith("gguf"):
        import sys

        sys.path.insert(0, str(ROOT / "tests"))
        from gguf_files import write_gguf

        target = folder.with_name("gguf")
        target.mkdir()
        write_gguf(folder, target / "model.gguf", "Q8_0" if form == "gguf8" else "F16")
        return target
    return folder


def applies(edit: str, form: str, model: str) -> bool:
    """Say whether an edit in a form is a case: whether it does anything there that another form does not show."""
    if form.startswith("gguf") and (model != "llama" or edit == "another prefix"):
        return False
    if form in ("packed", "packed subject", "gguf8") and any(word in edit for word in NOT_PACKED):
        return False
    return not (form == "cast" and edit in ("bfloat16", "float8", "scaled a little", "a small rank 8"))


def case(edit: str, form: str, model: str, work: Path, seed: int = 0) -> tuple[list[str], Diff] | None:
    """Make both sides and compare them; return what was named wrong, a line each. None where the edit has no place."""
    folder, roles = MODELS[model], ROLES[model]
    base = {name: value.float() for name, value in load_file(folder / "model.safetensors").items()}
    place = Place(dict(base), roles, seed)
    try:
        expected = EDITS[edit](place)
    except RuntimeError:  # a group that does not divide the rows
        return None
    if not expected and edit != "another prefix":
        return None
    if form == "packed":
        before = write(work / "before", base, "packed", folder, roles)
    else:
        before = folder
    found = diff(
        str(before), str(write(work / "after", place.tensors, "packed" if "packed" in form else form, folder, roles))
    )
    return list(wrong(found, expected, form, roles, base)), found


def wrong(found: Diff, expected: Expected, form: str, roles: Roles, base: Tensors) -> Iterator[str]:
    for name in (*found.missing, *found.added):
        yield f"{name} is not paired"
    for change in found.changes:
        told = [op for op in change.operations if op.name != "identical"]
        meant = list(expected.get(change.name, []))
        if "packed" in form and packable(change.name, base[change.name], roles) or form == "gguf8":
            meant, told = _without_storage(meant, told)
        if form in ("pickled", "cast", "packed", "packed subject", "gguf", "gguf8") and not (
            meant and meant[0][0] == "cast"
        ):
            told = [op for op in told if op.name != "cast"]
        right = [op.name for op in told] == [name for name, _ in meant]
        right = right and all(fits(op.facts, facts) for op, (_, facts) in zip(told, meant, strict=True))
        if not right:
            yield f"{change.name}: {change.words or 'identical'}; expected {meant or 'identical'} {_facts(change)}"


def _without_storage(meant: Operations, told: list[Any]) -> tuple[Operations, list[Any]]:
    """Leave out the rounding to 8 bits that the form of storage makes."""
    return meant, [op for op in told if not (op.name == "rounded" and op.facts["bits"] == 8)]


def _facts(change: Change) -> str:
    return f"[rel {change.rel_change}, cosine {change.cosine}]"


def fits(told: Any, meant: dict[str, Any]) -> bool:
    """Say whether figures are those that were meant; numbers within 2 %."""
    return all(
        abs(told[key] - value) <= 0.02 * abs(value) + 0.005 if isinstance(value, float) else told.get(key) == value
        for key, value in meant.items()
    )


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.diff_corpus", description=__doc__.splitlines()[0])
    parser.add_argument("--only", help="edits whose name holds this")
    parser.add_argument("--model", choices=MODELS, action="append")
    parser.add_argument("--form", choices=FORMS, action="append")
    parser.add_argument("--every", type=int, default=1, help="take one edit in so many, others for every form")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, default=ROOT / "benchmarks/results/diff_corpus.json")
    arguments = parser.parse_args()
    rows: list[dict[str, Any]] = []
    for model in arguments.model or MODELS:
        for turn, form in enumerate(arguments.form or FORMS):
            for edit in list(EDITS)[turn % arguments.every :: arguments.every]:
                if not applies(edit, form, model) or (arguments.only and arguments.only not in edit):
                    continue
                with tempfile.TemporaryDirectory() as work:
                    done = case(edit, form, model, Path(work), arguments.seed)
                if done is None:
                    continue
                rows.append({"model": model, "form": form, "edit": edit, "wrong": done[0][:2]})
                if done[0]:
                    print(f"WRONG {model}, {form}, {edit} ({len(done[0])}): {done[0][0][:330]}", flush=True)
            here = [row for row in rows if row["model"] == model and row["form"] == form]
            if here:
                print(
                    f"{model}, {form}: {sum(not row['wrong'] for row in here)} of {len(here)} named right", flush=True
                )
    counts = Counter((row["edit"], not row["wrong"]) for row in rows)
    print(f"named right: {sum(not row['wrong'] for row in rows)} of {len(rows)}; edits {len({e for e, _ in counts})}")
    if not arguments.only:
        arguments.out.write_text(json.dumps(rows).replace('{"model"', '\n{"model"') + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
