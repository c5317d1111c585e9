"""The YAML configuration: typed sections, where each value comes from, and errors that name the key.

Precedence, highest first: command line → profile (where one was asked for) → the file → its `defaults` → packaged.
Only names and types are judged here; whether a model or a file exists is found when it is used.
"""

from __future__ import annotations

import importlib
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Annotated, Any, Literal, TypeVar

from pydantic import AliasChoices, BaseModel, ConfigDict, Field, PrivateAttr, ValidationError

from invarlock.core import registry
from invarlock.core.exceptions import ConfigError
from invarlock.core.registry import nearest
from invarlock.policy.resolve import merge, profile_values, resolve_policy
from invarlock.policy.yaml_source import Document, KeyPath, read_yaml

__all__ = [
    "AutoSection",
    "ContextSection",
    "DatasetSection",
    "EditSection",
    "EvalSection",
    "GuardsSection",
    "ModelSection",
    "OutputSection",
    "RunSettings",
    "config_schema",
    "load_config",
    "load_edit_config",
]

BUILTIN_GUARDS = ("invariants", "spectral", "rmt", "variance")
#: keys that earlier configurations had; what to say instead of "unknown key"
_REFUSED = {
    "assurance": "assurance levels do not exist: the tier and the profile alone decide; choose one with auto.tier",
    "guards.spectral.mode": "spectral is always measured in the same way; set deadband, kappa or max_caps instead",
    "guards.invariants.intent": "the intent is said on the command line, where the certificate records it: --intent finetune",
    "guards.rmt.mode": "rmt is always measured in the same way; set epsilon or two_sided instead",
}
#: what a profile sets, and the keys of a configuration that mean the same
_PROFILE_KEYS = {
    ("sample", "preview"): ("dataset.preview_n",),
    ("sample", "final"): ("dataset.final_n",),
    ("bootstrap", "replicates"): ("eval.bootstrap.replicates", "eval.metric.reps"),
    ("device",): ("model.device",),
}
_EXPECTED = {
    "dataset.provider": "a provider's name, or a mapping with `kind`",
    "eval.loss": "auto, causal, mlm or seq2seq, or a mapping with `type`",
}

Count = Annotated[int, Field(ge=1)]
Ratio = Annotated[float, Field(gt=0)]
MetricKind = Literal["auto", "ppl_causal", "ppl_mlm", "ppl_seq2seq", "accuracy", "vqa_accuracy"]
LossKind = Literal["auto", "causal", "mlm", "seq2seq"]


class _Section(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, strict=True, allow_inf_nan=False, populate_by_name=True)


class ModelSection(_Section):
    """Which model and how to load it."""

    id: str | None = Field(None, min_length=1, description="Folder or hub id.")
    adapter: str = Field("auto", description="Registry name of the adapter; auto recognises the checkpoint.")
    device: str = Field("auto", pattern=r"^(auto|cpu|mps|cuda(:\d+)?)$", description="auto, cpu, cuda, cuda:N or mps.")
    dtype: Literal["auto", "float32", "float16", "bfloat16"] = Field(
        "auto", validation_alias=AliasChoices("dtype", "torch_dtype"), description="Type to compute in; auto: stored."
    )
    trust_remote_code: bool = Field(False, description="Run code that ships with the checkpoint.")
    revision: str | None = Field(None, description="Branch, tag or commit of a hub id.")
    options: dict[str, Any] = Field(default_factory=dict, description="Further arguments of the adapter's load_model.")


class DatasetSection(_Section):
    """Evaluation text. The provider's own options stand beside the keys below, or within `provider`."""

    model_config = ConfigDict(extra="allow")

    provider: str | dict[str, Any] | None = Field(None, description="Name, or {kind: name, ...options}.")
    split: str | None = Field(None, description="Split to read; default: the provider's own.")
    seq_len: int | None = Field(None, ge=2, description="Window length in tokens.")
    stride: int | None = Field(None, ge=1, description="Tokens between window starts; default: seq_len.")
    preview_n: int | None = Field(None, ge=1, description="Number of preview windows.")
    final_n: int | None = Field(None, ge=1, description="Number of final windows.")
    seed: int = Field(42, description="Seed that chooses and orders the windows.")

    @property
    def provider_name(self) -> str | None:
        """The provider's registry name; None leaves the choice to the command."""
        return self.provider.get("kind") if isinstance(self.provider, dict) else self.provider

    @property
    def provider_options(self) -> dict[str, Any]:
        """The provider's own options, from both places where they may stand."""
        inner = self.provider if isinstance(self.provider, dict) else {}
        return {key: value for key, value in {**inner, **(self.model_extra or {})}.items() if key != "kind"}


