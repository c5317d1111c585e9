"""Two checkpoints in, one certificate out: the form of the main job that never holds both models at once.

1. files: read both checkpoints' tensors as files; refuse a damaged baseline, and certify a damaged subject as FAIL
2. data: cut the windows with the baseline's tokenizer, or take those of a stored baseline report
3. baseline: load, measure, show it to plugin guards, write its evidence, free it
4. subject: load, measure on the same windows, let plugin guards validate it, free it
5. compare: one certificate
"""

from __future__ import annotations

import datetime
import gc
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from invarlock import __version__
from invarlock.core import registry, settings
from invarlock.core.api import Guard, GuardWithContext, GuardWithPrepare, RunReport
from invarlock.core.events import EventLog
from invarlock.core.exceptions import (
    CheckpointDamagedError,
    ConfigError,
    GuardError,
    InvarlockError,
    ModelLoadError,
    PairingError,
    TooLittleTextError,
)
from invarlock.core.files import read_json, write_json
from invarlock.core.outcome import checked_result, not_evaluated
from invarlock.core.policy import ResolvedPolicy, profile_values, resolve_policy

__all__ = ["CertifyOutcome", "CertifyRequest", "certify", "find_report"]

Tick = Callable[[str, int, int], None]
_MOST_SEQ_LEN = 512


@dataclass(frozen=True)
class CertifyRequest:
    """What to certify, against what, and how. Paths are checkpoint folders or hub ids.

    `dataset` holds `provider`, `seq_len`, `stride`, `split`, `seed` and the provider's options; `overrides` follows the
    shape of a policy; `guard_arguments` are constructor arguments of plugin guards. `edit` {name, plan} is applied to the
    subject after loading.
    """

    subject: str
    baseline: str | None = None
    baseline_report: Path | None = None
    adapter: str = "auto"
    device: str = "auto"
    dtype: str = "auto"
    trust_remote_code: bool = False
    profile: str = "ci"
    tier: str = "balanced"
    intent: str = "preserve"
    metric_kind: str = "auto"
    dataset: Mapping[str, Any] = field(default_factory=dict)
    overrides: Mapping[str, Any] = field(default_factory=dict)
    guard_arguments: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)
    edit: Mapping[str, Any] | None = None
    edit_label: str | None = None
    out: Path = Path("runs")

    def __post_init__(self) -> None:
        if self.intent not in ("preserve", "finetune"):
            raise ConfigError(f"intent is {self.intent!r}; expected preserve or finetune")
        if (self.baseline is None) == (self.baseline_report is None):
            got = "neither" if self.baseline is None else "both"
            raise ConfigError(f"got {got} of --baseline and --baseline-report; expected exactly one of the two")


@dataclass(frozen=True)
class CertifyOutcome:
    """The certificate, as plain JSON data, and where the reports of the two sides are."""

    certificate: dict[str, Any]
    source_report: Path | None
    edited_report: Path | None
    notes: list[str]
    timings: dict[str, float]

    @property
    def status(self) -> str:
        return str(self.certificate["verdict"]["status"])


@dataclass
class _Side:
    """One checkpoint as files."""

    id: str
    folder: Path | None
    structure: Any
    behaviour: dict[str, Any]
    tokenizer: Any
    tokenizer_facts: tuple[str | None, int | None]
    max_length: int | None = None


@dataclass
class _Job:
    request: CertifyRequest
    policy: ResolvedPolicy
    adapter: Any
    device: str
    guards: list[Guard]
    tick: Tick
    created: str
    stamp: str
    notes: list[str] = field(default_factory=list)
    timings: dict[str, float] = field(default_factory=dict)
    windows: Any = None
    data: Any = None
    baseline_report: dict[str, Any] | None = None
    baseline_report_path: Path | None = None

    @property
    def metric_kind(self) -> str:
        asked = self.request.metric_kind
        return str(getattr(self.adapter, "metric_kind", "ppl_causal")) if asked == "auto" else asked


def find_report(path: Path) -> Path:
    """Return the report.json that `path` names: the file, or the one in the folder or in its newest subfolder."""
    if path.is_file():
        return path
    if (path / "report.json").is_file():
        return path / "report.json"
    below = sorted(path.glob("*/report.json"))
    if below:
        return below[-1]
    raise ConfigError(f"{path} has no report.json; expected a run folder or its report.json")


