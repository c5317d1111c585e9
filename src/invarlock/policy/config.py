"""The YAML configuration: typed sections, where each value comes from, and errors that name the key.

Precedence, highest first: command line → profile (where one was asked for) → the file → its `defaults` → packaged.
Only names and types are judged here; whether a model or a file exists is found when it is used.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from glob import glob
from os.path import exists
from pathlib import Path
from typing import Annotated, Any, Literal, TypeVar

from pydantic import AliasChoices, BaseModel, ConfigDict, Field, PrivateAttr, ValidationError, create_model

from invarlock.core import registry
from invarlock.core.exceptions import ConfigError
from invarlock.core.registry import Registry, nearest
from invarlock.policy.presets import is_packaged
from invarlock.policy.resolve import merge, profile_values, resolve_policy
from invarlock.policy.yaml_source import Document, KeyPath, read_yaml

__all__ = [
    "AutoSection",
    "ContextSection",
    "DatasetSection",
    "EditSection",
    "EvalSection",
    "GuardsSection",
    "MetricKind",
    "ModelSection",
    "OutputSection",
    "RunSettings",
    "SliceSection",
    "config_schema",
    "load_config",
    "load_edit_config",
]

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
#: what stands in place of pydantic's words, for a key or for a kind of finding
_EXPECTED = {
    "bool_type": "true or false",
    "float_type": "a number",
    "model_type": "a mapping",
    "dataset.provider": "a provider's name, or a mapping with `kind`",
    "eval.loss": "auto, causal, mlm or seq2seq, or a mapping with `type`",
}

#: keys of a data set that name files
_DATA_PATHS = ("file", "path", "data_files", "dataset_name")

_Count = Annotated[int, Field(ge=1)]
_Ratio = Annotated[float, Field(gt=0)]
MetricKind = Literal["auto", "ppl_causal", "ppl_mlm", "ppl_seq2seq", "accuracy", "vqa_accuracy"]
_LossKind = Literal["auto", "causal", "mlm", "seq2seq"]


class _Section(BaseModel):
    model_config = ConfigDict(
        extra="forbid", frozen=True, strict=True, allow_inf_nan=False, populate_by_name=True, protected_namespaces=()
    )


class ModelSection(_Section):
    """Which model and how to load it."""

    id: str | None = Field(None, min_length=1, description="Folder or hub id.")
    adapter: str = Field("auto", description="Registry name of the adapter; auto recognises the checkpoint.")
    device: str = Field("auto", pattern=r"^(auto|cpu|mps|cuda(:\d+)?)$", description="auto, cpu, cuda, cuda:N or mps.")
    dtype: Literal["auto", "stored", "float32", "float16", "bfloat16"] = Field(
        "auto",
        validation_alias=AliasChoices("dtype", "torch_dtype"),
        description="Type to compute in; auto: float32 on the CPU, the stored one elsewhere.",
    )
    trust_remote_code: bool = Field(False, description="Run code that ships with the checkpoint.")
    revision: str | None = Field(None, description="Branch, tag or commit of a hub id.")
    options: dict[str, Any] = Field(default_factory=dict, description="Further arguments of the adapter's load_model.")


class _TextSection(_Section):
    """Where text comes from. The provider's own options stand beside the keys below, or within `provider`."""

    model_config = ConfigDict(extra="allow")

    provider: str | dict[str, Any] | None = Field(None, description="Name, or {kind: name, ...options}.")
    split: str | None = Field(None, description="Split to read; default: the provider's own.")
    seq_len: int | None = Field(None, ge=2, description="Window length in tokens.")
    stride: int | None = Field(None, ge=1, description="Tokens between window starts; default: seq_len.")

    @property
    def provider_name(self) -> str | None:
        """The provider's registry name; None leaves the choice to the command."""
        return self.provider.get("kind") if isinstance(self.provider, dict) else self.provider

    @property
    def provider_options(self) -> dict[str, Any]:
        """The provider's own options, from both places where they may stand."""
        inner = self.provider if isinstance(self.provider, dict) else {}
        return {key: value for key, value in {**inner, **(self.model_extra or {})}.items() if key != "kind"}


