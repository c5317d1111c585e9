"""How far the subject's next-token distributions are from the baseline's, token by token.

The baseline's evidence keeps, for each scored token, its `TOP` most likely ids with their log-probabilities and the
label's log-probability. Everything else is one cell, the tail. The Kullback-Leibler divergence of these coarsened
distributions is a lower bound of the exact one (data processing inequality; Cover & Thomas, theorem 2.8.1).
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

from invarlock.evidence.reference import TokenReference, joined

if TYPE_CHECKING:
    import torch

__all__ = [
    "TIES",
    "TOP",
    "TokenReference",
    "coarsened_kl",
    "contract",
    "is_top",
    "joined",
    "reference_rows",
    "told_kl",
]

TOP = 64
TIES = 8  # half precision ties a few ids; a model that finds all tokens alike has no top one
_FLOOR = 1e-7  # single precision cannot tell smaller tail masses from rounding


def contract() -> dict[str, Any]:
    """Return what changes these numbers."""
    return {
        "top": TOP,
        "cells": "top ids, label, tail",
        "floor": _FLOOR,
        "histogram": "20 bins a decade, 1e-7..1e2 nats",
        "flips": f"the baseline's top id is not among the subject's, or more than {TIES} share the top",
    }


def reference_rows(log_probs: torch.Tensor, label_log_prob: torch.Tensor) -> TokenReference:
    """Return the compact form of `log_probs` [n, V]; `label_log_prob` [n] are those of the tokens that came."""
    import torch

    values, ids = torch.topk(log_probs, min(TOP, log_probs.shape[-1]), dim=-1)
    return TokenReference(ids.to(torch.int32), values, label_log_prob)


def _cells(log_probs: torch.Tensor, label: torch.Tensor, label_is_apart: torch.Tensor) -> torch.Tensor:
    """Return probabilities [n, k + 2]: the ids, the label where it is not one of them, and the tail."""
    import torch

    apart = torch.where(label_is_apart, label.double().exp(), 0.0)
    cells = torch.cat([log_probs.double().exp(), apart[:, None]], dim=-1)
    tail = (1.0 - cells.sum(-1, keepdim=True)).clamp_min(_FLOOR)
    return torch.cat([cells, tail], dim=-1)


def coarsened_kl(
    reference: TokenReference, log_probs: torch.Tensor, labels: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return (KL in nats [n] float64, flipped [n] bool) of the subject's `log_probs` [n, V] against the reference.

    `labels` [n] are the tokens that came. A token flips when the baseline's most likely id is not the subject's (see
    `is_top`; as many ties as the baseline had are no flip). NaN log-probabilities give NaN and count as flipped.
    """
    import torch

    ids, theirs = reference.ids.long(), reference.log_probs
    foreign = ids >= log_probs.shape[-1]  # a subject with a shorter vocabulary: what it has no id for counts as tail
    picked = log_probs.gather(-1, ids.masked_fill(foreign, 0))
    if bool(foreign.any()):
        picked, theirs = (x.masked_fill(foreign, -torch.inf) for x in (picked, theirs))
    apart = (ids != labels[:, None]).all(-1)
    p = _cells(theirs, reference.label_log_prob, apart)
    q = _cells(picked, log_probs.gather(-1, labels[:, None])[:, 0], apart)
    terms = torch.where(p > 0, p * (p / q.clamp_min(1e-300)).log(), 0.0)
    kl = torch.where(torch.isnan(q).any(-1), torch.nan, terms.sum(-1).clamp_min(0.0))
    ties = (reference.log_probs >= reference.log_probs[:, :1]).sum(-1)
    allowed = torch.where(ties == ids.shape[-1], log_probs.shape[-1], ties).clamp_min(TIES)
    return kl, ~is_top(log_probs, picked[:, 0], allowed)


def told_kl(reference: TokenReference, told: TokenReference, labels: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Return what `coarsened_kl` does, of a subject that tells the log-probabilities of a few ids alone: `told` [n, k].

    The cells are the ids that both sides know, the label and the rest. Fewer cells only lower the bound.
    """
    import torch

    same = reference.ids[:, :, None] == told.ids[:, None, :]
    known = same.any(-1)
    picked = torch.where(same, told.log_probs[:, None, :], -torch.inf).amax(-1)
    theirs = reference.log_probs.masked_fill(~known, -torch.inf)
    apart = ~((reference.ids == labels[:, None]) & known).any(-1)
    p = _cells(theirs, reference.label_log_prob, apart)
    q = _cells(picked, told.label_log_prob, apart)
    terms = torch.where(p > 0, p * (p / q.clamp_min(1e-300)).log(), 0.0)
    lost = torch.isnan(told.label_log_prob) | torch.isnan(told.log_probs).any(-1)
    kl = torch.where(lost, torch.nan, terms.sum(-1).clamp_min(0.0))
    return kl, ~(picked[:, 0] >= told.log_probs.amax(-1))


def is_top(log_probs: torch.Tensor, picked: torch.Tensor, allowed: torch.Tensor) -> torch.Tensor:
    """Say for each row of `log_probs` [n, V] whether `picked` [n] is its largest and at most `allowed` [n] share it.

    Where k share it, each has a probability of at most 1/k: only rows that low are counted. NaN is never the top.
    """
    top = log_probs.amax(-1)
    among = picked >= top
    unsure = among & (top <= 1e-3 - math.log(TIES + 1))
    if bool(unsure.any()):
        sharing = (log_probs[unsure] >= top[unsure, None]).sum(-1)
        among[unsure] = sharing <= allowed[unsure]
    return among
