"""What others wrote is refused by name before it costs anything: what is no file, too large, too deep, too long a number."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from pathlib import Path

import datasets
import pytest

from invarlock.certificate.verify import verify_certificate
from invarlock.core import reading
from invarlock.core.exceptions import CertificateError, ConfigError, DataError, InvarlockError
from invarlock.core.files import plain, read_json
from invarlock.core.reading import LIMITS, parse_json
from invarlock.eval.data import get_provider
from invarlock.flow.run_folder import read_report
from invarlock.policy.config import load_config
from invarlock.policy.resolve import resolve_policy
from invarlock.reporting.bundle import read_certificate

FROZEN = Path(__file__).parents[1] / "assets/certificates/pass_8bit.json"


def _words(texts: list[str], **options: object) -> dict[str, list[list[int]]]:
    return {"input_ids": [[len(word) for word in text.split()] for text in texts]}


def _documents(path: Path) -> object:
    return get_provider("local_jsonl", file=str(path)).windows(_words, preview_n=1, final_n=1, seq_len=16)


READERS: dict[str, Callable[[Path], object]] = {
    "certificate": read_certificate,
    "report": read_report,
    "settings": load_config,
    "documents": _documents,
}


@pytest.fixture
def odd(tmp_path: Path) -> Callable[[str], Path]:
    """A path of a kind that is no regular file."""

    def make(kind: str) -> Path:
        path = tmp_path / "odd.json"
        if kind == "pipe":
            os.mkfifo(path)
        elif kind == "circle of links":
            path.symlink_to(path)
        elif kind == "device":
            path.symlink_to("/dev/zero")
        elif kind == "unreadable":  # a regular file, as its kind goes
            path.symlink_to("/proc/self/mem")
        elif kind == "long name":
            return tmp_path / ("x" * 5000)
        elif kind == "NUL":
            return tmp_path / "a\0b"
        elif kind == "not UTF-8":
            return tmp_path / "\udcff"
        return path

    return make


@pytest.mark.parametrize("kind", ["pipe", "circle of links", "device", "unreadable", "long name", "NUL", "not UTF-8"])
@pytest.mark.parametrize("reader", READERS)
def test_only_regular_files_are_read(odd: Callable[[str], Path], kind: str, reader: str) -> None:
    with pytest.raises(InvarlockError, match="pipe|device|opened|cannot be read|no such file|no data file|no report"):
        READERS[reader](odd(kind))


def test_a_pipe_that_a_preset_includes_is_not_waited_for(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "p.yaml").write_text("context: !include pipe\n")
    with pytest.raises(ConfigError, match=r"pipe.*p\.yaml:1"):
        load_config(tmp_path / "p.yaml")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("[" * 3000 + "]" * 3000, "nests deeper than 100"),
        ('{"a":' * 101 + "1" + "}" * 101, "nests deeper than 100"),
        ('{"a": ' + "9" * 10_000 + "}", "10,000 digits"),
        ('{"a": "\\ud800"}', "half a surrogate pair"),
        ('{"a": 1, "a": 2}', "'a' stands there twice"),
        ("[" + "0," * LIMITS["report"].values + "0]", "values or more"),
        ("{", "is not JSON"),
    ],
    ids=["lists", "mappings", "digits", "surrogate", "names", "values", "cut off"],
)
def test_json_is_held_to_depth_digits_and_values(tmp_path: Path, text: str, message: str) -> None:
    path = tmp_path / "report.json"
    path.write_text(text)
    with pytest.raises(ConfigError, match=message):
        read_json(path, "a report")


@pytest.mark.slow
@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("a: " + "[" * 3000 + "]" * 3000, "deeper"),
        ("a: " + "{b: " * 2000 + "}" * 2000, "deeper"),
        ("a: " + "9" * 10_000, "18 digits|not a value"),
        ("a: 0x" + "f" * 10_000, "18 digits"),
        ("# comment\n" * 30_000, "bytes or more"),
        ("a: \x00", "not valid YAML"),
        ("eval: {bootstrap: {replicates: 1000000000}}", "replicates"),
    ],
    ids=["lists", "mappings", "digits", "hexadecimal", "comments", "NUL", "replicates"],
)
def test_yaml_is_held_to_depth_digits_and_size(tmp_path: Path, text: str, message: str) -> None:
    path = tmp_path / "p.yaml"
    path.write_text(text)
    with pytest.raises(ConfigError, match=message):
        resolve_policy("balanced", "dev", overrides=load_config(path, require_model=False).policy_overrides())


@pytest.mark.slow
def test_included_files_count_together(tmp_path: Path) -> None:
    (tmp_path / "big.yaml").write_text("# comment\n" * 10_000)
    (tmp_path / "p.yaml").write_text("".join(f"k{number}: !include big.yaml\n" for number in range(4)))
    with pytest.raises(ConfigError, match="with what it includes"):
        load_config(tmp_path / "p.yaml")


@pytest.mark.parametrize("what", ["line", "lines", "file"])
def test_documents_are_read_line_by_line_within_limits(
    tmp_path: Path, what: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    small = {"line": LIMITS["line"]._replace(size=1000), "data": LIMITS["data"]._replace(values=50, size=100_000)}
    monkeypatch.setattr(reading, "LIMITS", {**LIMITS, **small})
    count, words = {"line": (1, 1000), "lines": (60, 10), "file": (40, 1400)}[what]
    if what == "file":
        monkeypatch.setitem(reading.LIMITS, "line", LIMITS["line"])
    path = tmp_path / "d.jsonl"
    path.write_text((json.dumps({"text": "a " * words}) + "\n") * count)
    with pytest.raises(DataError, match="INVARLOCK_READ_LIMITS"):
        _documents(path)
    monkeypatch.setenv("INVARLOCK_READ_LIMITS", "100")
    _documents(path) if what != "line" else path.read_text()


@pytest.mark.parametrize("source", ["txt", "rows of a library"])
def test_one_document_is_held_to_a_size_wherever_it_comes_from(
    tmp_path: Path, source: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(reading, "LIMITS", {**LIMITS, "line": LIMITS["line"]._replace(size=1000)})
    if source == "txt":  # many short lines, all of them one document
        (tmp_path / "d.txt").write_text("a b c\n" * 1000)
        provider = get_provider("local_jsonl", file=str(tmp_path / "d.txt"))
    else:
        rows = datasets.Dataset.from_dict({"text": ["short", "a " * 3000]})
        rows.save_to_disk(str(tmp_path / "d"))
        provider = get_provider("hf_text", dataset_name=str(tmp_path / "d"))
    with pytest.raises(DataError, match=r"the document .* INVARLOCK_READ_LIMITS"):
        provider.windows(_words, preview_n=1, final_n=1, seq_len=16)


@pytest.mark.slow
def test_limits_are_raised_by_a_variable(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    data = b"[" + b"0," * LIMITS["report"].values + b"0]"
    with pytest.raises(ConfigError, match="INVARLOCK_READ_LIMITS=4"):
        parse_json(data, "report", "x", "a report")
    monkeypatch.setenv("INVARLOCK_READ_LIMITS", "2")
    assert len(parse_json(data, "report", "x", "a report")) == LIMITS["report"].values + 1


@pytest.mark.parametrize("kind", ["replicates", "rows", "names"])
def test_a_certificate_that_would_take_minutes_is_refused(kind: str) -> None:
    certificate = json.loads(FROZEN.read_text(encoding="utf-8"))
    if kind == "replicates":
        certificate["resolved_policy"]["bootstrap"]["replicates"] = 10**9
    elif kind == "rows":
        rows = certificate["evaluation_windows"]["preview"]
        rows |= {name: values * 100 for name, values in rows.items() if isinstance(values, list)}
        certificate["resolved_policy"]["bootstrap"]["replicates"] = 100_000
    else:
        certificate["meta"] |= {f"k{number}": 0 for number in range(5000)}
    with pytest.raises(CertificateError, match=r"windows with|in 5,\d+ places|in 5000 places|in 5,000 places"):
        verify_certificate(certificate)


def test_half_a_surrogate_pair_in_a_name_can_be_written() -> None:
    assert plain({"id": "a\udcff"}) == {"id": "a\\udcff"}


def test_the_page_names_every_limit() -> None:
    page = (Path(__file__).parents[2] / "docs/reference/safety.md").read_text(encoding="utf-8")
    for limit in LIMITS.values():
        size = f"{limit.size // 1000} KB" if limit.size < 10**6 else f"{limit.size // 10**6} MB"
        assert not limit.size or f"| {size} |" in page
