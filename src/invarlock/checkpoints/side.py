"""A checkpoint before it is loaded: what its files say, and how to load it. What `certify` and `run` share."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from invarlock.checkpoints.behaviour import behaviour, load_config, usable_length, usage
from invarlock.checkpoints.files import read_structure, resolve_folder
from invarlock.checkpoints.sanity import check_depth
from invarlock.checkpoints.shards import SafetensorsFolder
from invarlock.checkpoints.structure import layout_of
from invarlock.checkpoints.tokenizer import tokenizer_facts
from invarlock.core import settings
from invarlock.core.api import AdapterLike, ModelLike
from invarlock.core.exceptions import InvarlockError, ModelLoadError
from invarlock.core.files import first_line
from invarlock.evidence.model import Structure

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from invarlock.policy.config import ModelSection

__all__ = ["Loading", "Origin", "Side", "read_side"]


@dataclass(frozen=True)
class Loading:
    """How models are loaded. `revision` is that of hub ids; `options` are further arguments of `load_model`."""

    dtype: str = "auto"
    trust_remote_code: bool = False
    revision: str | None = None
    options: Mapping[str, Any] = field(default_factory=dict)

    @classmethod
    def of(cls, model: ModelSection) -> Loading:
        """Return what a configuration's `model` section asks for."""
        return cls(model.dtype, model.trust_remote_code, model.revision, dict(model.options))

    @property
    def trusts(self) -> bool:
        """Whether code that ships with a checkpoint may run: by the configuration, or by the environment."""
        return self.trust_remote_code or settings.flag("INVARLOCK_TRUST_REMOTE_CODE")

    def load(self, adapter: AdapterLike, side: Side, device: str) -> ModelLike:
        """Load the model. A plugin's adapter gets only what was asked for, since it may know none of our keywords."""
        asked = {"dtype": self.dtype, "trust_remote_code": self.trusts, "revision": self.revision}
        if not hasattr(adapter, "auto_class"):
            asked = {key: value for key, value in asked.items() if value not in ("auto", False, None)}
        return adapter.load_model(str(side.folder or side.id), device=device, **{**asked, **self.options})


@dataclass(frozen=True)
class Origin:
    """Where a live model came from: the id that was asked for, the folder that it was read from, and how."""

    model_id: str
    folder: Path
    loading: Loading


@dataclass
class Side:
    """One checkpoint as files. `folder` is None where the adapter is a plugin's: its files are not ours to read."""

    id: str
    folder: Path | None
    structure: Structure
    behaviour: dict[str, Any]
    tokenizer: PreTrainedTokenizerBase | None
    tokenizer_facts: tuple[str | None, int | None]
    max_length: int | None = None
    usage: dict[str, Any] | None = (
        None  # see `behaviour.usage`; {} where no file says anything, None where none was read
    )
    engine: str | None = None  # where it is served, as `kind=address`


def read_side(adapter: AdapterLike, model_id: str, loading: Loading, *, tensors: bool = True) -> Side:
    """Read a checkpoint as files. A plugin adapter's checkpoint is measured live instead. Without `tensors` none of them is
    read, and an adapter (LoRA) is not merged: its folder is that of its base."""
    if not hasattr(adapter, "auto_class"):
        tokenizer = adapter.tokenizer(model_id) if hasattr(adapter, "tokenizer") else None
        return Side(
            model_id, None, Structure(source="model", tensors=[]), {}, tokenizer, tokenizer_facts(tokenizer), usage={}
        )
    folder = resolve_folder(model_id, loading.revision, merge=tensors)
    if hasattr(adapter, "select"):
        adapter.select(str(folder), trust_remote_code=loading.trusts)
    config = load_config(folder, trust_remote_code=loading.trusts)
    tokenizer = adapter.tokenizer(str(folder)) if hasattr(adapter, "tokenizer") else None
    if SafetensorsFolder.recognises(folder):
        check_depth(folder, config.to_dict(), SafetensorsFolder(folder, None).count())
    nothing = Structure(source="file", tensors=[])
    structure = read_structure(folder, layout_of(config, adapter.auto_class)) if tensors else nothing
    try:
        facts, length, said = tokenizer_facts(tokenizer), usable_length(config), usage(folder, config, tokenizer)
    except InvarlockError:
        raise
    except Exception as error:  # a tokenizer or a configuration that loads and fails in use ends anywhere
        what = f"the tokenizer or the configuration of {model_id} cannot be used"
        raise ModelLoadError(f"{what}: {first_line(error)}; copy the checkpoint's files again") from error
    return Side(model_id, folder, structure, behaviour(config), tokenizer, facts, length, said)