class SliceSection(_TextSection):
    """One kind of text among several. What is left out is as in `dataset`."""

    seed: int | None = Field(None, description="Seed that chooses and orders its windows.")
    share: float = Field(1.0, gt=0, description="Part of the windows, relative to the other slices'.")


class DatasetSection(_TextSection):
    """Evaluation text. The provider's own options stand beside the keys below, or within `provider`."""

    slices: dict[Annotated[str, Field(pattern=r"^[a-z][a-z0-9_-]{0,31}$")], SliceSection] | None = Field(
        None, min_length=2, max_length=8, description="Several kinds of text by name; every gate holds on each of them."
    )
    preview_n: int | None = Field(None, ge=1, description="Number of preview windows.")
    final_n: int | None = Field(None, ge=1, description="Number of final windows.")
    seed: int = Field(42, description="Seed that chooses and orders the windows.")
    add_special_tokens: bool = Field(
        True, description="Put around every window, unscored, the special tokens that the tokenizer puts around a text."
    )


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
    target_pm_ratio: _Ratio = Field(2.0, description="Ratio that retries aim at.")


class _Metric(_Section):
    kind: MetricKind = Field("auto", description="Primary metric; auto follows the model.")
    reps: _Count | None = Field(None, description="Bootstrap replicates.")
    ci_level: float | None = Field(None, gt=0.5, lt=1, description="Two-sided confidence level.")


class _Bootstrap(_Section):
    replicates: _Count | None = Field(None, description="Bootstrap replicates.")
    seed: int | None = Field(None, ge=0, description="Seed of the resampling.")


class _Loss(_Section):
    type: _LossKind = Field("auto", description="Loss of the language model.")


class EvalSection(_Section):
    """How the run is judged."""

    max_pm_ratio: _Ratio = Field(1.5, description="A ratio above it rolls the edit back.")
    spike_threshold: _Ratio = Field(2.0, description="A ratio at or above it stops the run early.")
    metric: _Metric = Field(default_factory=_Metric)
    bootstrap: _Bootstrap = Field(default_factory=_Bootstrap)
    loss: _LossKind | _Loss = Field("auto", description="Another way to say metric.kind: causal means ppl_causal.")
    early_stop: bool | None = Field(None, description="Whether `certify` decides look by look; default: it does.")
    gates_off: list[str] = Field(default_factory=list, description="Gates that `run` does not hold an edit to.")

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
        metric, bootstrap, policies = self.eval.metric, self.eval.bootstrap, _packaged("guards")
        replicates = bootstrap.replicates if bootstrap.replicates is not None else metric.reps
        wanted = {
            "metrics": merge(self.metrics, _given(pm_ratio=_given(ci_level=metric.ci_level))),
            "sample": _given(
                preview=self.dataset.preview_n, final=self.dataset.final_n, early_stop=self.eval.early_stop
            ),
            "bootstrap": _given(replicates=replicates, seed=bootstrap.seed),
            "guards": {
                **_given(order=self.guards.order),
                **{name: values for name, values in self.guards.by_name.items() if values and name in policies},
            },
        }
        return {section: values for section, values in wanted.items() if values}

    def plugin_arguments(self, name: str) -> dict[str, Any]:
        """Return the constructor arguments that the configuration gives a plugin guard; {} for a built-in one."""
        return {} if name in _packaged("guards") else dict(self.guards.by_name.get(name, {}))


def _packaged(section: str, tier: str = "balanced") -> dict[str, Any]:
    """Return a section of the packaged policy: the limits of gates, or the policy of each built-in guard."""
    values: dict[str, Any] = resolve_policy(tier, "ci", relaxed=False).values[section]
    return {key: value for key, value in values.items() if key != "order"}


