"""Evaluation windows: token sequences with an id and a document, split into preview and final, and where they came from."""

from __future__ import annotations

import hashlib
import operator
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from invarlock.core import settings
from invarlock.core.exceptions import DataError, PairingError
from invarlock.evidence.model import DataFacts
from invarlock.evidence.plan import in_order

__all__ = [
    "IGNORED",
    "EvaluationWindow",
    "TextOrigin",
    "Window",
    "WindowBatches",
    "Windows",
    "calibration_windows",
    "content_digest",
    "mask_tokens",
    "pick_indices",
    "windows_from_calibration",
    "windows_from_provider",
]

IGNORED = -100  # a label that is not scored, as in torch's cross-entropy


def content_digest(
    ids: Sequence[int],
    mask: Sequence[int] | None = None,
    labels: Sequence[int] | None = None,
    *around: Sequence[int],
) -> str:
    """Return 16 hex digits of SHA-256 over the token ids, mask and labels, and the special tokens around them."""
    parts = (ids, mask, labels, *around)
    text = ";".join(",".join(map(str, part)) if part is not None else "-" for part in parts)
    return hashlib.sha256(text.encode()).hexdigest()[:16]


@dataclass(frozen=True)
class Window:
    """One token sequence. `mask` None means no padding; `labels` None means that the inputs predict themselves; `slice`
    names its kind of text where there are several.

    `prefix` and `suffix` are the special tokens that the tokenizer puts around a text: a model sees them, and they are
    not scored. `dressed` puts them there.
    """

    id: str
    document: str
    input_ids: tuple[int, ...]
    mask: tuple[int, ...] | None = None
    labels: tuple[int, ...] | None = None
    slice: str | None = None
    prefix: tuple[int, ...] = ()
    suffix: tuple[int, ...] = ()

    def __post_init__(self) -> None:
        if not self.input_ids:
            raise DataError(f"window {self.id!r} has no tokens; expected at least one")
        if self.mask is not None and len(self.mask) != len(self.input_ids):
            raise PairingError(
                f"window {self.id!r} has {len(self.input_ids)} tokens but {len(self.mask)} mask entries; expected one "
                "mask entry a token",
                code="E003",
            )

    @property
    def content(self) -> tuple[Any, ...]:
        """What is scored, whatever its name: token ids, mask and labels; and the special tokens around them, if any."""
        around = (self.prefix, self.suffix) if self.prefix or self.suffix else ()
        return self.input_ids, self.mask, self.labels, *around

    def dressed(self) -> Window:
        """Return the window as a model sees it: special tokens among the inputs, and labels that leave them out.

        The first token of the content stays unscored where it was, since the text before it is not shown.
        """
        if not (self.prefix or self.suffix):
            return self
        before, after = len(self.prefix), len(self.suffix)
        labels = (IGNORED, *self.input_ids[1:]) if self.labels is None else self.labels
        return replace(
            self,
            input_ids=self.prefix + self.input_ids + self.suffix,
            mask=None if self.mask is None else (1,) * before + self.mask + (1,) * after,
            labels=(IGNORED,) * before + labels + (IGNORED,) * after,
            prefix=(),
            suffix=(),
        )


@dataclass(frozen=True)
class TextOrigin:
    """Where windows came from: a provider with its options, and how its text was cut."""

    provider: str = "calibration_data"
    options: Mapping[str, Any] = field(default_factory=dict)
    stride: int | None = None
    seed: int = 42
    split: str | None = None
    reused: bool = False
    texts: str | None = None  # digest of the documents, whole
    remarks: list[str] | None = None


