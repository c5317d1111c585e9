"""The edits of the fault matrix, as a table. Every edit is written over names and shapes, not over an architecture.

An edit of weights changes a live model in single precision, which is then saved in the baseline's type; an edit of
files changes what was saved. Both return the names of what they changed: the culprits that a certificate should name,
`uniform` among them where the edit is global. None means that the model has no place for the edit.
"""

from __future__ import annotations

import hashlib
import itertools
import json
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal

import torch
from benchmarks.faults import reparametrise
from benchmarks.faults.structure import Attention, attentions, bias_of, feed_forward, layer_of, layers
from safetensors.torch import load_file, save_file

from invarlock.edits.rtn import RTNQuantEdit
from invarlock.guards.families import WeightMatrix, weight_matrices

Kind = Literal["harmless", "structure", "degenerate", "unseen", "behaviour"]
Culprits = set[str] | None
UNIFORM = {"uniform"}


@dataclass
class Place:
    """What an edit works on. `at` in [0, 1] chooses the layer, `rng` everything else that is left to chance.

    `earlier` are the generators of the same edit's lower seeds, as they began.
    """

    model: Any
    at: float
    rng: torch.Generator
    earlier: tuple[torch.Generator, ...] = ()
    seen: frozenset[int] = frozenset()  # token ids in the windows of the certificates

    def path(self) -> str | None:
        """Return the path of the layer; None where the model has no stack of layers of its own (ALBERT shares one)."""
        paths = list(layers(self.model))
        return paths[round(self.at * (len(paths) - 1))] if paths else None

    def layer(self) -> list[WeightMatrix]:
        """Return the matrices of the layer."""
        return layers(self.model).get(self.path() or "", [])


@dataclass(frozen=True)
class Edit:
    """One row of the table: `places` of the layer and `seeds` make its variants; `dtype` is what is saved."""

    name: str
    kind: Kind
    change: Callable[[Place], Culprits] | None = None
    files: Callable[[Path, Place], Culprits] | None = None
    severity: str = ""
    places: tuple[float, ...] = (0.5,)
    seeds: int = 1
    dtype: str | None = None
    save: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Case:
    """One run: an edit at a place with a seed."""

    edit: Edit
    at: float
    seed: int

    @property
    def name(self) -> str:
        return f"{self.edit.name}@{self.at:g}#{self.seed}"

    def place(self, model: Any, seen: frozenset[int]) -> Place:
        """Return where the edit is made."""
        generators = [_generator(replace(self, seed=seed).name) for seed in range(self.seed + 1)]
        return Place(model, self.at, generators[-1], tuple(generators[:-1]), seen)


def _generator(name: str) -> torch.Generator:
    return torch.Generator().manual_seed(int(hashlib.sha256(name.encode()).hexdigest()[:12], 16))


def cases(edits: tuple[Edit, ...]) -> Iterator[Case]:
    """Yield every variant of every edit."""
    for edit in edits:
        for at in edit.places:
            yield from (Case(edit, at, seed) for seed in range(edit.seeds))


def rtn(bits: int, **options: Any) -> Callable[[Place], Culprits]:
    def change(place: Place) -> Culprits:
        RTNQuantEdit(bitwidth=bits, **options).apply(place.model, None)
        return UNIFORM

    return change


def noise(relative: float) -> Callable[[Place], Culprits]:
    """Add independent noise, `relative` to each matrix's own spread."""

    def change(place: Place) -> Culprits:
        for weight in weight_matrices(place.model):
            tensor = weight.tensor()
            tensor.add_(torch.randn(tensor.shape, generator=place.rng) * tensor.std() * relative)
        return UNIFORM

    return change


