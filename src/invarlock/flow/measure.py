"""One model and one set of windows in, one piece of evidence out. Used for both sides, in memory and from checkpoints."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import accumulate
from typing import Any

from invarlock.certificate.looks import fortunes, lost
from invarlock.checkpoints.side import Side
from invarlock.core.api import AdapterLike, ModelLike
from invarlock.core.device import library_versions, thread_count
from invarlock.core.files import plain
from invarlock.eval import divergence
from invarlock.eval.metrics import Task
from invarlock.eval.sources.base import Column, Glance, Scores, Watch, score_all
from invarlock.eval.sources.engines import Engine
from invarlock.eval.sources.served import ServedSource
from invarlock.eval.sources.torch_model import TorchSource
from invarlock.evidence.model import (
    DataFacts,
    EngineFacts,
    Evidence,
    GlanceFacts,
    ModelFacts,
    Plan,
    Runtime,
    canonical_digest,
)
from invarlock.evidence.plan import Cut
from invarlock.evidence.reference import TokenReference, joined, reference_digest
from invarlock.evidence.rows import WindowRows
from invarlock.evidence.windows import IGNORED, Window, Windows
from invarlock.flow.job import Job
from invarlock.guards.base import StatsGuard
from invarlock.guards.invariants import stats_of
from invarlock.guards.peaks import BlockPeaks
from invarlock.guards.routing import RoutedTokens
from invarlock.guards.rows import standing_rows
from invarlock.guards.sketch import sketch_model
from invarlock.guards.spectral import SpectralGuard
from invarlock.stats.coverage import vocabulary_seen

__all__ = ["Measurement", "files_only", "followed", "is_lost", "measure", "model_facts", "shown", "weights_of"]

_MOST_ROWS = 64  # of tokens whose texts are told


@dataclass(frozen=True)
class Measurement:
    """The evidence of one side, and the compact distributions where they were kept."""

    evidence: Evidence
    reference: TokenReference | None = None

    @property
    def reach(self) -> Cut:
        """How many windows of preview and final were measured."""
        return len(self.evidence.preview.window_ids), len(self.evidence.final.window_ids)

    def by_split(self) -> list[TokenReference]:
        """Return the distributions of preview and of final."""
        assert self.reference is not None
        middle, end = sum(self.evidence.preview.tokens), len(self.reference.label_log_prob)
        return [self.reference.rows(0, middle), self.reference.rows(middle, end)]

    def reference_of(self, start: Cut, stop: Cut | None) -> TokenReference | None:
        """Return the distributions of the windows of both splits from `start` to `stop`, all where None."""
        if self.reference is None or (start, stop or self.reach) == ((0, 0), self.reach):
            return self.reference
        parts = []
        for place, (split, part) in enumerate(zip(("preview", "final"), self.by_split(), strict=True)):
            ends = list(accumulate(getattr(self.evidence, split).tokens, initial=0))
            parts.append(part.rows(ends[start[place]], ends[(stop or self.reach)[place]]))
        return joined(parts)

    @property
    def guard_stats(self) -> dict[str, dict[str, Any]]:
        """What each built-in guard measured, by name."""
        return {**self.evidence.guards, "invariants": stats_of(self.evidence)}


def model_facts(model: ModelLike, adapter: AdapterLike, side: Side) -> ModelFacts:
    """Return who the model is. A plugin's `describe` may lack any key; of a served one the files alone are known."""
    if isinstance(model, Engine):
        return _identity(side, adapter, parameters=sum(math.prod(t.shape) for t in side.structure.tensors))
    described = dict(adapter.describe(model))
    parameters = list(model.parameters()) if hasattr(model, "parameters") else []
    kind, count = described.get("model_class"), sum(p.numel() for p in parameters)
    dtype = str(parameters[0].dtype).removeprefix("torch.") if parameters else None
    return _identity(side, adapter, model_class=kind, parameters=count, dtype=dtype, describe=described)


def _identity(side: Side, adapter: AdapterLike, **found: Any) -> ModelFacts:
    digest, size = side.tokenizer_facts
    tokenizer = {"tokenizer_digest": digest, "tokenizer_size": size}
    return ModelFacts(
        id=side.id, adapter=adapter.name, behaviour=side.behaviour, usage=side.usage, **tokenizer, **found
    )


