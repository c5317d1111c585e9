"""What lies between two checkpoints: the operation on every tensor, and what else their files say differently.

1. names: pair the tensors of both, under the names of the first; tell those that only one has
2. tensors: read pair by pair, compare, name the operation; no model is built and no more than one pair is in memory
3. pairs: tensors that hold what others held, and scales and orders that cancel out between two tensors
4. settings: configuration, generation, template, tokenizer
"""

from __future__ import annotations

import json
import re
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence, Set
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from invarlock.checkpoints.base import readers
from invarlock.checkpoints.behaviour import behaviour, load_config, usage
from invarlock.checkpoints.files import open_checkpoint, resolve_folder
from invarlock.checkpoints.fingerprints import Change, as_matrix, compare
from invarlock.checkpoints.operations import OPERATIONS, Operation
from invarlock.checkpoints.tokenizer import tokenizer_facts
from invarlock.core.exceptions import ConfigError, ModelLoadError
from invarlock.core.files import plain, read_json
from invarlock.core.registry import nearest
from invarlock.flow.job import Tick, no_tick
from invarlock.guards.families import classify, layer_index

if TYPE_CHECKING:
    from torch import Tensor

__all__ = ["Diff", "Expectation", "diff", "kind_of", "layers_in_words", "place_of", "role_of"]

_PREFIX = re.compile(r"^(module|_orig_mod|base_model\.model|model|transformer|language_model|bert|roberta|gpt_neox)\.")
_NUMBER = re.compile(r"\.\d+\.")
_TOKENIZER = (
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "vocab.json",
    "merges.txt",
    "vocab.txt",
)
_TEXTS = frozenset((".json", ".jinja", ".txt", ".model", ".py"))
_PROBES = 64
_CANCELS = 0.02
_MOST_ROLES = 6


@dataclass(frozen=True)
class Diff:
    """What lies between two checkpoints. `missing` and `added` are names of tensors that only one side has; `settings`
    are differences beside the weights, a line each; `pairs` are changes that cancel out, a line each."""

    baseline: str
    subject: str
    changes: tuple[Change, ...]
    missing: tuple[str, ...] = ()
    added: tuple[str, ...] = ()
    settings: tuple[str, ...] = ()
    pairs: tuple[str, ...] = ()
    notes: tuple[str, ...] = field(default=(), compare=False)

    @property
    def changed(self) -> list[Change]:
        """The tensors whose values differ."""
        return [change for change in self.changes if not change.identical]

    @property
    def same(self) -> bool:
        """Say whether nothing differs: neither a value, nor a name, nor what the files say of the use."""
        return not (self.changed or self.missing or self.added or self.settings)

    @property
    def summary(self) -> list[str]:
        """What was done, in words, the widest first."""
        return list(_summary(self))

    def to_dict(self) -> dict[str, Any]:
        """Return all of it as plain data."""
        return {
            "baseline": self.baseline,
            "subject": self.subject,
            "same": self.same,
            "summary": self.summary,
            "tensors": [_row(change) for change in self.changes],
            "missing": list(self.missing),
            "added": list(self.added),
            "settings": list(self.settings),
            "pairs": list(self.pairs),
            "notes": list(self.notes),
        }


def _row(change: Change) -> dict[str, Any]:
    row = {key: getattr(change, key) for key in ("name", "shape", "rel_change", "cosine", "norm_ratio", "largest")}
    operations = [{"name": op.name, "facts": op.facts, "words": op.words} for op in change.operations]
    told = {"rows": change.rows, "columns": change.columns, "dtypes": change.dtypes, "operations": operations}
    found: dict[str, Any] = plain({**row, **told, "words": change.words})
    return found


def diff(baseline: str, subject: str, tick: Tick = no_tick) -> Diff:
    """Compare two checkpoints, folders or hub ids of any formats. Raises ModelLoadError for one that cannot be read."""
    folders = resolve_folder(baseline), resolve_folder(subject)
    old, new = (readers(open_checkpoint(folder)) for folder in folders)
    names = _paired(old, new)
    changes, probes, head_size = [], {}, _head_size(folders[0])
    for done, (name, other) in enumerate(names.items()):
        before, after = old[name](), new[other]()
        of_heads = classify(name, ())[0] == "attn"
        changes.append(compare(name, before, after, head_size=head_size if of_heads else None))
        probes[name] = _probe(before)
        if _may_hold_another(changes[-1]):
            probes[f"after {name}"] = _probe(after)
        tick("comparing tensors", done + 1, len(names))
    others = {name: new[other] for name, other in names.items()}
    pairs, moved = _cancelling(changes)
    found = tuple(_holding_others([_as_scaled(c, moved) for c in changes], probes, old, others))
    missing = tuple(sorted(old.keys() - names.keys()))
    added = tuple(sorted(new.keys() - set(names.values())))
    notes = [f"{name} stands under another name" for name, other in names.items() if name != other][:1]
    missing, more = _without_copies(missing, old, baseline)
    added, again = _without_copies(added, new, subject)
    settings = tuple(_settings(*folders))
    return Diff(
        str(baseline),
        str(subject),
        found,
        missing,
        added,
        settings,
        tuple(pairs),
        tuple([*notes, *more, *again]),
    )