def _given(**values: object) -> dict[str, Any]:
    return {key: value for key, value in values.items() if value is not None and value != {}}


def load_config(
    path: Path | str | None,
    *,
    cli_overrides: Mapping[str, object] | None = None,
    profile: str | None = None,
    require_model: bool = True,
    refused: Mapping[str, str] | None = None,
    gates: Sequence[str] = (),
) -> RunSettings:
    """Read a configuration; without a path the command line and the profile are all there is.

    Paths of data are relative to the file's folder. `cli_overrides` maps dotted keys (`model.device`) to values; None
    means not given. `profile` is the one asked for, or None where the command fell back on its default, which then stands
    below the file. `require_model=False` is for
    presets, which hold data and policy only; `refused` are keys that have no use there, and what to do instead; `gates`
    are the names that `eval.gates_off` may hold, any where none are given. Raises ConfigError naming the key, its line,
    and the nearest valid key.
    """
    document = Document(Path("command line"), {}) if path is None else read_yaml(path)
    data = dict(document.data)
    defaults = data.pop("defaults", None)
    if defaults is not None:
        if not isinstance(defaults, dict):
            raise document.error(("defaults",), "defaults is not a mapping; expected sections like those beside it")
        lines = {key[1:]: line for key, line in document.lines.items() if key[0] == "defaults" and len(key) > 1}
        document = Document(document.path, document.data, {**lines, **document.lines})
        data = merge(defaults, data)
    for dotted, reason in {**_REFUSED, **(refused or {})}.items():
        if _at(data, dotted.split(".")) not in (None, {}):
            raise document.error(tuple(dotted.split(".")), f"{dotted} is refused: {reason}")
    if path is not None and not is_packaged(Path(path)):
        data = _placed(data, Path(path).parent)
    data, notes = _lay_profile(data, profile)
    for dotted, value in (cli_overrides or {}).items():
        if value is not None:
            data = merge(data, _nested(dotted.split("."), value))
            document.lines[tuple(dotted.split("."))] = "command line"
    resolved = _settings(data, document)
    _check_names(resolved, document)
    for index, name in enumerate(resolved.eval.gates_off if gates else ()):
        if name not in gates:
            message = f"eval.gates_off: unknown gate {name!r}{nearest(name, gates)}; {_one_of(gates)}"
            raise document.error(("eval", "gates_off", index), message)
    if require_model and resolved.model.id is None:
        raise document.error((), "model.id is missing; expected a folder or a hub id")
    resolved._notes = tuple(notes)
    return resolved


def _placed(data: dict[str, Any], folder: Path) -> dict[str, Any]:
    """Return `data` with the paths of its data set taken from the folder of the file that names them, where they lead to
    something; else they are left to the current folder."""

    def place(value: object, path: bool) -> object:
        if isinstance(value, Mapping):
            return {key: place(item, key in _DATA_PATHS) for key, item in value.items()}
        if isinstance(value, list):
            return [place(item, path) for item in value]
        if not (path and isinstance(value, str) and value) or Path(value).is_absolute():
            return value
        beside = folder / value
        return str(beside) if exists(beside) or glob(str(beside)) else value

    return {**data, "dataset": place(data["dataset"], False)} if "dataset" in data else data


def load_edit_config(path: Path | str) -> EditSection:
    """Read a file that holds an edit alone: `edit: {name, plan}`, or name and plan without the heading."""
    document = read_yaml(path, what="edit configuration")
    data = document.data if "edit" in document.data else {"edit": document.data}
    for key in sorted(set(data) - {"edit"}):
        raise document.error((key,), f"{key!r} has no place in an edit configuration; expected `edit` alone")
    edit = _settings(data, document).edit
    if edit.name is None:
        known = ", ".join(registry.edits.entries())
        raise document.error((), f"edit.name is missing; expected one of: {known}")
    _registered(("edit", "name"), registry.edits, edit.name, document)
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