def measure(
    job: Job,
    model: ModelLike,
    side: Side,
    what: str,
    *,
    baseline: Measurement | None = None,
    cut: Cut | None = None,
    glances: bool = False,
) -> Measurement:
    """Score windows once, with the guards watching, then measure the weights.

    `side` says what the model is as a checkpoint. `baseline` is what this side is compared with; without one this is the
    baseline's side, whose distributions are kept. `cut` says how many windows of preview and final to score, all where
    None; `followed` adds later ones. With `glances` a subject that is lost on the windows of the glance is measured on
    these alone, and so is a baseline where `cut` is the glance: without guards, peaks and experts. What an engine does
    not give is not measured; weights are read from the files where they are at hand.
    """
    assert job.windows is not None
    windows = job.windows if cut is None else job.windows.between((0, 0), cut)
    ordered = {g.name: g for g in job.guards if isinstance(g, StatsGuard) and g.name != "invariants"}
    weights, source = weights_of(job, model, side), job.source(model)
    given = source.provides | (frozenset() if isinstance(weights, Engine) else {"weights"})
    guards = {name: guard for name, guard in ordered.items() if guard.needs in given and not _brief(job, cut)}
    sampled = _places(windows, job.cuts[0])
    watching = [guard.watch(weights, job.adapter, len(sampled)) for guard in guards.values()]
    peaks, routed = _watchers(model)
    watch = [replace(one, windows=frozenset(sampled[i] for i in one.windows)) for one in watching if one is not None]
    watch += [peaks.watch(len(windows.all)), routed.watch(len(windows.all))]
    scores = _score(job, model, side, windows, what, baseline, ((0, 0), cut), watch, glances)
    if scores.ended:
        assert job.glance is not None
        windows, cut, guards = windows.between((0, 0), job.glance), job.glance, {}
    used = scores.reference if baseline is None else baseline.reference
    facts = model_facts(model, job.adapter, side)
    evidence = Evidence(
        metric_kind=job.metric.kind,
        model=facts,
        data=_data(job, model, side.tokenizer_facts[1], windows),
        plan=_plan(job, cut, glances=glances),
        **_rows(scores, windows),
        structure=side.structure,
        guards={name: guard.measure(weights, job.adapter) for name, guard in guards.items()},
        sketches=dict(sketch_model(weights)) if hasattr(weights, "named_parameters") else {},
        kl_histogram=scores.kl_histogram,
        kl_unbiased=_unbiased(used, source) if scores.kl_histogram else None,
        contracts=_contracts(job, windows, ordered.values()),
        reference_digest=reference_digest(used) if used is not None else None,
        peaks=None if _brief(job, cut) else peaks.peaks() or None,
        experts=None if _brief(job, cut) else routed.counts() or None,
        runtime=_runtime(job, source, facts.dtype or "unknown"),
    )
    if baseline is not None:
        _name_rows(baseline.evidence, evidence, side)
    return Measurement(evidence, scores.reference)


def _name_rows(baseline: Evidence, subject: Evidence, side: Side) -> None:
    """Add to the subject's measurements the texts of the tokens whose rows stand out, those of special tokens first."""
    name, tokenizer = SpectralGuard.name, side.tokenizer
    if tokenizer is None or not {name} <= baseline.guards.keys() & subject.guards.keys():
        return
    rows = standing_rows(baseline.guards[name], subject.guards[name], at_least=len(tokenizer))
    special = {*tokenizer.all_special_ids, *(i for i, t in tokenizer.added_tokens_decoder.items() if t.special)}
    first = sorted(rows, key=lambda row: (row not in special, row))[:_MOST_ROWS]
    if first:
        texts = tokenizer.convert_ids_to_tokens(first)
        subject.guards[name]["tokens"] = [[row, str(text)] for row, text in zip(first, texts, strict=True)]


def followed(
    job: Job,
    model: ModelLike,
    side: Side,
    earlier: Measurement,
    what: str,
    cut: Cut,
    *,
    baseline: Measurement | None = None,
) -> Measurement:
    """Score the windows between those of `earlier` and `cut`, and return the whole.

    What the guards measured stays as it is: they look at weights and at windows of the first look alone.
    """
    assert job.windows is not None
    start = earlier.reach
    windows = job.windows.between(start, cut)
    peaks, routed = _watchers(model)
    watch = [peaks.watch(len(windows.all)), routed.watch(len(windows.all))]
    scores = _score(job, model, side, windows, what, baseline, (start, cut), watch)
    old, rows = earlier.evidence, _rows(scores, windows)
    more = Measurement(old.model_copy(update=rows), scores.reference)
    reference = joined(_in_turn(earlier, more)) if scores.reference is not None else None
    counts = (old.kl_histogram, scores.kl_histogram)
    used = reference if baseline is None else baseline.reference
    changes = {
        "plan": _plan(job, cut, old.plan),
        **{split: getattr(old, split).followed_by(rows[split]) for split in ("preview", "final")},
        "kl_histogram": None if None in counts else [a + b for a, b in zip(*counts, strict=True)],  # type: ignore[arg-type]
        "reference_digest": reference_digest(used) if used is not None else None,
        "peaks": _larger(old.peaks or {}, peaks.peaks()) or None,
        "experts": routed.counts(old.experts or {}) or None,
        "data": _data(job, model, old.model.tokenizer_size, job.windows.between((0, 0), cut)),
    }
    return Measurement(old.model_copy(update=changes), reference)