class EditSection(_Section):
    """Which edit to apply; `plan` are its arguments."""

    name: str | None = Field(None, min_length=1, description="Registry name of the edit.")
    plan: dict[str, Any] = Field(
        default_factory=dict, validation_alias=AliasChoices("plan", "parameters"), description="Arguments of the edit."
    )


class GuardsSection(_Section):
    """`order`, and a mapping for each guard: policy of a built-in one, constructor arguments of a plugin."""

    model_config = ConfigDict(extra="allow")
    __pydantic_extra__: dict[str, dict[str, Any]] = Field(init=False)

    order: list[str] | None = Field(None, description="Guards to run, in order; a name may stand twice.")

    @property
    def by_name(self) -> dict[str, dict[str, Any]]:
        """The mapping of each guard that has one."""
        return dict(self.model_extra or {})


class AutoSection(_Section):
    """Tier and automatic retries."""

    enabled: bool = Field(True, description="Record and use the tier.")
    tier: Literal["conservative", "balanced", "aggressive"] = Field("balanced", description="Set of limits.")
    probes: int = Field(0, ge=0, le=10, description="Preview windows measured right after the edit, for an early stop.")
    target_pm_ratio: Ratio = Field(2.0, description="Ratio that retries aim at.")


class _Metric(_Section):
    kind: MetricKind = Field("auto", description="Primary metric; auto follows the model.")
    reps: Count | None = Field(None, description="Bootstrap replicates.")
    ci_level: float | None = Field(None, gt=0.5, lt=1, description="Two-sided confidence level.")


class _Bootstrap(_Section):
    replicates: Count | None = Field(None, description="Bootstrap replicates.")
    seed: int | None = Field(None, ge=0, description="Seed of the resampling.")


class _Loss(_Section):
    type: LossKind = Field("auto", description="Loss of the language model.")


class EvalSection(_Section):
    """How the run is judged."""

    max_pm_ratio: Ratio = Field(1.5, description="A ratio above it rolls the edit back.")
    spike_threshold: Ratio = Field(2.0, description="A ratio at or above it stops the run early.")
    metric: _Metric = Field(default_factory=_Metric)
    bootstrap: _Bootstrap = Field(default_factory=_Bootstrap)
    loss: LossKind | _Loss = Field("auto", description="Another way to say metric.kind: causal means ppl_causal.")

    @property
    def metric_kind(self) -> str:
        """The primary metric that `metric.kind` and `loss` ask for together."""
        loss = self.loss.type if isinstance(self.loss, _Loss) else self.loss
        return self.metric.kind if loss == "auto" or self.metric.kind != "auto" else f"ppl_{loss}"


class _Snapshot(_Section):
    mode: Literal["auto", "bytes", "chunked"] = "auto"
    ram_fraction: float | None = Field(None, gt=0, le=1)
    threshold_mb: float | None = Field(None, ge=0)
    disk_free_margin_ratio: float | None = Field(None, ge=1)
    temp_dir: str | None = None


class ContextSection(_Section):
    """Free-form context for guards and evaluation; `snapshot` is ours."""

    model_config = ConfigDict(extra="allow")

    snapshot: _Snapshot = Field(default_factory=_Snapshot)


class OutputSection(_Section):
    """What is written where."""

    dir: str = Field("runs", min_length=1, description="Folder under which each run gets its own.")
    save_model: bool = Field(False, description="Keep the edited model after a successful run.")
    model_dir: str | None = Field(None, description="Where to keep it; default: model_subdir of the run's folder.")
    model_subdir: str = Field("model", min_length=1, description="Subfolder of the run's folder.")
    save_report: bool = Field(True, description="Write report.json.")


