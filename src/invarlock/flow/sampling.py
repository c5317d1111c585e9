"""Which windows are measured: cut from a provider's text, or those of a stored baseline."""

from __future__ import annotations

import glob
import hashlib
import math
import os
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

from invarlock.certificate.reports import evidence_of
from invarlock.checkpoints.side import Side
from invarlock.checkpoints.tokenizer import special_tokens_around
from invarlock.core.exceptions import ConfigError, InvarlockError, ModelLoadError, PairingError, TooLittleTextError
from invarlock.core.network import network_allowed
from invarlock.eval.data import get_provider
from invarlock.eval.data.base import FieldsProvider, Tokenizer
from invarlock.eval.data.wikitext2 import Wikitext2Provider
from invarlock.evidence.model import DataFacts
from invarlock.evidence.windows import TextOrigin, Windows, mask_tokens, windows_from_provider
from invarlock.flow.job import Job
from invarlock.policy.config import DatasetSection, SliceSection

__all__ = [
    "EMBEDDED",
    "MOST_SEQ_LEN",
    "check_same_data",
    "cut_windows",
    "dataset_options",
    "look_at_text",
    "read_again",
    "reuse_windows",
]

MOST_SEQ_LEN = 512
_SEED = 42
_FILES = ("file", "path", "data_files")
#: keys of a data section that are not the provider's own
_CUT = ("provider", "split", "seq_len", "stride", "seed", "add_special_tokens", "slices", "share")


def dataset_options(section: DatasetSection) -> dict[str, Any]:
    """Return a configuration's `dataset` section as `cut_windows` takes it; the policy holds the counts."""
    options = {**section.provider_options, "provider": section.provider_name, "split": section.split}
    options |= {"seq_len": section.seq_len, "stride": section.stride, "seed": section.seed}
    options |= {"add_special_tokens": section.add_special_tokens}
    if section.slices is not None:
        options["slices"] = {name: _slice_options(part) for name, part in section.slices.items()}
    return {key: value for key, value in options.items() if value is not None}


def _slice_options(section: SliceSection) -> dict[str, Any]:
    named = {name: getattr(section, name) for name in ("split", "seq_len", "stride", "seed", "share")}
    options = {**section.provider_options, "provider": section.provider_name, **named}
    return {key: value for key, value in options.items() if value is not None}


def reuse_windows(report: Mapping[str, Any], *, reused: bool = True) -> Windows:
    """Return the windows that a stored report was measured on. Raises PairingError where they cannot be had whole.

    E001: the report holds no windows. E004: it does not say which it measured. E006: it holds others than it measured.
    """
    data = evidence_of(report, "baseline").data
    if not data.digest:
        raise PairingError("the baseline report has no provider digest; measure the baseline again", code="E004")
    origin = TextOrigin(
        data.provider, data.options, data.stride, data.seed, data.split, reused, data.texts, data.remarks
    )
    windows = Windows.from_dict(report.get("evaluation_windows") or {}, origin, data.slices)
    if windows.digest() != data.digest:
        raise PairingError("the baseline report's windows are not those it measured; measure it again", code="E006")
    return windows


def read_again(data: DataFacts, windows: Windows) -> dict[tuple[str | None, str], str]:
    """Return the documents that stored windows of running text were cut from, by slice and id; {} where they are not at
    hand as they were."""
    found: dict[tuple[str | None, str], str] = {}
    parts: list[tuple[str | None, DataFacts]] = [*(data.slices or {}).items()] or [(None, data)]
    for name, part in parts:
        chosen = {window.document for window in windows.all if window.slice == name}
        try:
            provider = get_provider(part.provider, **part.options)
            texts = provider.texts_of(chosen, part.split) if provider.kind == "text" else {}
        except InvarlockError:  # its text may be elsewhere, or another by now
            return {}
        if part.texts is None or _digest(texts) != part.texts:
            return {}
        found |= {(name, document): text for document, text in texts.items()}
    return found


def _digest(texts: Mapping[str, str]) -> str:
    sha = hashlib.sha256()
    for row in sorted(texts.items()):
        sha.update("\x1f".join((*row, "\x1e")).encode("utf-8", "surrogatepass"))
    return sha.hexdigest()