def _nested(key: Sequence[str], value: object) -> dict[str, Any]:
    nested = {key[-1]: value}
    for part in reversed(key[:-1]):
        nested = {part: nested}
    return nested


def _at(data: object, key: Sequence[str]) -> object:
    """Return what stands in `data` at a key, or None."""
    for part in key:
        data = data.get(part) if isinstance(data, Mapping) else None
    return data


def _leaves(values: Mapping[str, Any], above: tuple[str, ...] = ()) -> Iterator[tuple[tuple[str, ...], object]]:
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
            old = _at(data, key.split("."))
            data = _without(data, key.split("."))
            if old is not None and old != value:
                notes.append(f"{key}: {old} of the configuration gives way to {value} of profile {profile}")
        if path == ("device",):
            data = merge(data, {"model": {"device": value}})
    return data, notes


def _without(data: Mapping[str, Any], key: Sequence[str]) -> dict[str, Any]:
    """Return `data` without a key and without the sections that are empty then, as they are no wish any more."""
    out = dict(data)
    if _at(data, key) is not None:
        inner = out.pop(key[0])
        if key[1:] and (rest := _without(inner, key[1:])):
            out[key[0]] = rest
    return out


_Model = TypeVar("_Model", bound=BaseModel)


def _settings(data: Mapping[str, Any], document: Document) -> RunSettings:
    for section, name, alias in (("model", "dtype", "torch_dtype"), ("edit", "plan", "parameters")):
        if None not in (_at(data, (section, name)), _at(data, (section, alias))):
            both = f"{section}.{name} and {section}.{alias}"
            raise document.error((section, alias), f"{both} are one key; keep one of them")
    # an empty section (`guards:` with nothing below) means no wishes
    sections = RunSettings.model_fields
    given = {key: {} if value is None and key in sections else value for key, value in data.items()}
    return _parse(RunSettings, given, document)


def _parse(model: type[_Model], data: object, document: Document, above: KeyPath = ()) -> _Model:
    """Validate what stands at the key `above`; one line about the first finding, unknown keys before wrong values."""
    try:
        return model.model_validate(data)
    except ValidationError as error:
        findings = sorted(error.errors(), key=lambda finding: finding["type"] != "extra_forbidden")
    first = findings[0]
    inner, value = _real_path(first["loc"], data)
    path = (*above, *inner)
    dotted = ".".join(map(str, path))
    if first["type"] == "extra_forbidden" and len(inner) == len(first["loc"]):
        sections, name = _sections(model, above), str(path[-1])
        known = list(sections[path[:-1]].model_fields) if path[:-1] in sections else []
        homes = [
            ".".join(map(str, (*place, name))) for place, section in sections.items() if name in section.model_fields
        ]
        message = f"unknown key {dotted!r}{nearest(homes[0] if homes else name, homes or known)}; {_one_of(known)}"
    else:
        choices = re.findall(r"'(.*?)'", first["msg"]) if first["type"] == "literal_error" else []
        words = _EXPECTED.get(dotted) or _EXPECTED.get(first["type"]) or first["msg"].removeprefix("Input should be ")
        message = f"{dotted} is {value!r}{nearest(str(value), choices)}; expected {words}"
    others = len({_real_path(finding["loc"], data)[0] for finding in findings} - {inner})
    raise document.error(path, message + (f" (and {others} more)" if others else ""))


def _one_of(known: Sequence[str]) -> str:
    return f"expected one of: {', '.join(known)}"


def _real_path(location: tuple[str | int, ...], data: object) -> tuple[KeyPath, object]:
    """Drop from pydantic's location the names of union members, which are no keys of the file."""
    path: list[str | int] = []
    for part in location:
        if isinstance(data, list) and isinstance(part, int) or isinstance(data, dict) and part in data:
            path.append(part)
            data = data[part]  # type: ignore[index]  # mypy does not join the two cases
    return tuple(path), data


