"""Two checkpoints in, one certificate out: the order of the steps that never holds both models at once.

1. files: read both checkpoints' tensors as files; refuse a damaged baseline, and certify a damaged subject as FAIL
2. data: cut the windows with the baseline's tokenizer, or take those of a stored baseline report
3. baseline: load, measure as far as the look reaches, show it to plugin guards, write its evidence, free it
4. subject: load, measure on the same windows, let plugin guards validate it, free it
5. compare: one certificate; where its look decided nothing, steps 3 to 5 again as far as the next look reaches

Before them comes a glance at a few documents, which ends all for a subject that is lost.
"""

from __future__ import annotations

import contextlib
import gc
import os
import shutil
import time
from collections import defaultdict
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from invarlock.certificate.reports import make_certificate
from invarlock.checkpoints.behaviour import load_config
from invarlock.checkpoints.files import look_at_files, resolve_folder
from invarlock.checkpoints.side import Loading, Side
from invarlock.checkpoints.structure import layout_of
from invarlock.checkpoints.tokenizer import cut_differently, encoded_differently
from invarlock.core import registry
from invarlock.core.api import GuardWithPrepare, ModelLike, RunReport
from invarlock.core.device import make_deterministic
from invarlock.core.events import EventLog
from invarlock.core.exceptions import CheckpointDamagedError, ConfigError, EditError, InvarlockError, PairingError
from invarlock.core.leftovers import sweep
from invarlock.core.ranks import follows, join
from invarlock.core.registry import nearest
from invarlock.eval.sources.engines import Address
from invarlock.evidence.pack import is_pack
from invarlock.evidence.plan import Cut
from invarlock.evidence.reference import TokenReference
from invarlock.evidence.windows import WindowBatches
from invarlock.flow import cache, steps
from invarlock.flow.diff import diff, kind_of
from invarlock.flow.job import INTENTS, Job, Tick, open_job, resolved_metric
from invarlock.flow.measure import Measurement, files_only, followed, is_lost, measure, shown
from invarlock.flow.noise import noise_floor
from invarlock.flow.run_folder import PARTIAL, find_report
from invarlock.flow.sampling import check_same_data, cut_windows, look_at_text, read_again, reuse_windows
from invarlock.guards.boundary import BUILT_IN_GUARDS
from invarlock.guards.invariants import InvariantsGuard, baseline_damage
from invarlock.policy.resolve import resolve_policy

__all__ = [
    "CertifyOutcome",
    "CertifyRequest",
    "Source",
    "certify",
    "encode_both",
    "find_report",
    "open_certification",
    "open_request",
]

_REFUSED = "the subject was refused before evaluation because of what its files hold"
_HOW_TO_ASK = "; where it was built differently on purpose, certify it with --intent restructure"
_BY_DIGEST = (
    "the documents were not encoded with the subject's tokenizer, which was compared with the stored baseline's by its "
    "digest alone: their text is not at hand as it was"
)
_GLANCED = "a glance at the first documents decided before it"
_REBUILT = ("tensor_missing", "tensor_unexpected", "tensor_shape", "E002")


