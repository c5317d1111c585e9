"""Divergence of next-token distributions, held against the exact figure that torch gives on whole logits."""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from invarlock.edits import RTNQuantEdit
from invarlock.eval.divergence import TIES, TOP, TokenReference, coarsened_kl, reference_rows
from invarlock.eval.sources.base import Scores, score_all
from invarlock.eval.sources.torch_model import TorchSource
from invarlock.evidence.histogram import HISTOGRAM_EDGES, histogram, histogram_quantile
from invarlock.evidence.reference import read_reference, reference_digest, write_reference
from invarlock.evidence.windows import Window, windows_from_calibration

BITS = (8, 4, 2)


@pytest.fixture(scope="module")
def model(demo_model: Path, load_model: Callable[[Path], Any]) -> Any:
    return load_model(demo_model)


@pytest.fixture(scope="module")
def windows(calibration: list[dict[str, Any]]) -> tuple[Window, ...]:
    return windows_from_calibration(calibration[:8], None, None).all


def _scores(model: Any, windows: tuple[Window, ...], **options: Any) -> Scores:
    return score_all(TorchSource(model).score(windows, **options), len(windows))


@pytest.fixture(scope="module")
def baseline(model: Any, windows: tuple[Window, ...]) -> Scores:
    return _scores(model, windows, keep_reference=True)


@pytest.fixture(scope="module")
def edited(model: Any) -> dict[int, Any]:
    models = {}
    for bits in BITS:
        models[bits] = copy.deepcopy(model)
        RTNQuantEdit(bitwidth=bits).apply(models[bits], None)
    return models


def _exact(model: Any, subject: Any, window: Window) -> tuple[torch.Tensor, torch.Tensor]:
    ids = torch.tensor([window.input_ids])
    with torch.no_grad():
        p, q = (m(input_ids=ids).logits[0, :-1].double().log_softmax(-1) for m in (model, subject))
    return (p.exp() * (p - q)).sum(-1), p.argmax(-1) != q.argmax(-1)


@pytest.mark.slow
@pytest.mark.parametrize("bits", BITS)
def test_coarsened_figures_bound_the_exact_ones_from_below_and_closely(
    model: Any, windows: tuple[Window, ...], baseline: Scores, edited: dict[int, Any], bits: int
) -> None:
    result = _scores(edited[bits], windows, reference=baseline.reference)
    total = 0.0
    for window, kl, largest, flips in zip(windows, result["kl_sum"], result["kl_max"], result["flips"], strict=True):
        exact, flipped = _exact(model, edited[bits], window)
        assert kl <= float(exact.sum()) + 1e-5
        assert largest <= float(exact.max()) + 1e-6
        assert flips == int(flipped.sum())
        total += float(exact.sum())
    assert sum(result["kl_sum"]) > 0.5 * total, "a bound that says nothing would do no good"


@pytest.mark.slow
def test_damage_orders_the_figures(windows: tuple[Window, ...], baseline: Scores, edited: dict[int, Any]) -> None:
    results = [_scores(edited[bits], windows, reference=baseline.reference) for bits in BITS]
    kl = [sum(r["kl_sum"]) / sum(r.tokens) for r in results]
    flips = [sum(r["flips"]) / sum(r.tokens) for r in results]
    assert kl == sorted(kl) and flips == sorted(flips)
    assert kl[0] < 0.01 and flips[0] < 0.05 < 0.3 < kl[2] and flips[2] > 0.3


@pytest.mark.slow
def test_a_model_does_not_diverge_from_itself(model: Any, windows: tuple[Window, ...], baseline: Scores) -> None:
    result = _scores(model, windows, reference=baseline.reference)
    assert set(result["kl_sum"]) == set(result["kl_max"]) == {0.0}
    assert set(result["flips"]) == {0}
    assert result.kl_histogram is not None and result.kl_histogram[0] == sum(result.tokens)
    assert result.loss == baseline.loss