def _sections(model: type[BaseModel], above: KeyPath) -> dict[KeyPath, type[BaseModel]]:
    """Return `model`, which stands at the key `above`, and the sections within it, by their keys."""
    found = {above: model}
    for name, info in model.model_fields.items():
        if isinstance(info.annotation, type) and issubclass(info.annotation, BaseModel):
            found |= _sections(info.annotation, (*above, name))
    return found


def _shape(values: Mapping[str, Any]) -> type[BaseModel]:
    """Return the section that takes the keys and types of packaged values; what is None there may be anything."""
    kinds: dict[type, Any] = {bool: bool, int: float, float: float, str: str, list: list[Any]}
    fields: dict[str, Any] = {
        key: (_shape(value) if isinstance(value, Mapping) else kinds.get(type(value), Any), None)
        for key, value in values.items()
    }
    made: type[BaseModel] = create_model("Packaged", __base__=_Section, **fields)
    return made


def _registered(path: KeyPath, names: Registry[Any], name: str, document: Document) -> None:
    try:
        names.entry(name)
    except ConfigError as error:
        raise document.error(path, f"{'.'.join(map(str, path))}: {error}") from None


def _check_names(resolved: RunSettings, document: Document) -> None:
    """Check names that only the registry knows, and the keys below `guards`, `metrics` and `dataset`."""
    guards = resolved.guards
    _registered(("model", "adapter"), registry.adapters, resolved.model.adapter, document)
    if resolved.edit.name is not None:
        _registered(("edit", "name"), registry.edits, resolved.edit.name, document)
    for index, name in enumerate(guards.order or ()):
        _registered(("guards", "order", index), registry.guards, name, document)
    _parse(_shape(_packaged("metrics", resolved.auto.tier)), resolved.metrics, document, ("metrics",))
    policies = _packaged("guards", resolved.auto.tier)
    for name, values in guards.by_name.items():
        _registered(("guards", name), registry.guards, name, document)
        if name in policies:
            _parse(_shape(policies[name]), values, document, ("guards", name))
    _check_provider(resolved.dataset, document)


def _check_provider(dataset: DatasetSection, document: Document) -> None:
    """Check the provider and its options, which stand beside the keys of `dataset` or within `dataset.provider`; with
    `slices` those of each, and that none stand beside them."""
    if dataset.slices is None:
        _check_text(dataset, ("dataset",), document)
        return
    beside = [key for key in ("provider", "split") if getattr(dataset, key) is not None] + list(
        dataset.model_extra or {}
    )
    for key in beside:
        message = f"dataset.{key} stands beside dataset.slices; expected it within each slice"
        raise document.error(("dataset", key), message)
    for name, part in dataset.slices.items():
        place: KeyPath = ("dataset", "slices", name)
        if part.provider is None:
            raise document.error(place, f"dataset.slices.{name} has no provider; expected one in every slice")
        _check_text(part, place, document)


def _check_text(section: DatasetSection | SliceSection, above: KeyPath, document: Document) -> None:
    name, place = section.provider_name, (*above, "provider")
    inside = section.provider if isinstance(section.provider, dict) else {}
    if name is None and inside:
        where = ".".join(map(str, place))
        raise document.error(place, f"{where} has no `kind`; expected {{kind: name, ...}}")
    if name is not None and not isinstance(name, str):
        where = ".".join(map(str, place))
        raise document.error(place, f"{where}.kind is {name!r}; expected a provider's name")
    options: list[str] = []
    if name is not None:
        _registered(place, registry.providers, name, document)
        options = list(registry.providers.resolve(name).options())
    beside = dict.fromkeys([*type(section).model_fields, *options])
    _parse(_shape(dict.fromkeys(["kind", *options])), inside, document, place)
    _parse(_shape(beside), section.model_extra or {}, document, above)
