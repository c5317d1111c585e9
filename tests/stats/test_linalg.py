from __future__ import annotations

import math

import numpy as np
import pytest

from invarlock.core.exceptions import DataError
from invarlock.stats.linalg import (
    finite,
    marchenko_pastur_edge,
    norms,
    pack,
    sigma_max,
    sign_vectors,
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


@pytest.mark.parametrize("spectrum", SPECTRA)
def test_sigma_matches_exact_svd(spectrum: str) -> None:
    matrix = SPECTRA[spectrum]()
    exact = float(torch.linalg.svdvals(matrix.double())[0])
    tolerance = 1e-3 if spectrum == "twenty within a thousandth" else 1e-4
    assert sigma_max(matrix) == pytest.approx(exact, rel=tolerance)
    assert sigma_max(matrix.T) == pytest.approx(exact, rel=tolerance)


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
