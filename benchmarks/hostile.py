"""What hostile input costs: each alone in a process of the installed command.

    python -m benchmarks.hostile [--store]

prints for each the exit code, seconds from start to end, seconds of processor time, the peak of memory, and the first words
of the answer. The goal is 5 seconds and 1 GB each. `--store` writes benchmarks/results/hostile.txt.
"""

from __future__ import annotations

import argparse
import gzip
import json
import os
import shutil
import struct
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping
from multiprocessing import get_context
from pathlib import Path
from typing import Any, NamedTuple

ROOT = Path(__file__).parents[1]
MODEL = ROOT / "src/invarlock/data/demo_model"
CERTIFICATE = ROOT / "tests/assets/certificates/pass_8bit.json"
Make = Callable[[Path], list[str]]

INPUTS: dict[str, Make] = {}


class Cost(NamedTuple):
    """What one process took: memory in bytes, the rest in seconds; `said` is its last line."""

    code: int
    wall: float
    processor: float
    peak: int
    said: str


def hostile(name: str) -> Callable[[Make], Make]:
    def keep(make: Make) -> Make:
        INPUTS[name] = make
        return make

    return keep


def _made(name: str, folder: Path) -> list[str]:
    return INPUTS[name](folder)


def _certificate(folder: Path, text: str | bytes) -> list[str]:
    path = folder / "evaluation.cert.json"
    path.write_bytes(text.encode() if isinstance(text, str) else text)
    return ["verify", str(path)]


@hostile("verify: 120 MB of numbers")
def _(folder: Path) -> list[str]:
    return _certificate(folder, '{"schema_version": "v1", "x": [' + "0.25," * 24_000_000 + "0]}")


@hostile("verify: rows a hundredfold, 100,000 replicates")
def _(folder: Path) -> list[str]:
    found = json.loads(CERTIFICATE.read_text(encoding="utf-8"))
    rows = found["evaluation_windows"]["preview"]
    rows |= {name: values * 100 for name, values in rows.items() if isinstance(values, list)}
    found["resolved_policy"]["bootstrap"]["replicates"] = 100_000
    return _certificate(folder, json.dumps(found))


@hostile("verify: a million extra keys")
def _(folder: Path) -> list[str]:
    found = json.loads(CERTIFICATE.read_text(encoding="utf-8"))
    return _certificate(folder, json.dumps({**found, **{f"k{number}": 0 for number in range(1_000_000)}}))


@hostile("verify: nested 2,000 deep")
def _(folder: Path) -> list[str]:
    return _certificate(folder, '{"a":' * 2000 + "1" + "}" * 2000)


@hostile("verify: a number of 10,000 digits")
def _(folder: Path) -> list[str]:
    return _certificate(folder, '{"schema_version": "v1", "x": ' + "9" * 10_000 + "}")


@hostile("verify: /dev/zero")
def _(folder: Path) -> list[str]:
    return ["verify", "/dev/zero"]


def _subject(folder: Path, name: str | None = None, content: str | bytes | None = None) -> list[str]:
    """Certify a copy of a model in which the file `name` is replaced, by a pipe where there is no content."""
    subject = folder / "subject"
    shutil.copytree(MODEL, subject)
    if name is not None:
        (subject / name).unlink(missing_ok=True)
        if content is None:
            os.mkfifo(subject / name)
        else:
            (subject / name).write_bytes(content.encode() if isinstance(content, str) else content)
    return ["certify", "--baseline", str(MODEL), "--subject", str(subject), "--out", str(folder / "runs"),
            "--cert-out", str(folder / "cert")]  # fmt: skip


def _tensors(folder: Path, entries: Mapping[str, Any], size: int) -> list[str]:
    header = json.dumps(entries).encode()
    return _subject(folder, "model.safetensors", struct.pack("<Q", len(header)) + header + bytes(size))