@dataclass(frozen=True)
class CertifyRequest:
    """What to certify, against what, and how. Paths are checkpoint folders or hub ids.

    `engine` and `baseline_engine` (`kind=address`) are served engines that score the windows in place of a model here;
    what of the checkpoint's files is at hand is still read.

    `dataset` holds `provider`, `seq_len`, `stride`, `split`, `seed` and the provider's options; `overrides` follows the
    shape of a policy; `guard_arguments` are constructor arguments of plugin guards. `edit` {name, plan} is applied to the
    subject after loading. `baseline` may be a baseline pack. `cache`: a baseline that was measured before is found again.
    """

    subject: str
    baseline: str | None = None
    baseline_report: Path | None = None
    adapter: str = "auto"
    device: str = "auto"
    loading: Loading = Loading()
    profile: str = "ci"
    tier: str = "balanced"
    intent: str = "preserve"
    metric_kind: str = "auto"
    dataset: Mapping[str, Any] = field(default_factory=dict)
    overrides: Mapping[str, Any] = field(default_factory=dict)
    guard_arguments: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)
    edit: Mapping[str, Any] | None = None
    edit_label: str | None = None
    engine: str | None = None
    baseline_engine: str | None = None
    out: Path = Path("runs")
    notes: tuple[str, ...] = ()  # what else a reader of the certificate should know
    cache: bool = True
    noise_floor: bool = False  # also measure the baseline against itself, computed in other ways

    def __post_init__(self) -> None:
        if self.intent not in INTENTS:
            known = f"{nearest(self.intent, INTENTS)}; expected {' or '.join(INTENTS)}"
            raise ConfigError(f"intent is {self.intent!r}{known}")
        if (self.baseline is None) == (self.baseline_report is None):
            got = "neither" if self.baseline is None else "both"
            raise ConfigError(f"got {got} of baseline and baseline report; expected exactly one of the two")
        for option, address in (("baseline engine", self.baseline_engine), ("engine", self.engine)):
            if address is not None:
                Address.parse(address, option)
        if self.engine is not None and self.edit is not None:
            raise ConfigError("got an engine with an edit; a served model cannot be edited: serve the edited one")
        if self.noise_floor and (self.engine or self.baseline_engine):
            raise ConfigError("got an engine with a noise floor, which changes how a model here computes; expected one")
        if self.baseline_engine is not None and self.baseline is None:
            raise ConfigError("got a baseline engine with a baseline report, which was measured already; expected one")

    @property
    def served(self) -> bool:
        """Whether an engine scores a side, so that there is no object to hand to a plugin guard."""
        return self.engine is not None or self.baseline_engine is not None

    @property
    def stored(self) -> Path | None:
        """The baseline report or the pack, where the baseline was measured before."""
        if self.baseline is not None and is_pack(Path(self.baseline)):
            return Path(self.baseline)
        return self.baseline_report

    @property
    def edit_facts(self) -> dict[str, Any]:
        """What a report says of the edit before it was made; a checkpoint that was edited elsewhere is called by its name."""
        given = self.edit or {}
        facts = {"name": str(given.get("name", "checkpoint")), "plan": dict(given.get("plan") or {})}
        label = self.edit_label or (None if self.edit else Path(self.subject).name)
        return facts if label is None else {**facts, "label": label}


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
class Source:
    """The baseline's side. `report` is as it was read or written; `failed`: plugin guards whose prepare failed, by place,
    None before they were shown the model; `stale`: more was measured than was written; `key`: of its entry in the cache;
    `said`: of what the caller alone is told; `live`: as it was loaded, while nothing else has to be."""

    side: Side
    report: dict[str, Any] = field(default_factory=dict)
    path: Path | None = None
    measured: Measurement | None = None
    failed: dict[int, str] | None = None
    stale: bool = False
    key: str | None = None
    said: list[str] = field(default_factory=list)
    live: ModelLike | None = None

    @property
    def reach(self) -> Cut:
        return (0, 0) if self.measured is None else self.measured.reach

    @property
    def reference(self) -> TokenReference | None:
        return None if self.measured is None else self.measured.reference


@dataclass
class _Subject:
    """The subject's side, as far as it was measured. `glances`: its first documents may end all."""

    side: Side
    glances: bool = False
    measured: Measurement | None = None
    edit: dict[str, Any] | None = None
    overhead: dict[str, Any] = field(default_factory=dict)
    guards: dict[str, Any] = field(default_factory=dict)
    live: tuple[ModelLike, Side] | None = None  # as it was loaded, while nothing else has to be
    noise: list[dict[str, Any]] | None = None  # what the baseline showed against itself

    def report(self, job: Job, request: CertifyRequest) -> RunReport:
        assert self.measured is not None
        edit = request.edit_facts if self.edit is None else self.edit
        report = steps.report(job, self.measured, edit, f"edited-{job.stamp}", guard_overhead=self.overhead)
        report.guards = dict(self.guards)
        if self.noise is not None:
            report.meta["noise_floor"] = self.noise
        return report