class RunSettings(_Section):
    """A whole configuration, resolved. `notes` says which values of the file a profile replaced."""

    model: ModelSection = Field(default_factory=ModelSection)
    dataset: DatasetSection = Field(default_factory=DatasetSection)
    edit: EditSection = Field(default_factory=EditSection)
    guards: GuardsSection = Field(default_factory=GuardsSection)
    auto: AutoSection = Field(default_factory=AutoSection)
    eval: EvalSection = Field(default_factory=EvalSection)
    metrics: dict[str, Any] = Field(default_factory=dict, description="Limits of gates, in the shape of a tier's.")
    context: ContextSection = Field(default_factory=ContextSection)
    output: OutputSection = Field(default_factory=OutputSection)

    _notes: tuple[str, ...] = PrivateAttr(default=())

    @property
    def notes(self) -> tuple[str, ...]:
        """One line for each value of the file that gave way to the profile."""
        return self._notes

    def policy_overrides(self) -> dict[str, Any]:
        """Return what the configuration asks of the policy, for `resolve_policy(overrides=...)`; {} when nothing."""
        metric, bootstrap = self.eval.metric, self.eval.bootstrap
        replicates = bootstrap.replicates if bootstrap.replicates is not None else metric.reps
        wanted = {
            "metrics": merge(self.metrics, _given(pm_ratio=_given(ci_level=metric.ci_level))),
            "sample": _given(preview=self.dataset.preview_n, final=self.dataset.final_n),
            "bootstrap": _given(replicates=replicates, seed=bootstrap.seed),
            "guards": {
                **_given(order=self.guards.order),
                **{name: policy for name, policy in self.guards.by_name.items() if name in BUILTIN_GUARDS and policy},
            },
        }
        return {section: values for section, values in wanted.items() if values}

    def plugin_arguments(self, name: str) -> dict[str, Any]:
        """Return the constructor arguments that the configuration gives a plugin guard; {} for a built-in one."""
        return {} if name in BUILTIN_GUARDS else dict(self.guards.by_name.get(name, {}))


def _given(**values: Any) -> dict[str, Any]:
    return {key: value for key, value in values.items() if value is not None and value != {}}


def load_config(
    path: Path | str,
    *,
    cli_overrides: Mapping[str, Any] | None = None,
    profile: str | None = None,
    require_model: bool = True,
) -> RunSettings:
    """Read a configuration.

    `cli_overrides` maps dotted keys (`model.device`) to values; None means not given. `profile` is the one asked for, or
    None where the command fell back on its default, which then stands below the file. `require_model=False` is for
    presets, which hold data and policy only. Raises ConfigError naming the key, its line, and the nearest valid key.
    """
    document = read_yaml(path)
    data = dict(document.data)
    defaults = data.pop("defaults", None)
    if defaults is not None:
        if not isinstance(defaults, dict):
            raise ConfigError(
                f"{document.where(('defaults',))}: defaults is not a mapping; expected sections like those beside it"
            )
        lines = {key[1:]: line for key, line in document.lines.items() if key[0] == "defaults" and len(key) > 1}
        document = Document(document.path, document.data, {**lines, **document.lines})
        data = merge(defaults, data)
    data, notes = _lay_profile(data, profile)
    for key, value in (cli_overrides or {}).items():
        if value is not None:
            parts = key.split(".")
            data = merge(data, _nested(parts, value))
            document.lines[tuple(parts)] = "command line"
    resolved = _parse(RunSettings, data, document)
    _check_names(resolved, document)
    if require_model and resolved.model.id is None:
        raise ConfigError(f"{document.path.name}: model.id is missing; expected a folder or a hub id")
    resolved._notes = tuple(notes)
    return resolved


def load_edit_config(path: Path | str) -> EditSection:
    """Read a file that holds an edit alone: `edit: {name, plan}`, or name and plan without the heading."""
    document = read_yaml(path, what="edit configuration")
    data = document.data if "edit" in document.data else {"edit": document.data}
    extra = sorted(set(data) - {"edit"})
    if extra:
        raise ConfigError(
            f"{document.where((extra[0],))}: {extra[0]!r} has no place in an edit configuration; expected `edit` alone"
        )
    edit = _parse(RunSettings, data, document).edit
    if edit.name is None:
        raise ConfigError(
            f"{document.path.name}: edit.name is missing; expected one of: {', '.join(registry.edits.entries())}"
        )
    _look_up(document, ("edit", "name"), registry.edits.entry, edit.name)
    return edit


def config_schema() -> dict[str, Any]:
    """Return the JSON Schema (draft 2020-12) of a configuration file, for editors."""
    schema = RunSettings.model_json_schema(by_alias=False)
    # a file that is a schema cannot say which of two spellings is the alias, so both are declared
    definitions = schema["$defs"]
    definitions["ModelSection"]["properties"]["torch_dtype"] = definitions["ModelSection"]["properties"]["dtype"]
    definitions["EditSection"]["properties"]["parameters"] = definitions["EditSection"]["properties"]["plan"]
    schema["properties"]["defaults"] = {"$ref": "#", "description": "Sections merged below those of the file."}
    return {
        "$schema": "https://json-schema.org/draft/2020-12/schema",
        "$id": "https://invarlock.dev/schema/config.schema.json",
        **schema,
        "title": "InvarLock configuration",
        "description": "Settings of `invarlock run` and presets of `invarlock certify`.",
    }


