"""Hostile input of ten kinds, seeded: each is read or refused by one of our errors, whatever stands in it.

    python -m benchmarks.fuzz [COUNT] [SEED]

prints for each kind how many were tried, accepted, refused, and ended in an error that is not ours (none may), and the
longest that one took. tests/core/test_fuzz.py runs a short slice.
"""

from __future__ import annotations

import copy
import functools
import json
import os
import random
import struct
import sys
import tempfile
import time
import traceback
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

from invarlock.assurance import render_certificate_html, render_certificate_markdown, verify_certificate
from invarlock.checkpoints.files import open_checkpoint, resolve_folder
from invarlock.checkpoints.side import Loading, read_side
from invarlock.core import registry, settings
from invarlock.core.exceptions import InvarlockError
from invarlock.core.network import enforce_network_policy
from invarlock.eval.data import get_provider
from invarlock.flow.doctor import Request, examine
from invarlock.flow.run_folder import read_report
from invarlock.policy.config import load_config
from invarlock.policy.resolve import resolve_policy
from invarlock.policy.yaml_source import read_yaml
from invarlock.reporting.bundle import read_certificate

ROOT = Path(__file__).parents[1]
sys.path.append(str(ROOT / "tests"))
from gguf_files import write_gguf  # noqa: E402 - what writes the test models as GGUF

CERTIFICATES = ROOT / "tests/assets/certificates"
MODEL = ROOT / "src/invarlock/data/demo_model"
LLAMA = ROOT / "tests/assets/models/llama"
#: kinds that take longer, and how many times fewer of them are tried: those that render, and those that build a model
FEWER = {
    "paths": 4,
    "certificates": 4,
    "reports": 4,
    "configurations": 20,
    "tokenizers": 20,
    "ggufs": 20,
    "variables": 20,
}
#: what stands in place of a value
VALUES: tuple[Any, ...] = (
    None, True, False, -1, 0, 1, 2**31, 10**12, 10**18, 10**30, -(10**30), 0.5, -0.0, 1e308, float("inf"), float("nan"),
    "", " ", "x" * 5000, "\ud800", "\x00", "\u202e", "../../etc/passwd", "/dev/zero", "{{7*7}}", "<script>", "1e999",
    [], {}, [[]], [None], [1], {"": None}, {"x": {"y": []}}, ["a"] * 300, [1e308, -1e308],
)  # fmt: skip
SPLICES = (b"\x00", b"\xff", b"\xed\xa0\x80", b"\xef\xbb\xbf", b"{", b"[", b"]" * 50, b"[" * 3000, b'{"a":' * 2000, b'"',
           b"\\ud800", b"9" * 10_000, b"1e999", b"-", b"NaN", b"\n", b"!include x", b"&a *a", b"<<: *b", b"? ", b": ", b"\t",
           b"%", b"#")  # fmt: skip
PATHS = ("", ".", "..", "/", "~", "~nobody/x", "a\x00b", "x" * 5000, "x/" * 2000, "\udcff", "/dev/null", "/dev/zero",
         "/dev/stdin/x", "/proc/self/mem", "/proc/self/environ", "%s", "*", "[", "**/*", "org/name", "a/b/c", "-", "--help",
         "file:///x", "http://example.org/x", "\u202ex", " ", "\n", "con", "$HOME", "loop", "fifo", "folder",
         "empty", "noperm", "loop/x", "empty/x")  # fmt: skip


class Outcome(NamedTuple):
    """What became of the inputs of one kind; `untyped` are the tracebacks of errors that are not ours."""

    counts: Counter[str]
    slowest: float
    untyped: list[str]


def mutated_bytes(data: bytes, chance: random.Random) -> bytes:
    """Return `data` with one to four changes: a byte set, a part cut out or doubled, something spliced in, an end cut off."""
    found = bytearray(data)
    for _ in range(chance.randint(1, 4)):
        at = chance.randrange(len(found) + 1)
        end = min(len(found), at + chance.randint(1, 40))
        change = chance.randrange(5)
        if change == 0 and at < len(found):
            found[at] = chance.randrange(256)
        elif change == 1:
            del found[at:end]
        elif change == 2:
            found[at:at] = found[at:end] * chance.randint(1, 3)
        elif change == 3:
            found[at:at] = chance.choice(SPLICES)
        elif chance.random() < 0.3:
            del found[at:]
    return bytes(found)


def mutated_data(data: Any, chance: random.Random) -> Any:
    """Return JSON data with one to three places changed: another value, a key gone, doubled or new, a list cut or longer."""
    data = json.loads(json.dumps(data))
    for _ in range(chance.randint(1, 3)):
        place = data
        while isinstance(place, (dict, list)) and place:
            key = chance.choice(list(place) if isinstance(place, dict) else range(len(place)))
            if isinstance(place[key], (dict, list)) and place[key] and chance.random() < 0.85:
                place = place[key]
                continue
            change = chance.randrange(4)
            if change == 0:
                del place[key]
            elif change == 1 and isinstance(place, dict):
                place[chance.choice(["", "x", "mode", "\ud800", key + "x"])] = copy.deepcopy(chance.choice(VALUES))
            elif change == 1:
                place += place[: chance.randint(1, 3)]
            else:
                place[key] = copy.deepcopy(chance.choice(VALUES))
            break
    return data