def certify(request: CertifyRequest, tick: Tick | None = None) -> CertifyOutcome:
    """Certify a subject against its baseline.

    Under `torchrun` every rank calls this with the same request and gets the same outcome; the leader alone writes.

    Returns the outcome for PASS, FAIL and INCONCLUSIVE alike. Raises ModelLoadError for checkpoints that cannot be read
    and for a damaged baseline, DataError for text that cannot serve, PairingError (E001 … E006) where the sides cannot
    be compared, ConfigError for a request that makes no sense.
    """
    if not follows():
        sweep(request.out)
    job, source = open_certification(request, tick)
    with job.timed("subject files"):
        subject = steps.read(job, request.subject, request.engine)
    job.metric = resolved_metric(request.metric_kind, job.adapter)
    certificate, edited = _refuse(job, request, source, subject), None
    if certificate is None:
        with job.timed("data"):
            _choose_windows(job, request, source)
            encode_both(job, source, subject)
            local = job.ranks is None and request.engine is None and request.baseline_engine is None
            if source.measured is None and request.cache and local:
                _find(job, request, source)
        with _settled():
            certificate, report = _look_by_look(job, request, source, _Subject(subject))
        if certificate["verdict"]["status"] == "FAIL" and request.edit is None and request.intent != "restructure":
            report.meta["operations"] = _operations(job, request.loading, source, subject)
            certificate = make_certificate(report, source.report)
        edited = _finish(job, request, report, certificate)
        if not follows() and job.partial is not None:
            shutil.rmtree(job.partial, ignore_errors=True)
    return CertifyOutcome(certificate, source.path, edited, [*job.notes, *source.said], job.timings)


def open_certification(request: CertifyRequest, tick: Tick | None = None) -> tuple[Job, Source]:
    """Resolve a request and read the baseline's side, before anything is measured.

    What can be refused without a library is refused first: importing those takes longer than all of it.
    """
    ours = registry.adapters.entry(request.adapter).origin == "Core"  # else the files are not ours to read
    if ours and request.engine is None:
        look_at_files(request.subject)
    if request.stored is None:
        if ours and request.baseline_engine is None:
            look_at_files(str(request.baseline))
        look_at_text(request.dataset)
    job = open_request(request, tick)
    with job.timed("baseline files"):
        source = _read_baseline(job, request)
    job.metric = resolved_metric(request.metric_kind, job.adapter)
    return job, source


def open_request(request: CertifyRequest, tick: Tick | None = None) -> Job:
    """Resolve a request: its policy, guards, adapter and device. Nothing of the models is read."""
    policy = resolve_policy(request.tier, request.profile, overrides=request.overrides)
    guards = steps.create_guards(tuple(dict.fromkeys(policy.values["guards"]["order"])), request.guard_arguments)
    facts = {"intent": request.intent, "loading": request.loading, "notes": [*request.notes], "ranks": join()}
    facts["native"] = request.edit is None
    job = open_job(policy, request.adapter, request.device, guards, tick, **facts)
    job.partial = request.out / PARTIAL
    return job


@contextlib.contextmanager
def _settled() -> Iterator[None]:
    """Leave what exists by now, a million objects of the libraries, out of the collections that let go of models."""
    gc.freeze()
    try:
        yield
    finally:
        gc.unfreeze()


def _look_by_look(
    job: Job, request: CertifyRequest, source: Source, subject: _Subject
) -> tuple[dict[str, Any], RunReport]:
    """Measure both sides as far as each look reaches, until all gates are decided or the text ends.

    No model is in memory beside the other. A stored baseline may end before the text does: its model is loaded again
    where it can be had, else the look that it reaches is the last one.
    """
    early = job.policy.limits.sample.early_stop and len(job.cuts) > 1
    plan: list[Cut | None] = [*job.cuts] if early else [None]
    subject.glances = early and _may_glance(job)
    if subject.glances and not _skips_the_glance(job, request, source):
        with job.calling("looking at a few documents"):
            lost = _lost_at_a_glance(job, request, source, subject)
        if lost:
            with job.timed("compare"):
                return _compared(job, request, source, subject)
    for cut, following in zip(plan, [*plan[1:], None], strict=True):
        with job.timed("baseline"):
            reached = _measure_baseline(job, request, source, cut)
            subject.noise = _noise(job, request, source) if subject.measured is None else subject.noise
            source.live = None  # the model is gone before the next one comes
            gc.collect()
        if not reached and subject.measured is not None:
            job.notes.append(f"the stored baseline ends at {sum(source.reach)} windows, before the gates were decided")
            break
        with job.timed("subject"):
            _measure_subject(job, request, source, subject, cut)
            if following is None or any(a < b for a, b in zip(source.reach, following, strict=True)):
                subject.live = None  # the baseline's model comes next
            gc.collect()
        with job.timed("compare"):
            certificate, report = _compared(job, request, source, subject)
        if early and certificate["looks"]["made"][-1]["decision"] != "inconclusive":
            break
    if source.stale:
        source.path = _write(job, source.report, request.out / "source", source.reference)
    return certificate, report