def certify(request: CertifyRequest, tick: Tick | None = None) -> CertifyOutcome:
    """Certify a subject against its baseline.

    Returns the outcome for PASS, FAIL and INCONCLUSIVE alike. Raises ModelLoadError for checkpoints that cannot be read
    and for a damaged baseline, DataError for text that cannot serve, PairingError (E001 … E006) where the sides cannot
    be compared, ConfigError for a request that makes no sense.
    """
    job = _open(request, tick or (lambda what, done, total: None))
    baseline = _timed(job, "baseline files", _read_baseline, job)
    subject = _timed(job, "subject files", _read_side, job, request.subject)
    refused = _refuse_subject(job, baseline, subject)
    if refused is not None:
        return CertifyOutcome(refused, job.baseline_report_path, None, job.notes, job.timings)
    _timed(job, "data", _prepare_windows, job, baseline)
    source = _timed(job, "baseline", _measure_baseline, job, baseline)
    edited = _timed(job, "subject", _measure_subject, job, subject, source)
    outcome: CertifyOutcome = _timed(job, "compare", _compare, job, source, edited)
    return outcome


def _timed(job: _Job, name: str, step: Callable[..., Any], *arguments: Any) -> Any:
    started = time.perf_counter()
    try:
        return step(*arguments)
    finally:
        job.timings[name] = round(time.perf_counter() - started, 3)


def _open(request: CertifyRequest, tick: Tick) -> _Job:
    from invarlock.core.device import make_deterministic, resolve_device

    policy = resolve_policy(request.tier, request.profile, overrides=request.overrides)
    device = request.device
    if device == "auto":
        device = str(profile_values(request.profile).get("device", "auto"))
    device = resolve_device(device)
    make_deterministic(int(policy.values["bootstrap"]["seed"]))
    guards = [
        registry.guards.create(name, **dict(request.guard_arguments.get(name, {})))
        for name in dict.fromkeys(policy.values["guards"]["order"])
    ]
    now = datetime.datetime.now(datetime.UTC)
    return _Job(
        request=request,
        policy=policy,
        adapter=registry.adapters.create(request.adapter),
        device=device,
        guards=guards,
        tick=tick,
        created=now.isoformat(timespec="seconds"),
        stamp=now.strftime("%Y%m%dT%H%M%S%fZ"),
    )


def _read_side(job: _Job, model_id: str) -> _Side:
    """Read a checkpoint as files. A plugin adapter's checkpoint is not ours to read: it is measured live."""
    from invarlock.adapters import checkpoint
    from invarlock.adapters.hf import tokenizer_facts
    from invarlock.evidence.model import Structure

    job.tick("reading files", 0, 1)
    adapter = job.adapter
    if hasattr(adapter, "select"):
        adapter.select(model_id)
    tokenizer = adapter.tokenizer(model_id) if hasattr(adapter, "tokenizer") else None
    facts = tokenizer_facts(tokenizer)
    if not hasattr(adapter, "auto_class"):
        return _Side(model_id, None, Structure(source="model", tensors=[]), {}, tokenizer, facts)
    folder = checkpoint.resolve_folder(model_id)
    config = checkpoint.load_config(folder, trust_remote_code=job.request.trust_remote_code)
    structure = checkpoint.read_structure(folder, checkpoint.layout_of(config, adapter.auto_class))
    longest = getattr(config, "max_position_embeddings", None) or getattr(config, "n_positions", None)
    return _Side(model_id, folder, structure, checkpoint.behaviour(config), tokenizer, facts, longest)


def _read_baseline(job: _Job) -> _Side:
    """Read the baseline's files, or take the facts of a stored baseline report."""
    from invarlock.certificate.reports import evidence_of
    from invarlock.guards.invariants import baseline_damage

    if job.request.baseline_report is not None:
        path = find_report(job.request.baseline_report)
        job.baseline_report_path, job.baseline_report = path, read_json(path, "a run's report.json")
        evidence = evidence_of(job.baseline_report or {}, "baseline")
        facts = evidence.model
        return _Side(
            facts.id,
            None,
            evidence.structure,
            facts.behaviour,
            None,
            (facts.tokenizer_digest, facts.tokenizer_size),
        )
    side: _Side = _read_side(job, str(job.request.baseline))
    damage = baseline_damage(side.structure)
    if damage:
        more = f" (and {len(damage) - 1} more)" if len(damage) > 1 else ""
        raise CheckpointDamagedError(
            f"the baseline {side.id} is damaged: {damage[0]['message']}{more}; give an intact baseline", damage
        )
    return side