def _paired(old: Mapping[str, Any], new: Mapping[str, Any]) -> dict[str, str]:
    """Map names of the baseline to those of the subject; a prefix that only one of them has makes no difference."""
    pairs = {name: name for name in old if name in new}

    def bare(name: str) -> str:
        while (shorter := _PREFIX.sub("", name)) != name:
            name = shorter
        return name

    left = {bare(name): name for name in new if name not in pairs}
    return {name: pairs.get(name) or left[bare(name)] for name in sorted(old) if name in pairs or bare(name) in left}


def _head_size(folder: Path) -> int | None:
    try:
        config = read_json(folder / "config.json", "a model's configuration", ModelLoadError, "checkpoint")
        heads = config.get("num_attention_heads") or config.get("n_head") or config.get("num_heads")
        width = config.get("hidden_size") or config.get("n_embd") or config.get("d_model")
        return int(config.get("head_dim") or config.get("d_kv") or width // heads)
    except (ModelLoadError, ValueError, TypeError, AttributeError):
        return None


def _probe(tensor: Tensor) -> Tensor:
    """Return a few values at fixed places, by which a tensor is found again under another name."""
    flat = as_matrix(tensor).reshape(-1)
    return flat[:: max(1, len(flat) // _PROBES)][:_PROBES].float()


def _may_hold_another(change: Change) -> bool:
    return any(op.name in ("unrelated", "changed") for op in change.operations) and (change.cosine or 0.0) < 0.9


def _holding_others(
    changes: Sequence[Change],
    probes: Mapping[str, Tensor],
    old: Mapping[str, Callable[[], Tensor]],
    new: Mapping[str, Callable[[], Tensor]],
) -> Iterator[Change]:
    """Yield the changes, those of tensors that hold what another one held named as such."""
    shapes = {change.name: change.shape for change in changes}
    for change in changes:
        after = probes.get(f"after {change.name}")
        if after is None:
            yield change
            continue
        others = (other for other, shape in shapes.items() if shape == change.shape and other != change.name)
        match = next((other for other in others if _alike(probes[other], after)), None)
        rest = compare(change.name, old[match](), new[change.name]()) if match else None
        if rest is None or (rest.cosine or 0.0) < 0.9:
            yield change
        else:
            kept = tuple(op for op in rest.operations if op.name != "identical")
            yield replace(change, operations=(Operation("swapped", {"with": match}), *kept))


def _alike(one: Tensor, two: Tensor) -> bool:
    size = float(one.norm() * two.norm())
    return len(one) == len(two) and size > 0 and float(one @ two) > 0.9 * size


def _without_copies(
    names: tuple[str, ...], stored: Mapping[str, Callable[[], Tensor]], where: str
) -> tuple[tuple[str, ...], list[str]]:
    """Leave out names whose tensor the same checkpoint holds under a second name: tied weights may be stored twice."""
    notes, left = [], []
    for name in names:
        tensor = stored[name]()
        heads = (
            (other for other in stored if other != name and classify(other, ())[0] == "embed")
            if tensor.ndim == 2
            else ()
        )
        twin = next((o for o in heads if (t := stored[o]()).shape == tensor.shape and bool((t == tensor).all())), None)
        if twin is None:
            left.append(name)
        else:
            notes.append(f"{where} stores {name} a second time, as {twin}")
    return tuple(left), notes


def _cancelling(changes: Sequence[Change]) -> tuple[list[str], set[str]]:
    """Tell pairs of tensors of one layer whose scales or orders cancel out, for the function may be the same as before; and
    the names of the tensors in them."""
    scaled = [(change.name, axis, values) for change in changes for axis, values in change.factors.items()]
    ordered = [(change.name, axis, values) for change in changes for axis, values in change.order.items()]
    found: dict[str, list[str]] = defaultdict(list)
    named: set[str] = set()
    for kind, entries, fits in (("scales moved", scaled, _inverse), ("same order", ordered, _same)):
        for index, (name, axis, values) in enumerate(entries):
            for other, along, theirs in entries[index + 1 :]:
                near = layer_index(name) == layer_index(other)
                if near and (name, axis) != (other, along) and len(values) == len(theirs) and fits(values, theirs):
                    found[f"{kind} between {role_of(name)} and {role_of(other)}"].append(name)
                    named |= {name, other}
    return [f"{what}, which cancels out ({layers_in_words(names)})" for what, names in found.items()], named


def _as_scaled(change: Change, moved: Set[str]) -> Change:
    """Name the change of a vector by what makes it cancel out; alone, any change of a vector is a scale of each value."""
    if change.name not in moved or change.known or len(change.shape) > 1:
        return change
    factors = change.factors["columns"]
    facts = {"axis": "values", "least": float(factors.min()), "most": float(factors.max())}
    return replace(change, operations=(Operation("lines_scaled", facts),))


def _inverse(one: Tensor, two: Tensor) -> bool:
    return float((one * two - 1).abs().median()) < _CANCELS and float((one - 1).abs().median()) > _CANCELS


def _same(one: Tensor, two: Tensor) -> bool:
    return bool((one == two).all())


def role_of(name: str) -> str:
    """Return what a tensor is for, without its layer: `mlp.down_proj` for every layer's."""
    short = _NUMBER.split(name)[-1] if _NUMBER.search(name) else name
    return short.removesuffix(".weight")


def place_of(name: str) -> tuple[str, str]:
    """Return where a tensor stands in a picture by layer: its layer, or `outside` of them, and its role."""
    layer = layer_index(name)
    return "outside" if layer is None else str(layer), role_of(name)


def layers_in_words(names: Iterable[str]) -> str:
    """Return the layers of tensors in words: `layers 0–31`, `layer 3`; `outside the layers` for those that have none."""
    found = sorted({layer for name in names if (layer := layer_index(name)) is not None})
    if not found:
        return "outside the layers"
    runs: list[list[int]] = []
    for layer in found:
        if runs and layer == runs[-1][-1] + 1:
            runs[-1].append(layer)
        else:
            runs.append([layer])
    told = ", ".join(f"{run[0]}–{run[-1]}" if len(run) > 1 else str(run[0]) for run in runs[:4])
    return f"layer{'s' * (len(found) > 1)} {told}{', …' * (len(runs) > 4)}"


def _summary(found: Diff) -> Iterator[str]:
    total, changed = len(found.changes), found.changed
    if found.same:
        yield f"nothing changed: all {total} tensors, the configuration and the tokenizer are the same"
        return
    groups: dict[str, list[Change]] = defaultdict(list)
    for change in changed:
        groups[kind_of(change)].append(change)
    for kind, members in sorted(groups.items(), key=lambda pair: -len(pair[1])):
        yield f"{kind}{_sizes(members)}: {_where(members, total)}"
    yield from found.pairs
    casts = {change.words for change in found.changes if change.identical and change.operations[0].name == "cast"}
    yield from sorted(casts)
    if not changed:
        yield f"the values of all {total} tensors are the same"
    elif len(changed) < total:
        yield f"untouched: {_untouched(found)}"
    for what, names in (("missing", found.missing), ("added", found.added)):
        if names:
            yield f"{what}: {', '.join(names[:3])}{f' and {len(names) - 3} more' if len(names) > 3 else ''}"
    yield from found.settings


def kind_of(change: Change) -> str:
    """Return the operations in words without figures that differ from tensor to tensor."""
    words = []
    for op in change.operations:
        told = {
            "changed": "changed without a pattern",
            "unrelated": "unrelated to what it was (re-initialised?)",
            "pruned": f"pruned {op.facts.get('pattern') or 'without a pattern'}",
            "not_finite": "values that are not finite",
        }.get(op.name, op.words)
        if op.name != "identical":
            words.append(told)
    return " + ".join(words)


def _sizes(members: Sequence[Change]) -> str:
    sizes = [change.rel_change for change in members if change.rel_change is not None]
    if not sizes or all(op.name in ("zeroed", "sign") for change in members for op in change.operations):
        return ""
    low, high = f"{min(sizes):.2g}", f"{max(sizes):.2g}"
    return f", relative change {low}" + ("" if low == high else f" to {high}")


def _where(members: Sequence[Change], total: int) -> str:
    if len(members) == 1:
        return members[0].name
    roles = list(dict.fromkeys(role_of(change.name) for change in members))
    more = f" and {len(roles) - _MOST_ROLES} more" if len(roles) > _MOST_ROLES else ""
    layers = layers_in_words(change.name for change in members)
    return f"{len(members)} of {total} tensors ({', '.join(roles[:_MOST_ROLES])}{more}; {layers})"


def _untouched(found: Diff) -> str:
    same = [change for change in found.changes if change.identical]
    families = {classify(change.name, change.shape)[0] for change in found.changed}
    kept = sorted({role_of(change.name) for change in same if classify(change.name, change.shape)[0] == "embed"})
    named = f", {' and '.join(kept[:3])} among them" if kept and "embed" not in families else ""
    return f"{len(same)} of {len(found.changes)} tensors{named}"


def _settings(old: Path, new: Path) -> Iterator[str]:
    """Tell what the files beside the weights say differently; where they are the same, no library is asked what they say."""
    if (beside := _beside(old)) is not None and beside == _beside(new):
        return
    told = [_told(folder) for folder in (old, new)]
    yield from _differences("configuration", *(acts for acts, _ in told))
    sides = [used for _, used in told]
    for key, what in (("config", "token roles"), ("generation", "generation"), ("sampling", "sampling")):
        yield from _differences(what, *(dict(side.get(key) or {}) for side in sides))
    here, there = ((side.get("chat_template") or {}).get("digest") for side in sides)
    if here != there:
        yield f"chat template: {'added' if here is None else 'removed' if there is None else 'another one'}"
    if any(_bytes(old / name) != _bytes(new / name) for name in _TOKENIZER):
        yield from _tokenizers(old, new)


def _beside(folder: Path) -> dict[str, bytes] | None:
    """Return the files of a folder that are no weights; None for a single file, and where there are folders within."""
    if not folder.is_dir() or any(path.is_dir() for path in folder.iterdir()):
        return None
    kept = (path for path in folder.iterdir() if path.suffix in _TEXTS and not path.name.endswith(".index.json"))
    return {path.name: path.read_bytes() for path in kept}


def _bytes(path: Path) -> bytes | None:
    return path.read_bytes() if path.is_file() else None


def _told(folder: Path) -> tuple[dict[str, Any], dict[str, Any]]:
    """Return what a configuration makes a model do, and how it is to be used; nothing of one that cannot be read."""
    try:
        config = load_config(folder)
        return behaviour(config), usage(folder, config, None)
    except ModelLoadError:
        return {}, {}


def _tokenizers(old: Path, new: Path) -> Iterator[str]:
    from transformers import AutoTokenizer

    facts = []
    for folder in (old, new):
        try:
            facts.append(tokenizer_facts(AutoTokenizer.from_pretrained(folder, local_files_only=True)))
        except Exception:  # noqa: BLE001 - many roots; a tokenizer that cannot be read is told as such
            facts.append((None, None))
    if facts[0] != facts[1]:
        told = ["none that can be read" if size is None else f"{size} tokens" for _, size in facts]
        yield (
            f"tokenizer: another one ({told[0]} became {told[1]})"
            if facts[0][1] != facts[1][1]
            else (f"tokenizer: encodes, decodes or names its special tokens differently ({told[0]})")
        )


def _differences(what: str, old: Mapping[str, Any], new: Mapping[str, Any]) -> Iterator[str]:
    def said(value: object) -> str:
        return json.dumps(value, default=str)[:60]

    for key in sorted(old.keys() | new.keys()):
        if old.get(key) != new.get(key):
            yield f"{what}: {key} {said(old.get(key))} became {said(new.get(key))}"


@dataclass(frozen=True)
class Expectation:
    """What an edit was meant to do: operations that every changed tensor must have had, in tensors that `scope` finds."""

    operation: str | None = None
    value: str = ""
    scope: str = ""

    @classmethod
    def parse(cls, expected: str | None, scope: str | None) -> Expectation:
        """Read `NAME` or `NAME:VALUE`; ConfigError for an operation that does not exist or a pattern that is none."""
        name, _, value = (expected or "").partition(":")
        if expected is not None and name not in OPERATIONS:
            raise ConfigError(
                f"--expect got {name!r}{nearest(name, OPERATIONS)}; expected one of: {', '.join(OPERATIONS)}"
            )
        try:
            re.compile(scope or "")
        except re.error as error:
            raise ConfigError(f"--scope is no regular expression: {error}") from None
        return cls(name or None, value, scope or "")

    def violations(self, found: Diff) -> list[str]:
        """Return what was not meant, a line each; nothing where the edit did what it should and nothing else."""
        lines = []
        for change in found.changed:
            if self.scope and not re.search(self.scope, change.name):
                lines.append(f"{change.name} is outside the scope {self.scope!r}: {change.words}")
            elif self.operation and not any(self._meets(op) for op in change.operations):
                lines.append(f"{change.name} was not {self.operation}{self.value and ':' + self.value}: {change.words}")
        lines += [f"{name} is missing" for name in found.missing] + [f"{name} was added" for name in found.added]
        if not found.changed:
            lines.append("no tensor changed")
        return lines

    def _meets(self, op: Operation) -> bool:
        pattern = str(op.facts.get("pattern", ""))
        return op.name == self.operation and (not self.value or self.value in (op.value, pattern))