def _watchers(model: ModelLike) -> tuple[BlockPeaks, RoutedTokens]:
    seen: ModelLike = object() if getattr(model, "runs_elsewhere", False) else model  # type: ignore[assignment]
    return BlockPeaks(seen), RoutedTokens(seen)


def _score(
    job: Job,
    model: ModelLike,
    side: Side,
    windows: Windows,
    what: str,
    baseline: Measurement | None,
    part: tuple[Cut, Cut | None],
    watch: Sequence[Watch],
    glances: bool = False,
) -> Scores:
    keep = baseline is None and job.policy.limits.divergence.mode != "off"
    reference = None if baseline is None else baseline.reference_of(*part)
    key = _key(job, side, windows, reference) if job.ranks is not None else None
    first = _places(windows, job.glance) if job.glance is not None and part[0] == (0, 0) else []
    scored = job.source(model, key).score(
        windows.all, reference=reference, keep_reference=keep, correct=job.metric.is_accuracy, watch=watch, first=first
    )
    total = job.scored(windows)

    def ends(columns: dict[str, Column]) -> bool:
        assert job.windows is not None and job.glance is not None
        return is_lost(job, _rows(Scores(columns), job.windows.between((0, 0), job.glance)).values())

    glance = Glance(first, ends) if glances and first else None
    return score_all(scored, len(windows.all), lambda tokens: job.tick(f"measuring {what}", tokens, total), glance)


def _places(windows: Windows, cut: Cut) -> list[int]:
    """Return the indices, among all of these windows, of those that `cut` takes. Guards sample among those of the first
    look, so that they see the same however far a measurement goes."""
    first, final = cut
    return [*range(first), *range(len(windows.preview), len(windows.preview) + final)]


def _brief(job: Job, cut: Cut | None) -> bool:
    """Whether no more is measured than a glance."""
    return cut is not None and cut == job.glance


def is_lost(job: Job, rows: Iterable[WindowRows]) -> bool:
    """Whether a subject's rows of preview and final, those of the glance, show that it is beyond a limit."""
    return lost(fortunes(rows, job.policy.limits, job.largest))


def _unbiased(used: TokenReference | None, source: TorchSource | ServedSource) -> bool | None:
    """True where the tail of both sides was at hand; None where the divergence is a lower bound."""
    return True if used is not None and used.tail_ids is not None and "distributions" in source.provides else None


def _plan(job: Job, cut: Cut | None, earlier: Plan | None = None, *, glances: bool = False) -> Plan | None:
    assert job.windows is not None
    if cut is None:
        return None
    if earlier is not None:
        return earlier.model_copy(update={"reached": [*earlier.reached, cut]})
    whole = job.windows
    return Plan(
        documents=len({window.document for window in whole.all}),
        windows=(len(whole.preview), len(whole.final)),
        tokens=job.scored(whole),
        reached=[cut],
        glance=GlanceFacts(windows=job.glance, largest=job.largest) if glances and job.glance else None,
    )


def _in_turn(earlier: Measurement, more: Measurement) -> list[TokenReference]:
    """Return the distributions of two measurements, those of preview before those of final."""
    return [part for split in range(2) for one in (earlier, more) for part in [one.by_split()[split]]]


def _larger(old: Mapping[str, float | None], new: Mapping[str, float | None]) -> dict[str, float | None]:
    """Return the larger magnitudes; what is not finite is the largest."""
    pairs = {name: (old.get(name, 0.0), new.get(name, 0.0)) for name in {**old, **new}}
    return {name: None if a is None or b is None else max(a, b) for name, (a, b) in pairs.items()}