def _many(folder: Path, count: int) -> list[str]:
    ends = ((n, [4 * n, 4 * n + 4]) for n in range(count))
    return _tensors(folder, {f"t{n}": {"dtype": "F32", "shape": [1], "data_offsets": e} for n, e in ends}, 4 * count)


def _config(folder: Path, **values: Any) -> list[str]:
    return _subject(folder, "config.json", json.dumps(json.loads((MODEL / "config.json").read_text()) | values))


@hostile("certify: a header of a million tensors")
def _(folder: Path) -> list[str]:
    return _many(folder, 1_000_000)


@hostile("certify: a header of 100,000 tensors")
def _(folder: Path) -> list[str]:
    return _many(folder, 100_000)


@hostile("certify: tensors that overlap")
def _(folder: Path) -> list[str]:
    entry = {"dtype": "F32", "shape": [2], "data_offsets": [0, 8]}
    return _tensors(folder, {"a": entry, "b": entry}, 8)


@hostile("certify: n_layer 10,000,000")
def _(folder: Path) -> list[str]:
    return _config(folder, n_layer=10**7)


@hostile("certify: n_layer 9,000")
def _(folder: Path) -> list[str]:
    return _config(folder, n_layer=9000)


@hostile("certify: n_embd 10^12")
def _(folder: Path) -> list[str]:
    return _config(folder, n_embd=10**12)


@hostile("certify: vocab_size 90,000,000")
def _(folder: Path) -> list[str]:
    return _config(folder, vocab_size=90_000_000)


@hostile("certify: vocab_size -1")
def _(folder: Path) -> list[str]:
    return _config(folder, vocab_size=-1)


@hostile("certify: a million labels")
def _(folder: Path) -> list[str]:
    return _config(folder, id2label={str(number): "x" for number in range(1_000_000)})


@hostile("certify: num_labels 10^9")
def _(folder: Path) -> list[str]:
    return _config(folder, num_labels=10**9)


@hostile("certify: a configuration nested 2,000 deep")
def _(folder: Path) -> list[str]:
    return _subject(folder, "config.json", '{"a":' * 2000 + "1" + "}" * 2000)


@hostile("certify: a configuration that is a pipe")
def _(folder: Path) -> list[str]:
    return _subject(folder, "config.json", None)


@hostile("certify: a tokenizer of 400 MB")
def _(folder: Path) -> list[str]:
    return _subject(folder, "tokenizer.json", b'{"a": "' + b"x" * 400_000_000 + b'"}')


@hostile("certify: a GGUF header of 2^60 tensors")
def _(folder: Path) -> list[str]:
    arguments = _subject(folder, "m.gguf", b"GGUF" + struct.pack("<IQQ", 3, 2**60, 0) + bytes(64))
    (folder / "subject" / "model.safetensors").unlink()
    return arguments


@hostile("certify: a symbolic link to itself")
def _(folder: Path) -> list[str]:
    (folder / "loop").symlink_to("loop")
    return ["certify", "--baseline", str(MODEL), "--subject", str(folder / "loop")]


def _preset(folder: Path, text: str) -> list[str]:
    (folder / "preset.yaml").write_text(text)
    return [*_subject(folder), "--preset", str(folder / "preset.yaml")]


def _data(folder: Path, path: Path) -> list[str]:
    return _preset(folder, f"dataset: {{provider: {{kind: local_jsonl, file: {path}}}, seq_len: 64}}\n")


@hostile("certify: data from /dev/zero")
def _(folder: Path) -> list[str]:
    return _data(folder, Path("/dev/zero"))


@hostile("certify: one line of 150 MB")
def _(folder: Path) -> list[str]:
    with (folder / "d.jsonl").open("w") as file:
        file.write('{"text": "' + "a " * 75_000_000 + '"}\n')
    return _data(folder, folder / "d.jsonl")


@hostile("certify: lines nested 2,000 deep")
def _(folder: Path) -> list[str]:
    (folder / "d.jsonl").write_text(('{"text":' * 2000 + '"a"' + "}" * 2000 + "\n") * 100)
    return _data(folder, folder / "d.jsonl")


