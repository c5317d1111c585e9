from __future__ import annotations

import math
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

from invarlock.core.exceptions import DataError
from invarlock.stats import linalg
from invarlock.stats.linalg import (
    SIGMA_CONTRACT,
    finite,
    marchenko_pastur_edge,
    norms,
    pack,
    sigma_max,
    sigma_max_bounded,
    sign_vectors,
    sketch_error,
    stable_rank,
    unpack,
)

torch = pytest.importorskip("torch")


def with_spectrum(rows: int, columns: int, values: torch.Tensor) -> torch.Tensor:
    generator = torch.Generator().manual_seed(3)
    left = torch.linalg.qr(torch.randn(rows, columns, generator=generator))[0]
    right = torch.linalg.qr(torch.randn(columns, columns, generator=generator))[0]
    return (left * values) @ right.T


def crowded(columns: int) -> torch.Tensor:
    """Twenty values within 0.1 % at the top."""
    return torch.cat([torch.linspace(1, 0.999, 20), torch.linspace(0.95, 0.1, columns - 20)])


SPECTRA = {
    "gaussian": lambda: torch.randn(400, 300, generator=torch.Generator().manual_seed(1)),
    "wide gaussian": lambda: torch.randn(300, 900, generator=torch.Generator().manual_seed(2)),
    "power law": lambda: with_spectrum(500, 300, torch.arange(1, 301).float() ** -0.3),
    "two equal at the top": lambda: with_spectrum(400, 300, torch.cat([torch.ones(2), torch.linspace(0.9, 0.1, 298)])),
    "twenty within a thousandth": lambda: with_spectrum(400, 300, crowded(300)),
    "all equal": lambda: with_spectrum(400, 300, torch.ones(300)),
    "rank one": lambda: torch.outer(torch.arange(400.0), torch.arange(300.0)),
    "exact branch": lambda: torch.randn(1000, 40, generator=torch.Generator().manual_seed(4)),
    "single column": lambda: torch.randn(300, 1, generator=torch.Generator().manual_seed(5)),
}


#: estimates of `sigma_max` and `sigma_max_bounded`
FROZEN = (12.232957439581021, 12.233011410491173)


@pytest.mark.parametrize("spectrum", SPECTRA)
def test_sigma_matches_exact_svd(spectrum: str) -> None:
    matrix = SPECTRA[spectrum]()
    exact = float(torch.linalg.svdvals(matrix.double())[0])
    tolerance = 1e-3 if spectrum == "twenty within a thousandth" else 1e-4
    assert sigma_max(matrix) == pytest.approx(exact, rel=tolerance)
    assert sigma_max(matrix.T) == pytest.approx(exact, rel=tolerance)


def one_above(columns: int, top: float, low: float = 1.0) -> torch.Tensor:
    """All values between `low` and 1 but the first."""
    return torch.cat([torch.tensor([top]), torch.linspace(1.0, low, columns - 1)])


FLAT = {
    "8 % above equal values": one_above(1024, 1.08),
    "2 % above equal values": one_above(1024, 1.02),
    "0.5 % above equal values": one_above(1024, 1.005),
    "5 % above nearly equal values": one_above(512, 1.05, 0.99),
    "0.2 % above a uniform spectrum": one_above(512, 1.002, 0.9),
    "uniform": torch.linspace(1.0, 0.0, 512),
}


@pytest.mark.slow
@pytest.mark.parametrize("spectrum", [*SPECTRA, *FLAT])
def test_bounded_sigma_holds_its_bound_on_any_spectrum(spectrum: str) -> None:
    flat = FLAT.get(spectrum)
    matrix = SPECTRA[spectrum]() if flat is None else with_spectrum(len(flat), len(flat), flat)
    exact = float(torch.linalg.svdvals(matrix.double())[0])
    assert sigma_max_bounded(matrix) == pytest.approx(exact, rel=3e-4)  # a third of what is promised
    assert sigma_max_bounded(matrix.T) == pytest.approx(exact, rel=3e-4)


@pytest.mark.slow
def test_the_first_contract_misses_what_stands_above_a_flat_spectrum() -> None:
    """Why there is a second one: the values of the first, wrong as they are, stay as they were recorded."""
    matrix = with_spectrum(1024, 1024, FLAT["8 % above equal values"])
    assert sigma_max(matrix) == pytest.approx(1.0, rel=1e-3)
    assert sigma_max_bounded(matrix) == pytest.approx(1.08, rel=1e-5)