def _nested(key: list[str], value: Any) -> dict[str, Any]:
    for part in reversed(key):
        value = {part: value}
    nested: dict[str, Any] = value
    return nested


def _leaves(values: Mapping[str, Any], above: tuple[str, ...] = ()) -> Iterator[tuple[tuple[str, ...], Any]]:
    for key, value in values.items():
        if isinstance(value, Mapping):
            yield from _leaves(value, (*above, key))
        else:
            yield (*above, key), value


def _lay_profile(data: dict[str, Any], profile: str | None) -> tuple[dict[str, Any], list[str]]:
    """Take out of `data` what the profile decides, so that the policy's own layers do; a device is put in instead."""
    notes: list[str] = []
    for path, value in _leaves(profile_values(profile)) if profile else ():
        for key in _PROFILE_KEYS.get(path, (".".join(path),) if path[0] == "metrics" else ()):
            data, old = _without(data, key.split("."))
            if old is not None and old != value:
                notes.append(f"{key}: {old} of the configuration gives way to {value} of profile {profile}")
        if path == ("device",):
            data = merge(data, {"model": {"device": value}})
    return data, notes


def _without(data: Mapping[str, Any], key: list[str]) -> tuple[dict[str, Any], Any]:
    out = dict(data)
    if len(key) == 1:
        return out, out.pop(key[0], None)
    if not isinstance(out.get(key[0]), Mapping):
        return out, None
    rest, old = _without(out[key[0]], key[1:])
    if rest or old is None:
        out[key[0]] = rest
    else:  # what is emptied is no wish any more
        del out[key[0]]
    return out, old


_Model = TypeVar("_Model", bound=BaseModel)


def _parse(model: type[_Model], data: dict[str, Any], document: Document) -> _Model:
    for dotted, reason in _REFUSED.items():
        path = tuple(dotted.split("."))
        if _holds(data, path):
            raise ConfigError(f"{document.where(path)}: {dotted} is refused: {reason}")
    for section, name, alias in (("model", "dtype", "torch_dtype"), ("edit", "plan", "parameters")):
        if _holds(data, (section, name)) and _holds(data, (section, alias)):
            raise ConfigError(
                f"{document.where((section, alias))}: {section}.{name} and {section}.{alias} are one key; keep one of them"
            )
    # an empty section (`guards:` with nothing below) means no wishes
    data = {key: {} if value is None and key in model.model_fields else value for key, value in data.items()}
    try:
        return model.model_validate(data)
    except ValidationError as error:
        raise _explained(error, data, model, document) from None


def _holds(data: Any, path: tuple[str, ...]) -> bool:
    for part in path:
        if not isinstance(data, Mapping) or part not in data:
            return False
        data = data[part]
    return True


def _explained(error: ValidationError, data: Any, model: type[BaseModel], document: Document) -> ConfigError:
    """Turn pydantic's findings into one line about the first; unknown keys before wrong values, as they explain more."""
    findings = sorted(error.errors(), key=lambda finding: finding["type"] != "extra_forbidden")
    first = findings[0]
    path, value = _real_path(first["loc"], data)
    dotted = ".".join(map(str, path))
    if first["type"] == "extra_forbidden" and len(path) == len(first["loc"]):
        message = _unknown(path, model)
    else:
        expected = _EXPECTED.get(dotted) or first["msg"].removeprefix("Input should be ")
        message = f"{dotted} is {value!r}; expected {expected}"
    others = len({_real_path(finding["loc"], data)[0] for finding in findings} - {path})
    return ConfigError(f"{document.where(path)}: {message}" + (f" (and {others} more)" if others else ""))


def _real_path(location: tuple[str | int, ...], data: Any) -> tuple[KeyPath, Any]:
    """Drop from pydantic's location the names of union members, which are no keys of the file."""
    path: list[str | int] = []
    for part in location:
        if isinstance(data, list) and isinstance(part, int) or isinstance(data, dict) and part in data:
            path.append(part)
            data = data[part]  # type: ignore[index]  # mypy does not join the two cases
    return tuple(path), data


def _fields(model: type[BaseModel]) -> Iterator[tuple[str, type[BaseModel] | None]]:
    for name, info in model.model_fields.items():
        kind = info.annotation
        yield name, kind if isinstance(kind, type) and issubclass(kind, BaseModel) else None


def _dotted_keys(model: type[BaseModel], above: str = "") -> Iterator[str]:
    for name, section in _fields(model):
        yield above + name
        if section is not None:
            yield from _dotted_keys(section, f"{above}{name}.")


