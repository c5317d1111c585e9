"""Error and cost of both estimators of the largest singular value, on flat and on real spectra."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from pathlib import Path

import torch
from safetensors import safe_open

from invarlock.stats.linalg import sigma_max, sigma_max_bounded

ROOT = Path(__file__).resolve().parents[2]
MODEL = ROOT / "src/invarlock/data/demo_model/model.safetensors"


def with_spectrum(values: torch.Tensor) -> torch.Tensor:
    generator, n = torch.Generator().manual_seed(3), len(values)
    left, right = (torch.linalg.qr(torch.randn(n, n, generator=generator))[0] for _ in range(2))
    return (left * values) @ right.T


def spectra(n: int) -> Iterator[tuple[str, torch.Tensor]]:
    generator = torch.Generator().manual_seed(1)
    for top in (1.08, 1.02, 1.005):
        yield (
            f"flat, one {100 * (top - 1):g} % above",
            with_spectrum(torch.cat([torch.tensor([top]), torch.ones(n - 1)])),
        )
    yield "uniform", with_spectrum(torch.linspace(1.0, 0.0, n))
    crowded = torch.cat([torch.linspace(1.0, 0.999, 20), torch.linspace(0.95, 0.1, n - 20)])
    yield "twenty within 0.1 %", with_spectrum(crowded)
    yield "Gaussian, square", torch.randn(n, n, generator=generator)
    yield "Gaussian, 4 to 1", torch.randn(4 * n, n, generator=generator)
    low = torch.randn(n, 8, generator=generator) @ torch.randn(8, n, generator=generator)
    yield "Gaussian and 8 directions", 0.02 * torch.randn(n, n, generator=generator) + 0.004 * low
    with safe_open(MODEL, "pt") as file:
        for name in file.keys():  # noqa: SIM118
            tensor = file.get_tensor(name).float()
            if tensor.ndim == 2 and min(tensor.shape) > 128:
                yield f"demo {name}", tensor


def seconds(estimate: Callable[[torch.Tensor], float], matrix: torch.Tensor) -> tuple[float, float]:
    found, best = 0.0, float("inf")
    for _ in range(3):
        start = time.process_time()
        found = estimate(matrix)
        best = min(best, time.process_time() - start)
    return found, best


def sigma(n: int = 1024) -> list[dict[str, str | float | int]]:
    """Relative error of each estimator, and the processor time of the second over that of the first."""
    torch.set_num_threads(1)
    rows: list[dict[str, str | float | int]] = []
    for name, matrix in spectra(n):
        exact = float(torch.linalg.svdvals(matrix.double())[0])
        (old, before), (new, after) = seconds(sigma_max, matrix), seconds(sigma_max_bounded, matrix)
        rows.append({"spectrum": name, "old error": old / exact - 1, "new error": new / exact - 1,
                     "times the cost": after / before})  # fmt: skip
    return rows
