"""What `diff` costs beside reading both files, and how much memory it takes.

    python -m benchmarks.diff_cost [--billions 0.25] [--work FOLDER]

Writes a synthetic pair of a Llama's shapes in bfloat16, in shards of 2 GB, the subject's matrices rounded to 4 bits in
groups of 128 (a share of them by --changed), compares it in a process of its own, and sets the time against reading both
in order, with the files dropped from the system's cache before each as far as the system lets us. Prints; it does not judge.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import torch
from safetensors.torch import save_file

from invarlock.edits.rtn import round_to_nearest

SHARD = 2 << 30
SHAPES = {
    "q": (1, 1),
    "k": (1, 1),
    "v": (1, 1),
    "o": (1, 1),
    "gate": (2.6875, 1),
    "up": (2.6875, 1),
    "down": (1, 2.6875),
}


def tensors(width: int, layers: int) -> Iterator[tuple[str, tuple[int, int]]]:
    yield "model.embed_tokens.weight", (32000, width)
    for layer in range(layers):
        for name, (rows, columns) in SHAPES.items():
            part = "self_attn" if len(name) == 1 else "mlp"
            yield f"model.layers.{layer}.{part}.{name}_proj.weight", (int(rows * width), int(columns * width))


def write_pair(work: Path, billions: float, changed: float) -> tuple[Path, Path]:
    """Write the pair, a shard of both at a time."""
    width = 4096 if billions >= 2 else 2048 if billions >= 0.5 else 1024
    layers = max(1, round((billions * 1e9 - 32000 * width) / (12.0625 * width**2)))
    folders = work / "baseline", work / "subject"
    for folder in folders:
        folder.mkdir(parents=True)
        sizes = {"hidden_size": width, "num_hidden_layers": layers, "num_attention_heads": width // 128}
        (folder / "config.json").write_text(json.dumps({"model_type": "llama", **sizes}))
    drawn = torch.randn(4096 * 2816, generator=torch.Generator().manual_seed(0)).mul(0.02).bfloat16()
    index: dict[str, str] = {}
    held: tuple[dict[str, torch.Tensor], dict[str, torch.Tensor]] = ({}, {})
    names = list(tensors(width, layers))
    for place, (name, shape) in enumerate(names):
        count = shape[0] * shape[1]
        old = drawn.roll(place * 7919).repeat(-(-count // len(drawn)))[:count].reshape(shape)
        edited = place > 0 and place % 100 < 100 * changed
        rounded = (
            round_to_nearest(part, 4, per_channel=True, group_size=128, clamp_ratio=0.0) for part in old.split(1024)
        )
        held[0][name], held[1][name] = old, torch.cat(list(rounded)) if edited else old.clone()
        if sum(t.numel() * 2 for t in held[0].values()) >= SHARD or place == len(names) - 1:
            file = f"model-{len(set(index.values())) + 1:05}.safetensors"
            index |= dict.fromkeys(held[0], file)
            for folder, part in zip(folders, held, strict=True):
                save_file(part, folder / file, metadata={"format": "pt"})
                part.clear()
    for folder in folders:
        (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": index}))
    return folders


def forget(*folders: Path) -> None:
    """Drop the files from the system's cache."""
    os.sync()
    for file in (file for folder in folders for file in folder.glob("*.safetensors")):
        descriptor = os.open(file, os.O_RDONLY)
        os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
        os.close(descriptor)


def reading(*folders: Path) -> float:
    """Return the seconds that reading all files in order takes."""
    started, buffer = time.perf_counter(), bytearray(1 << 24)
    for file in (file for folder in folders for file in sorted(folder.glob("*.safetensors"))):
        with file.open("rb", buffering=0) as stream:
            while stream.readinto(buffer):
                pass
    return time.perf_counter() - started


CHILD = """
import re, sys, time
from pathlib import Path
import torch, transformers
from invarlock.flow.diff import diff

def peak():  # megabytes; unlike ru_maxrss it does not start from the parent's
    return int(re.search(r"VmHWM:\\s+(\\d+)", Path("/proc/self/status").read_text())[1]) / 1024

base, started, used = peak(), time.perf_counter(), time.process_time()
found = diff(sys.argv[1], sys.argv[2])
print(time.perf_counter() - started, time.process_time() - used, peak() - base, found.summary[0], sep="|")
"""


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.diff_cost", description=__doc__.splitlines()[0])
    parser.add_argument("--billions", type=float, default=0.125, help="parameters; 0.125 is a pair of 0.5 GB in all")
    parser.add_argument("--changed", type=float, default=1.0, help="share of the matrices that differ")
    parser.add_argument("--work", type=Path, default=Path("runs/diff_cost"))
    parser.add_argument("--warm", action="store_true", help="leave the files in the system's cache")
    arguments = parser.parse_args()
    folders = write_pair(arguments.work, arguments.billions, arguments.changed)
    try:
        size = sum(file.stat().st_size for folder in folders for file in folder.glob("*.safetensors"))
        drop = (lambda: None) if arguments.warm else lambda: forget(*folders)
        drop()
        read = reading(*folders)
        drop()
        told = subprocess.run(
            [sys.executable, "-c", CHILD, *map(str, folders)], capture_output=True, text=True, check=True
        )
        seconds, used, peak, summary = told.stdout.strip().split("|")
        print(f"pair of {size / 1e9:.2f} GB in all, {os.environ.get('OMP_NUM_THREADS', 'all')} threads: {summary}")
        ratio = f"{float(seconds) / read:.2f} x"
        print(f"reading {read:.1f} s; diff {float(seconds):.1f} s ({ratio}), of the processor {float(used):.1f} s")
        print(f"memory above the imports {float(peak) / 1024:.2f} GB, pages of mapped files among them")
    finally:
        shutil.rmtree(arguments.work)


if __name__ == "__main__":
    main()
