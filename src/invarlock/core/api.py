"""The public contracts: what a caller configures, what a run reports, what an adapter, an edit or a guard must offer."""

from __future__ import annotations

import functools
import re
from abc import ABC, abstractmethod
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, Protocol, TypeAlias, TypeVar, runtime_checkable

from invarlock.core.exceptions import AdapterError, ConfigError
from invarlock.core.files import plain
from invarlock.core.registry import no_argument

if TYPE_CHECKING:
    from torch import Tensor
    from torch.nn import Module

__all__ = [
    "AdapterLike",
    "Batches",
    "Context",
    "EditLike",
    "Guard",
    "GuardChain",
    "GuardWithAfterEdit",
    "GuardWithBeforeEdit",
    "GuardWithContext",
    "GuardWithFinalize",
    "GuardWithPrepare",
    "ModelAdapter",
    "ModelEdit",
    "ModelLike",
    "RunConfig",
    "RunReport",
    "Settings",
    "Status",
]

Status = Literal["pending", "running", "success", "failed", "rollback"]
Context: TypeAlias = dict[str, Any]  # what a run tells its guards, open to callers' own keys
Settings: TypeAlias = Mapping[str, Any]  # a guard's part of the resolved policy


class ModelLike(Protocol):
    """What is used of a model: the part of `torch.nn.Module` that every model has.

    What only some have (`config`, `get_input_embeddings`, ...) is asked for with `getattr`. An inference session has
    nothing but its call: who walks modules or weights checks with `hasattr` first.
    """

    training: bool

    def __call__(self, *args: object, **kwargs: object) -> Any: ...
    def parameters(self) -> Iterator[Tensor]: ...
    def named_parameters(self, *, remove_duplicate: bool = True) -> Iterator[tuple[str, Tensor]]: ...
    def named_buffers(self) -> Iterator[tuple[str, Tensor]]: ...
    def named_modules(self) -> Iterator[tuple[str, Module]]: ...
    def get_submodule(self, target: str) -> Module: ...
    def state_dict(self, *, keep_vars: bool = False) -> Mapping[str, Tensor]: ...
    def eval(self) -> object: ...
    def train(self, mode: bool = True) -> object: ...
    def to(self, device: str) -> object: ...


class AdapterLike(Protocol):
    """What is used of every adapter; `ModelAdapter` has it, and the rest with defaults."""

    name: str

    def load_model(self, model_id: str, device: str = "auto", **kwargs: Any) -> ModelLike: ...
    def describe(self, model: ModelLike) -> dict[str, Any]: ...
    def snapshot(self, model: ModelLike) -> bytes: ...
    def restore(self, model: ModelLike, snapshot: bytes) -> None: ...


class Batches(Protocol):
    """Calibration batches: indexable, each {input_ids, attention_mask?, labels?} of token ids [B, T] or [T]."""

    def __len__(self) -> int: ...
    def __getitem__(self, index: int, /) -> Mapping[str, Any]: ...


_DEVICE = re.compile(r"auto|cpu|mps|cuda(:\d+)?")
_Config = TypeVar("_Config", bound=type)


def _named(config: _Config) -> _Config:
    """Let a dataclass answer an argument that it does not have with the nearest one."""
    known, make = [item.name for item in fields(config)], config.__init__  # type: ignore[misc]

    @functools.wraps(make)
    def init(self: object, *args: object, **given: object) -> None:
        for name in given.keys() - set(known):
            raise no_argument(config.__name__, name, known)
        make(self, *args, **given)

    config.__init__ = init  # type: ignore[misc]
    return config


@_named
@dataclass
class RunConfig:
    """How `CoreRunner.execute` behaves.

    `max_pm_ratio` and `spike_threshold` are ratios of the edited to the unedited primary metric (1 = unchanged); a
    ratio above the first, or at or above the second, rolls the edit back. `checkpoint_interval` N > 0 writes the
    report as it stands after every N-th phase beside the event log.
    """

    device: str = "auto"
    max_pm_ratio: float = 1.5
    spike_threshold: float = 2.0
    event_path: Path | str | None = None
    checkpoint_interval: int = 0
    dry_run: bool = False
    verbose: bool = False
    context: dict[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if not isinstance(self.device, str) or not _DEVICE.fullmatch(self.device):
            raise ConfigError(f"RunConfig.device is {self.device!r}; expected auto, cpu, mps, cuda or cuda:N")
        if not isinstance(self.context, Mapping):
            raise ConfigError(f"RunConfig.context is {type(self.context).__name__}; expected a mapping")
        for name in ("max_pm_ratio", "spike_threshold"):
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, (int, float)) or not value > 0:
                raise ConfigError(f"RunConfig.{name} is {value!r}; expected a ratio above 0, such as 1.5")
        if self.checkpoint_interval < 0:
            raise ConfigError(f"RunConfig.checkpoint_interval is {self.checkpoint_interval}; expected 0 (off) or more")


@dataclass
class RunReport:
    """What one run did and showed; `to_dict` is what `report.json` holds."""

    meta: dict[str, Any] = field(default_factory=dict)
    edit: dict[str, Any] = field(default_factory=dict)
    guards: dict[str, dict[str, Any]] = field(default_factory=dict)
    metrics: dict[str, Any] = field(default_factory=dict)
    evaluation_windows: dict[str, Any] = field(default_factory=dict)
    status: Status = "pending"
    error: str | None = None
    context: dict[str, Any] = field(default_factory=dict)
    dataset: dict[str, Any] = field(default_factory=dict)
    evidence: dict[str, Any] = field(default_factory=dict)

    def to_dict(self) -> dict[str, Any]:
        """Return a plain, JSON-ready copy."""
        return {f.name: plain(getattr(self, f.name)) for f in fields(self)}

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> RunReport:
        """Read what `to_dict` wrote; unknown keys are ignored so that newer reports stay readable."""
        known = {f.name for f in fields(cls)}
        return cls(**{key: value for key, value in data.items() if key in known})


