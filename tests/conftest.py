"""Small trained models, calibration data cut from real text, and a way to make an edited checkpoint."""

from __future__ import annotations

import os
import shutil
import signal
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

os.environ["INVARLOCK_CACHE"] = "off"  # a test measures what it claims; those of the cache name a folder of their own
os.environ.setdefault("OMP_NUM_THREADS", "1")  # before torch is imported: threads only slow such small models down

# a job started in the background ignores Ctrl-C, and so would every command that a test starts and interrupts
signal.signal(signal.SIGINT, signal.default_int_handler)

ROOT = Path(__file__).parents[1]
pytest_plugins = ["certification", "distributions", "executions", "runs"]
SEQ_LEN = 64

#: fixtures that certify, run an edit, execute pages or start the command line: a test that asks for one is slow
SLOW = {
    "certify_models", "passed", "failed", "refused", "run_small", "noop_run", "edited_run", "quick_start", "installed",
    "shell", "script", "run",
}  # fmt: skip

CopyModel = Callable[..., Path]


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        if SLOW.intersection(getattr(item, "fixturenames", ())):
            item.add_marker(pytest.mark.slow)


@pytest.fixture(autouse=True)
def _clean_environment(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Tests start without the variables that the person who runs them may have set."""
    from invarlock.core.settings import SETTINGS

    for setting in SETTINGS:
        if setting.name not in ("HF_HOME", "INVARLOCK_CACHE"):
            monkeypatch.delenv(setting.name, raising=False)
    yield


@pytest.fixture(scope="session")
def demo_model() -> Path:
    """The trained GPT-2-shaped model that ships in the package (tied head, `Conv1D`)."""
    folder = ROOT / "src" / "invarlock" / "data" / "demo_model"
    assert (folder / "model.safetensors").is_file()
    return folder


@pytest.fixture(scope="session")
def model_folder() -> Callable[[str], Path]:
    """The folder of a trained test model by name, such as `llama` or `bert`; skips where it is not there."""

    def _folder(name: str) -> Path:
        folder = ROOT / "tests" / "assets" / "models" / name
        if not (folder / "model.safetensors").is_file():
            pytest.skip(f"no trained model {name} in tests/assets/models")
        return folder

    return _folder


@pytest.fixture(scope="session")
def llama_model(model_folder: Callable[[str], Path]) -> Path:
    """A trained Llama-shaped model (rotary positions, RMS norm, gated MLP, tied head)."""
    return model_folder("llama")


@pytest.fixture(scope="session")
def demo_tokenizer(demo_model: Path) -> Any:
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(demo_model, local_files_only=True)


@pytest.fixture(scope="session")
def calibration(demo_tokenizer: Any) -> list[dict[str, Any]]:
    """Eight preview and eight final windows of 64 tokens of `python_docs`, as the API guide builds them."""
    from invarlock.eval.data import get_provider

    preview, final = get_provider("python_docs").windows(
        demo_tokenizer, preview_n=8, final_n=8, seq_len=SEQ_LEN, stride=SEQ_LEN
    )
    return [
        {"input_ids": ids, "attention_mask": mask}
        for ids, mask in zip(
            preview.input_ids + final.input_ids, preview.attention_masks + final.attention_masks, strict=True
        )
    ]


@pytest.fixture(scope="session")
def load_model() -> Callable[[Path], Any]:
    """Load a fresh copy of a checkpoint in single precision; the caller may change it."""
    import torch
    from transformers import AutoModelForCausalLM

    def _load(folder: Path) -> Any:
        return AutoModelForCausalLM.from_pretrained(folder, local_files_only=True, dtype=torch.float32).eval()

    return _load


@pytest.fixture(scope="session")
def copy_model(tmp_path_factory: pytest.TempPathFactory) -> CopyModel:
    """Save a copy of a checkpoint after `change(model)`, tokenizer included; returns its folder.

    Without `change` the model is loaded and saved again: a harmless re-save. The type of the weights is kept unless
    `dtype` names another; other keywords go to `save_pretrained`, such as `max_shard_size`.
    """
    import torch
    from transformers import AutoModelForCausalLM

    def _copy(source: Path, change: Callable[[Any], Any] | None = None, dtype: Any = "auto", **options: Any) -> Path:
        folder = tmp_path_factory.mktemp("copy") / source.name
        model = AutoModelForCausalLM.from_pretrained(source, local_files_only=True, dtype=dtype)
        if change is not None:
            with torch.no_grad():
                change(model)
        model.save_pretrained(folder, **options)
        for name in ("tokenizer.json", "tokenizer_config.json"):
            shutil.copyfile(source / name, folder / name)
        return folder

    return _copy


@pytest.fixture(scope="session")
def rewrite_tensors(tmp_path_factory: pytest.TempPathFactory) -> CopyModel:
    """Copy a checkpoint's files and let `change` alter the dict of stored tensors in place; no model is built."""
    from safetensors.torch import load_file, save_file

    def _rewrite(source: Path, change: Callable[[dict[str, Any]], Any]) -> Path:
        folder = tmp_path_factory.mktemp("files") / source.name
        shutil.copytree(source, folder)
        tensors = load_file(folder / "model.safetensors")
        change(tensors)
        save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
        return folder

    return _rewrite