def check_same_data(data: DataFacts, dataset: Mapping[str, Any]) -> None:
    """Raise ConfigError, naming the key, where `dataset` asks for other data than a stored baseline was measured on.

    Its windows are measured again as they are, so that what else was asked for would be recorded and not done.
    """
    slices = dataset.get("slices")
    if (slices is None) != (data.slices is None) and dataset.get("provider", slices) is not None:
        raise _other_data("slices", sorted(slices or ()), sorted(data.slices or ()))
    for name, asked in (slices or {}).items():
        if name not in (data.slices or {}):
            raise _other_data(f"slices.{name}", asked, "no such slice")
        _check_same(f"slices.{name}.", {k: v for k, v in asked.items() if k != "share"}, (data.slices or {})[name])
    if slices is None:
        _check_same("", dataset, data)


def _check_same(where: str, dataset: Mapping[str, Any], data: DataFacts) -> None:
    recorded = {
        **data.options,
        "provider": data.provider,
        "split": data.split,
        "stride": data.stride,
        "seed": data.seed,
    }
    recorded |= {"seq_len": data.seq_len, "add_special_tokens": bool(data.prefix or data.suffix)}
    own = get_provider(dataset["provider"], **_own_options(dataset)).describe() if dataset.get("provider") else {}
    for key, asked in {**dataset, **own.get("options", {})}.items():
        there = recorded.get(key)
        if key in _FILES and not _paths(asked) <= {os.path.abspath(str(p)) for p in _listed(there)}:
            raise _other_data(f"{where}{key}", asked, there)
        if key == "seq_len" and data.seq_len <= asked <= data.seq_len + len(data.prefix or ()) + len(data.suffix or ()):
            continue  # shortened, so that the special tokens fit
        if key == "seed" and asked == _SEED:
            continue  # the default: nobody asked
        if key not in (*_FILES, "add_special_tokens", "slices") and asked != there and key in recorded:
            raise _other_data(f"{where}{key}", asked, there)


