"""Evaluation windows: token sequences with an id and a document, split into preview and final."""

from __future__ import annotations

import hashlib
import operator
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from invarlock.core import settings
from invarlock.core.exceptions import DataError, PairingError

__all__ = ["Window", "WindowSet", "content_digest", "mask_tokens", "windows_from_calibration", "windows_from_provider"]

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
class WindowSet:
    """The windows of one comparison; preview comes first, final after."""

    preview: tuple[Window, ...]
    final: tuple[Window, ...]
    seq_len: int
    requested: tuple[int, int]

    @property
    def all(self) -> tuple[Window, ...]:
        return self.preview + self.final

    def digest(self) -> str:
        """Return SHA-256 over ids, documents and tokens: two sides with this digest saw the same text."""
        sha = hashlib.sha256()
        for split in (self.preview, self.final):
            for window in split:
                content = content_digest(window.input_ids, window.mask, window.labels)
                sha.update(f"{window.id}\t{window.document}\t{content}\n".encode())
            sha.update(b"--\n")
        return sha.hexdigest()

    def with_all(self, windows: Sequence[Window]) -> WindowSet:
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
    def from_dict(cls, data: Mapping[str, Any]) -> WindowSet:
        try:
            splits = [_rows(data[name]) for name in ("preview", "final")]
        except KeyError as error:
            raise PairingError(
                f"the report has no evaluation windows ({error} is missing); expected a report made with "
                "INVARLOCK_STORE_EVAL_WINDOWS=1",
                code="E001",
            ) from None
        first, second = data["requested"]
        return cls(splits[0], splits[1], int(data["seq_len"]), (int(first), int(second)))


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


def windows_from_provider(preview: Any, final: Any, seq_len: int, requested: tuple[int, int]) -> WindowSet:
    """Turn the two `EvaluationWindow`s of a provider into a `WindowSet`."""
    splits = []
    for part in (preview, final):
        labels = part.labels or [None] * len(part.window_ids)
        splits.append(
            tuple(
                Window(
                    id,
                    document,
                    tuple(ids),
                    None if all(mask) else tuple(mask),
                    tuple(lab) if lab is not None else None,
                )
                for id, document, ids, mask, lab in zip(
                    part.window_ids, part.document_ids, part.input_ids, part.attention_masks, labels, strict=True
                )
            )
        )
    return WindowSet(splits[0], splits[1], seq_len, requested)


def windows_from_calibration(data: Any, preview_n: int | None, final_n: int | None) -> WindowSet:
    """Slice calibration batches into preview and final windows; every row of a batch is a window and its own cluster.

    Without counts the sequence is split into two equal halves (an odd last window is left out). Raises DataError for an
    iterator (unless INVARLOCK_ALLOW_CALIBRATION_MATERIALIZE=1), a batch without `input_ids`, or too few windows.
    """
    windows = _distinct(_batch_rows(_indexable(data)))
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
    return WindowSet(tuple(used[:preview_n]), tuple(used[preview_n:]), seq_len, (preview_n, final_n))


def _indexable(data: Any) -> Sequence[Any]:
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


def _plain(value: Any) -> Any:
    return value.tolist() if hasattr(value, "tolist") else value


def _seen(value: Any) -> int:
    return int(bool(value))


def _matrix(value: Any, key: str, index: int) -> list[list[int]]:
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


def _batch_rows(batches: Sequence[Any]) -> list[Window]:
    windows = []
    for index, batch in enumerate(batches):
        if not hasattr(batch, "keys") or "input_ids" not in batch:
            got = sorted(batch.keys()) if hasattr(batch, "keys") else type(batch).__name__
            raise DataError(f"calibration batch {index} is {got}; expected a mapping with 'input_ids'")
        ids = _matrix(batch["input_ids"], "input_ids", index)
        extra = {}
        for key in ("attention_mask", "labels"):
            rows = _matrix(batch[key], key, index) if batch.get(key) is not None else [None] * len(ids)
            if len(rows) != len(ids):
                raise DataError(f"calibration batch {index}: {key!r} has {len(rows)} rows, 'input_ids' {len(ids)}")
            extra[key] = rows
        for row, mask, labels in zip(ids, extra["attention_mask"], extra["labels"], strict=True):
            shown = None if mask is None or (all(mask) and len(mask) == len(row)) else tuple(mask)
            digest = content_digest(row, shown, labels)
            windows.append(Window(digest, digest, tuple(row), shown, tuple(labels) if labels is not None else None))
    return windows


def _distinct(windows: list[Window]) -> list[Window]:
    """Number the repeats of one content, so that ids stay unique."""
    seen: dict[str, int] = {}
    out = []
    for window in windows:
        count = seen[window.id] = seen.get(window.id, 0) + 1
        name = window.id if count == 1 else f"{window.id}#{count}"
        out.append(replace(window, id=name, document=name))
    return out


def mask_tokens(
    windows: WindowSet, mask_id: int, special: Iterable[int], *, seed: int, share: float = 0.15
) -> WindowSet:
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