@dataclass(frozen=True)
class Windows:
    """The windows of one comparison, preview before final; one type from the provider to the report."""

    preview: tuple[Window, ...]
    final: tuple[Window, ...]
    seq_len: int
    requested: tuple[int, int]
    origin: TextOrigin = TextOrigin()
    slices: Mapping[str, DataFacts] | None = None  # the facts of each kind of text, where there are several

    @property
    def all(self) -> tuple[Window, ...]:
        return self.preview + self.final

    def between(self, start: tuple[int, int], stop: tuple[int, int]) -> Windows:
        """Return the windows of preview and final from `start` to `stop`."""
        return replace(self, preview=self.preview[start[0] : stop[0]], final=self.final[start[1] : stop[1]])

    def facts(self) -> DataFacts:
        """Return what the evidence says of the text."""
        own = {"seq_len": self.seq_len, "requested": list(self.requested), "digest": self.digest()}
        around = {"prefix": list(self.prefix), "suffix": list(self.suffix)} if self.all else {}
        slices = None if self.slices is None else dict(self.slices)
        return DataFacts(**vars(self.origin), **own, **around, slices=slices)

    @property
    def prefix(self) -> tuple[int, ...]:
        """The special tokens before every window, unscored."""
        return self.all[0].prefix if self.all else ()

    @property
    def suffix(self) -> tuple[int, ...]:
        """The special tokens after every window, unscored."""
        return self.all[0].suffix if self.all else ()

    def surrounded(self, prefix: Sequence[int], suffix: Sequence[int]) -> Windows:
        """Return the same windows with other special tokens around them."""

        def dress(split: tuple[Window, ...]) -> tuple[Window, ...]:
            return tuple(replace(window, prefix=tuple(prefix), suffix=tuple(suffix)) for window in split)

        return replace(self, preview=dress(self.preview), final=dress(self.final))

    def used_by(self, task: str) -> Windows:
        """Return the windows as models of a task see them: only masked models read what follows the text, and pairs
        have their special tokens already."""
        prefix = self.prefix if task != "seq2seq" else ()
        suffix = self.suffix if task == "mlm" else ()
        return self if (prefix, suffix) == (self.prefix, self.suffix) else self.surrounded(prefix, suffix)

    def stats(self) -> dict[str, float]:
        """Return the pairing facts of these windows, measured on both sides alike.

        Overlap counts the final windows whose content stands in preview too, since ids of repeats are numbered.
        """
        actual = (len(self.preview), len(self.final))
        seen = {w.content for w in self.preview}
        repeated = sum(w.content in seen for w in self.final)
        return {
            "requested_preview": self.requested[0],
            "requested_final": self.requested[1],
            "actual_preview": actual[0],
            "actual_final": actual[1],
            "paired_windows": sum(actual),
            "window_match_fraction": 1.0,
            "window_overlap_fraction": repeated / actual[1] if actual[1] else 0.0,
            "coverage": sum(actual) / sum(self.requested) if sum(self.requested) else 0.0,
        }

    def digest(self) -> str:
        """Return SHA-256 over ids, documents and tokens: two sides with this digest saw the same text."""
        sha = hashlib.sha256()
        for split in (self.preview, self.final):
            for window in split:
                kind = "" if window.slice is None else f"\t{window.slice}"
                sha.update(f"{window.id}\t{window.document}\t{content_digest(*window.content)}{kind}\n".encode())
            sha.update(b"--\n")
        return sha.hexdigest()

    def to_dict(self) -> dict[str, Any]:
        """Return the JSON form, from which `from_dict` restores the set."""
        splits = {"preview": _columns(self.preview), "final": _columns(self.final)}
        around = {"prefix": list(self.prefix), "suffix": list(self.suffix)}
        facts = {"seq_len": self.seq_len, "requested": list(self.requested)}
        return {**facts, **{name: ids for name, ids in around.items() if ids}, **splits}

    @classmethod
    def from_dict(
        cls,
        data: Mapping[str, Any],
        origin: TextOrigin = TextOrigin(),
        slices: Mapping[str, DataFacts] | None = None,
    ) -> Windows:
        try:
            preview, final = (_rows(data[name]) for name in ("preview", "final"))
        except KeyError as error:
            raise PairingError(
                f"the report has no evaluation windows ({error} is missing); expected a report made with "
                "INVARLOCK_STORE_EVAL_WINDOWS=1",
                code="E001",
            ) from None
        first, second = data["requested"]
        windows = cls(preview, final, int(data["seq_len"]), (int(first), int(second)), origin, slices)
        around = data.get("prefix") or (), data.get("suffix") or ()
        return windows.surrounded(*around) if any(around) else windows

    @classmethod
    def of_slices(cls, slices: Mapping[str, Windows]) -> Windows:
        """Put several kinds of text together, so mixed that any first part holds all of them in proportion.

        Raises DataError where two of them share a window.
        """
        parts = list(slices.values())
        first = parts[0].origin
        splits = in_order(
            [
                [replace(window, slice=name) for name, part in slices.items() for window in getattr(part, split)]
                for split in ("preview", "final")
            ],
            first.seed,
        )
        _check_apart(splits[0] + splits[1])
        origin = TextOrigin("+".join(dict.fromkeys(part.origin.provider for part in parts)), {}, None, first.seed)
        preview, final = (sum(part.requested[which] for part in parts) for which in (0, 1))
        facts = {name: part.facts() for name, part in slices.items()}
        return cls(splits[0], splits[1], max(part.seq_len for part in parts), (preview, final), origin, facts)