def _refuse_subject(job: _Job, baseline: _Side, subject: _Side) -> dict[str, Any] | None:
    """Return a FAIL certificate where the subject's files alone show that it is damaged, else None.

    A foreign tokenizer is a pairing error (E002) in the ci and release profiles, a FAIL elsewhere.
    """
    from invarlock.guards.invariants import InvariantsGuard

    if subject.structure.source != "file" or baseline.structure.source != "file" or job.request.edit is not None:
        return None
    guard = InvariantsGuard()
    old = guard.stats_from(baseline.structure, baseline.behaviour, *baseline.tokenizer_facts)
    new = guard.stats_from(subject.structure, subject.behaviour, *subject.tokenizer_facts)
    findings = guard.pair(old, new)["findings"]
    foreign = [f for f in findings if f["code"] == "E002"]
    if foreign and job.policy.values["sample"]["shortfall"] == "stop":
        raise PairingError(
            foreign[0]["message"] + "; certify with the tokenizer that the subject ships with", code="E002"
        )
    fatal = [f for f in findings if f["group"] == "structure" or f["code"] in ("E002", "vocabulary_size")]
    return _refused_certificate(job, baseline, subject) if fatal else None


def _refused_certificate(job: _Job, baseline: _Side, subject: _Side) -> dict[str, Any]:
    from invarlock.certificate.make import RunFacts, refuse
    from invarlock.certificate.reports import certificate_json
    from invarlock.certificate.schema import Meta, Overhead, StructureSection
    from invarlock.core.device import library_versions
    from invarlock.evidence.model import DataFacts, ModelFacts

    def model(side: _Side) -> ModelFacts:
        return ModelFacts(
            id=side.id,
            adapter=job.adapter.name,
            parameters=sum(_product(t.shape) for t in side.structure.tensors),
            behaviour=side.behaviour,
            tokenizer_digest=side.tokenizer_facts[0],
            tokenizer_size=side.tokenizer_facts[1],
        )

    sample = job.policy.values["sample"]
    data = DataFacts(provider="none", seq_len=0, requested=[sample["preview"], sample["final"]], digest="")
    meta = Meta(
        created=job.created,
        tool="invarlock",
        tool_version=__version__,
        profile=job.request.profile,
        tier=job.request.tier,
        intent=job.request.intent,
        device=job.device,
        adapter=job.adapter.name,
        baseline_model=model(baseline),
        subject_model=model(subject),
    )
    facts = RunFacts(
        meta=meta,
        edit=_edit_facts(job),
        auto={"tier": job.request.tier, "enabled": True},
        baseline_run_id=None,
        baseline_reused=job.request.baseline_report is not None,
        env_flags=settings.environment_flags(),
        overhead=Overhead(evaluated=False, ratio=None, windows=0, skipped="nothing was evaluated"),
        plugins=_plugin_facts(job),
        telemetry={"timings": dict(job.timings)},
    )
    structure = StructureSection(
        baseline=baseline.structure,
        subject=subject.structure,
        baseline_behaviour=baseline.behaviour,
        subject_behaviour=subject.behaviour,
        baseline_tokenizer=baseline.tokenizer_facts,
        subject_tokenizer=subject.tokenizer_facts,
    )
    return certificate_json(refuse(structure, data, job.metric_kind, job.policy, facts, library_versions()))


def _product(shape: Sequence[int]) -> int:
    size = 1
    for extent in shape:
        size *= extent
    return size


def _edit_facts(job: _Job) -> dict[str, Any]:
    given = job.request.edit or {}
    return {
        "name": given.get("name", "checkpoint"),
        "plan": dict(given.get("plan") or {}),
        "label": job.request.edit_label or given.get("name") or Path(job.request.subject).name,
    }


def _plugin_facts(job: _Job) -> dict[str, Any]:
    entries = registry.guards.entries()
    return {
        "adapter": job.adapter.name,
        "edit": _edit_facts(job)["name"],
        "guards": [
            {"name": g.name, "origin": entries[g.name].origin, "version": entries[g.name].version}
            for g in job.guards
            if g.name in entries
        ],
    }


def _default_provider(job: _Job) -> str:
    """Return the data to use where none were named, and note which."""
    from invarlock.core.network import network_allowed
    from invarlock.eval.data import Wikitext2Provider

    if getattr(job.adapter, "task", "causal") == "seq2seq":
        name = "seq2seq"
    else:
        name = "wikitext2" if network_allowed() or Wikitext2Provider.is_cached() else "python_docs"
    job.notes.append(f"no data were named; measured on {name}")
    return name