@pytest.mark.slow
def test_the_histogram_counts_every_token_and_its_quantiles_are_near(
    model: Any, windows: tuple[Window, ...], baseline: Scores, edited: dict[int, Any]
) -> None:
    result = _scores(edited[4], windows, reference=baseline.reference)
    counts = result.kl_histogram
    assert counts is not None and sum(counts) == sum(result.tokens)
    exact = torch.cat([_exact(model, edited[4], w)[0] for w in windows]).numpy()
    for q in (0.5, 0.9, 0.99):
        shown, true = histogram_quantile(counts, q), float(np.quantile(exact, q))
        assert shown is not None and 0.5 * true < shown <= true * 1.01  # a bin is 12 % wide; the rest is coarsening
    low = sum(n * edge for n, edge in zip(counts, HISTOGRAM_EDGES, strict=True))
    high = sum(n * edge for n, edge in zip(counts, HISTOGRAM_EDGES[1:] + (100.0,), strict=True))
    assert low <= sum(result["kl_sum"]) <= high
    assert counts[np.searchsorted(HISTOGRAM_EDGES, max(result["kl_max"]), side="right") - 1] >= 1
    assert counts[np.searchsorted(HISTOGRAM_EDGES, max(result["kl_max"]), side="right") :] == [0] * len(
        counts[np.searchsorted(HISTOGRAM_EDGES, max(result["kl_max"]), side="right") :]
    )


@pytest.mark.parametrize("value", [0.0, 1e-9, 1e-7, 0.03, 99.0, 5000.0])
def test_every_value_falls_into_the_bin_whose_lower_edge_is_at_most_an_eighth_below(value: float) -> None:
    counts = histogram(np.array([value, np.nan, np.inf]))
    assert counts.sum() == 1 and len(counts) == len(HISTOGRAM_EDGES)
    edge = histogram_quantile(counts.tolist(), 0.5)
    assert edge is not None and edge <= value
    if 1e-7 <= value <= 100:
        assert value < edge * 1.1221
    assert histogram_quantile([0] * len(HISTOGRAM_EDGES), 0.5) is None


def _rows(logits: torch.Tensor, labels: torch.Tensor) -> TokenReference:
    log_probs = logits.log_softmax(-1)
    return reference_rows(log_probs, log_probs.gather(-1, labels[:, None])[:, 0])


def _compare(before: torch.Tensor, after: torch.Tensor, labels: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    return coarsened_kl(_rows(before, labels), after.log_softmax(-1), labels)


@pytest.mark.parametrize("vocabulary", [5, TOP, TOP + 1, 500])
def test_random_logits_against_theory(vocabulary: int) -> None:
    generator = torch.Generator().manual_seed(vocabulary)
    before, after = (torch.randn(40, vocabulary, generator=generator) * 3 for _ in range(2))
    labels = torch.randint(0, vocabulary, (40,), generator=generator)
    kl, flips = _compare(before, after, labels)
    p, q = before.double().log_softmax(-1), after.double().log_softmax(-1)
    exact = (p.exp() * (p - q)).sum(-1)
    assert bool((kl <= exact + 1e-5).all()) and bool((kl >= 0).all())
    if vocabulary <= TOP:  # nothing is coarsened
        assert torch.allclose(kl, exact, atol=1e-5)
    assert torch.equal(flips, before.argmax(-1) != after.argmax(-1))


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_non_finite_logits_give_nan_and_count_as_flipped(bad: float) -> None:
    before = torch.randn(3, 100)
    after = before.clone()
    after[1, 7] = bad
    kl, flips = _compare(before, after, torch.tensor([1, 2, 3]))
    assert torch.isnan(kl).tolist() == [False, True, False]
    assert flips.tolist() == [False, True, False]


def test_a_few_ties_do_not_flip_but_indifference_does() -> None:
    before = torch.zeros(1, 300)
    before[0, 9] = 1.0
    label = torch.tensor([9])
    few, many = torch.zeros(1, 300), torch.zeros(1, 300)
    few[0, 5 : 5 + TIES] = 1.0
    assert _compare(before, few, label)[1].tolist() == [False]
    assert _compare(before, many, label)[1].tolist() == [True]
    kl, flips = _compare(many, many, label)
    assert (kl.tolist(), flips.tolist()) == ([0.0], [False]), "indifferent to begin with"


@pytest.mark.slow
def test_the_compact_form_is_small_and_survives_its_file(baseline: Scores, tmp_path: Path) -> None:
    from invarlock.core.exceptions import ModelLoadError

    reference = baseline.reference
    assert reference is not None
    path = tmp_path / "tokens.safetensors"
    facts = write_reference(reference, path)
    assert facts.bytes_per_token < 560
    again = read_reference(path, facts)
    assert reference_digest(again) == reference_digest(reference)
    blob = bytearray(path.read_bytes())
    blob[-1] ^= 1
    path.write_bytes(bytes(blob))
    with pytest.raises(ModelLoadError, match="is not the file that the baseline's report recorded"):
        read_reference(path, facts)
    path.unlink()
    with pytest.raises(ModelLoadError, match="is missing"):
        read_reference(path, facts)