def _compared(job: Job, request: CertifyRequest, source: Source, subject: _Subject) -> tuple[dict[str, Any], RunReport]:
    report = subject.report(job, request)
    return make_certificate(report, source.report), report


def _may_glance(job: Job) -> bool:
    """Whether a subject can be lost before the first look: where a limit of the divergence is one that fails."""
    strict = job.policy.limits.divergence.mode == "fail" and job.intent != "finetune"
    return strict and not job.metric.is_accuracy and job.glance is not None


def _skips_the_glance(job: Job, request: CertifyRequest, source: Source) -> bool:
    """Whether the baseline is not measured on a few documents first: it was measured before, or a model is not simply
    loaded. The subject's first look begins with these documents all the same."""
    return bool(
        source.measured is not None or job.ranks is not None or request.served or request.edit or request.noise_floor
    )


def _pays(loading: float, scoring: float) -> bool:
    """Whether both models may be loaded once more (seconds each) for what a few documents can show (seconds of a model)."""
    return 2.0 * loading <= scoring


def _lost_at_a_glance(job: Job, request: CertifyRequest, source: Source, subject: _Subject) -> bool:
    """Measure both sides on a few documents; return whether the subject is lost there. Else nothing of it is kept.

    Nor is it done where loading both models once more would take longer than the baseline takes to score these documents:
    the subject's first look begins with them.
    """
    with job.timed("baseline"):
        started = time.perf_counter()
        source.live = steps.load(job, source.side, "the baseline")
        loading = time.perf_counter() - started
        measured = measure(job, source.live, source.side, "the baseline", cut=job.glance)
        if not _pays(loading, scoring=time.perf_counter() - started - loading):
            return False
        source.live = None  # the subject's model comes next
        gc.collect()
    with job.timed("subject"):
        source.measured = measured
        _measure_subject(job, request, source, subject, job.glance)
        subject.live = None
        gc.collect()
    assert subject.measured is not None
    evidence = subject.measured.evidence
    if not is_lost(job, (evidence.preview, evidence.final)):
        source.measured = subject.measured = None
        return False
    _keep_baseline(job, request, source)
    return True


def _operations(job: Job, loading: Loading, source: Source, subject: Side) -> dict[str, str]:
    """Name what was done to each tensor, from the files of both; {} where they are not at hand. A tensor whose change has no
    name is left out."""
    if subject.folder is None or not _at_hand(job, source):
        return {}
    folder = source.side.folder or resolve_folder(source.side.id)
    with job.timed("what was done"):
        config = load_config(folder, trust_remote_code=loading.trusts)
        layout = layout_of(config, job.adapter.auto_class)  # type: ignore[attr-defined]  # read as files
        known = layout.canonical if layout is not None else str
        found = diff(str(folder), str(subject.folder))
    return {known(change.name): kind_of(change) for change in found.changed if change.known}


def _find(job: Job, request: CertifyRequest, source: Source) -> None:
    """Take the baseline's measurement from the cache where it has one of these files on this text."""
    source.key = cache.key_of(job, source.side)
    source.measured = cache.find(source.key, source.side)
    if source.measured is None:
        return
    source.said.append("the baseline's measurement was found in the cache; --no-cache measures it again")
    source.report = steps.report(job, source.measured, steps.NOOP, f"source-{job.stamp}").to_dict()
    source.path = _write(job, source.report, request.out / "source", source.reference)