def _prepare_windows(job: _Job, baseline: _Side) -> None:
    """Cut the windows, or take those of the stored baseline; stop where there is less text than the profile needs."""
    from invarlock.certificate.reports import evidence_of
    from invarlock.eval.windows import WindowSet

    if job.baseline_report is not None:
        job.windows = WindowSet.from_dict(job.baseline_report.get("evaluation_windows") or {})
        job.data = evidence_of(job.baseline_report, "baseline").data.model_copy(update={"reused": True})
        if job.windows.digest() != job.data.digest:
            raise PairingError(
                "the windows in the baseline report are not those it measured; measure it again", code="E006"
            )
        return
    if baseline.tokenizer is None:
        raise ModelLoadError(
            f"{baseline.id} has no tokenizer; expected tokenizer.json or a vocabulary beside the weights"
        )
    job.windows, job.data = _cut_windows(job, baseline)
    _check_floor(job)


def _cut_windows(job: _Job, baseline: _Side) -> tuple[Any, Any]:
    from invarlock.eval.data import get_provider
    from invarlock.eval.windows import mask_tokens, windows_from_provider
    from invarlock.evidence.model import DataFacts

    options = dict(job.request.dataset)
    spec = options.pop("provider", None) or _default_provider(job)
    longest = min(_MOST_SEQ_LEN, baseline.max_length or _MOST_SEQ_LEN)
    seq_len = int(options.pop("seq_len", None) or longest)
    if baseline.max_length and seq_len > baseline.max_length:
        raise ConfigError(f"dataset.seq_len is {seq_len}; the model takes at most {baseline.max_length} tokens")
    stride = int(options.pop("stride", None) or seq_len)
    seed, split = int(options.pop("seed", 42)), options.pop("split", None)
    sample = job.policy.values["sample"]
    counts = (int(sample["preview"]), int(sample["final"]))
    provider = get_provider(spec, **options)
    cut = {"seq_len": seq_len, "stride": stride, "seed": seed, "split": split}
    job.tick("reading text", 0, 1)
    try:
        parts = provider.windows(baseline.tokenizer, preview_n=counts[0], final_n=counts[1], **cut)
    except TooLittleTextError as error:
        if sample["shortfall"] != "warn" or min(error.fits) < 1:
            code = "E001" if sample["shortfall"] == "stop" else None
            raise PairingError(str(error), code=code) if code else error from None
        job.notes.append(f"{error}; measured what fits")
        parts = provider.windows(baseline.tokenizer, preview_n=error.fits[0], final_n=error.fits[1], **cut)
    windows = windows_from_provider(*parts, seq_len, counts)
    if job.metric_kind == "ppl_mlm":
        tokenizer = baseline.tokenizer
        windows = mask_tokens(windows, tokenizer.mask_token_id, tokenizer.all_special_ids, seed=seed)
    described = provider.describe()
    return windows, DataFacts(
        provider=described["name"],
        options=described["options"],
        seq_len=seq_len,
        stride=stride,
        seed=seed,
        split=split,
        requested=list(counts),
        digest=windows.digest(),
    )


def _check_floor(job: _Job) -> None:
    """Stop before any model is loaded where the text cannot decide."""
    from invarlock.eval.loop import scored_tokens
    from invarlock.eval.measure import task_of

    sample = job.policy.values["sample"]
    tokens = sum(scored_tokens(window, task_of(job.metric_kind)) for window in job.windows.all)
    if tokens < sample["min_tokens"]:
        message = (
            f"the windows hold {tokens} scored tokens; tier {job.request.tier} in profile {job.request.profile} expects "
            f"{sample['min_tokens']}: use longer windows, more of them, or the dev profile"
        )
        if sample["shortfall"] == "stop":
            raise PairingError(message, code="E001")
        job.notes.append(message)


def _load(job: _Job, side: _Side, label: str) -> Any:
    job.tick(f"loading {label}", 0, 1)
    options: dict[str, Any] = {}
    if hasattr(job.adapter, "auto_class"):
        options = {"dtype": job.request.dtype, "trust_remote_code": job.request.trust_remote_code}
    return job.adapter.load_model(side.id, device=job.device, **options)


def _facts(job: _Job, model: Any, side: _Side) -> Any:
    from invarlock.eval.measure import model_facts

    facts = model_facts(model, job.adapter, side.id, side.tokenizer_facts)
    return facts.model_copy(update={"behaviour": side.behaviour}) if side.behaviour else facts


def _structure(model: Any, side: _Side) -> Any:
    from invarlock.adapters.checkpoint import live_structure

    return side.structure if side.structure.source == "file" else live_structure(model)


