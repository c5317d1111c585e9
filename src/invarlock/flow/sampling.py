"""Which windows are measured: cut from a provider's text, or those of a stored baseline. Shared by `certify` and `run`."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from invarlock.checkpoints.side import Side
from invarlock.core.exceptions import ConfigError, ModelLoadError, PairingError, TooLittleTextError
from invarlock.policy.resolve import ResolvedPolicy

__all__ = ["MOST_SEQ_LEN", "Sample", "cut_sample", "dataset_options", "metric_kind_of", "reuse_sample"]

MOST_SEQ_LEN = 512
Tick = Callable[[str, int, int], None]


@dataclass(frozen=True)
class Sample:
    """The windows (`WindowSet`), where they came from (`DataFacts`), and what the reader should know about the choice."""

    windows: Any
    data: Any
    notes: tuple[str, ...] = ()


def metric_kind_of(asked: str, adapter: Any) -> str:
    """Return the metric kind; `auto` follows the model."""
    return str(getattr(adapter, "metric_kind", "ppl_causal")) if asked == "auto" else asked


def dataset_options(section: Any) -> dict[str, Any]:
    """Return a configuration's `dataset` section as `cut_sample` takes it; the policy holds the counts."""
    options = {**section.provider_options, "provider": section.provider_name, "split": section.split}
    options |= {"seq_len": section.seq_len, "stride": section.stride, "seed": section.seed}
    return {key: value for key, value in options.items() if value is not None}


def reuse_sample(report: Mapping[str, Any]) -> Sample:
    """Return the windows that a stored report was measured on. Raises PairingError where they cannot be had whole.

    E001: the report holds no windows. E004: it does not say which it measured. E006: it holds others than it measured.
    """
    from invarlock.certificate.reports import evidence_of
    from invarlock.evidence.windows import WindowSet

    data = evidence_of(report, "baseline").data.model_copy(update={"reused": True})
    if not data.digest:
        raise PairingError("the baseline report has no provider digest; measure the baseline again", code="E004")
    windows = WindowSet.from_dict(report.get("evaluation_windows") or {})
    if windows.digest() != data.digest:
        raise PairingError(
            "the windows in the baseline report are not those it measured; measure it again", code="E006"
        )
    return Sample(windows, data)


def cut_sample(
    side: Side,
    adapter: Any,
    metric_kind: str,
    dataset: Mapping[str, Any],
    policy: ResolvedPolicy,
    tick: Tick = lambda what, done, total: None,
) -> Sample:
    """Cut as many windows as the policy asks for, with the tokenizer of `side`.

    `dataset` holds `provider`, `seq_len`, `stride`, `split`, `seed` and the provider's options. Too little text, or too
    few scored tokens, is a PairingError (E001) in the profiles that stop there, and a note in those that warn.
    """
    from invarlock.eval.data import get_provider
    from invarlock.evidence.model import DataFacts
    from invarlock.evidence.windows import mask_tokens, windows_from_provider

    if side.tokenizer is None:
        raise ModelLoadError(f"{side.id} has no tokenizer; expected tokenizer.json or a vocabulary beside the weights")
    notes: list[str] = []
    options = dict(dataset)
    spec = options.pop("provider", None) or _default_provider(adapter, notes)
    seq_len = _seq_len(options.pop("seq_len", None), side.max_length)
    seed = int(options.pop("seed", 42))
    cut = {"seq_len": seq_len, "stride": int(options.pop("stride", None) or seq_len)}
    cut |= {"seed": seed, "split": options.pop("split", None)}
    provider = get_provider(spec, **options)
    tick("reading text", 0, 1)
    counts = (int(policy.values["sample"]["preview"]), int(policy.values["sample"]["final"]))
    preview, final = _parts(provider, side.tokenizer, counts, cut, policy, notes)
    windows = windows_from_provider(preview, final, seq_len, counts)
    if metric_kind == "ppl_mlm":
        windows = mask_tokens(windows, side.tokenizer.mask_token_id, side.tokenizer.all_special_ids, seed=seed)
    described = provider.describe()
    data = DataFacts(
        provider=described["name"],
        options=described["options"],
        requested=list(counts),
        digest=windows.digest(),
        **cut,
    )
    _check_floor(windows, metric_kind, policy, notes)
    return Sample(windows, data, tuple(notes))


def _default_provider(adapter: Any, notes: list[str]) -> str:
    """Return the data to use where none were named, and note which."""
    from invarlock.core.network import network_allowed
    from invarlock.eval.data import Wikitext2Provider

    if getattr(adapter, "task", "causal") == "seq2seq":
        name = "seq2seq"
    else:
        name = "wikitext2" if network_allowed() or Wikitext2Provider.is_cached() else "python_docs"
    notes.append(f"no data were named; measured on {name}")
    return name


def _seq_len(asked: int | None, longest: int | None) -> int:
    if asked is not None and longest and asked > longest:
        raise ConfigError(f"dataset.seq_len is {asked}; the model takes at most {longest} tokens")
    return int(asked or min(MOST_SEQ_LEN, longest or MOST_SEQ_LEN))


def _parts(
    provider: Any,
    tokenizer: Any,
    counts: tuple[int, int],
    cut: Mapping[str, Any],
    policy: ResolvedPolicy,
    notes: list[str],
) -> Any:
    shortfall = policy.values["sample"]["shortfall"]
    try:
        return provider.windows(tokenizer, preview_n=counts[0], final_n=counts[1], **cut)
    except TooLittleTextError as error:
        if shortfall != "warn" or min(error.fits) < 1:
            raise PairingError(str(error), code="E001") if shortfall == "stop" else error from None
        notes.append(f"{error}; measured what fits")
        return provider.windows(tokenizer, preview_n=error.fits[0], final_n=error.fits[1], **cut)


def _check_floor(windows: Any, metric_kind: str, policy: ResolvedPolicy, notes: list[str]) -> None:
    """Stop before any model is loaded where the text cannot decide."""
    from invarlock.eval.sources.torch_model import scored_tokens
    from invarlock.flow.measure import task_of

    sample = policy.values["sample"]
    tokens = sum(scored_tokens(window, task_of(metric_kind)) for window in windows.all)
    if tokens < sample["min_tokens"]:
        message = (
            f"the windows hold {tokens} scored tokens; tier {policy.tier} in profile {policy.profile} expects "
            f"{sample['min_tokens']}: use longer windows, more of them, or the dev profile"
        )
        if sample["shortfall"] == "stop":
            raise PairingError(message, code="E001")
        notes.append(message)