def _check_apart(windows: Iterable[Window]) -> None:
    """Raise DataError where two slices share a window."""
    seen: dict[object, str | None] = {}
    for window in windows:
        other = seen.setdefault(window.content, window.slice)
        if other != window.slice:
            message = f"the slices {other!r} and {window.slice!r} share text (window {window.id!r})"
            raise DataError(f"{message}; expected different text in each: name other data for one of them")


#: the columns of the JSON form and of what a provider gives, each with the field of a window that it holds
_COLUMNS = {"window_ids": "id", "document_ids": "document", "input_ids": "input_ids"}
_OPTIONAL = {"attention_masks": "mask", "labels": "labels", "slices": "slice"}  # left out where no window has one


def _columns(windows: Sequence[Window]) -> dict[str, Any]:
    columns = {key: [getattr(w, name) for w in windows] for key, name in (_COLUMNS | _OPTIONAL).items()}
    kept = {key: column for key, column in columns.items() if key in _COLUMNS or column.count(None) < len(column)}
    return {key: [list(v) if isinstance(v, tuple) else v for v in column] for key, column in kept.items()}


def _rows(columns: Mapping[str, Any]) -> tuple[Window, ...]:
    nothing = [None] * len(columns["window_ids"])
    given = [columns[key] for key in _COLUMNS] + [columns.get(key) or nothing for key in _OPTIONAL]
    return tuple(
        Window(name, document, tuple(ids), _tuple(mask), _tuple(row), kind)
        for name, document, ids, mask, row, kind in zip(*given, strict=True)
    )


@dataclass(frozen=True)
class EvaluationWindow:
    """A set of n windows, each field a list of length n.

    `input_ids` and `attention_masks` are ragged [n][t]; `window_ids` are 16 hexadecimal digits, unique and stable;
    `document_ids` name the text of each. For pairs `input_ids` are the source and `labels` the target, [n][u].
    `prefix` and `suffix` are the special tokens that the tokenizer puts around a text: a model is to see them around
    every window, and they are not scored.
    """

    input_ids: list[list[int]] = field(default_factory=list)
    attention_masks: list[list[int]] = field(default_factory=list)
    window_ids: list[str] = field(default_factory=list)
    document_ids: list[str] = field(default_factory=list)
    labels: list[list[int]] | None = None
    prefix: list[int] = field(default_factory=list)
    suffix: list[int] = field(default_factory=list)

    def __len__(self) -> int:
        return len(self.input_ids)


def windows_from_provider(
    preview: EvaluationWindow,
    final: EvaluationWindow,
    seq_len: int,
    requested: tuple[int, int],
    origin: TextOrigin = TextOrigin(),
) -> Windows:
    """Turn what a provider gives for the two splits into `Windows`."""
    splits = []
    for part in (preview, final):
        columns = {key: getattr(part, key, None) for key in (*_COLUMNS, *_OPTIONAL)}
        columns["attention_masks"] = [None if all(mask) else mask for mask in part.attention_masks]
        splits.append(_rows(columns))
    windows = Windows(splits[0], splits[1], seq_len, requested, origin)
    around = preview.prefix or final.prefix, preview.suffix or final.suffix
    return windows.surrounded(*around) if any(around) else windows


