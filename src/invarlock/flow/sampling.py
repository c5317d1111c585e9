"""Which windows are measured: cut from a provider's text, or those of a stored baseline."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from invarlock.certificate.reports import evidence_of
from invarlock.checkpoints.side import Side
from invarlock.checkpoints.tokenizer import special_tokens_around
from invarlock.core.exceptions import ConfigError, ModelLoadError, PairingError, TooLittleTextError
from invarlock.core.network import network_allowed
from invarlock.eval.data import EvaluationWindow, Provider, get_provider
from invarlock.eval.data.base import Tokenizer
from invarlock.eval.data.wikitext2 import Wikitext2Provider
from invarlock.eval.sources.base import scored_tokens
from invarlock.evidence.windows import TextOrigin, Windows, mask_tokens, windows_from_provider
from invarlock.flow.job import Job
from invarlock.policy.config import DatasetSection

__all__ = ["MOST_SEQ_LEN", "cut_windows", "dataset_options", "reuse_windows"]

MOST_SEQ_LEN = 512


def dataset_options(section: DatasetSection) -> dict[str, Any]:
    """Return a configuration's `dataset` section as `cut_windows` takes it; the policy holds the counts."""
    options = {**section.provider_options, "provider": section.provider_name, "split": section.split}
    options |= {"seq_len": section.seq_len, "stride": section.stride, "seed": section.seed}
    options |= {"add_special_tokens": section.add_special_tokens}
    return {key: value for key, value in options.items() if value is not None}


def reuse_windows(report: Mapping[str, Any], *, reused: bool = True) -> Windows:
    """Return the windows that a stored report was measured on. Raises PairingError where they cannot be had whole.

    E001: the report holds no windows. E004: it does not say which it measured. E006: it holds others than it measured.
    """
    data = evidence_of(report, "baseline").data
    if not data.digest:
        raise PairingError("the baseline report has no provider digest; measure the baseline again", code="E004")
    origin = TextOrigin(data.provider, data.options, data.stride, data.seed, data.split, reused=reused)
    windows = Windows.from_dict(report.get("evaluation_windows") or {}, origin)
    if windows.digest() != data.digest:
        raise PairingError("the baseline report's windows are not those it measured; measure it again", code="E006")
    return windows


def cut_windows(job: Job, side: Side, dataset: Mapping[str, Any]) -> Windows:
    """Cut as many windows as the policy asks for, with the tokenizer of `side`.

    `dataset` holds `provider`, `seq_len`, `stride`, `split`, `seed`, `add_special_tokens` and the provider's options.
    Too little text, or too few scored tokens, is a PairingError (E001) in the profiles that stop there, and a note in
    those that warn.
    """
    if side.tokenizer is None:
        raise ModelLoadError(f"{side.id} has no tokenizer; expected tokenizer.json or a vocabulary beside the weights")
    options = dict(dataset)
    spec = options.pop("provider", None) or _default_provider(job)
    special = bool(options.pop("add_special_tokens", True))
    around = _around(job, side.tokenizer) if special else 0
    seq_len = _seq_len(job, options.pop("seq_len", None), side.max_length, around)
    seed, split = int(options.pop("seed", 42)), options.pop("split", None)
    stride = int(options.pop("stride", None) or seq_len)
    provider = get_provider(spec, **options)
    job.tick("reading text", 0, 1)
    counts = (job.policy.limits.sample.preview, job.policy.limits.sample.final)
    cut = {"seq_len": seq_len, "stride": stride, "seed": seed, "split": split}
    parts = _parts(job, provider, side.tokenizer, counts, **cut, **({} if special else {"add_special_tokens": False}))
    told = provider.describe()
    origin = TextOrigin(told["name"], told["options"], stride, seed, split)
    windows = windows_from_provider(*parts, seq_len, counts, origin).used_by(job.metric.task)
    if job.metric.task == "mlm":
        windows = mask_tokens(windows, side.tokenizer.mask_token_id, side.tokenizer.all_special_ids, seed=seed)
    _check_floor(job, windows)
    return windows


def _around(job: Job, tokenizer: Tokenizer) -> int:
    """Return how many special tokens stand around a window of text; pairs hold theirs."""
    before, after = special_tokens_around(tokenizer)
    return {"mlm": len(before) + len(after), "seq2seq": 0}.get(job.metric.task, len(before))


def _default_provider(job: Job) -> str:
    """Return the data to use where none were named, and note which."""
    text = "wikitext2" if network_allowed() or Wikitext2Provider.is_cached() else "python_docs"
    name = "seq2seq" if job.metric.task == "seq2seq" else text
    job.notes.append(f"no data were named; measured on {name}")
    return name


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


def _parts(
    job: Job, provider: Provider, tokenizer: Tokenizer, counts: tuple[int, int], **cut: Any
) -> tuple[EvaluationWindow, EvaluationWindow]:
    try:
        return provider.windows(tokenizer, preview_n=counts[0], final_n=counts[1], **cut)
    except TooLittleTextError as error:
        if job.policy.limits.sample.shortfall == "stop":
            raise PairingError(str(error), code="E001") from None
        if min(error.fits) < 1:
            raise
        job.notes.append(f"{error}; measured what fits")
        return provider.windows(tokenizer, preview_n=error.fits[0], final_n=error.fits[1], **cut)


def _check_floor(job: Job, windows: Windows) -> None:
    """Stop before any model is loaded where the text cannot decide."""
    policy, sample = job.policy, job.policy.limits.sample
    tokens = sum(scored_tokens(window, job.metric.task) for window in windows.all)
    if tokens < sample.min_tokens:
        expected = f"tier {policy.tier} in profile {policy.profile} expects {sample.min_tokens}"
        instead = "use longer windows, more of them, or the dev profile"
        message = f"the windows hold {tokens} scored tokens; {expected}: {instead}"
        if sample.shortfall == "stop":
            raise PairingError(message, code="E001")
        job.notes.append(message)