def _plugin_guards(job: _Job) -> list[Guard]:
    from invarlock.guards.base import StatsGuard

    return [guard for guard in job.guards if not isinstance(guard, StatsGuard)]


def _measure(job: _Job, model: Any, side: _Side, label: str, **options: Any) -> Any:
    from invarlock.eval.measure import measure_model

    return measure_model(
        model,
        job.adapter,
        job.windows,
        facts=_facts(job, model, side),
        data=job.data,
        structure=_structure(model, side),
        metric_kind=job.metric_kind,
        guards=job.guards,
        device=job.device,
        progress=lambda done, total: job.tick(f"measuring {label}", done, total),
        **options,
    )


@dataclass
class _Measured:
    report: dict[str, Any]
    evidence: Any
    reference: Any
    path: Path | None
    prepared: dict[str, str]  # plugin guards whose prepare failed, and why


def _measure_baseline(job: _Job, side: _Side) -> _Measured:
    from invarlock.eval.measure import read_reference, write_reference

    plugins = _plugin_guards(job)
    if job.baseline_report is not None:
        from invarlock.certificate.reports import evidence_of

        evidence = evidence_of(job.baseline_report, "baseline")
        assert job.baseline_report_path is not None
        reference = None
        if evidence.token_file is not None:
            path = job.baseline_report_path.parent / evidence.token_file.name
            reference = read_reference(path, evidence.token_file)
        prepared = {}
        if any(isinstance(guard, GuardWithPrepare) for guard in plugins):
            model = _load(job, side, "the baseline for plugin guards")
            prepared = _prepare_plugins(job, plugins, model)
            _free(model)
        return _Measured(job.baseline_report, evidence, reference, job.baseline_report_path, prepared)
    model = _load(job, side, "the baseline")
    measured = _measure(job, model, side, "the baseline", keep_reference=True)
    prepared = _prepare_plugins(job, plugins, model)
    _free(model)
    del model
    folder = job.request.out / "source" / job.stamp
    token_file = write_reference(measured.reference, folder / "evidence.safetensors")
    evidence = measured.evidence.model_copy(update={"token_file": token_file})
    report = _report(job, evidence, {"name": "noop", "deltas": {"params_changed": 0}}, f"source-{job.stamp}")
    path = _write_report(job, report, folder)
    return _Measured(report, evidence, measured.reference, path, prepared)


def _free(model: Any) -> None:
    del model
    gc.collect()


def _prepare_plugins(job: _Job, guards: Sequence[Guard], model: Any) -> dict[str, str]:
    """Show plugin guards the baseline; return the failures that INVARLOCK_GUARD_PREPARE_STRICT=0 tolerates."""
    from invarlock.core.runner import CalibrationBatches

    failed: dict[str, str] = {}
    for guard in guards:
        if isinstance(guard, GuardWithContext):
            guard.set_run_context(RunReport(context={"profile": job.request.profile, "tier": job.request.tier}))
        if not isinstance(guard, GuardWithPrepare):
            continue
        policy = job.policy.values["guards"].get(guard.name, {})
        try:
            guard.prepare(model, job.adapter, CalibrationBatches(job.windows.all), policy)
        except Exception as error:  # the plugin boundary: a guard's prepare may raise anything
            message = f"{type(error).__name__}: {error}"
            if settings.flag("INVARLOCK_GUARD_PREPARE_STRICT"):
                raise GuardError(f"guard {guard.name!r} failed in prepare: {message}") from error
            job.notes.append(f"guard {guard.name!r} failed in prepare and is not evaluated: {message}")
            failed[guard.name] = message
    return failed


def _validate_plugins(job: _Job, model: Any, failed: Mapping[str, str]) -> dict[str, dict[str, Any]]:
    results: dict[str, dict[str, Any]] = {}
    for guard in _plugin_guards(job):
        if guard.name in failed:
            results[guard.name] = not_evaluated(guard.name, failed[guard.name])
            continue
        try:
            returned = guard.validate(model, job.adapter, {"device": job.device})
        except InvarlockError:
            raise
        except Exception as error:  # the plugin boundary: a guard's validate may raise anything
            raise GuardError(f"guard {guard.name!r} failed in validate: {type(error).__name__}: {error}") from error
        results[guard.name] = checked_result(guard.name, returned)
    return results


