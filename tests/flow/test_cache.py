"""The same certificate from a fresh measurement, from the cache and from a pack; and what can go wrong with a stored one."""

from __future__ import annotations

import contextlib
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from certification import FEW, SEQ_LEN, Certify, gates, reread
from invarlock.certificate.verify import verify_certificate
from invarlock.core.api import GuardWithPrepare
from invarlock.core.exceptions import ConfigError, ModelLoadError
from invarlock.evidence.pack import pack_bytes, read_pack, write_pack
from invarlock.flow import cache, certify, steps
from invarlock.flow.baseline import make_pack
from invarlock.flow.certify import CertifyRequest
from invarlock.flow.job import open_job
from invarlock.flow.run_folder import read_report
from invarlock.flow.sampling import cut_windows
from invarlock.policy.resolve import resolve_policy

#: what two certifications of the same thing may differ in: times and ids
_OWN = ("run_id", "created", "timings", "reused", "pack")


@pytest.fixture
def folder(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    monkeypatch.setenv("INVARLOCK_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


@pytest.fixture
def loaded(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Which models are loaded, in order."""
    seen: list[str] = []
    load = steps.load

    def watched(job: Any, side: Any, what: str, *others: Any) -> Any:
        seen.append(what)
        return load(job, side, what, *others)

    monkeypatch.setattr(steps, "load", watched)
    return seen


def without(value: Any, names: tuple[str, ...]) -> Any:
    if isinstance(value, dict):
        return {key: without(item, names) for key, item in value.items() if key not in names}
    return [without(item, names) for item in value] if isinstance(value, list) else value


def figures(outcome: Any, *others: str) -> dict[str, Any]:
    found: dict[str, Any] = without(outcome.certificate, (*_OWN, *others))
    return found


@pytest.mark.slow
def test_fresh_cached_and_packed_baselines_give_the_same_certificate(
    folder: Path, loaded: list[str], demo_model: Path, harmless: Path, certify_models: Certify, tmp_path: Path,
    text_file: Path,
) -> None:  # fmt: skip
    fresh = certify_models(harmless, demo_model, cache=False)
    assert not list(cache.entries())
    first, again = certify_models(harmless, demo_model), certify_models(harmless, demo_model)
    assert len(list(cache.entries())) == 1 and any("found in the cache" in note for note in again.notes)
    assert loaded == ["the baseline", "the subject"] * 2 + ["the subject"]
    data = {"provider": "local_jsonl", "file": str(text_file), "seq_len": SEQ_LEN}
    request = CertifyRequest(subject="", baseline=str(demo_model), profile="dev", dataset=data, overrides=FEW)
    made = make_pack(request, tmp_path / "demo.pack")
    gone = shutil.copytree(demo_model, tmp_path / "gone")  # the pack alone is left of it
    moved = make_pack(
        CertifyRequest(subject="", baseline=str(gone), profile="dev", dataset=data, overrides=FEW, cache=False),
        tmp_path / "gone.pack",
    )
    shutil.rmtree(gone)
    packed = certify_models(harmless, made.path)
    assert figures(fresh) == figures(first) == figures(again)
    apart = ("evidence_digests", "encoded")  # of a subject on reused windows; what needs the baseline's own tokenizer
    assert figures(packed, *apart) == figures(fresh, *apart)
    digests = [side.certificate["provenance"]["evidence_digests"]["baseline"] for side in (packed, fresh)]
    assert digests[0] == digests[1]
    assert certify_models(harmless, moved.path).status == "PASS"
    assert packed.certificate["baseline_ref"]["pack"] == made.address
    certificate, report = reread(packed.certificate), read_report(made.path)[0]
    assert verify_certificate(certificate, baseline=report).intact
    assert not verify_certificate(certificate, baseline=read_report(moved.path)[0]).intact


def _key(model: Path, data: dict[str, Any], **overrides: Any) -> str | None:
    policy = resolve_policy("balanced", "dev", overrides={**FEW, **overrides})
    job = open_job(policy, "auto", "cpu", steps.create_guards(policy.values["guards"]["order"], {}), None)
    side = steps.read(job, str(model))
    job.windows = cut_windows(job, side, {"provider": "local_jsonl", "seq_len": SEQ_LEN, **data})
    return cache.key_of(job, side)


@pytest.mark.slow
def test_another_file_text_policy_or_version_is_another_entry(
    demo_model: Path, tmp_path: Path, text_file: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    text = {"file": str(text_file)}
    there, beside, edited = (shutil.copytree(demo_model, tmp_path / name) for name in ("there", "beside", "edited"))
    (beside / "generation_config.json").write_text("{}", encoding="utf-8")
    with (edited / "model.safetensors").open("r+b") as file:
        file.seek(-1, os.SEEK_END)
        file.write(b"\x01")
    key = _key(demo_model, text)
    assert key is not None
    assert _key(there, text) == key  # the same files elsewhere
    others = [_key(beside, text), _key(edited, text), _key(demo_model, {**text, "seq_len": 40})]
    others += [_key(demo_model, {**text, "seed": 7}), _key(demo_model, text, metrics={"divergence": {"mode": "off"}})]
    others += [_key(demo_model, text, guards={"rmt": {"epsilon": {"ffn": 0.3}}})]
    monkeypatch.setattr(cache, "library_versions", lambda: {"torch": "9.0"})
    others += [_key(demo_model, text)]
    assert len({key, *others}) == 1 + len(others)


@pytest.mark.slow
@pytest.mark.parametrize("damage", ["cut", "flip", "other key"])
def test_a_damaged_entry_is_measured_again(
    damage: str, folder: Path, loaded: list[str], demo_model: Path, certify_models: Certify
) -> None:
    fresh = certify_models(demo_model, demo_model)
    (path,) = folder.glob("*.pack")
    data = bytearray(path.read_bytes())
    if damage == "flip":
        data[len(data) // 2] ^= 1
    if damage == "other key":
        pack = read_pack(path)
        data = bytearray(pack_bytes({**pack.about, "key": "0" * 64}, pack.members)[0])
    path.write_bytes(data[: len(data) // 2] if damage == "cut" else data)
    again = certify_models(demo_model, demo_model)
    assert loaded.count("the baseline") == 2
    assert figures(again) == figures(fresh)
    read_pack(path)  # whole again


class _Sees(GuardWithPrepare):
    name = "sees"

    def prepare(self, model: Any, adapter: Any, calib: Any, policy: Any) -> dict[str, Any]:
        return {"ready": True}

    def validate(self, model: Any, adapter: Any, context: Any) -> dict[str, Any]:
        return {"passed": True, "action": "none", "message": "", "metrics": {}, "warnings": [], "errors": []}


@pytest.mark.slow
def test_a_guard_that_has_to_see_the_baseline_is_not_evaluated_with_a_pack_alone(
    demo_model: Path, certify_models: Certify, tmp_path: Path, text_file: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = shutil.copytree(demo_model, tmp_path / "base")
    data = {"provider": "local_jsonl", "file": str(text_file), "seq_len": SEQ_LEN}
    made = make_pack(
        CertifyRequest(subject="", baseline=str(folder), profile="dev", dataset=data, overrides=FEW),
        tmp_path / "p.pack",
    )
    shutil.rmtree(folder)
    create = steps.create_guards
    monkeypatch.setattr(certify.steps, "create_guards", lambda names, arguments: [*create(names, arguments), _Sees()])
    outcome = certify_models(demo_model, made.path)
    assert gates(outcome.certificate)["plugin:sees"] == "not_evaluated"
    assert outcome.status == "INCONCLUSIVE"


def test_a_pack_is_not_written_over(demo_model: Path, tmp_path: Path) -> None:
    (tmp_path / "there").write_text("mine", encoding="utf-8")
    with pytest.raises(ConfigError, match="is there already"):
        make_pack(CertifyRequest(subject="", baseline=str(demo_model)), tmp_path / "there")


@pytest.mark.slow
def test_a_file_that_is_no_whole_pack_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "a.pack"
    address = write_pack(path, {"model": "m"}, {"report.json": b"{}", "evidence.safetensors": b"\0" * 5000})
    whole = path.read_bytes()
    assert read_pack(path).address == address
    for place in random.Random(1).sample(range(len(whole)), 60):
        path.write_bytes(whole[:place] + bytes([whole[place] ^ 0x55]) + whole[place + 1 :])
        with contextlib.suppress(ModelLoadError):
            assert read_pack(path).address == address  # a date, or another byte that says nothing
        path.write_bytes(whole[:place])
        with pytest.raises(ModelLoadError):
            read_pack(path)


_WRITER = """
import sys, os
from pathlib import Path
from invarlock.evidence.pack import write_pack
while True:
    write_pack(Path(sys.argv[1]), {"key": "k"}, {"evidence.json": b"[1]" * 200_000}, compress=False)
    print("w", flush=True)
"""


@pytest.mark.slow
def test_two_writers_that_are_killed_at_any_moment_leave_a_whole_entry_or_none(tmp_path: Path) -> None:
    path, draw = tmp_path / "cache" / "k.pack", random.Random(2)
    command = [sys.executable, "-c", _WRITER, str(path)]
    for _ in range(3):
        writers = [subprocess.Popen(command, stdout=subprocess.PIPE, env={**os.environ}) for _ in range(2)]
        for writer in writers:
            assert writer.stdout is not None
            writer.stdout.readline()
        end = time.monotonic() + draw.random()
        while time.monotonic() < end:
            assert read_pack(path).about == {"key": "k"}
        for writer in writers:
            writer.send_signal(signal.SIGKILL)
            writer.communicate()
        assert read_pack(path).members["evidence.json"][:3] == b"[1]"


@pytest.fixture
def command(folder: Path) -> Iterator[Callable[..., str]]:
    def run(*arguments: str) -> str:
        done = subprocess.run(
            [sys.executable, "-m", "invarlock", *arguments], capture_output=True, text=True, check=True
        )
        return done.stdout

    yield run


@pytest.mark.slow
def test_the_cache_is_listed_and_cleared(folder: Path, command: Callable[..., str]) -> None:
    assert json.loads(command("cache", "list", "--json"))["entries"] == []
    write_pack(folder / f"{'a' * 64}.pack", {"key": "a" * 64, "model": "m", "text": "t"}, {"evidence.json": b"{}"})
    (folder / f"{'b' * 64}.pack").write_bytes(b"PK\x03\x04nonsense")
    (folder / "notes.txt").write_text("mine", encoding="utf-8")
    listed = command("cache", "list")
    assert "2 entries" in listed and "m on t" in listed and "damaged" in listed
    assert json.loads(command("cache", "clear", "--json"))["removed"] == 2
    assert [path.name for path in folder.iterdir()] == ["notes.txt"]