def _read_baseline(job: Job, request: CertifyRequest) -> Source:
    """Read the baseline's files, or take a stored baseline report or a pack."""
    if request.stored is not None:
        report, evidence, path = steps.stored_baseline(request.stored)
        if is_pack(path):  # what was said when its text was cut
            job.notes += map(str, report["meta"].get("warnings") or ())
        model, measured = evidence.model, steps.stored_measurement(evidence, path)
        facts = (model.tokenizer_digest, model.tokenizer_size)
        return Source(
            Side(model.id, None, evidence.structure, model.behaviour, None, facts, usage=model.usage),
            report,
            path,
            measured,
        )
    side = steps.read(job, str(request.baseline), request.baseline_engine)
    damage = baseline_damage(side.structure)
    if damage:
        more = f" (and {len(damage) - 1} more)" if len(damage) > 1 else ""
        what = f"the baseline {side.id} is damaged: {damage[0]['message']}{more}"
        raise CheckpointDamagedError(f"{what}; give an intact baseline", damage)
    return Source(side)


def _refuse(job: Job, request: CertifyRequest, source: Source, subject: Side) -> dict[str, Any] | None:
    """Return a FAIL certificate where the subject's files alone show that it is damaged, else None.

    A foreign tokenizer is a pairing error (E002) in the ci and release profiles, a FAIL elsewhere.
    """
    sides = (source.side, subject)
    if any(side.structure.source != "file" for side in sides) or request.edit is not None:
        return None
    guard = InvariantsGuard()
    old, new = (guard.stats_from(side.structure, side.behaviour, *side.tokenizer_facts, side.usage) for side in sides)
    findings = guard.pair(old, new)["findings"]
    foreign = [f for f in findings if f["code"] == "E002"]
    if foreign:
        with contextlib.suppress(InvarlockError):  # text that cannot be had does not make the tokenizer the right one
            _choose_windows(job, request, source)
            encode_both(job, source, subject)
            new = guard.stats_from(subject.structure, subject.behaviour, *subject.tokenizer_facts, subject.usage)
            foreign = [f for f in guard.pair(old, new)["findings"] if f["code"] == "E002"]
    if foreign and job.policy.limits.sample.shortfall == "stop" and job.intent != "restructure":
        raise PairingError(foreign[0]["message"] + "; put the baseline's tokenizer beside the subject", code="E002")
    if not any(_refuses(f, subject, job.intent) for f in findings):
        return None
    job.windows = None
    left, right = (Measurement(files_only(job, side)) for side in sides)
    rebuilt = any(f["code"] in _REBUILT for f in findings) and job.intent != "restructure"
    why = _REFUSED + (_HOW_TO_ASK if rebuilt else "")
    report = steps.report(job, right, request.edit_facts, f"edited-{job.stamp}", refused=why)
    return make_certificate(report, steps.report(job, left, steps.NOOP, None))


def _choose_windows(job: Job, request: CertifyRequest, source: Source) -> None:
    """Cut the windows, or take those of a stored baseline with what was said of their text."""
    if source.measured is None:
        job.windows = job.windows or cut_windows(job, source.side, request.dataset)
        return
    data = source.measured.evidence.data
    check_same_data(data, request.dataset)
    job.windows = reuse_windows(source.report)
    said = [*(data.remarks or ())]
    for name, part in (data.slices or {}).items():
        said += [f"slice {name}: {remark}" for remark in part.remarks or ()]
    job.notes += [remark for remark in said if remark not in job.notes]


def encode_both(job: Job, source: Source, subject: Side) -> None:
    """Encode every document that windows are cut from with both tokenizers; the subject's usage says how many differ.

    Two sides of one folder have one tokenizer, which is not held against itself. Of a stored baseline there are the ids
    of the windows: the subject's tokenizer is held to give them, where the documents are at hand as they were.
    """
    ours, theirs, known = subject.tokenizer, source.side.tokenizer, subject.usage
    if known is None or "encoded" in known or ours is None or job.windows is None:
        return
    if subject.folder is not None and subject.folder == source.side.folder:
        return
    if theirs is not None:
        names = list(job.texts)
        differing = [names[place] for place in encoded_differently(ours, theirs, list(job.texts.values()))]
    elif source.measured is not None and source.side.tokenizer_facts[0] is not None:
        texts = read_again(source.measured.evidence.data, job.windows)
        if not texts:
            job.notes.append(_BY_DIGEST)
        cuts: dict[tuple[str | None, str], list[list[int]]] = defaultdict(list)
        for window in job.windows.all:
            cuts[window.slice, window.document].append(list(shown(window, job.metric.task)))
        names = [document for _, document in texts]
        differing = [document for _, document in cut_differently(ours, texts, cuts)]
    else:
        return
    if names:
        facts = {"documents": len(names), "differing": len(differing), "first": differing[0] if differing else None}
        subject.usage = {**known, "encoded": facts}


