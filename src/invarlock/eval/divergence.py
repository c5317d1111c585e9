"""How far the subject's next-token distributions are from the baseline's, token by token.

The baseline's evidence keeps, for each scored token, its `TOP` most likely ids with their log-probabilities, the label's
log-probability, and `DRAWS` ids drawn from all the others, the tail. With the tail as one cell, p_T of the baseline's
mass and q_T of the subject's, the divergence of the coarsened distributions is a lower bound of the exact one (data
processing inequality; Cover & Thomas, theorem 2.8.1), and what it lacks is that within the tail (the chain rule):

    KL(p || q) = sum over cells p ln(p / q) + p_T E[r - 1 - ln r],    r = (q / q_T) / (p / p_T), of an id drawn from p

The mean of r - 1 - ln r over the drawn ids estimates the last term without bias and is never negative; E[r] is 1, so that
r - 1 changes nothing but the variance: of second order in a small change. Draws are systematic (places (u + k) / DRAWS
of the tail's distribution function, u uniform by window and token). A source that knows the most likely ids alone has
no draws, and gives the lower bound.
"""

from __future__ import annotations

import hashlib
import math
from typing import TYPE_CHECKING, Any

import numpy as np

from invarlock.evidence.reference import TokenReference, joined

if TYPE_CHECKING:
    import torch

__all__ = [
    "DRAWS",
    "TIES",
    "TOP",
    "TokenReference",
    "contract",
    "is_top",
    "joined",
    "kl_and_flips",
    "places",
    "reference_rows",
    "told_kl",
]

TOP = 16
DRAWS = 4
_BLOCK = 256  # ids summed at once on the way to the one that is drawn
TIES = 8  # half precision ties a few ids; a model that finds all tokens alike has no top one
_FAR = 600.0  # nats: beyond, double precision overflows
_FLOOR = 1e-7  # single precision cannot tell smaller tail masses from rounding


def contract() -> dict[str, Any]:
    """Return what changes these numbers."""
    return {
        "top": TOP,
        "cells": "top ids, label, tail",
        "floor": _FLOOR,
        "within the tail": f"{DRAWS} ids drawn systematically, place by SHA-256 of the window",
        "histogram": "20 bins a decade, 1e-7..1e2 nats",
        "flips": f"the baseline's top id is not among the subject's, or more than {TIES} share the top",
    }


def places(window_id: str, count: int) -> list[float]:
    """Return a number in [0, 1) for each token of a window: where its draws from the tail start."""
    seed = int.from_bytes(hashlib.sha256(window_id.encode()).digest()[:8], "big")
    drawn: list[float] = ((np.random.PCG64(seed).random_raw(count) >> np.uint64(11)) * 2.0**-53).tolist()
    return drawn


def reference_rows(log_probs: torch.Tensor, labels: torch.Tensor, place: torch.Tensor) -> TokenReference:
    """Return the compact form of `log_probs` [n, V]; `labels` [n] are the tokens that came, `place` [n] as `places`."""
    import torch

    values, ids = torch.topk(log_probs, min(TOP, log_probs.shape[-1]), dim=-1)
    label = log_probs.gather(-1, labels[:, None])[:, 0]
    drawn, there = _drawn(log_probs, ids, labels, place)
    size = torch.full_like(ids[:, 0], log_probs.shape[-1], dtype=torch.int32)
    tail = log_probs.gather(-1, drawn).masked_fill(~there, -torch.inf)
    return TokenReference(ids.to(torch.int32), values, label, drawn.to(torch.int32), tail, size)


