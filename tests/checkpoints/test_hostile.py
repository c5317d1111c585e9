"""Checkpoints that nobody made in good faith are refused by name before a model is built from them."""

from __future__ import annotations

import json
import os
import shutil
import struct
from pathlib import Path
from typing import Any

import pytest

from invarlock.checkpoints.files import read_structure, resolve_folder
from invarlock.checkpoints.gguf_header import read_header as read_gguf_header
from invarlock.checkpoints.side import Loading, read_side
from invarlock.core import registry
from invarlock.core.exceptions import DataError, InvarlockError, ModelLoadError
from invarlock.flow import certify as certify_flow


def _linked(source: Path, folder: Path, without: str) -> Path:
    for file in source.iterdir():
        if file.name != without:
            (folder / file.name).symlink_to(file)
    return folder


def _read(folder: Path) -> None:
    read_side(registry.adapters.create("auto"), str(folder), Loading())


@pytest.mark.slow
@pytest.mark.parametrize(
    ("change", "named"),
    [
        ({"n_layer": 10**7}, "n_layer is 10000000"),
        ({"n_layer": 5000}, "names 5,000 layers, and the files hold"),
        ({"n_layer": -1}, "n_layer is -1"),
        ({"n_embd": 10**12}, "n_embd is 1000000000000"),
        ({"n_embd": -1}, "n_embd is -1"),
        ({"n_head": 0}, "config.json of a gpt2 describes"),
        ({"n_head": 7}, "config.json of a gpt2 describes"),
        ({"vocab_size": -1}, "vocab_size is -1"),
        ({"vocab_size": "many"}, "vocab_size is 'many'"),
        ({"n_positions": 10**12}, "n_positions"),
        ({"num_labels": 10**8}, "num_labels"),
        ({"id2label": dict.fromkeys(map(str, range(100_001)), "x")}, "id2label has 100,001 entries"),
        ({"architectures": [1]}, "architectures is .1."),
        ({"architectures": "GPT2LMHeadModel"}, "architectures is"),
        ({"model_type": ["gpt2"]}, "model_type is"),
        ({"text_config": {"num_hidden_layers": 10**7}}, "num_hidden_layers"),
        ({"activation_function": "nothing"}, "config.json of a gpt2 describes"),
    ],
)
def test_a_configuration_that_no_model_has_is_refused_with_the_key(
    tmp_path: Path, demo_model: Path, change: dict[str, Any], named: str
) -> None:
    folder = _linked(demo_model, tmp_path, "config.json")
    config = json.loads((demo_model / "config.json").read_text(encoding="utf-8"))
    (folder / "config.json").write_text(json.dumps(config | change))
    with pytest.raises(InvarlockError, match=named):
        _read(folder)


@pytest.mark.parametrize("text", ["[" * 3000, '{"a": ' + "9" * 9999 + "}", "[]", "", '{"n_layer": 2', '"\\ud800"'])
def test_a_configuration_that_is_none_is_refused(tmp_path: Path, demo_model: Path, text: str) -> None:
    folder = _linked(demo_model, tmp_path, "config.json")
    (folder / "config.json").write_text(text)
    with pytest.raises(ModelLoadError, match=r"config\.json"):
        _read(folder)


@pytest.mark.parametrize("name", ["tokenizer.json", "generation_config.json", "config.json"])
def test_a_pipe_among_the_files_is_refused(tmp_path: Path, demo_model: Path, name: str) -> None:
    folder = _linked(demo_model, tmp_path, name)
    os.mkfifo(folder / name)
    with pytest.raises(ModelLoadError, match="a pipe"):
        _read(folder)


_POINTER = b"version https://git-lfs.github.com/spec/v1\noid sha256:4d7a\nsize 123456\n"


@pytest.mark.parametrize("name", ["model.safetensors", "tokenizer.json", "config.json", "generation_config.json"])
def test_a_pointer_of_git_lfs_is_answered_with_what_fetches_the_file(
    tmp_path: Path, demo_model: Path, name: str
) -> None:
    folder = _linked(demo_model, tmp_path, name)
    (folder / name).write_bytes(_POINTER)
    with pytest.raises(ModelLoadError, match=f"{name} is a Git LFS pointer.*git lfs pull"):
        _read(folder)


@pytest.mark.parametrize(
    "name", ["pytorch_model.bin", "model-00001-of-00002.safetensors", "model.safetensors.index.json"]
)
def test_weights_of_every_form_may_be_a_pointer(tmp_path: Path, name: str) -> None:
    (tmp_path / name).write_bytes(_POINTER)
    with pytest.raises(ModelLoadError, match=f"{name} is a Git LFS pointer.*git lfs pull"):
        read_structure(tmp_path, None)


def test_a_gguf_file_and_an_adapter_may_be_pointers(tmp_path: Path) -> None:
    (tmp_path / "model.gguf").write_bytes(_POINTER)
    with pytest.raises(ModelLoadError, match=r"model\.gguf is a Git LFS pointer"):
        resolve_folder(str(tmp_path / "model.gguf"))
    (tmp_path / "lora").mkdir()
    (tmp_path / "lora/adapter_config.json").write_text('{"peft_type": "LORA", "base_model_name_or_path": "x/y"}')
    (tmp_path / "lora/adapter_model.safetensors").write_bytes(_POINTER)
    with pytest.raises(ModelLoadError, match=r"adapter_model\.safetensors is a Git LFS pointer"):
        resolve_folder(str(tmp_path / "lora"))