def _either(data: Any, chance: random.Random) -> bytes:
    if chance.random() < 0.6:
        return json.dumps(mutated_data(data, chance)).encode()
    return mutated_bytes(json.dumps(data).encode(), chance)


def paths(folder: Path, chance: random.Random) -> Callable[[], object]:
    """A path that is no file, given to whatever takes one."""
    _odd_places(folder)
    name = chance.choice(PATHS)
    path = Path(name) if name.startswith(("/", "~")) or chance.random() < 0.3 else folder / name
    readers: tuple[Callable[[], object], ...] = (
        lambda: read_certificate(path),
        lambda: read_report(path),
        lambda: read_yaml(path),
        lambda: open_checkpoint(resolve_folder(str(path))).structure(),
        lambda: get_provider("local_jsonl", file=str(path)).windows(_words, preview_n=1, final_n=1, seq_len=8),
        lambda: get_provider("hf_text", dataset_name=str(path)).windows(_words, preview_n=1, final_n=1, seq_len=8),
        lambda: examine(Request(config=path, baseline_report=path)),
    )
    return chance.choice(readers)


def _odd_places(folder: Path) -> None:
    if not (folder / "fifo").exists():
        os.mkfifo(folder / "fifo")
        (folder / "loop").symlink_to("loop")
        (folder / "folder").mkdir()
        (folder / "empty").touch()
        (folder / "noperm").touch(mode=0)


def presets(folder: Path, chance: random.Random) -> Callable[[], object]:
    """A configuration of which something is changed, resolved as a command resolves it."""
    data = {
        "model": {"id": "m", "device": "cpu", "options": {"a": 1}},
        "dataset": {
            "provider": {"kind": "local_jsonl", "file": "x.jsonl"},
            "seq_len": 64,
            "preview_n": 4,
            "final_n": 4,
        },
        "edit": {"name": "quant_rtn", "plan": {"bitwidth": 8}},
        "guards": {"order": ["invariants", "spectral", "rmt"], "spectral": {"deadband": 0.1, "max_caps": 3}},
        "auto": {"tier": "balanced", "probes": 1},
        "eval": {"max_pm_ratio": 1.5, "bootstrap": {"replicates": 50, "seed": 1}, "metric": {"kind": "auto"}},
        "metrics": {"pm_ratio": {"limit": 1.1}, "divergence": {"kl_max": 0.1}},
        "context": {"snapshot": {"mode": "auto"}},
    }
    path = folder / "preset.yaml"
    path.write_bytes(_either(data, chance))

    def read() -> None:
        found = load_config(path, require_model=False)
        resolve_policy(found.auto.tier, "dev", overrides=found.policy_overrides())

    return read


def documents(folder: Path, chance: random.Random) -> Callable[[], object]:
    """A file of documents of which something is changed, cut into windows."""
    lines = [{"text": f"document {number}: " + "one two three four five six seven eight " * 3} for number in range(12)]
    path = folder / "data.jsonl"
    path.write_bytes(
        b"\n".join(_either(line, chance) if chance.random() < 0.3 else json.dumps(line).encode() for line in lines)
    )
    return lambda: get_provider("local_jsonl", file=str(path)).windows(_words, preview_n=3, final_n=3, seq_len=16)


def _words(texts: list[str], **options: Any) -> dict[str, list[list[int]]]:
    for text in texts:
        text.encode("utf-8")  # as the tokenizers library must
    return {"input_ids": [[len(word) for word in text.split()] for text in texts]}


def certificates(folder: Path, chance: random.Random) -> Callable[[], object]:
    """A certificate of which something is changed, verified and, where it is one, shown."""
    data = json.loads(chance.choice(sorted(CERTIFICATES.glob("*.json"))).read_text(encoding="utf-8"))
    path = folder / "evaluation.cert.json"
    path.write_bytes(_either(data, chance))

    def read() -> None:
        certificate = read_certificate(path)
        verify_certificate(certificate)
        render_certificate_markdown(certificate)
        render_certificate_html(certificate)

    return read


def headers(folder: Path, chance: random.Random) -> Callable[[], object]:
    """A safetensors file whose header or length is changed, read as a checkpoint."""
    entries = {
        f"w{number}": {"dtype": "F32", "shape": [2, 4], "data_offsets": [32 * number, 32 * number + 32]}
        for number in range(4)
    }
    header = _either(entries, chance)
    size = len(header) if chance.random() < 0.9 else chance.choice([0, 1, 2**31, 2**63, 2**64 - 1, len(header) + 9])
    (folder / "model.safetensors").write_bytes(struct.pack("<Q", size) + header + bytes(128))
    return lambda: open_checkpoint(folder).structure()


