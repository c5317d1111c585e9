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
from invarlock.eval.divergence import DRAWS, TIES, TOP, TokenReference, kl_and_flips, places, reference_rows
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
def test_the_estimate_is_near_the_exact_figure_and_flips_are_exact(
    model: Any, windows: tuple[Window, ...], baseline: Scores, edited: dict[int, Any], bits: int
) -> None:
    result = _scores(edited[bits], windows, reference=baseline.reference)
    exact = [_exact(model, edited[bits], window) for window in windows]
    assert result["flips"] == [int(flipped.sum()) for _, flipped in exact]
    total = sum(float(kl.sum()) for kl, _ in exact)
    assert sum(result["kl_sum"]) == pytest.approx(total, rel=0.05)


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
        assert (
            shown is not None and 0.7 * true < shown <= true * 1.25
        )  # a bin is 12 % wide; draws add noise to single tokens
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


def _rows(logits: torch.Tensor, labels: torch.Tensor, place: torch.Tensor | None = None) -> TokenReference:
    place = torch.zeros(len(labels), dtype=torch.float64) if place is None else place
    return reference_rows(logits.log_softmax(-1), labels, place)


def _compare(before: torch.Tensor, after: torch.Tensor, labels: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    return kl_and_flips(_rows(before, labels), after.log_softmax(-1), labels)


def _pair(vocabulary: int, more: int = 0, spread: float = 3.0) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(vocabulary)
    before = torch.randn(40, vocabulary, generator=generator) * spread
    after = torch.randn(40, vocabulary + more, generator=generator) * spread
    return before, after, torch.randint(0, vocabulary, (40,), generator=generator)


def _theory(before: torch.Tensor, after: torch.Tensor) -> torch.Tensor:
    p, q = before.double().log_softmax(-1), after.double().log_softmax(-1)[:, : before.shape[-1]]
    return (p.exp() * (p - q)).sum(-1)


@pytest.mark.slow
@pytest.mark.parametrize(("vocabulary", "more"), [(5, 0), (TOP, 0), (TOP + 1, 0), (500, 0), (700, 9)])
def test_random_logits_against_theory(vocabulary: int, more: int) -> None:
    """Over every place that a draw may have, the mean is the exact KL; with few ids there is no tail at all."""
    before, after, labels = _pair(vocabulary, more)
    exact, log_probs = _theory(before, after), after.log_softmax(-1)
    kl, flips = _compare(before, after, labels)
    assert bool((kl >= 0).all())
    assert torch.equal(flips, before.argmax(-1) != after.argmax(-1))
    near = before + 0.3 * after[:, :vocabulary]
    if vocabulary <= TOP:
        assert torch.allclose(kl, exact, atol=1e-5)
    else:
        steps = [torch.full((40,), (k + 0.5) / 400, dtype=torch.float64) for k in range(400)]
        rows = [_rows(before, labels, u) for u in steps]
        far = torch.stack([kl_and_flips(row, log_probs, labels)[0] for row in rows])
        close = torch.stack([kl_and_flips(row, near.log_softmax(-1), labels)[0] for row in rows])
        assert torch.allclose(close.mean(0), _theory(before, near), rtol=0.03, atol=1e-4)
        assert float(close.mean()) == pytest.approx(float(_theory(before, near).mean()), rel=0.002)
        assert float(far.mean()) == pytest.approx(float(exact.mean()), rel=0.05), "unrelated: few ids weigh most"


def test_without_draws_the_figure_is_a_lower_bound() -> None:
    before, after, labels = _pair(500)
    rows = _rows(before, labels)
    bare = TokenReference(rows.ids, rows.log_probs, rows.label_log_prob)
    bound = kl_and_flips(bare, after.log_softmax(-1), labels)[0]
    exact = _theory(before, after)
    assert bool((bound <= exact + 1e-5).all()) and bool((bound >= 0).all())
    assert float(bound.mean()) < 0.95 * float(exact.mean())


@pytest.mark.slow
def test_ids_are_drawn_from_the_tail_alone_in_proportion_to_their_probability() -> None:
    before, _, labels = _pair(600, spread=1.0)
    counts = torch.zeros(40, 600)
    for k in range(500):
        rows = _rows(before, labels, torch.full((40,), (k + 0.5) / 500, dtype=torch.float64))
        assert rows.tail_ids is not None
        counts.scatter_add_(1, rows.tail_ids.long(), torch.ones(40, DRAWS))
    tail = before.softmax(-1).scatter(1, rows.ids.long(), 0.0).scatter(1, labels[:, None], 0.0)
    shares = tail / tail.sum(-1, keepdim=True)
    assert float((counts / 2000 - shares).abs().max()) <= 1 / 500
    assert float(counts[tail == 0].sum()) == 0


def test_a_subject_that_knows_fewer_ids_is_compared_on_those_that_it_knows() -> None:
    before, _, labels = _pair(600)
    labels = labels.clamp_max(500)
    kl, _ = _compare(before, before[:, :590], labels)
    assert bool(torch.isfinite(kl).all())


def test_where_draws_start_depends_on_the_window_and_token_alone() -> None:
    assert places("a", 3) == places("a", 5)[:3] != places("b", 3)
    assert all(0 <= place < 1 for place in places("a", 100))


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
    assert facts.bytes_per_token < 180
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