def _tuple(values: Sequence[int] | None) -> tuple[int, ...] | None:
    return None if values is None else tuple(values)


def pick_indices(total: int, count: int, policy: str = "evenly_spaced") -> list[int]:
    """Choose `count` of range(total) by `policy`: evenly_spaced (first and last included), first or last."""
    if policy in ("first", "last"):
        return list(range(total))[:count] if policy == "first" else list(range(total))[-count:]
    if count >= total:
        return list(range(total))
    return sorted({round(k * (total - 1) / max(count - 1, 1)) for k in range(count)})


class WindowBatches(list[dict[str, Any]]):
    """Windows as guards see them: batches of one, as lists, special tokens included, each with its document.

    `measurements` holds, by guard, what was measured already while the windows were scored.
    """

    def __init__(self, windows: Sequence[Window], measurements: Mapping[str, Any] | None = None) -> None:
        super().__init__(_batch(window) for window in windows)
        self.windows = tuple(windows)
        self.measurements = dict(measurements or {})


def _batch(window: Window) -> dict[str, Any]:
    window = window.dressed()
    mask = window.mask or [1] * len(window.input_ids)
    batch: dict[str, Any] = {"input_ids": [list(window.input_ids)], "attention_mask": [list(mask)]}
    labels = {} if window.labels is None else {"labels": [list(window.labels)]}
    return {**batch, "document_id": window.document, **labels}


def windows_from_calibration(data: object, preview_n: int | None = None, final_n: int | None = None) -> Windows:
    """Slice calibration batches into preview and final windows; every row of a batch is a window.

    A batch may say which document its rows come from (`document_id`, one text or one a row): windows of one document are
    one cluster. Without it every row is its own. What a provider's `windows` returns may be given as it is. Without
    counts the sequence is split into two equal halves (an odd last window is left out). Raises DataError for an iterator
    (unless INVARLOCK_ALLOW_CALIBRATION_MATERIALIZE=1), a batch without `input_ids`, or too few windows.
    """
    if isinstance(data, Windows) and preview_n is None and final_n is None:
        return data
    if isinstance(data, tuple) and len(data) == 2 and all(hasattr(part, "window_ids") for part in data):
        counts = (len(data[0].window_ids), len(data[1].window_ids))
        longest = max(len(ids) for part in data for ids in part.input_ids)
        return windows_from_calibration(windows_from_provider(*data, longest, counts), preview_n, final_n)
    windows = calibration_windows(data)
    if preview_n is None and final_n is None:
        preview_n = final_n = len(windows) // 2
    preview_n = len(windows) - (final_n or 0) if preview_n is None else preview_n
    final_n = len(windows) - preview_n if final_n is None else final_n
    if preview_n < 1 or final_n < 1 or preview_n + final_n > len(windows):
        raise DataError(
            f"calibration data has {len(windows)} windows; expected at least one preview and one final window and no "
            f"more than there are, got preview_n={preview_n}, final_n={final_n}: pass fewer or more data"
        )
    used = windows[: preview_n + final_n]
    seq_len = max(len(w.input_ids) for w in used)
    about = (data.origin, data.slices) if isinstance(data, Windows) else ()
    return Windows(tuple(used[:preview_n]), tuple(used[preview_n:]), seq_len, (preview_n, final_n), *about)


def calibration_windows(data: object) -> list[Window]:
    """Return every row of calibration batches as a window, in order. Raises DataError as `windows_from_calibration`."""
    windows: list[Window] = []
    for index, batch in enumerate(_indexable(data)):
        if isinstance(batch, Window):
            windows.append(batch)
            continue
        keys = sorted(batch.keys()) if hasattr(batch, "keys") else type(batch).__name__
        if isinstance(keys, str) or "input_ids" not in keys:
            raise DataError(f"calibration batch {index} is {keys}; expected a mapping with 'input_ids'")
        windows += _rows_of(batch, index)  # type: ignore[arg-type]  # it has keys: a mapping, or a tokenizer's batch
    return list(_distinct(windows))