def configurations(folder: Path, chance: random.Random) -> Callable[[], object]:
    """A checkpoint whose config.json is changed, read as `certify` reads it."""
    for name in ("model.safetensors", "tokenizer.json", "tokenizer_config.json"):
        if not (folder / name).exists():
            (folder / name).symlink_to(MODEL / name)
    (folder / "config.json").write_bytes(_either(json.loads((MODEL / "config.json").read_text()), chance))
    return lambda: read_side(registry.adapters.create("auto"), str(folder), Loading())


def tokenizers(folder: Path, chance: random.Random) -> Callable[[], object]:
    """A checkpoint whose tokenizer's files are changed, looked at as the doctor does and used."""
    changed = chance.choice(("tokenizer.json", "tokenizer_config.json"))
    for path in MODEL.iterdir():
        if path.name != changed:
            (folder / path.name).symlink_to(path)
    (folder / changed).write_bytes(_either(json.loads((MODEL / changed).read_text(encoding="utf-8")), chance))
    return lambda: read_side(registry.adapters.create("auto"), str(folder), Loading(), tensors=False)


def ggufs(folder: Path, chance: random.Random) -> Callable[[], object]:
    """A GGUF file of which something is changed, most often in its header, read as a checkpoint."""
    data = _gguf()
    head = len(data) if chance.random() < 0.1 else chance.choice((64, 1024, 100_000))
    path = folder / "model.gguf"
    path.write_bytes(mutated_bytes(data[:head], chance) + data[head:])
    return lambda: open_checkpoint(resolve_folder(str(path))).structure()


@functools.cache
def _gguf() -> bytes:
    with tempfile.TemporaryDirectory() as folder:
        return write_gguf(LLAMA, Path(folder) / "model.gguf").read_bytes()


def variables(folder: Path, chance: random.Random) -> Callable[[], object]:
    """Environment variables with nonsense in them, looked at by the doctor and read where they are used."""
    names = [setting.name for setting in settings.SETTINGS]
    texts = [
        str(value).replace("\x00", "").replace("\ud800", "") for value in (*VALUES, *PATHS[:4], "auto", "1,2", "0x10")
    ]
    chosen = {chance.choice(names): chance.choice(texts) for _ in range(3)}

    def read() -> None:
        before = dict(os.environ)
        os.environ.update(chosen)
        try:
            examine(Request(tier="balanced", profile="ci"))
            for name in names:
                settings.get(name)
        finally:
            os.environ.clear()
            os.environ.update(before)

    return read


def reports(folder: Path, chance: random.Random) -> Callable[[], object]:
    """The report of a stored baseline of which something is changed, held against its certificate."""
    data = json.loads((CERTIFICATES / "pass_8bit.baseline.report.json").read_text(encoding="utf-8"))
    certificate = json.loads((CERTIFICATES / "pass_8bit.json").read_text(encoding="utf-8"))
    (folder / "report.json").write_bytes(_either(data, chance))
    return lambda: verify_certificate(certificate, baseline=read_report(folder)[0])


KINDS: dict[str, Callable[[Path, random.Random], Callable[[], object]]] = {
    found.__name__: found for found in (paths, presets, documents, certificates, headers, configurations, tokenizers, ggufs,
                                   variables, reports)
}  # fmt: skip


def fuzz(kind: str, count: int, seed: int) -> Outcome:
    """Try `count` inputs of a kind."""
    counts, untyped, slowest = Counter[str](), [], 0.0
    for number in range(count):
        chance = random.Random(f"{kind} {seed} {number}")
        with tempfile.TemporaryDirectory(prefix="fuzz-", ignore_cleanup_errors=True) as folder:
            call = KINDS[kind](Path(folder), chance)
            started = time.perf_counter()
            try:
                call()
                counts["accepted"] += 1
            except InvarlockError:
                counts["refused"] += 1
            except Exception:  # noqa: BLE001 - what is counted here
                counts["untyped"] += 1
                untyped.append(f"{kind} {seed} {number}\n{traceback.format_exc(limit=-6)}")
            slowest = max(slowest, time.perf_counter() - started)
    return Outcome(counts, slowest, untyped)


def table(count: int, seed: int) -> Iterator[str]:
    """Yield a line for each kind, then the tracebacks of what is not ours."""
    yield f"{'kind':<16}{'tried':>7}{'accepted':>10}{'refused':>9}{'untyped':>9}{'slowest':>10}"
    wrong = []
    for kind in KINDS:
        tried = max(1, count // FEWER.get(kind, 1))
        outcome = fuzz(kind, tried, seed)
        shown = "".join(
            f"{outcome.counts[name]:>{width}}" for name, width in (("accepted", 10), ("refused", 9), ("untyped", 9))
        )
        yield f"{kind:<16}{tried:>7}{shown}{outcome.slowest:>8.2f} s"
        wrong += outcome.untyped
    yield from wrong


if __name__ == "__main__":
    enforce_network_policy()
    given = [int(text) for text in sys.argv[1:]]
    for line in table(*given, *(1000, 1)[len(given) :]):
        print(line, flush=True)
