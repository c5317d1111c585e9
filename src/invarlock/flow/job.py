"""What a command works on: the request resolved once, and what has been seen so far. `certify`, `run` and `execute` order
the same steps (`steps.py`) over one `Job`."""

from __future__ import annotations

import contextlib
import datetime
import functools
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from invarlock.checkpoints.side import Loading
from invarlock.core import registry, settings
from invarlock.core.api import AdapterLike, Guard, ModelLike
from invarlock.core.device import make_deterministic, resolve_device
from invarlock.core.exceptions import ConfigError
from invarlock.core.ranks import Ranks
from invarlock.eval.metrics import Metric, metric_of
from invarlock.eval.sources.base import Scores, score_all, scored_tokens
from invarlock.eval.sources.engines import Engine
from invarlock.eval.sources.ranked import RankedSource
from invarlock.eval.sources.served import ServedSource
from invarlock.eval.sources.torch_model import TorchSource
from invarlock.evidence.plan import Cut, cuts, glance
from invarlock.evidence.windows import Window, Windows
from invarlock.guards.base import StatsGuard, configure_guards
from invarlock.policy.resolve import ResolvedPolicy, profile_values

__all__ = ["INTENTS", "Job", "Tick", "no_tick", "open_job", "resolved_metric"]

#: what the subject is meant to be: the same function; another one; the same function, built differently; the same weights
#: in another engine or version, judged by behaviour alone
INTENTS = ("preserve", "finetune", "restructure", "engine")
Tick = Callable[[str, int, int], None]  # what is being done, how much of it, out of how much


def no_tick(what: str, done: int, total: int) -> None:
    """Show nothing."""


@dataclass
class Job:
    """One command at work."""

    policy: ResolvedPolicy
    adapter: AdapterLike
    guards: list[Guard]
    device: str
    metric: Metric = metric_of("ppl_causal")  # until the adapter knows the checkpoint
    intent: str = "preserve"
    loading: Loading = Loading()
    tick: Tick = no_tick
    windows: Windows | None = None
    texts: dict[str, str] = field(default_factory=dict)  # the documents that windows were cut from, whole, by id
    native: bool = False  # whether a packed model's own runtime may execute it: one that is edited is dense
    ranks: Ranks | None = None  # the processes that measure together with this one
    partial: Path | None = None  # where parts of a measurement are kept until all are there
    notes: list[str] = field(default_factory=list)
    timings: dict[str, float] = field(default_factory=dict)
    now: datetime.datetime = field(default_factory=lambda: datetime.datetime.now(datetime.UTC))

    @property
    def stamp(self) -> str:
        """When the work began, as the name of a run's folder: UTC to the microsecond, so that names sort by time."""
        return self.now.strftime("%Y%m%dT%H%M%S%fZ")

    @functools.cached_property
    def cuts(self) -> list[Cut]:
        """How many windows of preview and final each look reaches; the last one reaches all."""
        assert self.windows is not None
        return cuts(self.windows, self.policy.limits.sample.early_documents)

    @functools.cached_property
    def glance(self) -> Cut | None:
        """How many windows of preview and final come before the first look, in batches of their own; None for one look."""
        assert self.windows is not None
        found = glance(self.windows) if len(self.cuts) > 1 else None
        return found if found is not None and sum(found) < sum(self.cuts[0]) else None

    @functools.cached_property
    def largest(self) -> int:
        """The scored tokens of the largest document that is planned."""
        assert self.windows is not None
        sizes = Counter[str]()
        for window in self.windows.all:
            sizes[window.document] += scored_tokens(window, self.metric.task)
        return max(sizes.values())

    def scored(self, windows: Windows) -> int:
        """Return how many tokens of the windows the metric scores."""
        return sum(scored_tokens(window, self.metric.task) for window in windows.all)

    @property
    def plugins(self) -> list[Guard]:
        """The guards that are not in the measure / pair / judge form."""
        return [guard for guard in self.guards if not isinstance(guard, StatsGuard)]

    def source(self, model: ModelLike, key: str | None = None) -> TorchSource | ServedSource:
        """Return what scores windows with a model: live, on several ranks, or served. `key`: under which parts of what it
        gives are kept, which must cover all that they depend on."""
        if isinstance(model, Engine):
            return ServedSource(model, folder=self.partial)
        if self.ranks is not None:
            folder = None if self.partial is None or key is None else self.partial / key
            return RankedSource(model, self.metric.task, ranks=self.ranks, folder=folder, device=self.device)
        return TorchSource(model, self.metric.task, device=self.device)

    def score(self, model: ModelLike, windows: Sequence[Window]) -> Scores:
        """Score windows, and nothing more."""
        return score_all(self.source(model).score(windows), len(windows))

    @contextlib.contextmanager
    def timed(self, name: str) -> Iterator[None]:
        """Record how long a step took in all, in seconds, also where it fails."""
        started = time.perf_counter()
        try:
            yield
        finally:
            self.timings[name] = round(self.timings.get(name, 0.0) + time.perf_counter() - started, 3)

    @contextlib.contextmanager
    def calling(self, step: str) -> Iterator[None]:
        """Show whatever is done as one step of this name, which counts for nothing of the whole."""
        tick = self.tick
        self.tick = lambda what, done, total: tick(step, 0, 1)
        try:
            yield
        finally:
            self.tick = tick

    def facts(self, edit: str) -> dict[str, Any]:
        """Return what a report says of the command: time, tier, policy, intent, device, environment, plugins."""
        guards = list({guard.name: _origin(guard) for guard in self.guards}.values())
        return {
            "created": self.now.isoformat(timespec="seconds"),
            "policy": {**self.policy.provenance(), "values": self.policy.values, "digest": self.policy.digest},
            "intent": self.intent,
            "device": self.device,
            "env_flags": settings.environment_flags(),
            "plugins": {"adapter": self.adapter.name, "edit": edit, "guards": guards},
        }


def _origin(guard: Guard) -> dict[str, Any]:
    """Say where a guard comes from: its distribution, or the caller who handed over an object of an unregistered name."""
    entry = registry.guards.entries().get(guard.name)
    origin, version = (entry.origin, entry.version) if entry is not None else ("Caller", None)
    return {"name": guard.name, "origin": origin, "version": version}


def resolved_metric(asked: str, adapter: AdapterLike) -> Metric:
    """Return the metric; `auto` follows the model. Raises ConfigError for one that such a model cannot be measured by."""
    own = str(getattr(adapter, "metric_kind", "ppl_causal"))
    metric, task = metric_of(own if asked == "auto" else asked), getattr(adapter, "task", None)
    if task is not None and metric.task != task:
        raise ConfigError(
            f"the metric is {asked}, for {metric.task} models, and the model is {task}; use auto or {own}"
        )
    return metric


def open_job(
    policy: ResolvedPolicy, adapter: str, device: str, guards: Sequence[Guard], tick: Tick | None, **facts: Any
) -> Job:
    """Create the adapter, resolve the device (the profile's where `auto` is asked for), seed all, configure the guards.

    The metric stays open until the adapter knows the checkpoint.
    """
    wanted = profile_values(policy.profile).get("device", "auto") if device == "auto" else device
    device = resolve_device(str(wanted))
    ranks = facts.get("ranks")
    if ranks is not None and device == "cuda":
        device = f"cuda:{ranks.local}"
    make_deterministic(policy.limits.bootstrap.seed)
    configure_guards(guards, policy.limits.guards)
    return Job(policy, registry.adapters.create(adapter), list(guards), device, tick=tick or no_tick, **facts)