def _indexable(data: object) -> Sequence[object]:
    if isinstance(data, Windows | WindowBatches):
        return data.all if isinstance(data, Windows) else data.windows
    text = isinstance(data, str | bytes | Mapping)
    if not text and hasattr(data, "__len__") and hasattr(data, "__getitem__"):
        return [data[i] for i in range(len(data))]
    if text or not isinstance(data, Iterable):
        raise DataError(f"calibration data is {type(data).__name__}; expected a list of batches with 'input_ids'")
    if settings.flag("INVARLOCK_ALLOW_CALIBRATION_MATERIALIZE"):
        return list(data)
    raise DataError(
        f"calibration data is {type(data).__name__}, which cannot be indexed; expected a list or another sequence, "
        "or set INVARLOCK_ALLOW_CALIBRATION_MATERIALIZE=1 to let it be read into one"
    )


def _plain(value: object) -> Any:
    return value.tolist() if hasattr(value, "tolist") else value


def _matrix(value: object, key: str, index: int) -> list[list[int]]:
    rows = _plain(value)
    if isinstance(rows, (list, tuple)) and rows and not isinstance(_plain(rows[0]), (list, tuple)):
        rows = [rows]
    read = bool if key == "attention_mask" else operator.index
    try:
        return [[int(read(token)) for token in _plain(row)] for row in rows]
    except (TypeError, ValueError):
        raise DataError(
            f"calibration batch {index}: {key!r} is {type(value).__name__}; expected token ids of shape [T] or [B, T]"
        ) from None


def _rows_of(batch: Mapping[str, Any], index: int) -> Iterator[Window]:
    ids = _matrix(batch["input_ids"], "input_ids", index)
    nothing, document = [None] * len(ids), batch.get("document_id")
    columns: dict[str, Sequence[Any]] = {
        key: nothing if batch.get(key) is None else _matrix(batch[key], key, index)
        for key in ("attention_mask", "labels")
    }
    columns["document_id"] = document if isinstance(document, (list, tuple)) else [document] * len(ids)
    for key, rows in columns.items():
        if len(rows) != len(ids):
            raise DataError(f"calibration batch {index}: {key!r} has {len(rows)} rows, 'input_ids' {len(ids)}")
    for row, mask, labels, named in zip(ids, *columns.values(), strict=True):
        shown = None if mask is None or (all(mask) and len(mask) == len(row)) else tuple(mask)
        digest = content_digest(row, shown, labels)
        yield Window(digest, digest if named is None else str(named), tuple(row), shown, _tuple(labels))


def _distinct(windows: Iterable[Window]) -> Iterator[Window]:
    """Number the repeats of one content, so that ids stay unique."""
    seen: Counter[str] = Counter()
    for window in windows:
        seen[window.id] += 1
        name = window.id if seen[window.id] == 1 else f"{window.id}#{seen[window.id]}"
        yield replace(window, id=name, document=name if window.document == window.id else window.document)


def mask_tokens(windows: Windows, mask_id: int, special: Iterable[int], *, seed: int, share: float = 0.15) -> Windows:
    """Hide about `share` of each window's tokens (at least one) behind `mask_id`, and label just those.

    Which positions are hidden depends on (seed, window id, position) alone, through SHA-256, so that both sides and
    any later run hide the same ones. Source of the share: Devlin et al., 2019.
    """
    skip = set(special)

    def hide(window: Window) -> Window:
        if window.labels is not None:
            return window
        candidates = [i for i, token in enumerate(window.input_ids) if token not in skip]
        keyed = sorted(candidates, key=lambda i: hashlib.sha256(f"{seed}:{window.id}:{i}".encode()).digest())
        hidden = set(keyed[: max(1, round(share * len(candidates)))])
        ids = tuple(mask_id if i in hidden else token for i, token in enumerate(window.input_ids))
        labels = tuple(token if i in hidden else IGNORED for i, token in enumerate(window.input_ids))
        return replace(window, input_ids=ids, labels=labels)

    return replace(windows, preview=tuple(map(hide, windows.preview)), final=tuple(map(hide, windows.final)))
