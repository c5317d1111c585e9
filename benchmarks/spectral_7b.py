"""Time and memory of the weight guards (spectral statistics and sketches) on tensors of Llama-7B's shapes.

Tensors are made, measured and dropped one by one, as a streamed checkpoint would be; making them is not timed. The
spectrum is Gaussian, the slowest case for the estimator, with a few stronger directions as trained weights have when
--outliers is given. Prints seconds per layer, the sum over all 32 layers with embedding and head, and the peak memory
above the start. Budget: 15 minutes and 2 GB.

    python -m benchmarks.spectral_7b --layers 2
"""

from __future__ import annotations

import argparse
import resource
import sys
import time

import torch

from invarlock.guards.sketch import sketch_tensor
from invarlock.stats.linalg import norms, sigma_max

LAYERS = 32
LAYER_SHAPES = [(4096, 4096)] * 4 + [(11008, 4096)] * 2 + [(4096, 11008)]
ENDS = [(32000, 4096)] * 2


def peak_mb() -> float:
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak / (1 << 20 if sys.platform == "darwin" else 1 << 10)


def make(shape: tuple[int, int], dtype: torch.dtype, outliers: int, seed: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    matrix = torch.empty(shape, dtype=dtype)
    step = 1024
    right = torch.randn(outliers, shape[1], generator=generator)
    for start in range(0, shape[0], step):
        rows = min(step, shape[0] - start)
        part = 0.02 * torch.randn(rows, shape[1], generator=generator)
        if outliers:
            part += 0.004 * torch.randn(rows, outliers, generator=generator) @ right
        matrix[start : start + rows] = part.to(dtype)
    return matrix


def measure(shapes: list[tuple[int, int]], dtype: torch.dtype, outliers: int) -> dict[str, float]:
    spent = {"norms": 0.0, "sigma": 0.0, "sketch": 0.0}
    for index, shape in enumerate(shapes):
        matrix = make(shape, dtype, outliers, index)
        for name, work in (("norms", norms), ("sigma", sigma_max), ("sketch", lambda m: sketch_tensor(m, "w"))):
            started = time.perf_counter()
            work(matrix)
            spent[name] += time.perf_counter() - started
    return spent


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--layers", type=int, default=2, help=f"layers to measure of the {LAYERS}")
    parser.add_argument("--dtype", default="bfloat16")
    parser.add_argument("--outliers", type=int, default=0, help="directions stronger than the noise")
    options = parser.parse_args()
    dtype = getattr(torch, options.dtype)
    before = peak_mb()
    layers = measure(LAYER_SHAPES * options.layers, dtype, options.outliers)
    ends = measure(ENDS, dtype, options.outliers)
    total = 0.0
    for name in layers:
        whole = layers[name] / options.layers * LAYERS + ends[name]
        total += whole
        print(
            f"{name:7s} {layers[name] / options.layers:7.2f} s/layer  {ends[name]:6.2f} s ends  {whole:7.1f} s in all"
        )
    print(f"total {total:.0f} s ({options.layers} of {LAYERS} layers measured), threads {torch.get_num_threads()}")
    print(f"peak memory {peak_mb() - before:.0f} MB above the start")


if __name__ == "__main__":
    main()