def _unknown(path: KeyPath, model: type[BaseModel]) -> str:
    section: type[BaseModel] | None = model
    for part in path[:-1]:
        section = dict(_fields(section)).get(str(part)) if section else None
    known = list(section.model_fields) if section else []
    name, dotted = str(path[-1]), ".".join(map(str, path))
    elsewhere = [key for key in _dotted_keys(model) if key.rpartition(".")[2] == name]
    hint = f" (did you mean {elsewhere[0]!r}?)" if elsewhere else nearest(name, known)
    return f"unknown key {dotted!r}{hint}; expected one of: {', '.join(known)}"


def _look_up(document: Document, path: KeyPath, find: Any, *arguments: Any) -> Any:
    """Call `find` and put the place and the key before the message of its ConfigError."""
    try:
        return find(*arguments)
    except ConfigError as error:
        raise ConfigError(f"{document.where(path)}: {'.'.join(map(str, path))}: {error}") from None


def _check_names(resolved: RunSettings, document: Document) -> None:
    """Check names that only the registry knows, and the keys below `guards`, `metrics` and `dataset`."""
    _look_up(document, ("model", "adapter"), registry.adapters.entry, resolved.model.adapter)
    if resolved.edit.name is not None:
        _look_up(document, ("edit", "name"), registry.edits.entry, resolved.edit.name)
    for index, name in enumerate(resolved.guards.order or ()):
        _look_up(document, ("guards", "order", index), registry.guards.entry, name)
    packaged = resolve_policy(resolved.auto.tier, "ci", relaxed=False).values
    _check_like(("metrics",), resolved.metrics, packaged["metrics"], document)
    for name, values in resolved.guards.by_name.items():
        entry = _look_up(document, ("guards", name), registry.guards.entry, name)
        if name in BUILTIN_GUARDS:
            known = merge(_guard_defaults(entry.target), packaged["guards"].get(name, {}))
            _check_like(("guards", name), values, known, document)
    _check_provider(resolved.dataset, document)


def _guard_defaults(target: str) -> dict[str, Any]:
    module, _, name = target.partition(":")
    return dict(getattr(importlib.import_module(module), name).defaults)


def _check_provider(dataset: DatasetSection, document: Document) -> None:
    name, path = dataset.provider_name, ("dataset", "provider")
    own = list(DatasetSection.model_fields)
    if name is None and (isinstance(dataset.provider, dict) or dataset.provider_options):
        extra = next(iter(dataset.provider_options), None)
        if extra is None or isinstance(dataset.provider, dict):
            raise ConfigError(f"{document.where(path)}: dataset.provider has no `kind`; expected {{kind: name, ...}}")
        raise ConfigError(
            f"{document.where(('dataset', extra))}: unknown key 'dataset.{extra}'{nearest(extra, own)}; expected one of: "
            f"{', '.join(own)}, or an option of the provider that dataset.provider names"
        )
    if name is None:
        return
    if not isinstance(name, str):
        raise ConfigError(f"{document.where(path)}: dataset.provider.kind is {name!r}; expected a provider's name")
    _look_up(document, path, registry.providers.entry, name)
    options = registry.providers.resolve(name).options()
    for option in dataset.provider_options:
        if option not in options:
            inside = isinstance(dataset.provider, dict) and option in dataset.provider
            known = options if inside else [*own, *options]
            key = (*path, option) if inside else ("dataset", option)
            raise ConfigError(
                f"{document.where(key)}: unknown key {'.'.join(key)!r}{nearest(option, known)}; {name!r} takes: "
                f"{', '.join(options) or 'no options'}"
            )


def _check_like(path: tuple[str, ...], value: Any, known: Any, document: Document) -> None:
    """Require that `value` has the keys and the types of `known`, the packaged value; None there allows anything."""
    dotted, where = ".".join(path), document.where(path)
    if isinstance(known, Mapping):
        if not isinstance(value, Mapping):
            raise ConfigError(f"{where}: {dotted} is {value!r}; expected a mapping with {', '.join(known)}")
        for key, inner in value.items():
            if key not in known:
                raise ConfigError(
                    f"{document.where((*path, key))}: unknown key '{dotted}.{key}'{nearest(key, known)}; expected one of: "
                    f"{', '.join(known)}"
                )
            _check_like((*path, key), inner, known[key], document)
        return
    kinds = {bool: "true or false", int: "a number", float: "a number", str: "text", list: "a list"}
    expected = kinds.get(type(known))
    if expected is not None and kinds.get(type(value)) != expected:
        raise ConfigError(f"{where}: {dotted} is {value!r}; expected {expected}, such as {known!r}")