class ModelAdapter(ABC):
    """Loads, describes and snapshots one kind of model. Only the four abstract methods and `name` are required."""

    name: str = ""

    @abstractmethod
    def load_model(self, model_id: str, device: str = "auto", **kwargs: Any) -> ModelLike:
        """Load the model from a folder or hub id, in evaluation mode, on `device`."""

    @abstractmethod
    def describe(self, model: ModelLike) -> dict[str, Any]:
        """Return structural facts; keys that are absent read as None."""

    @abstractmethod
    def snapshot(self, model: ModelLike) -> bytes:
        """Return the state of the model, enough for `restore` to bring it back bit for bit."""

    @abstractmethod
    def restore(self, model: ModelLike, snapshot: bytes) -> None:
        """Bring the model back to the state in `snapshot`, bit for bit."""

    def can_handle(self, model_id: str) -> bool:
        """Say whether this adapter recognises the checkpoint. The default recognises nothing."""
        return False

    def snapshot_chunked(self, model: ModelLike, folder: Path) -> Path:
        """Write the state into `folder`, a piece at a time, and return where. Default: one file with `snapshot`."""
        path = folder / "snapshot.bin"
        path.write_bytes(self.snapshot(model))
        return path

    def restore_chunked(self, model: ModelLike, path: Path) -> None:
        """Bring the model back from what `snapshot_chunked` wrote."""
        self.restore(model, path.read_bytes())

    def tokenizer(self, model_id: str) -> Any:
        """Return the tokenizer that belongs to the checkpoint, or None where there is none."""
        return None

    def module_families(self, model: ModelLike) -> dict[str, str]:
        """Map weight names to ffn, attn, embed, router or other, where the built-in rules would guess wrong."""
        return {}

    def save(self, model: ModelLike, folder: Path) -> None:
        """Write the model as a checkpoint that `load_model` reads."""
        raise AdapterError(f"adapter {self.name!r} cannot save models; expected one with `save`, such as hf_auto")


@runtime_checkable
class EditLike(Protocol):
    """Anything with a `name` and an `apply` that changes the model in place and reports what it changed."""

    name: str

    def apply(self, model: ModelLike, adapter: AdapterLike, **config: Any) -> dict[str, Any]: ...


class ModelEdit(ABC):
    """Base class of edits."""

    name: str = ""

    @abstractmethod
    def apply(self, model: ModelLike, adapter: AdapterLike, **config: Any) -> dict[str, Any]:
        """Change `model` in place; return what was done, at least `deltas` with the counts of what changed."""


class Guard(ABC):
    """A check of the edited model. `prepare(model, adapter, calib, policy)` is optional and sees the unedited one."""

    name: str = ""

    @abstractmethod
    def validate(self, model: ModelLike, adapter: AdapterLike, context: Context) -> dict[str, Any]:
        """Return at least `passed`; also `action` (continue|none|warn|rollback|abort), `message`, `metrics`,
        `warnings`, `errors`."""


@runtime_checkable
class GuardWithPrepare(Protocol):
    def prepare(
        self, model: ModelLike, adapter: AdapterLike, calib: Batches | None, policy: Settings | None
    ) -> dict[str, Any]: ...


@runtime_checkable
class GuardWithBeforeEdit(Protocol):
    def before_edit(self, model: ModelLike) -> object: ...


@runtime_checkable
class GuardWithAfterEdit(Protocol):
    def after_edit(self, model: ModelLike) -> object: ...


@runtime_checkable
class GuardWithFinalize(Protocol):
    def finalize(self, model: ModelLike) -> object: ...


@runtime_checkable
class GuardWithContext(Protocol):
    def set_run_context(self, report: RunReport) -> None: ...


class GuardChain:
    """Calls the lifecycle methods of several guards in order, for callers who coordinate guards by hand.

    Every method returns a map from guard name to what that guard returned; guards without the method are left out.
    """

    def __init__(self, guards: Iterable[Guard], policy: Settings | None = None) -> None:
        self.guards: Sequence[Guard] = list(guards)
        self.policy = dict(policy or {})

    def prepare_all(
        self, model: ModelLike, adapter: AdapterLike, calib: Batches | None, policy_config: Settings | None = None
    ) -> dict[str, Any]:
        """Show every guard the unedited model. `policy_config` maps guard names to their policies."""
        policies = policy_config if isinstance(policy_config, Mapping) else self.policy
        return {
            guard.name: guard.prepare(model, adapter, calib, policies.get(guard.name, {}))
            for guard in self.guards
            if isinstance(guard, GuardWithPrepare)
        }

    def before_edit_all(self, model: ModelLike) -> dict[str, Any]:
        return {g.name: g.before_edit(model) for g in self.guards if isinstance(g, GuardWithBeforeEdit)}

    def after_edit_all(self, model: ModelLike) -> dict[str, Any]:
        return {g.name: g.after_edit(model) for g in self.guards if isinstance(g, GuardWithAfterEdit)}

    def validate_all(self, model: ModelLike, adapter: AdapterLike, context: Context | None = None) -> dict[str, Any]:
        return {guard.name: guard.validate(model, adapter, context or {}) for guard in self.guards}

    def finalize_all(self, model: ModelLike) -> dict[str, Any]:
        return {g.name: g.finalize(model) for g in self.guards if isinstance(g, GuardWithFinalize)}