def low_rank(relative: float, rank: int = 4) -> Callable[[Place], Culprits]:
    """Merge an adapter of `rank` into queries and values (or the fused matrix), ‖ΔW‖ = `relative` ‖W‖."""

    def change(place: Place) -> Culprits:
        names = set(UNIFORM)
        for members in layers(place.model).values():
            for weight in members:
                if weight.family == "attn" and weight.module.rpartition(".")[2] in _ADAPTED:
                    tensor = weight.tensor()
                    left = torch.randn(tensor.shape[0], rank, generator=place.rng)
                    delta = left @ torch.randn(rank, tensor.shape[1], generator=place.rng)
                    tensor.add_(delta * (relative * tensor.norm() / delta.norm()))
                    names.add(weight.name)
        return names

    return change


_ADAPTED = {"q", "v", "q_proj", "v_proj", "query", "value", "c_attn", "query_key_value", "qkv_proj"}


def permute_neurons(place: Place) -> Culprits:
    parts = feed_forward(place.layer())
    if parts is None:
        return None
    into, out = parts
    order = torch.randperm(out.shape[1], generator=place.rng)
    for weight in into:
        for tensor in (weight.tensor(), *bias_of(place.model, weight)):
            tensor.copy_(tensor[order].clone())
    out.tensor().copy_(out.tensor()[:, order].clone())
    return {w.name for w in (*into, out)}


def _one_attention(place: Place) -> Attention | None:
    found = attentions(place.model)
    return found[round(place.at * (len(found) - 1))] if found else None


def permute_heads(place: Place) -> Culprits:
    attention = _one_attention(place)
    if attention is None:
        return None
    order = torch.randperm(attention.output.shape[1], generator=place.rng)
    for part in (*attention.query, *attention.key, *attention.value):
        part.copy_(part[order].clone())
    attention.output.copy_(attention.output[:, order].clone())
    return set(attention.names)