def _refuses(finding: Mapping[str, Any], subject: Side, intent: str) -> bool:
    """Whether a finding on files alone ends the certification; what was built differently on purpose does not."""
    if intent == "restructure":
        broken = {*subject.structure.missing, *(line.split(":")[0] for line in subject.structure.misshapen)}
        return finding["code"] == "non_finite" or finding["tensor"] in broken
    if finding["code"] == "untied" and subject.behaviour.get("tie_word_embeddings") is False:
        return False  # it is loaded as it is stored, so that its behaviour decides: a rotation needs a head of its own
    return finding["group"] == "structure" or finding["code"] in ("E002", "vocabulary_size")


def _measure_baseline(job: Job, request: CertifyRequest, source: Source, cut: Cut | None) -> bool:
    """Measure the baseline as far as `cut`, all where None, and show it to plugin guards the first time.

    A stored one that ends before the first look, at the glance of a lost subject, is measured anew: its guards saw nothing.
    Returns False where one does not reach so far and cannot be loaded; raises PairingError where it has not even one look.
    """
    assert job.windows is not None
    if request.served:
        source.failed = dict.fromkeys(range(len(job.plugins)), "a served engine has no model to look at")
    whole = (len(job.windows.preview), len(job.windows.final))
    enough = source.measured is not None and all(a >= b for a, b in zip(source.reach, cut or whole, strict=True))
    ask = source.failed is None and any(isinstance(guard, GuardWithPrepare) for guard in job.plugins)
    if enough and not ask:
        source.failed = source.failed or {}
        return True
    brief = source.measured is not None and any(a < b for a, b in zip(source.reach, job.cuts[0], strict=True))
    if source.measured is not None and not _at_hand(job, source):
        if brief:
            few = (
                f"the baseline was measured on {sum(source.reach)} of {sum(whole)} windows, before the first look ends"
            )
            raise PairingError(f"{few}, and its weights are not at hand; give --baseline its folder", code="E001")
        source.failed = _not_shown(job) if source.failed is None else source.failed
        return enough
    what = "the baseline for plugin guards" if enough else "the baseline"
    if (model := source.live) is None:
        model = steps.load(job, source.side, what)
    else:
        job.tick(f"loading {what}", 0, 1)  # as it is told where it has to be loaded once more
    if source.failed is None:
        about = RunReport(context={"profile": request.profile, "tier": request.tier})
        source.failed = steps.prepare_guards(job, job.plugins, model, WindowBatches(job.windows.all), about)
    if source.measured is None:
        source.measured = measure(job, model, source.side, "the baseline", cut=cut)
        _keep_baseline(job, request, source)
        cache.keep(source.key, source.measured)
    elif not enough:
        if brief:
            source.measured = measure(job, model, source.side, "the baseline", cut=cut)
        else:
            source.measured = followed(job, model, source.side, source.measured, "the baseline", cut or whole)
        source.report = {**source.report, "evidence": source.measured.evidence.model_dump(mode="json")}
        source.stale = True
        cache.keep(source.key, source.measured)
    return True


def _keep_baseline(job: Job, request: CertifyRequest, source: Source) -> None:
    """Write the report of what was measured of the baseline."""
    assert source.measured is not None
    steps.remark_on_baseline(job, source.measured.evidence)
    source.report = steps.report(job, source.measured, steps.NOOP, f"source-{job.stamp}").to_dict()
    source.path = _write(job, source.report, request.out / "source", source.measured.reference)