def _metadata(*values: bytes, tensors: int = 0) -> bytes:
    """The header of a GGUF file whose metadata have these values, each a type and what stands there."""
    fields = b"".join(struct.pack("<Q", 1) + b"a" + value for value in values)
    return b"GGUF" + struct.pack("<IQQ", 3, tensors, len(values)) + fields


@pytest.mark.parametrize(
    "data",
    [
        b"",
        b"GGUF",
        b"GGUF" + struct.pack("<IQQ", 3, 0, 2**60) + bytes(64),
        b"GGUF" + struct.pack("<IQQ", 3, 2**60, 0) + bytes(64),
        _metadata(struct.pack("<IIQ", 9, 0, 10**12)),
        _metadata(struct.pack("<IIQ", 9, 0, 10**7) + bytes(10**7)),
        _metadata(struct.pack("<I", 9) + struct.pack("<IQ", 9, 1) * 5000),
        _metadata(struct.pack("<IIQ", 9, 9, 10**7) + struct.pack("<IQ", 0, 0) * 100),
        _metadata(struct.pack("<I", 99)),
        _metadata(struct.pack("<IQ", 8, 2) + b"\xff\xff"),
        b"GGUF" + struct.pack("<IQQQ", 3, 0, 1, 17) + b"general.alignment" + struct.pack("<II", 4, 0),
        b"GGUF" + struct.pack("<IQQQ", 3, 0, 1, 17) + b"general.alignment" + struct.pack("<IQ", 9, 0) + b"\0" * 4,
        _metadata(tensors=1) + struct.pack("<Q", 1) + b"a" + struct.pack("<I", 2**31) + bytes(64),
        _metadata(tensors=1) + struct.pack("<Q", 1) + b"a" + struct.pack("<IQIQ", 1, 2**62, 0, 0),
        _metadata(tensors=1) + struct.pack("<Q", 1) + b"a" + struct.pack("<IQIQ", 1, 1, 77, 0),
    ],
)
def test_a_gguf_header_that_nobody_wrote_in_good_faith_is_refused(tmp_path: Path, data: bytes) -> None:
    (tmp_path / "m.gguf").write_bytes(data)
    with pytest.raises(ModelLoadError, match=r"m\.gguf cannot be read|header of a GGUF file has"):
        read_gguf_header(tmp_path / "m.gguf")


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("tokenizer.json", "[]"),
        ("tokenizer.json", '{"added_tokens": [], "model": {"type": "WordLevel", "vocab": {"a": 0}, "unk_token": "b"}}'),
        ("tokenizer_config.json", "[]"),
        ("tokenizer_config.json", '{"chat_template": [{"name": 1}]}'),
        ("tokenizer_config.json", '{"tokenizer_class": ["x"], "bos_token": {"a": 1}}'),
        ("generation_config.json", '{"eos_token_id": [1, "a", {}]}'),
        ("chat_template.jinja", "\udcff"),
        ("config.json", "\ufeff{}"),
    ],
)
def test_what_lies_beside_the_weights_is_used_or_refused_with_its_name(
    tmp_path: Path, demo_model: Path, name: str, text: str
) -> None:
    folder = _linked(demo_model, tmp_path, name)
    (folder / name).write_bytes(text.encode("utf-8", "surrogateescape"))
    with pytest.raises(ModelLoadError, match=r"tokenizer|config\.json|configuration") as caught:
        read_side(registry.adapters.create("auto"), str(folder), Loading(), tensors=False)
    assert "\n" not in str(caught.value)