def _own_options(dataset: Mapping[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in dataset.items() if key not in _CUT}


def _listed(given: object) -> Sequence[object]:
    return given if isinstance(given, list | tuple) else [given]


def _paths(given: object) -> set[str]:
    """Return the files that an option names, wherever the caller stands. Raises ConfigError for one that is not there."""
    names = [str(path) for path in _listed(given)]
    absent = [name for name in names if not os.path.exists(name) and not glob.glob(name)]
    if absent:
        raise ConfigError(f"{absent[0]!r} does not exist; expected the data file that the baseline was measured on")
    return {os.path.abspath(name) for name in names}


def _other_data(key: str, asked: object, there: object) -> ConfigError:
    return ConfigError(
        f"dataset.{key} is {asked!r}, and the stored baseline was measured with {there!r}; leave the data out to measure on "
        "its windows, or measure a baseline on these data"
    )


def cut_windows(job: Job, side: Side, dataset: Mapping[str, Any]) -> Windows:
    """Cut as many windows as the policy asks for, with the tokenizer of `side`.

    `dataset` holds `provider`, `seq_len`, `stride`, `split`, `seed`, `add_special_tokens` and the provider's options; or
    `slices`, which maps the name of each kind of text to such a mapping with its `share` of the windows (default 1 each),
    laid on what stands beside it. Too little text, or too few scored tokens, is a PairingError (E001) in the profiles
    that stop there, and a note in those that warn.
    """
    if side.tokenizer is None:
        raise ModelLoadError(f"{side.id} has no tokenizer; expected tokenizer.json or a vocabulary beside the weights")
    sample, short = job.policy.limits.sample, list[str]()
    job.tick("reading text", 0, 1)
    windows = _cut_all(job, side, dataset, (sample.preview, sample.final), short)
    alone, few = _alone(job, windows), _too_little(job, side, dataset, windows, short)
    if (alone or few) and sample.shortfall == "stop":
        raise PairingError(alone or str(few), code="E001")
    job.notes += [f"{found}; measured what fits" for found in short] or ([few] if few else [])
    job.notes += [alone] if alone else []
    return windows


def _cut_all(job: Job, side: Side, dataset: Mapping[str, Any], asked: tuple[int, int], short: list[str]) -> Windows:
    """Cut windows of all kinds of text; `short` gets a line for each of which there are fewer than asked for."""
    common = dict(dataset)
    slices = common.pop("slices", None)
    if slices is None and common.get("provider") is None:
        common, slices = _default_data(job, common)
    if slices is None:
        windows = _cut(job, side, common, asked, short)
    else:
        shares = {name: float(own.get("share", 1.0)) for name, own in slices.items()}
        windows = Windows.of_slices(
            {
                name: _cut(job, side, {**common, **_without_share(own)}, counts, short, f"slice {name}: ")
                for (name, own), counts in zip(slices.items(), _dealt(shares, asked), strict=True)
            }
        )
    if job.metric.task == "mlm":
        assert side.tokenizer is not None
        if side.tokenizer.mask_token_id is None:
            raise ConfigError(
                f"the tokenizer of {side.id} has no mask token, and its model fills in masked text; add one"
            )
        windows = mask_tokens(windows, side.tokenizer.mask_token_id, side.tokenizer.all_special_ids, seed=_seed(common))
    return windows


def _around(job: Job, tokenizer: Tokenizer) -> int:
    """Return how many special tokens stand around a window of text; pairs hold theirs."""
    before, after = special_tokens_around(tokenizer)
    return {"mlm": len(before) + len(after), "seq2seq": 0}.get(job.metric.task, len(before))


def look_at_text(dataset: Mapping[str, Any]) -> None:
    """Look at the first line of every file of text that a request names, so that what is none is refused at once."""
    for own in (dataset.get("slices") or {"": {}}).values():
        named = {**dataset, **_without_share(own)}
        if named.get("provider") is None:
            continue
        provider = get_provider(named["provider"], **{k: v for k, v in named.items() if k not in _CUT})
        if isinstance(provider, FieldsProvider):
            provider.look(named.get("split"))


def _seed(dataset: Mapping[str, Any]) -> int:
    return int(dataset.get("seed", _SEED))


def _without_share(own: Mapping[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in own.items() if key != "share" and value is not None}


def _dealt(shares: Mapping[str, float], counts: tuple[int, int]) -> list[tuple[int, int]]:
    """Deal the windows asked for to the slices in proportion to their shares; the first ones get what is left over."""
    whole = sum(shares.values())
    columns = []
    for count in counts:
        exact = [count * share / whole for share in shares.values()]
        dealt = [int(part) for part in exact]
        rest = sorted(range(len(exact)), key=lambda i: dealt[i] - exact[i])[: count - sum(dealt)]
        columns.append([n + (i in rest) for i, n in enumerate(dealt)])
    if min(map(min, columns)) < 1:
        raise ConfigError(
            f"got {counts[0]} + {counts[1]} windows for {len(shares)} slices; expected one of each at least"
        )
    return list(zip(*columns, strict=True))


def _cut(
    job: Job, side: Side, dataset: Mapping[str, Any], counts: tuple[int, int], short: list[str], where: str = ""
) -> Windows:
    """Cut windows of one kind of text."""
    assert side.tokenizer is not None
    options = dict(dataset)
    spec, seed = options.pop("provider", None), _seed(options)
    if spec is None:
        raise ConfigError(f"{where}no provider is named; expected `provider`")
    options.pop("seed", None)
    special = bool(options.pop("add_special_tokens", True))
    around = _around(job, side.tokenizer) if special else 0
    seq_len = _seq_len(job, options.pop("seq_len", None), side.max_length, around)
    split, stride = options.pop("split", None), int(options.pop("stride", None) or seq_len)
    provider = get_provider(spec, **options)
    cut = {"seq_len": seq_len, "stride": stride, "seed": seed, "split": split}
    cut |= {} if special else {"add_special_tokens": False}
    if getattr(provider, "kind", "text") == "pairs" and job.metric.task != "seq2seq":
        if job.metric.task == "mlm":
            raise ConfigError(
                f"{where}the provider {spec!r} gives pairs, and {side.id} fills in masked text; name a text provider"
            )
        cut |= {"joined": True}
    elif job.metric.kind == "vqa_accuracy":
        raise ConfigError(
            f"{where}vqa_accuracy scores answers; name a provider of pairs, of questions and their answers"
        )
    try:
        parts = provider.windows(side.tokenizer, preview_n=counts[0], final_n=counts[1], **cut)
    except TooLittleTextError as error:
        if min(error.fits) < 1:
            raise _stopping(job, f"{where}{error}", error) from None
        short.append(f"{where}{error.found}")
        parts = provider.windows(side.tokenizer, preview_n=error.fits[0], final_n=error.fits[1], **cut)
    chosen = {name for part in parts for name in part.document_ids}
    texts, remarks = provider.texts_of(chosen, split), list(getattr(provider, "remarks", ()))
    job.texts |= texts
    job.notes += [f"{where}{remark}" for remark in remarks]
    told = provider.describe()
    digest = _digest(texts) if texts else None
    origin = TextOrigin(told["name"], told["options"], stride, seed, split, texts=digest, remarks=remarks or None)
    return windows_from_provider(*parts, seq_len, counts, origin).used_by(job.metric.task)


#: the kinds of text that every machine has; another seed for code, so that few modules stand in both
EMBEDDED: Mapping[str, Mapping[str, Any]] = {
    "docs": {"provider": "python_docs"},
    "code": {"provider": "python_code", "seed": 43},
}


def _default_data(job: Job, asked: dict[str, Any]) -> tuple[dict[str, Any], Mapping[str, Mapping[str, Any]] | None]:
    """Return the data to use where none were named, and note which: what was asked beside it, and its slices."""
    name = "seq2seq" if job.metric.task == "seq2seq" else "wikitext2"
    embedded = name == "wikitext2" and not (network_allowed() or Wikitext2Provider.is_cached())
    told = "python_docs and python_code" if embedded else name
    job.notes.append(f"no data were named; measured on {told}")
    return (asked, EMBEDDED) if embedded else ({**asked, "provider": name}, None)


def _seq_len(job: Job, asked: int | None, longest: int | None, around: int) -> int:
    """Return how many tokens of content a window has, so that it fits the model with the special tokens around it."""
    if asked is not None and longest and asked > longest:
        raise ConfigError(f"dataset.seq_len is {asked}; the model takes at most {longest} tokens")
    room = max((longest or MOST_SEQ_LEN + around) - around, 2)
    if asked is not None and longest and asked > room:
        job.notes.append(
            f"windows have {room} tokens, and {around} special ones around them: the model takes {longest}"
        )
        return room
    return int(asked or min(MOST_SEQ_LEN, room))


def _stopping(job: Job, message: str, error: TooLittleTextError) -> InvarlockError:
    return PairingError(message, code="E001") if job.policy.limits.sample.shortfall == "stop" else error


def _alone(job: Job, windows: Windows) -> str | None:
    """Say that all of the text is one document, which nothing can be told from; None where it is not."""
    documents, floor = {window.document for window in windows.all}, job.policy.limits.sample.min_documents
    if len(documents) != 1 or floor < 2:
        return None
    return (
        f"all of the text is one document ({documents.pop()}), and no interval follows from one; expected {floor} or more: "
        "a document is one line of a .jsonl file (its field `text`), or one .txt file"
    )


def _too_little(job: Job, side: Side, dataset: Mapping[str, Any], windows: Windows, short: Sequence[str]) -> str | None:
    """Say in one line why the text cannot decide and which counts would fit, before any model is loaded; None: it can."""
    policy, sample = job.policy, job.policy.limits.sample
    tokens = job.scored(windows)
    if not short and tokens >= sample.min_tokens:
        return None
    found = "; ".join(short) or f"{len(windows.all)} windows"
    floor = f"tier {policy.tier} in profile {policy.profile} expects {sample.min_tokens:,}"
    held = f"{found} with {tokens:,} scored tokens"
    held += f"; {floor}" if tokens < sample.min_tokens else ""
    if not short:  # there may be more text than was asked for
        share = 1.02 * sample.min_tokens / max(tokens, 1)
        more = (math.ceil(sample.preview * share), math.ceil(sample.final * share))
        windows, tokens = _tried(job, side, dataset, more)
    if tokens < sample.min_tokens:
        times = f"{sample.min_tokens / max(tokens, 1):.1f}"
        return f"{held}: no counts fit, so give {times} times as much text, or measure what there is with --profile dev"
    counts = f"dataset.preview_n: {len(windows.preview)} and dataset.final_n: {len(windows.final)}"
    return f"{held}: {counts} fit, in a preset that is given without --profile"


def _tried(job: Job, side: Side, dataset: Mapping[str, Any], counts: tuple[int, int]) -> tuple[Windows, int]:
    """Return the windows that there are of so many, and their scored tokens."""
    windows = _cut_all(replace(job, notes=[], texts={}), side, dataset, counts, [])
    return windows, job.scored(windows)