def _noise(job: Job, request: CertifyRequest, source: Source) -> list[dict[str, Any]] | None:
    """Measure the baseline against itself where that is asked for and its weights are at hand."""
    assert source.measured is not None
    if not request.noise_floor:
        return None
    if job.metric.is_accuracy or not _at_hand(job, source):
        why = "it is of the ratio" if job.metric.is_accuracy else "the baseline's weights are not at hand"
        job.notes.append(f"the noise floor is not measured: {why}")
        return None
    return noise_floor(job, steps.load(job, source.side, "the baseline again"), source.measured)


def _not_shown(job: Job) -> dict[int, str]:
    """Say of the guards that have to see the baseline why they did not."""
    why = "it has to see the baseline's weights, which are not at hand: give --baseline its folder"
    named = {place: guard.name for place, guard in enumerate(job.plugins) if isinstance(guard, GuardWithPrepare)}
    job.notes.extend(f"guard {name!r} is not evaluated: {why}" for name in named.values())
    return dict.fromkeys(named, why)


def _at_hand(job: Job, source: Source) -> bool:
    """Whether the checkpoint of a stored baseline still is where it was, and what it was."""
    assert source.measured is not None
    if source.side.folder is not None:  # its files were read by this command
        return True
    if source.side.structure.source != "file" or not os.path.exists(source.side.id):
        return False
    there = steps.read(job, source.side.id)
    return there.structure.weights_digest() == source.measured.evidence.structure.weights_digest()


def _measure_subject(job: Job, request: CertifyRequest, source: Source, subject: _Subject, cut: Cut | None) -> None:
    """Measure the subject as far as `cut`, all where None; the first time, show it to plugin guards too."""
    assert source.measured is not None
    make_deterministic(job.policy.limits.bootstrap.seed)  # an edit in memory is made again at every load
    loaded = subject.live is None
    if subject.live is None:
        subject.live = steps.load(job, subject.side, "the subject", source.side.tokenizer), subject.side
    model, side = subject.live
    if request.edit is not None and loaded:
        edit = request.edit_facts
        made = registry.edits.create(edit["name"], **edit["plan"])
        facts, side = steps.apply_edit(job, model, side, made, {})
        subject.edit, subject.live = {**edit, **facts}, (model, side)
    if subject.measured is not None and cut is not None:
        if side.structure.weights_digest() != subject.measured.evidence.structure.weights_digest():
            raise EditError("the edit made other weights the second time; expected the same: use --no-early-stop")
        subject.measured = followed(job, model, side, subject.measured, "the subject", cut, baseline=source.measured)
        return
    subject.measured = measure(
        job, model, side, "the subject", baseline=source.measured, cut=cut, glances=subject.glances
    )
    failed = source.failed or {}
    if subject.measured.reach == job.glance:
        failed = dict.fromkeys(range(len(job.plugins)), _GLANCED)
        subject.overhead = {"evaluated": False, "ratio": None, "windows": 0, "skipped": _GLANCED}
    else:
        subject.overhead = steps.measure_overhead(job, model, subject.measured)
    subject.guards = {
        guard.name: steps.validate(job, guard, model, {"device": job.device}, failed.get(place))
        for place, guard in enumerate(job.plugins)
    }


def _finish(job: Job, request: CertifyRequest, report: RunReport, certificate: Mapping[str, Any]) -> Path:
    """Write the subject's report with what the comparison found."""
    report.metrics = {"primary_metric": certificate["primary_metric"], "verdict": certificate["verdict"]}
    for name in filter(certificate.get, BUILT_IN_GUARDS):
        report.guards[name] = {k: v for k, v in certificate[name].items() if k not in ("facts", "policy")}
    report.meta["timings"] = dict(job.timings)
    return _write(job, report.to_dict(), request.out / "edited")


def _write(job: Job, report: dict[str, Any], above: Path, reference: TokenReference | None = None) -> Path:
    folder = above / job.stamp
    if follows():
        return folder
    log = EventLog(folder / "events.jsonl", run_id=report["meta"]["run_id"])
    for name, seconds in job.timings.items():
        log.log(name, "end", seconds=seconds)
    log.log("report", "written", status=report["status"])
    log.close()
    return steps.write_measured(report, reference, folder)