def _data(job: Job, model: ModelLike, tokenizer_size: int | None, reached: Windows) -> DataFacts:
    """Return the facts of the planned text, with how much of the vocabulary stands in what was reached of it."""
    assert job.windows is not None
    weight = getattr(getattr(model, "get_input_embeddings", lambda: None)(), "weight", None)
    rows = int(weight.shape[0]) if weight is not None else None
    size = min(filter(None, (tokenizer_size, rows)), default=None)
    ids = [token for window in reached.all for token in shown(window.dressed(), job.metric.task)]
    seen = vocabulary_seen([ids], max(size, max(ids) + 1))._asdict() if size and ids else None
    return job.windows.facts().model_copy(update={"vocabulary_seen": seen})


def shown(window: Window, task: Task) -> Iterator[int]:
    """Yield every token of a window once, whether it is an input, hidden behind a mask, or a target."""
    if task == "seq2seq":
        yield from (*window.input_ids, *(token for token in window.labels or () if token != IGNORED))
    elif task == "mlm":
        pairs = zip(window.input_ids, window.labels or window.input_ids, strict=True)
        yield from (token if label == IGNORED else label for token, label in pairs)
    else:
        yield from window.input_ids


def _key(job: Job, side: Side, windows: Windows, reference: TokenReference | None) -> str:
    """Return a digest of all that the figures of windows depend on."""
    facts = [job.metric.kind, job.device, thread_count(), library_versions(), side.structure.weights_digest()]
    facts += [side.behaviour, str(job.loading), job.native, windows.digest(), job.policy.values["guards"]]
    against = reference_digest(reference) if reference is not None else str(job.policy.limits.divergence.mode)
    return canonical_digest(plain([*facts, job.intent, against]))[:16]


def weights_of(job: Job, model: ModelLike, side: Side) -> ModelLike:
    """Return what the weights are read from: the model, or the files of a served one, left on disk until they are read.
    Where there are none, or behaviour alone is judged, it is the engine, which has no weights."""
    served = isinstance(model, Engine)
    if not served or side.folder is None or not side.structure.tensors or job.intent == "engine":
        return model
    options = {**job.loading.options, "device_map": "disk"}
    return replace(job.loading, options=options).load(job.adapter, side, "cpu")


def _runtime(job: Job, source: TorchSource | ServedSource | None, dtype: str) -> Runtime:
    tokens, threads = (source.batch_tokens, thread_count()) if source is not None else (0, 0)
    common = {"dtype": dtype, "batch_tokens": tokens, "threads": threads, "versions": library_versions()}
    if isinstance(source, ServedSource):
        return Runtime(device=source.device, engine=EngineFacts(**source.engine.facts()), **common)
    return Runtime(device=job.device, **common)


def _contracts(job: Job, windows: Windows, guards: Iterable[StatsGuard]) -> dict[str, str]:
    contracts = {guard.name: guard.contract() for guard in guards} | {"divergence": divergence.contract()}
    around = {"prefix": list(windows.prefix), "suffix": list(windows.suffix)}
    contracts["windows"] = {"task": job.metric.task, "log": "natural", "masked": "never"}
    contracts["windows"] |= {name: ids for name, ids in around.items() if ids}
    return {name: canonical_digest(contract)[:16] for name, contract in contracts.items()}


def _rows(scores: Scores, windows: Windows) -> dict[str, Any]:
    cut = len(windows.preview)
    return {
        split: WindowRows.of(
            [window.id for window in windows.all[part]],
            [window.document for window in windows.all[part]],
            {**_kinds(windows.all[part]), **{name: values[part] for name, values in scores.columns.items()}},
        )
        for split, part in (("preview", slice(cut)), ("final", slice(cut, None)))
    }


def _kinds(windows: Sequence[Window]) -> dict[str, list[str]]:
    """Return the kind of each window's text as a column, where there are several."""
    named = [window.slice for window in windows if window.slice is not None]
    return {"slices": named} if named else {}


def files_only(job: Job, side: Side) -> Evidence:
    """Return the evidence of a checkpoint of which only the files were read: no rows."""
    sample = job.policy.limits.sample
    nothing = Windows((), (), 0, (sample.preview, sample.final))
    return Evidence(
        metric_kind=job.metric.kind,
        model=_identity(side, job.adapter, parameters=sum(math.prod(t.shape) for t in side.structure.tensors)),
        data=nothing.facts().model_copy(update={"provider": "none", "digest": ""}),
        **_rows(Scores({"tokens": [], "loss": []}), nothing),
        structure=side.structure,
        runtime=_runtime(job, None, "unknown"),
    )