def move_factor(factor: float) -> Callable[[Place], Culprits]:
    """Multiply values (every second seed: queries) by a factor and divide the output projection (or the keys) by it.

    The first two seeds do so in all heads, the others in some.
    """

    def change(place: Place) -> Culprits:
        attention = _one_attention(place)
        if attention is None:
            return None
        seed, count = len(place.earlier), attention.output.shape[1]
        chosen = torch.rand(count, generator=place.rng).argsort()[
            : count if seed < 2 else 1 + (seed // 2) % (count - 1)
        ]
        for part in attention.query if seed % 2 else attention.value:
            part[chosen] *= factor
        if seed % 2:
            for part in attention.key:
                part[chosen] /= factor
        else:
            attention.output[:, chosen] /= factor
        return set(attention.names)

    return change


Change = Callable[[torch.Tensor, torch.Generator], torch.Tensor | None]


def one_matrix(change: Change, family: str | None = None) -> Callable[[Place], Culprits]:
    """Change one matrix of the layer, the family left to chance unless given; None from `change`: try the next.

    No seed takes a matrix that a lower seed has taken, as long as there are others.
    """

    def apply(place: Place) -> Culprits:
        members = [w for w in place.layer() if family is None or w.family == family]
        if not members:
            return None
        taken: list[int] = []
        for rng in (*place.earlier, place.rng):
            order = torch.randperm(len(members), generator=rng).tolist()
            order.sort(key=lambda i: taken.count(i))
            taken.append(order[0])
        for weight in (members[i] for i in order):
            tensor = weight.tensor()
            changed = change(tensor.clone(), place.rng)
            if changed is not None:
                tensor.copy_(changed)
                return {weight.name}
        return None

    return apply


def _transpose(t: torch.Tensor, rng: torch.Generator) -> torch.Tensor | None:
    return t.T.clone() if t.shape[0] == t.shape[1] else None


def _shuffle(t: torch.Tensor, rng: torch.Generator) -> torch.Tensor:
    return t[torch.randperm(len(t), generator=rng)]


def _negate_row(t: torch.Tensor, rng: torch.Generator) -> torch.Tensor:
    t[int(torch.randint(len(t), (1,), generator=rng))] *= -1
    return t


def _wrong_axis(t: torch.Tensor, rng: torch.Generator) -> torch.Tensor:
    """Quantize a row at a time, and give the rows' scales to the columns on the way back."""
    scale = t.abs().amax(1, keepdim=True).clamp_min(1e-12) / 127
    whole = (t / scale).round()
    columns = scale.flatten().repeat(-(-t.shape[1] // len(scale)))[: t.shape[1]]
    return whole * columns[None, :]


def _put(value: float) -> Change:
    def change(t: torch.Tensor, rng: torch.Generator) -> torch.Tensor:
        t[int(torch.randint(t.shape[0], (1,), generator=rng)), int(torch.randint(t.shape[1], (1,), generator=rng))] = (
            value
        )
        return t

    return change


def prune(share: float) -> Callable[[Place], Culprits]:
    """Zero the smallest weights of every attention and feed-forward matrix."""

    def change(place: Place) -> Culprits:
        for weight in (w for members in layers(place.model).values() for w in members):
            tensor = weight.tensor()
            cut = tensor.abs().flatten().kthvalue(max(1, int(share * tensor.numel()))).values
            tensor[tensor.abs() <= cut] = 0
        return UNIFORM

    return change


def zero_head(place: Place) -> Culprits:
    attention = _one_attention(place)
    if attention is None:
        return None
    index = int(torch.randint(attention.output.shape[1], (1,), generator=place.rng))
    for part in (*attention.query, *attention.key, *attention.value):
        part[index] = 0
    attention.output[:, index] = 0
    return set(attention.names)


def swap_layers(place: Place) -> Culprits:
    paths = list(layers(place.model))
    stacks: dict[str, list[str]] = {}
    for path in paths:
        stacks.setdefault(path.rpartition(".")[0], []).append(path)
    pairs = [pair for stack in stacks.values() for pair in itertools.pairwise(stack)]
    if len(pairs) < len(_THREE) and place.at not in (0.0, 1.0):
        return None  # the pair of another place
    chosen = pairs[round(place.at * (len(pairs) - 1))]
    one, two = (place.model.get_submodule(path).state_dict() for path in chosen)
    names = set()
    for key, tensor in one.items():
        if key in two and two[key].shape == tensor.shape:
            kept = tensor.clone()
            tensor.copy_(two[key])
            two[key].copy_(kept)
            names |= {f"{path}.{key}" for path in chosen}
    return names


def reset_norms(place: Place) -> Culprits:
    """Set the normalisation weights to 1 and their biases to 0, those of one layer; place above 1: all."""
    names = set()
    only = place.path() if place.at <= 1 else None
    if only is None and place.at <= 1:
        return None
    for path, module in place.model.named_modules():
        if "norm" not in type(module).__name__.lower() or (only and layer_of(f"{path}.weight") != only):
            continue
        for key, parameter in module.named_parameters(recurse=False):
            parameter.data.fill_(1.0 if key == "weight" else 0.0)
            names.add(f"{path}.{key}")
    return names if only else names | UNIFORM


def _matrix(model: Any, module: Any) -> WeightMatrix:
    """Return the matrix of an embedding or an output layer; it may be listed under the name of what it is tied to."""
    return next(w for w in weight_matrices(model) if w.tensor().data_ptr() == module.weight.data_ptr())


def zero_unseen(place: Place) -> Culprits:
    weight = _matrix(place.model, place.model.get_input_embeddings())
    unseen = sorted(set(range(weight.shape[0])) - place.seen)
    if len(unseen) < 8:
        return None
    order = torch.randperm(len(unseen), generator=place.rng)[: max(4, len(unseen) // 8)].tolist()
    weight.tensor()[[unseen[i] for i in order]] = 0
    return {weight.name}


def shift_vocabulary(place: Place) -> Culprits:
    weight = _matrix(place.model, place.model.get_input_embeddings())
    weight.tensor().copy_(weight.tensor().roll(1, 0))
    return {weight.name}


def reinitialise_head(place: Place) -> Culprits:
    """Re-initialise the output layer; where it is tied to the embedding, both."""
    entry = _matrix(place.model, place.model.get_output_embeddings())
    tensor = entry.tensor()
    tensor.copy_(torch.randn(tensor.shape, generator=place.rng) * 0.02)
    return {entry.name}


def lose_head(folder: Path, place: Place) -> Culprits:
    """Drop the output layer from the file; where it is tied, store another one beside the embedding."""
    head = next(n for n, m in place.model.named_modules() if m is place.model.get_output_embeddings()) + ".weight"
    tensors = load_file(folder / "model.safetensors")
    weight = place.model.get_output_embeddings().weight.detach()
    if torch.equal(weight, place.model.get_input_embeddings().weight):
        tensors[head] = (torch.randn(weight.shape, generator=place.rng) * 0.02).half()
    else:  # found by its values: a file may have another name for it
        stored = next(n for n, t in tensors.items() if t.shape == weight.shape and torch.equal(t, weight.to(t.dtype)))
        del tensors[stored]
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    return {head}


def drop_layer(folder: Path, place: Place) -> Culprits:
    """Remove a layer's tensors and close the gap; the configuration says one layer less."""
    path = place.path()
    if path is None:
        return None
    paths = list(layers(place.model))
    tensors = load_file(folder / "model.safetensors")
    stack, number = path.rpartition(".")[0], int(path.rpartition(".")[2])
    stored = next(k for k in tensors if f"{path}." in k or k.startswith(path.split(".", 1)[1]))
    prefix = "" if stored.startswith(stack) else stack.split(".", 1)[0] + "."
    last = max(int(p.rpartition(".")[2]) for p in paths if p.startswith(f"{stack}."))
    base = stack.removeprefix(prefix)
    kept = {}
    names = set()
    for key, tensor in tensors.items():
        if not key.startswith(f"{base}."):
            kept[key] = tensor
            continue
        index, _, rest = key.removeprefix(f"{base}.").partition(".")
        names |= {f"{stack}.{i}.{rest}" for i in range(number, last + 1)}
        if int(index) != number:
            kept[f"{base}.{int(index) - (int(index) > number)}.{rest}"] = tensor
    save_file(kept, folder / "model.safetensors", metadata={"format": "pt"})
    keys = ("num_hidden_layers", "n_layer", "num_decoder_layers" if "decoder" in stack else "num_layers")

    def shorter(config: dict[str, Any]) -> dict[str, Any]:
        counts = {k: config[k] - 1 for k in keys if isinstance(config.get(k), int)}
        lists = {k: v for k, v in config.items() if isinstance(v, list) and len(v) == last + 1}  # one entry a layer
        return counts | {k: [*v[:number], *v[number + 1 :]] for k, v in lists.items()}

    return names | _configure(folder, shorter)


def _configure(folder: Path, change: Callable[[dict[str, Any]], dict[str, Any]]) -> set[str]:
    path = folder / "config.json"
    config = json.loads(path.read_text(encoding="utf-8"))
    new = change(config)
    path.write_text(json.dumps({**config, **new}), encoding="utf-8")
    return set(new)


def configure(name: str) -> Callable[[Path, Place], Culprits]:
    """Change one thing in config.json and leave the weights alone."""

    def apply(folder: Path, place: Place) -> Culprits:
        return _configure(folder, _SETTINGS[name]) or None

    return apply


def _rope(config: dict[str, Any]) -> dict[str, Any]:
    if isinstance(config.get("rope_parameters"), dict) and "rope_theta" in config["rope_parameters"]:
        return {"rope_parameters": {**config["rope_parameters"], "rope_theta": 500000.0}}
    return {k: 500000.0 for k in ("rope_theta", "rotary_emb_base") if k in config}


def _first(names: tuple[str, ...], new: Callable[[Any], Any]) -> Callable[[dict[str, Any]], dict[str, Any]]:
    def change(config: dict[str, Any]) -> dict[str, Any]:
        found = [n for n in names if config.get(n) is not None]
        return {found[0]: new(config[found[0]])} if found else {}

    return change


_SETTINGS: dict[str, Callable[[dict[str, Any]], dict[str, Any]]] = {
    "rope": _rope,
    "epsilon": _first(("layer_norm_epsilon", "rms_norm_eps", "layer_norm_eps"), lambda v: v * 1000),
    "activation": _first(
        ("activation_function", "hidden_act", "feed_forward_proj", "dense_act_fn"),
        lambda v: "relu" if v != "relu" else "gelu",
    ),
    "heads": _first(("n_head", "num_attention_heads", "num_heads"), lambda v: v * 2 if v % 5 else 10),
}


def foreign_tokenizer(folder: Path, place: Place) -> Culprits:
    """Exchange the first two hundred merges' tokens: the same vocabulary, other numbers."""
    path = folder / "tokenizer.json"
    data = json.loads(path.read_text(encoding="utf-8"))
    vocabulary = data["model"]["vocab"]
    names = sorted(vocabulary, key=lambda token: vocabulary[token])[-200:]
    numbers = [vocabulary[name] for name in names]
    vocabulary.update(zip(names, reversed(numbers), strict=True))
    path.write_text(json.dumps(data), encoding="utf-8")
    return {"tokenizer"}


def end_of_text(folder: Path, place: Place) -> Culprits:
    """Write another end of the text into config.json: the model does not stop any more."""
    return _configure(folder, _first(("eos_token_id",), lambda token: token + 7)) or None


def second_set(folder: Path, place: Place) -> Culprits:
    """Leave pickled weights of another state beside the file: some tools read those."""
    tensors = load_file(folder / "model.safetensors")
    name = min(tensors)
    torch.save(tensors | {name: tensors[name] * 2}, folder / "pytorch_model.bin")
    return {name}


def rewritten(change: Callable[[Path, torch.Generator], set[str] | None]) -> Callable[[Path, Place], Culprits]:
    """An edit of the saved tensors that needs no model."""
    return lambda folder, place: change(folder, place.rng)


def unseen_rows(change: Callable[[Path, list[int]], set[str] | None]) -> Callable[[Path, Place], Culprits]:
    """Change rows of the embedding that no window holds: two of them, and with every further seed many more."""

    def apply(folder: Path, place: Place) -> Culprits:
        unseen = sorted(set(range(place.model.get_input_embeddings().weight.shape[0])) - place.seen)
        order = torch.randperm(len(unseen), generator=place.rng).tolist()
        return change(folder, [unseen[i] for i in order[: 2 * 16 ** len(place.earlier)]])

    return apply


_THREE = (0.0, 0.5, 1.0)
EDITS: tuple[Edit, ...] = (
    Edit("self", "harmless"),
    Edit("re-saved", "harmless", save={"max_shard_size": "1MB"}),
    Edit("re-saved as float32", "harmless", dtype="float32"),
    Edit("bfloat16", "harmless", dtype="bfloat16"),
    Edit("int8 a channel", "harmless", rtn(8)),
    Edit("int8 a group", "harmless", rtn(8, group_size=64), severity="64"),
    Edit("int8 a small group", "harmless", rtn(8, group_size=32), severity="32"),
    Edit("int8 attention", "harmless", rtn(8, scope="attn")),
    Edit("noise", "harmless", noise(0.003), severity="0.3 %", seeds=8),
    Edit("tiny LoRA", "harmless", low_rank(0.01), severity="1 %", seeds=12),
    Edit("permuted neurons", "harmless", permute_neurons, places=_THREE, seeds=4),
    Edit("permuted heads", "harmless", permute_heads, places=_THREE, seeds=3),
    Edit("factor moved", "harmless", move_factor(1.5), severity="1.5", places=_THREE, seeds=5),
    Edit("gains folded", "harmless", files=rewritten(reparametrise.fold_gains)),
    Edit("smoothed", "harmless", files=rewritten(reparametrise.smooth), seeds=2),
    Edit("rotated", "harmless", files=rewritten(reparametrise.rotate), seeds=2),
    Edit("head stored beside its embedding", "harmless", files=rewritten(reparametrise.store_head)),
    Edit("NaN", "structure", one_matrix(_put(float("nan"))), places=_THREE),
    Edit("Inf", "structure", one_matrix(_put(float("inf"))), places=_THREE),
    Edit("zeroed attention", "degenerate", one_matrix(lambda t, g: t * 0, "attn"), places=_THREE),
    Edit("zeroed MLP", "degenerate", one_matrix(lambda t, g: t * 0, "ffn"), places=_THREE),
    Edit("scaled up", "degenerate", one_matrix(lambda t, g: t * 8), severity="x8", places=_THREE, seeds=2),
    Edit("scaled down", "degenerate", one_matrix(lambda t, g: t / 8), severity="/8", places=_THREE, seeds=2),
    Edit("sign flipped", "behaviour", one_matrix(lambda t, g: -t), places=_THREE, seeds=2),
    Edit("transposed", "behaviour", one_matrix(_transpose), places=_THREE),
    Edit("rows shuffled", "behaviour", one_matrix(_shuffle), places=_THREE, seeds=2),
    Edit("wrong-axis scales", "behaviour", one_matrix(_wrong_axis), places=_THREE),
    Edit("one row negated", "behaviour", one_matrix(_negate_row), places=_THREE),
    Edit("x1.5 on one", "behaviour", one_matrix(lambda t, g: t * 1.5), places=_THREE),
    Edit("4-bit a group", "behaviour", rtn(4, group_size=32), severity="4"),
    Edit("4-bit a channel", "behaviour", rtn(4), severity="4"),
    Edit("4-bit a matrix", "behaviour", rtn(4, per_channel=False), severity="4"),
    Edit("3-bit a group", "behaviour", rtn(3, group_size=32), severity="3"),
    Edit("3-bit a channel", "behaviour", rtn(3), severity="3"),
    Edit("2-bit a group", "behaviour", rtn(2, group_size=32), severity="2"),
    Edit("2-bit a channel", "behaviour", rtn(2), severity="2"),
    Edit("pruned 30 %", "behaviour", prune(0.3), severity="0.3"),
    Edit("pruned 50 %", "behaviour", prune(0.5), severity="0.5"),
    Edit("pruned 70 %", "behaviour", prune(0.7), severity="0.7"),
    Edit("one head zeroed", "degenerate", zero_head, places=_THREE),
    Edit("layers swapped", "behaviour", swap_layers, places=_THREE),
    Edit("layer dropped", "structure", files=drop_layer, places=_THREE),
    Edit("head lost", "structure", files=lose_head),
    Edit("head re-initialised", "behaviour", reinitialise_head),
    Edit("norms of a layer reset", "behaviour", reset_norms, places=_THREE),
    Edit("norms reset", "behaviour", reset_norms, places=(2.0,)),
    Edit("unseen tokens zeroed", "unseen", zero_unseen, seeds=3),
    Edit("unseen rows moved", "unseen", files=unseen_rows(reparametrise.move_rows), seeds=3),
    Edit("unseen rows overwritten", "unseen", files=unseen_rows(reparametrise.overwrite_rows), seeds=3),
    Edit("vocabulary shifted", "behaviour", shift_vocabulary),
    Edit("LoRA merged twice", "behaviour", low_rank(0.8), severity="80 %", seeds=3),
    Edit("rope base", "structure", files=configure("rope")),
    Edit("epsilon", "structure", files=configure("epsilon")),
    Edit("activation", "structure", files=configure("activation")),
    Edit("head count", "structure", files=configure("heads")),
    Edit("foreign tokenizer", "structure", files=foreign_tokenizer),
    Edit("end of text changed", "structure", files=end_of_text),
    Edit("two sets of weights", "structure", files=second_set),
)