def _entry(start: int, end: int, shape: list[int] | None = None) -> dict[str, Any]:
    return {"dtype": "F32", "shape": shape or [(end - start) // 4], "data_offsets": [start, end]}


@pytest.mark.parametrize(
    ("header", "named"),
    [
        ('{"a": %s, "a": %s}', "'a' stands there twice"),
        ('{"a": %s, "b": {"dtype": "F32", "shape": [2], "data_offsets": [4, 12]}}', "'a' and 'b' overlap"),
        ('{"a": {"dtype": "F32", "shape": [-2], "data_offsets": [0, 8]}}', "'a' is malformed"),
        ('{"a": {"dtype": "F32", "shape": [2], "data_offsets": [8, 0]}}', "'a' is malformed"),
        ('{"a": 1}', "'a' is malformed"),
        ("[]" + " " * 30, "is a list"),
        ('{"a": ' * 200 + "1" + "}" * 200, "nests deeper"),
    ],
)
def test_a_header_that_says_two_things_is_refused(tmp_path: Path, header: str, named: str) -> None:
    text = header.replace("%s", json.dumps(_entry(0, 8))).encode()
    (tmp_path / "model.safetensors").write_bytes(struct.pack("<Q", len(text)) + text + bytes(16))
    with pytest.raises(ModelLoadError, match=named):
        read_structure(tmp_path, None)


def test_a_header_of_a_million_tensors_is_refused_before_it_is_parsed(tmp_path: Path) -> None:
    with (tmp_path / "model.safetensors").open("wb") as file:
        file.write(struct.pack("<Q", 60_000_000) + b"{")
        file.truncate(61_000_000)
    with pytest.raises(ModelLoadError, match="60,000,000 bytes or more"):
        read_structure(tmp_path, None)


def test_an_index_names_files_beside_it_alone(tmp_path: Path) -> None:
    (tmp_path / "model.safetensors.index.json").write_text('{"weight_map": {"a": "../x.safetensors"}}')
    with pytest.raises(ModelLoadError, match="no name of a file beside it"):
        read_structure(tmp_path, None)


def test_an_adapter_that_is_its_own_base_is_refused(tmp_path: Path) -> None:
    (tmp_path / "adapter_config.json").write_text(
        json.dumps({"peft_type": "LORA", "base_model_name_or_path": str(tmp_path)})
    )
    (tmp_path / "adapter_model.safetensors").write_bytes(struct.pack("<Q", 2) + b"{}")
    with pytest.raises(ModelLoadError, match="its own base"):
        resolve_folder(str(tmp_path))


def _unreachable(*_: object, **__: object) -> None:
    raise AssertionError("a library was loaded before the files were looked at")


def _many(names: int) -> bytes:
    header = json.dumps({f"t{n}": _entry(4 * n, 4 * n + 4) for n in range(names)}).encode()
    return struct.pack("<Q", len(header)) + header + bytes(4 * names)


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("config.json", b'{"n_layer": 10000000}'),
        ("config.json", b'{"model_type": "gpt2", "n_layer": 9000}'),
        ("config.json", b'{"a":' * 2000 + b"1" + b"}" * 2000),
        ("config.json", b'{"vocab_size": "many"}'),
        ("model.safetensors", _many(40_000)),
        ("model.safetensors", _many(2).replace(b"[4, 8]", b"[0, 8]")),
        ("model.safetensors", struct.pack("<Q", 60_000_000) + b"{" + bytes(61_000_000)),
        ("m.gguf", b"GGUF" + struct.pack("<IQQ", 3, 2**60, 0) + bytes(64)),
        ("data", b'{"a":' * 2000 + b"1" + b"}" * 2000),
        ("data", b"\x1f\x8b" + bytes(100)),
        ("data", b'{"text": "' + b"a" * 3_000_000 + b'"}'),
        ("loop", b""),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
@pytest.mark.parametrize("side", ["subject", "baseline"])
def test_what_files_show_is_refused_before_a_library_is_loaded(
    tmp_path: Path, demo_model: Path, name: str, content: bytes, side: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(certify_flow, "open_request", _unreachable)
    folder, dataset = tmp_path / "model", {}
    shutil.copytree(demo_model, folder)
    if name == "loop":
        folder = tmp_path / "loop"
        folder.symlink_to("loop")
    elif name == "data":
        (tmp_path / "d.jsonl").write_bytes(content)
        dataset = {"slices": {"a": {"provider": "local_jsonl", "file": str(tmp_path / "d.jsonl")}}}
    else:
        (folder / name).write_bytes(content)
        if name.endswith("gguf"):
            (folder / "model.safetensors").unlink()
    sides = {"subject": str(demo_model), "baseline": str(demo_model), side: str(folder)}
    with pytest.raises((ModelLoadError, DataError)) as caught:
        certify_flow.open_certification(certify_flow.CertifyRequest(**sides, dataset=dataset))
    assert "\n" not in str(caught.value)


def test_files_that_are_not_ours_to_read_are_left_alone(
    tmp_path: Path, demo_model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A plugin's adapter, a served engine and a stored baseline say themselves what stands at a path, and what text was."""

    class ReachedError(Exception):
        pass

    def reached(*_: object, **__: object) -> None:
        raise ReachedError

    monkeypatch.setattr(certify_flow, "open_request", reached)
    (tmp_path / "config.json").write_text('{"n_layer": 10000000}')
    bad, data = str(tmp_path), {"provider": "local_jsonl", "file": "/nowhere.jsonl"}
    plugin = registry.Entry("odd", "x:y", "invarlock.adapters", "odd-package", "1")
    monkeypatch.setattr(registry.adapters, "entry", lambda name: plugin if name == "odd" else registry.Entry(
        name, "x:y", "invarlock.adapters", "invarlock", "1"))  # fmt: skip
    requests = [
        certify_flow.CertifyRequest(subject=bad, baseline=bad, adapter="odd"),
        certify_flow.CertifyRequest(subject=bad, baseline=str(demo_model), engine="vllm=http://127.0.0.1:1"),
        certify_flow.CertifyRequest(subject=str(demo_model), baseline_report=Path(bad), dataset=data),
        certify_flow.CertifyRequest(subject="org/name", baseline=str(demo_model)),
    ]
    for request in requests:
        with pytest.raises(ReachedError):
            certify_flow.open_certification(request)