@pytest.mark.slow
def test_bounded_sigma_holds_for_every_start() -> None:
    """A risk of 1e-4 a start: none of 60 misses."""
    spectrum = one_above(256, 1.004, 0.9)
    matrix = with_spectrum(256, 256, spectrum)
    found = [sigma_max_bounded(matrix, seed=seed) for seed in range(60)]
    assert min(found) >= 1.004 * (1 - 1e-3)
    assert max(found) <= 1.004 * (1 + 1e-5)


@pytest.mark.slow
def test_the_bound_costs_less_than_twice_the_steps(monkeypatch: pytest.MonkeyPatch, demo_model: Path) -> None:
    """Counted on every matrix of the demo model that is not solved exactly."""
    from safetensors import safe_open

    passes = {"sigma_max": 0, "sigma_max_bounded": 0}
    parts = linalg._parts
    with safe_open(demo_model / "model.safetensors", "pt") as file:
        tensors = [file.get_tensor(name).float() for name in file.keys()]  # noqa: SIM118
    matrices = [tensor for tensor in tensors if tensor.ndim == 2 and min(tensor.shape) > 128]
    assert len(matrices) >= 10
    for name in passes:

        def counted(matrix: torch.Tensor, name: str = name) -> Iterator[tuple[int, torch.Tensor]]:
            passes[name] += 1
            return parts(matrix)

        monkeypatch.setattr(linalg, "_parts", counted)
        for matrix in matrices:
            exact = float(torch.linalg.svdvals(matrix.double())[0])
            assert getattr(linalg, name)(matrix) == pytest.approx(exact, rel=1e-4)
    assert 1.0 < passes["sigma_max_bounded"] / passes["sigma_max"] < 2.0


def test_bounded_sigma_of_zeros_nan_and_shapes() -> None:
    assert sigma_max_bounded(torch.zeros(300, 200)) == 0.0
    matrix = torch.ones(300, 200)
    assert sigma_max_bounded(matrix) == pytest.approx(math.sqrt(60_000), rel=1e-6)
    matrix[3, 4] = math.inf
    assert math.isnan(sigma_max_bounded(matrix))
    with pytest.raises(DataError, match="expected a matrix"):
        sigma_max_bounded(torch.zeros(3))


def test_recorded_estimates_stay_what_they_were() -> None:
    """Numbers written down once, of matrices that need no generator: both contracts are frozen."""
    rows, columns = torch.arange(300)[:, None], torch.arange(200)[None, :]
    matrix = ((rows * rows + 37 * rows * columns + 11 * columns) % 101).float() / 101 - 0.5
    assert sigma_max(matrix) == pytest.approx(FROZEN[0], rel=1e-6)
    assert sigma_max_bounded(matrix) == pytest.approx(FROZEN[1], rel=1e-6)
    assert (SIGMA_CONTRACT["estimator"], SIGMA_CONTRACT["tol"]) == ("lanczos-gram", 1e-3)


def test_sigma_repeats_exactly_and_scales_with_the_matrix() -> None:
    matrix = SPECTRA["gaussian"]()
    assert sigma_max(matrix) == sigma_max(matrix.clone())
    assert sigma_max(4 * matrix) == pytest.approx(4 * sigma_max(matrix), rel=1e-6)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_weights_are_measured_in_float32(dtype: torch.dtype) -> None:
    matrix = SPECTRA["gaussian"]().to(dtype)
    assert sigma_max(matrix) == sigma_max(matrix.float())


def test_half_precision_parts_give_the_same_as_the_whole(monkeypatch: pytest.MonkeyPatch) -> None:
    matrix = SPECTRA["wide gaussian"]().bfloat16()
    whole = sigma_max(matrix)
    monkeypatch.setattr("invarlock.stats.linalg._WHOLE", 1000)
    monkeypatch.setattr("invarlock.stats.linalg._CACHED", 5000)
    assert sigma_max(matrix) == pytest.approx(whole, rel=1e-6)


@pytest.mark.parametrize("shape", [(10, 20), (300, 200)])
def test_sigma_of_zeros_is_zero_and_of_nan_is_nan(shape: tuple[int, int]) -> None:
    assert sigma_max(torch.zeros(shape)) == 0.0
    for bad in (math.nan, math.inf):
        matrix = torch.ones(shape)
        matrix[3, 4] = bad
        assert math.isnan(sigma_max(matrix))


def test_sigma_refuses_what_is_no_matrix() -> None:
    with pytest.raises(DataError, match="expected a matrix"):
        sigma_max(torch.zeros(3))