def _measure_subject(job: _Job, side: _Side, source: _Measured) -> _Measured:
    model = _load(job, side, "the subject")
    if job.request.edit is not None:
        side = _apply_edit(job, model, side)
    measured = _measure(job, model, side, "the subject", reference=source.reference)
    results = _validate_plugins(job, model, source.prepared)
    overhead = _guard_overhead(job, model, measured)
    _free(model)
    del model
    report = _report(job, measured.evidence, _edit_facts(job), f"edited-{job.stamp}")
    report["guards"] = results
    report["meta"]["guard_overhead"] = overhead
    return _Measured(report, measured.evidence, None, None, {})


def _apply_edit(job: _Job, model: Any, side: _Side) -> _Side:
    """Apply the edit of --edit-config; what is then in memory is the subject."""
    from invarlock.adapters.checkpoint import live_structure

    given = job.request.edit or {}
    edit = registry.edits.create(str(given["name"]), **dict(given.get("plan") or {}))
    edit.apply(model, job.adapter)
    return replace(side, structure=live_structure(model))


def _guard_overhead(job: _Job, model: Any, measured: Any) -> dict[str, Any]:
    """Measure a few windows again without hooks; the ratio of the two metrics tells whether measuring changed them."""
    limits = job.policy.values["metrics"]["guard_overhead"]
    if settings.flag("INVARLOCK_SKIP_OVERHEAD_CHECK"):
        return {"evaluated": False, "ratio": None, "windows": 0, "skipped": "INVARLOCK_SKIP_OVERHEAD_CHECK is set"}
    if not limits["required"]:
        return {"evaluated": False, "ratio": None, "windows": 0, "skipped": None}
    from invarlock.eval.loop import evenly_spaced, forward_windows
    from invarlock.eval.measure import SAMPLED_WINDOWS, task_of
    from invarlock.eval.metrics import perplexity
    from invarlock.evidence.model import finite_or_none

    picked = evenly_spaced(len(job.windows.all), SAMPLED_WINDOWS)
    bare = forward_windows(
        model, [job.windows.all[i] for i in picked], task=task_of(job.metric_kind), device=job.device
    )
    losses = measured.evidence.preview.loss + measured.evidence.final.loss
    guarded = [float("nan") if losses[i] is None else float(losses[i]) for i in picked]
    ratio = perplexity(guarded, bare.tokens) / perplexity(bare.loss, bare.tokens)
    return {"evaluated": True, "ratio": finite_or_none(ratio), "windows": len(picked), "skipped": None}


def _report(job: _Job, evidence: Any, edit: Mapping[str, Any], run_id: str) -> dict[str, Any]:
    stored = settings.flag("INVARLOCK_STORE_EVAL_WINDOWS")
    report = RunReport(
        meta={
            "run_id": run_id,
            "created": job.created,
            "auto": {"enabled": True, "tier": job.request.tier, "profile": job.request.profile},
            "policy": {**job.policy.provenance(), "values": job.policy.values, "digest": job.policy.digest},
            "intent": job.request.intent,
            "device": job.device,
            "env_flags": settings.environment_flags(),
            "plugins": _plugin_facts(job),
            "warnings": list(job.notes),
            "timings": dict(job.timings),
        },
        edit=dict(edit),
        evaluation_windows=job.windows.to_dict() if stored else {},
        status="success",
        dataset=job.data.model_dump(mode="json"),
        evidence=evidence.model_dump(mode="json"),
    )
    return report.to_dict()


def _write_report(job: _Job, report: dict[str, Any], folder: Path) -> Path:
    log = EventLog(folder / "events.jsonl", run_id=report["meta"]["run_id"])
    for name, seconds in job.timings.items():
        log.log(name, "end", seconds=seconds)
    log.log("report", "written", status=report["status"])
    log.close()
    write_json(folder / "report.json", report)
    return folder / "report.json"


def _compare(job: _Job, source: _Measured, edited: _Measured) -> CertifyOutcome:
    from invarlock.certificate.reports import make_certificate

    certificate = make_certificate(edited.report, source.report)
    report = edited.report
    report["metrics"] = {"primary_metric": certificate["primary_metric"]}
    for name in ("invariants", "spectral", "rmt", "variance"):
        if certificate.get(name):
            report["guards"][name] = {k: v for k, v in certificate[name].items() if k not in ("facts", "policy")}
    report["dataset"]["windows"] = certificate["dataset"]["windows"]
    report["meta"]["timings"] = dict(job.timings)
    path = _write_report(job, report, job.request.out / "edited" / job.stamp)
    return CertifyOutcome(certificate, source.path, path, job.notes, job.timings)