@hostile("certify: data that unpacks to 1 GB")
def _(folder: Path) -> list[str]:
    with gzip.open(folder / "d.jsonl.gz", "wb", compresslevel=1) as file:
        for _ in range(64):
            file.write(bytes(1 << 24))
    return _data(folder, folder / "d.jsonl.gz")


@hostile("certify: a preset of 10 MB")
def _(folder: Path) -> list[str]:
    return _preset(folder, "".join(f"k{number}: [1, 2, 3]\n" for number in range(500_000)))


@hostile("certify: a preset of 100 MB of comments")
def _(folder: Path) -> list[str]:
    return _preset(folder, "# nothing\n" * 10_000_000)


@hostile("certify: a preset of aliases of aliases")
def _(folder: Path) -> list[str]:
    lines = ["a0: &a0 [x, x, x, x, x, x, x, x, x, x]"]
    lines += [f"a{n}: &a{n} [{', '.join([f'*a{n - 1}'] * 10)}]" for n in range(1, 12)]
    return _preset(folder, "\n".join(lines) + "\n")


@hostile("certify: a preset that includes a pipe")
def _(folder: Path) -> list[str]:
    os.mkfifo(folder / "pipe.yaml")
    return _preset(folder, "dataset: !include pipe.yaml\n")


@hostile("certify: a preset nested 2,000 deep")
def _(folder: Path) -> list[str]:
    return _preset(folder, "a: " + "[" * 2000 + "]" * 2000 + "\n")


def cost(arguments: list[str], folder: Path) -> Cost:
    """Run the command and measure its process."""
    out = folder / "said.txt"
    environment = {**os.environ, "COLUMNS": "200", "NO_COLOR": "1", "INVARLOCK_CACHE": "off"}
    started = time.perf_counter()
    with out.open("wb") as said:
        process = subprocess.Popen([sys.executable, "-m", "invarlock", *arguments], stdin=subprocess.DEVNULL, stdout=said,
                                   stderr=said, env=environment, cwd=folder)  # fmt: skip
        _, status, used = os.wait4(process.pid, 0)
    wall = time.perf_counter() - started
    lines = [line for line in out.read_text(errors="replace").splitlines() if line.startswith(("ERROR", "Traceback"))]
    last = lines[-1] if lines else out.read_text(errors="replace").strip().splitlines()[-1]
    return Cost(
        os.waitstatus_to_exitcode(status), wall, used.ru_utime + used.ru_stime, used.ru_maxrss * 1024, last[:70]
    )


def table() -> Iterator[str]:
    yield f"{'input':<48}{'exit':>5}{'seconds':>9}{'processor':>11}{'MB':>7}  answer"
    costs: list[Cost] = []
    for name in INPUTS:
        with tempfile.TemporaryDirectory(prefix="hostile-") as scratch:
            folder = Path(scratch)
            with get_context("fork").Pool(1) as child:  # a process begins at the size of its parent, which stays small
                arguments = child.apply(_made, (name, folder))
            found = cost(arguments, folder)
        said = found.said.replace(scratch, "…")
        yield f"{name:<48}{found.code:>5}{found.wall:>9.1f}{found.processor:>11.1f}{found.peak / 1e6:>7.0f}  {said}"
        costs.append(found)
    wall, processor, peak = (max(getattr(one, name) for one in costs) for name in ("wall", "processor", "peak"))
    yield (
        f"{len(INPUTS)} inputs; at most {wall:.1f} s, {processor:.1f} s of processor time and "
        f"{peak / 1e6:.0f} MB; goal 5 s and 1,000 MB"
    )


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.hostile", description=__doc__.splitlines()[0])
    parser.add_argument("--store", action="store_true", help="write benchmarks/results/hostile.txt")
    arguments, lines = parser.parse_args(), []
    for line in table():
        print(line, flush=True)
        lines.append(line)
    if arguments.store:
        (ROOT / "benchmarks/results/hostile.txt").write_text("\n".join(lines) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