def _drawn(
    log_probs: torch.Tensor, ids: torch.Tensor, labels: torch.Tensor, place: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return ids drawn from the tail [n, DRAWS], by its inverse distribution function, found by sums of blocks of ids;
    and whether each is of the tail, which none is where there is no tail."""
    import torch

    size = log_probs.shape[-1]
    tail = log_probs.exp().scatter_(-1, ids, 0.0).scatter_(-1, labels[:, None], 0.0)
    blocks = torch.nn.functional.pad(tail, (0, -size % _BLOCK)).view(len(tail), -1, _BLOCK)
    ends = blocks.sum(-1, dtype=torch.float64).cumsum(-1)
    steps = torch.arange(DRAWS, device=place.device, dtype=torch.float64)
    targets = (place[:, None] + steps) / DRAWS * ends[:, -1:]
    chosen = torch.searchsorted(ends, targets, right=True).clamp_max(blocks.shape[1] - 1)
    before = torch.where(chosen > 0, ends.gather(-1, (chosen - 1).clamp_min(0)), 0.0)
    inside = blocks.gather(1, chosen[..., None].expand(-1, -1, _BLOCK)).double().cumsum(-1)
    within = torch.searchsorted(inside, (targets - before)[..., None], right=True)[..., 0].clamp_max(_BLOCK - 1)
    drawn = (chosen * _BLOCK + within).clamp_max(size - 1)
    return drawn, tail.gather(-1, drawn) > 0


def _cells(
    log_probs: torch.Tensor, label: torch.Tensor, label_is_apart: torch.Tensor, beyond: torch.Tensor | float
) -> torch.Tensor:
    """Return probabilities [n, k + 2]: the ids, the label where it is not one of them, and the tail
    without what lies `beyond` the other side's vocabulary."""
    import torch

    apart = torch.where(label_is_apart, label.double().exp(), 0.0)
    cells = torch.cat([log_probs.double().exp(), apart[:, None]], dim=-1)
    tail = (1.0 - cells.sum(-1) - beyond).clamp_min(_FLOOR)[:, None]
    return torch.cat([cells, tail], dim=-1)


def _of_cells(p: torch.Tensor, q: torch.Tensor) -> torch.Tensor:
    """Return the divergence [n] of distributions over cells, [n, cells]."""
    import torch

    return torch.where(p > 0, p * (p / q.clamp_min(1e-300)).log(), 0.0).sum(-1).clamp_min(0.0)


def kl_and_flips(
    reference: TokenReference, log_probs: torch.Tensor, labels: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return (KL in nats [n] float64, flipped [n] bool) of the subject's `log_probs` [n, V] against the reference.

    `labels` [n] are the tokens that came. A token flips when the baseline's most likely id is not the subject's (see
    `is_top`; as many ties as the baseline had are no flip). NaN log-probabilities give NaN and count as flipped. Ids
    that the subject does not have say nothing; what it has beyond the baseline's vocabulary counts in full.
    """
    import torch

    ids, theirs = reference.ids.long(), reference.log_probs
    foreign = ids >= log_probs.shape[-1]
    picked = log_probs.gather(-1, ids.masked_fill(foreign, 0))
    if bool(foreign.any()):
        picked, theirs = (x.masked_fill(foreign, -torch.inf) for x in (picked, theirs))
    apart = (ids != labels[:, None]).all(-1)
    p = _cells(theirs, reference.label_log_prob, apart, 0.0)
    q = _cells(picked, log_probs.gather(-1, labels[:, None])[:, 0], apart, _beyond(reference, log_probs))
    kl = _of_cells(p, q) + _within_tail(reference, log_probs, p[:, -1], q[:, -1])
    kl = torch.where(torch.isnan(q).any(-1), torch.nan, kl)
    ties = (reference.log_probs >= reference.log_probs[:, :1]).sum(-1)
    allowed = torch.where(ties == ids.shape[-1], log_probs.shape[-1], ties).clamp_min(TIES)
    return kl, ~is_top(log_probs, picked[:, 0], allowed)


def told_kl(reference: TokenReference, told: TokenReference, labels: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Return what `kl_and_flips` does, as a lower bound, of a subject that tells a few ids alone: `told` [n, k].

    The cells are the ids that both sides know, the label and the rest. Fewer cells only lower the bound.
    """
    import torch

    same = reference.ids[:, :, None] == told.ids[:, None, :]
    known = same.any(-1)
    picked = torch.where(same, told.log_probs[:, None, :], -torch.inf).amax(-1)
    theirs = reference.log_probs.masked_fill(~known, -torch.inf)
    apart = ~((reference.ids == labels[:, None]) & known).any(-1)
    p = _cells(theirs, reference.label_log_prob, apart, 0.0)
    q = _cells(picked, told.label_log_prob, apart, 0.0)
    lost = torch.isnan(told.label_log_prob) | torch.isnan(told.log_probs).any(-1)
    kl = torch.where(lost, torch.nan, _of_cells(p, q))
    return kl, ~(picked[:, 0] >= told.log_probs.amax(-1))


def _beyond(reference: TokenReference, log_probs: torch.Tensor) -> torch.Tensor | float:
    """The subject's mass [n] on ids that the baseline does not have."""
    known = log_probs.shape[-1] if reference.vocabulary is None else int(reference.vocabulary.max())
    return log_probs[:, known:].double().exp().sum(-1) if known < log_probs.shape[-1] else 0.0


def _within_tail(
    reference: TokenReference, log_probs: torch.Tensor, p_tail: torch.Tensor, q_tail: torch.Tensor
) -> torch.Tensor | float:
    """Estimate the part [n] of the divergence that lies within the tail, of the masses given [n]."""
    import torch

    if reference.tail_ids is None or reference.tail_log_probs is None:
        return 0.0
    ids, theirs = reference.tail_ids.long(), reference.tail_log_probs
    foreign = (ids >= log_probs.shape[-1]) | torch.isneginf(theirs)
    ours = torch.where(foreign, theirs, log_probs.gather(-1, ids.masked_fill(foreign, 0)))
    log_r = (ours.double() - theirs.double() - (q_tail / p_tail).log()[:, None]).clamp(-_FAR, _FAR)
    return p_tail * (torch.expm1(log_r) - log_r).clamp_min(0.0).masked_fill(foreign, 0.0).mean(-1)


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
