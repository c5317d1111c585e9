"""Evaluation windows: token sequences with an id and a document, split into preview and final, and where they came from."""

from __future__ import annotations

import hashlib
import operator
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Protocol, overload

from invarlock.core import settings
from invarlock.core.exceptions import DataError, PairingError
from invarlock.evidence.model import DataFacts

__all__ = [
    "IGNORED",
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


def content_digest(ids: Sequence[int], mask: Sequence[int] | None = None, labels: Sequence[int] | None = None) -> str:
    """Return 16 hex digits of SHA-256 over the token ids, mask and labels."""
    text = ";".join(",".join(map(str, part)) if part is not None else "-" for part in (ids, mask, labels))
    return hashlib.sha256(text.encode()).hexdigest()[:16]


@dataclass(frozen=True)
class Window:
    """One token sequence. `mask` None means no padding; `labels` None means that the inputs predict themselves."""

    id: str
    document: str
    input_ids: tuple[int, ...]
    mask: tuple[int, ...] | None = None
    labels: tuple[int, ...] | None = None

    def __post_init__(self) -> None:
        if not self.input_ids:
            raise DataError(f"window {self.id!r} has no tokens; expected at least one")
        if self.mask is not None and len(self.mask) != len(self.input_ids):
            raise PairingError(
                f"window {self.id!r} has {len(self.input_ids)} tokens but {len(self.mask)} mask entries; expected one "
                "mask entry a token",
                code="E003",
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


@dataclass(frozen=True)
class Windows:
    """The windows of one comparison, preview before final; one type from the provider to the report."""

    preview: tuple[Window, ...]
    final: tuple[Window, ...]
    seq_len: int
    requested: tuple[int, int]
    origin: TextOrigin = TextOrigin()

    @property
    def all(self) -> tuple[Window, ...]:
        return self.preview + self.final

    def facts(self) -> DataFacts:
        """Return what the evidence says of the text."""
        origin = self.origin
        return DataFacts(
            provider=origin.provider,
            options=dict(origin.options),
            seq_len=self.seq_len,
            stride=origin.stride,
            seed=origin.seed,
            split=origin.split,
            requested=list(self.requested),
            digest=self.digest(),
            reused=origin.reused,
        )

    def stats(self) -> dict[str, float]:
        """Return the pairing facts of these windows, measured on both sides alike.

        Overlap counts the final windows whose content stands in preview too, since ids of repeats are numbered.
        """
        actual = (len(self.preview), len(self.final))
        seen = {(w.input_ids, w.mask, w.labels) for w in self.preview}
        repeated = sum((w.input_ids, w.mask, w.labels) in seen for w in self.final)
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
                content = content_digest(window.input_ids, window.mask, window.labels)
                sha.update(f"{window.id}\t{window.document}\t{content}\n".encode())
            sha.update(b"--\n")
        return sha.hexdigest()

    def with_all(self, windows: Sequence[Window]) -> Windows:
        """Return a copy whose windows are replaced one by one."""
        cut = len(self.preview)
        return replace(self, preview=tuple(windows[:cut]), final=tuple(windows[cut:]))

    def to_dict(self) -> dict[str, Any]:
        """Return the JSON form, from which `from_dict` restores the set."""
        return {
            "seq_len": self.seq_len,
            "requested": list(self.requested),
            "preview": _columns(self.preview),
            "final": _columns(self.final),
        }

    @classmethod
    def from_dict(cls, data: Mapping[str, Any], origin: TextOrigin = TextOrigin()) -> Windows:  # noqa: B008 - frozen
        try:
            splits = [_rows(data[name]) for name in ("preview", "final")]
        except KeyError as error:
            raise PairingError(
                f"the report has no evaluation windows ({error} is missing); expected a report made with "
                "INVARLOCK_STORE_EVAL_WINDOWS=1",
                code="E001",
            ) from None
        first, second = data["requested"]
        return cls(splits[0], splits[1], int(data["seq_len"]), (int(first), int(second)), origin)


def _columns(windows: Sequence[Window]) -> dict[str, Any]:
    columns: dict[str, Any] = {
        "window_ids": [w.id for w in windows],
        "document_ids": [w.document for w in windows],
        "input_ids": [list(w.input_ids) for w in windows],
    }
    for key, field in (("attention_masks", "mask"), ("labels", "labels")):
        values = [getattr(w, field) for w in windows]
        if any(value is not None for value in values):
            columns[key] = [None if value is None else list(value) for value in values]
    return columns


def _rows(columns: Mapping[str, Any]) -> tuple[Window, ...]:
    count = len(columns["window_ids"])
    masks = columns.get("attention_masks") or [None] * count
    labels = columns.get("labels") or [None] * count
    return tuple(
        Window(
            id, document, tuple(ids), tuple(mask) if mask is not None else None, tuple(lab) if lab is not None else None
        )
        for id, document, ids, mask, lab in zip(
            columns["window_ids"], columns["document_ids"], columns["input_ids"], masks, labels, strict=True
        )
    )


class ProviderWindows(Protocol):
    """What a provider gives for one split, as columns (`EvaluationWindow`)."""

    @property
    def input_ids(self) -> Sequence[Sequence[int]]: ...
    @property
    def attention_masks(self) -> Sequence[Sequence[int]]: ...
    @property
    def window_ids(self) -> Sequence[str]: ...
    @property
    def document_ids(self) -> Sequence[str]: ...
    @property
    def labels(self) -> Sequence[Sequence[int]] | None: ...


def windows_from_provider(
    preview: ProviderWindows,
    final: ProviderWindows,
    seq_len: int,
    requested: tuple[int, int],
    origin: TextOrigin = TextOrigin(),  # noqa: B008 - frozen
) -> Windows:
    """Turn what a provider gives for the two splits into `Windows`."""
    splits = []
    for part in (preview, final):
        columns = (part.window_ids, part.document_ids, part.input_ids, part.attention_masks)
        labels: Sequence[Sequence[int] | None] = part.labels or [None] * len(part.window_ids)
        splits.append(
            tuple(
                Window(name, document, tuple(ids), None if all(mask) else tuple(mask), _tuple(row))
                for name, document, ids, mask, row in zip(*columns, labels, strict=True)
            )
        )
    return Windows(splits[0], splits[1], seq_len, requested, origin)


def _tuple(values: Sequence[int] | None) -> tuple[int, ...] | None:
    return None if values is None else tuple(values)


def pick_indices(total: int, count: int, policy: str = "evenly_spaced") -> list[int]:
    """Choose `count` of range(total) by `policy`: evenly_spaced (first and last included), first or last."""
    if policy in ("first", "last"):
        return list(range(total))[:count] if policy == "first" else list(range(total))[-count:]
    if count >= total:
        return list(range(total))
    return sorted({round(k * (total - 1) / max(count - 1, 1)) for k in range(count)})


class WindowBatches(Sequence[dict[str, Any]]):
    """Windows as guards see them: batches of one, as lists, each with its document.

    `measurements` holds, by guard, what was measured already while the windows were scored.
    """

    def __init__(self, windows: Sequence[Window], measurements: Mapping[str, Any] | None = None) -> None:
        self.windows = tuple(windows)
        self.measurements = dict(measurements or {})

    def __len__(self) -> int:
        return len(self.windows)

    @overload
    def __getitem__(self, index: int) -> dict[str, Any]: ...
    @overload
    def __getitem__(self, index: slice) -> list[dict[str, Any]]: ...
    def __getitem__(self, index: int | slice) -> dict[str, Any] | list[dict[str, Any]]:
        if isinstance(index, slice):
            return [self[i] for i in range(*index.indices(len(self)))]
        window = self.windows[index]
        batch: dict[str, Any] = {
            "input_ids": [list(window.input_ids)],
            "attention_mask": [list(window.mask or [1] * len(window.input_ids))],
            "document_id": window.document,
        }
        if window.labels is not None:
            batch["labels"] = [list(window.labels)]
        return batch


def windows_from_calibration(data: object, preview_n: int | None = None, final_n: int | None = None) -> Windows:
    """Slice calibration batches into preview and final windows; every row of a batch is a window.

    A batch may say which document its rows come from (`document_id`, one text or one a row): windows of one document are
    one cluster. Without it every row is its own. What a provider's `windows` returns may be given as it is. Without counts the sequence is split into two equal halves (an odd last window is left out). Raises DataError for an
    iterator (unless INVARLOCK_ALLOW_CALIBRATION_MATERIALIZE=1), a batch without `input_ids`, or too few windows.
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
    elif preview_n is None:
        preview_n = len(windows) - int(final_n or 0)
    elif final_n is None:
        final_n = len(windows) - preview_n
    assert final_n is not None
    if preview_n < 1 or final_n < 1 or preview_n + final_n > len(windows):
        raise DataError(
            f"calibration data has {len(windows)} windows; expected at least one preview and one final window and no "
            f"more than there are, got preview_n={preview_n}, final_n={final_n}: pass fewer or more data"
        )
    used = windows[: preview_n + final_n]
    seq_len = max(len(w.input_ids) for w in used)
    origin = data.origin if isinstance(data, Windows) else TextOrigin()
    return Windows(tuple(used[:preview_n]), tuple(used[preview_n:]), seq_len, (preview_n, final_n), origin)


def calibration_windows(data: object) -> list[Window]:
    """Return every row of calibration batches as a window, in order. Raises DataError as `windows_from_calibration`."""
    return _distinct(_batch_rows(data.all if isinstance(data, Windows) else _indexable(data)))


def _indexable(data: object) -> Sequence[object]:
    if isinstance(data, WindowBatches):
        return data.windows
    if hasattr(data, "__len__") and hasattr(data, "__getitem__") and not isinstance(data, (str, bytes, Mapping)):
        return [data[i] for i in range(len(data))]
    if isinstance(data, Iterable) and not isinstance(data, (str, bytes, Mapping)):
        if settings.flag("INVARLOCK_ALLOW_CALIBRATION_MATERIALIZE"):
            return list(data)
        raise DataError(
            f"calibration data is {type(data).__name__}, which cannot be indexed; expected a list or another sequence, "
            "or set INVARLOCK_ALLOW_CALIBRATION_MATERIALIZE=1 to let it be read into one"
        )
    raise DataError(f"calibration data is {type(data).__name__}; expected a list of batches with 'input_ids'")


def _plain(value: object) -> Any:
    return value.tolist() if hasattr(value, "tolist") else value


def _seen(value: object) -> int:
    return int(bool(value))


def _matrix(value: object, key: str, index: int) -> list[list[int]]:
    rows = _plain(value)
    if isinstance(rows, (list, tuple)) and rows and not isinstance(_plain(rows[0]), (list, tuple)):
        rows = [rows]
    read = _seen if key == "attention_mask" else operator.index
    try:
        return [[read(token) for token in _plain(row)] for row in rows]
    except (TypeError, ValueError):
        raise DataError(
            f"calibration batch {index}: {key!r} is {type(value).__name__}; expected token ids of shape [T] or [B, T]"
        ) from None


def _batch_rows(batches: Sequence[object]) -> list[Window]:
    windows: list[Window] = []
    for index, batch in enumerate(batches):
        if isinstance(batch, Window):
            windows.append(batch)
            continue
        keys = sorted(batch.keys()) if hasattr(batch, "keys") else type(batch).__name__
        if isinstance(keys, str) or "input_ids" not in keys:
            raise DataError(f"calibration batch {index} is {keys}; expected a mapping with 'input_ids'")
        windows += _rows_of(batch, index)  # type: ignore[arg-type]  # it has keys: a mapping, or a tokenizer's batch
    return windows


def _rows_of(batch: Mapping[str, Any], index: int) -> list[Window]:
    ids = _matrix(batch["input_ids"], "input_ids", index)
    given = {key: batch[key] for key in ("attention_mask", "labels") if batch.get(key) is not None}
    extra = {key: _matrix(value, key, index) for key, value in given.items()}
    document = batch.get("document_id")
    documents = document if isinstance(document, (list, tuple)) else [document] * len(ids)
    for key, rows in {**extra, "document_id": documents}.items():
        if len(rows) != len(ids):
            raise DataError(f"calibration batch {index}: {key!r} has {len(rows)} rows, 'input_ids' {len(ids)}")
    windows = []
    for number, row in enumerate(ids):
        mask, labels = (extra[key][number] if key in extra else None for key in ("attention_mask", "labels"))
        shown = None if mask is None or (all(mask) and len(mask) == len(row)) else tuple(mask)
        digest = content_digest(row, shown, labels)
        named = digest if documents[number] is None else str(documents[number])
        windows.append(Window(digest, named, tuple(row), shown, _tuple(labels)))
    return windows


def _distinct(windows: list[Window]) -> list[Window]:
    """Number the repeats of one content, so that ids stay unique."""
    seen: dict[str, int] = {}
    out = []
    for window in windows:
        count = seen[window.id] = seen.get(window.id, 0) + 1
        name = window.id if count == 1 else f"{window.id}#{count}"
        own = window.document == window.id
        out.append(replace(window, id=name, document=name if own else window.document))
    return out


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

    return windows.with_all([hide(window) for window in windows.all])