def test_stable_rank_of_known_matrices() -> None:
    assert stable_rank(math.sqrt(5), 1.0) == pytest.approx(5)  # identity of size 5
    assert math.isnan(stable_rank(0.0, 0.0))


def test_norms_of_rows_and_columns() -> None:
    matrix = torch.tensor([[3.0, 4.0], [0.0, 0.0], [1.0, 0.0]])
    rows, columns = norms(matrix)
    assert rows.tolist() == [5.0, 0.0, 1.0]
    assert columns.tolist() == pytest.approx([math.sqrt(10), 4.0])


@pytest.mark.parametrize("transposed", [False, True])
def test_norms_in_parts_match_those_of_the_whole(monkeypatch: pytest.MonkeyPatch, transposed: bool) -> None:
    matrix = SPECTRA["gaussian"]().half()
    matrix = matrix.T if transposed else matrix
    monkeypatch.setattr("invarlock.stats.linalg._CACHED", 1000)
    rows, columns = norms(matrix)
    assert rows == pytest.approx(matrix.double().norm(dim=1).numpy(), rel=1e-5)
    assert columns == pytest.approx(matrix.double().norm(dim=0).numpy(), rel=1e-5)


def test_the_number_of_threads_is_left_as_it_was() -> None:
    threads = torch.get_num_threads()
    matrix = SPECTRA["gaussian"]()
    torch.set_num_threads(2)
    try:
        two = sigma_max(matrix)
        assert torch.get_num_threads() == 2
        torch.set_num_threads(1)
        assert sigma_max(matrix) == two
    finally:
        torch.set_num_threads(threads)


def test_gaussian_noise_lies_at_the_marchenko_pastur_edge() -> None:
    noise = torch.randn(2000, 500, generator=torch.Generator().manual_seed(9))
    assert sigma_max(noise) / marchenko_pastur_edge(2000, 500) == pytest.approx(1.0, abs=0.02)


def test_sign_vectors_are_a_fixed_stream_of_independent_signs() -> None:
    signs = sign_vectors(4096, 64)
    assert set(np.unique(signs)) == {-1.0, 1.0}
    assert (signs[:100, :16] == sign_vectors(100, 16)).all()
    correlation = signs.T @ signs / len(signs) - np.eye(64)
    assert abs(correlation).max() < 5 / math.sqrt(4096)
    first = int(np.random.PCG64(np.random.SeedSequence(0)).random_raw())
    assert [int(bit) for bit in (signs[0] > 0)] == [(first >> j) & 1 for j in range(64)]


@pytest.mark.slow
@pytest.mark.parametrize("rank", [1, 4, 30])
def test_sketch_error_matches_simulation(rank: int) -> None:
    """The formula is for normal numbers; signs vary a little less, never more, where W is not symmetric."""
    rng = np.random.default_rng(rank)
    matrix = rng.normal(size=(60, rank)) @ rng.normal(size=(rank, 80))
    squares = np.linalg.svd(matrix, compute_uv=False) ** 2
    found = []
    for _ in range(3000):
        signs = rng.choice([-1.0, 1.0], (80, 16))
        found.append((signs[:60].T @ matrix @ signs)[~np.eye(16, dtype=bool)])
    estimates = np.square(found).mean(axis=1) / squares.sum()
    assert estimates.mean() == pytest.approx(1.0, abs=0.03)
    assert 0.8 < estimates.std() / sketch_error(squares.sum() ** 2 / (squares**2).sum()) < 1.03
    assert sketch_error(1e9) == pytest.approx(math.sqrt(2 / 240))  # 9 % is the floor: no sketch is finer


def test_sketch_error_needs_a_rank() -> None:
    for bad in (0.5, math.nan):
        with pytest.raises(DataError, match="expected at least 1"):
            sketch_error(bad)


def test_pack_keeps_float32_exactly_and_refuses_garbage() -> None:
    values = np.array([1.5, -0.1, 3e38], dtype=np.float32)
    assert (unpack(pack(values)) == values).all()
    for bad in ("not base64!", "AAA=", None):
        with pytest.raises(DataError, match="expected base64"):
            unpack(bad)  # type: ignore[arg-type]


@pytest.mark.parametrize("value", [math.nan, math.inf, None, "1", True])
def test_what_is_no_finite_number_becomes_none(value: object) -> None:
    assert finite(value) is None
    assert finite(2) == 2.0
