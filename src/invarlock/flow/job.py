"""What a command works on: the request resolved once, and what has been seen so far. `certify`, `run` and `execute` order
the same steps (`steps.py`) over one `Job`."""

from __future__ import annotations

import contextlib
import datetime
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

from invarlock.checkpoints.side import Loading
from invarlock.core import registry, settings
from invarlock.core.api import AdapterLike, Guard
from invarlock.core.device import make_deterministic, resolve_device
from invarlock.eval.metrics import Metric, metric_of
from invarlock.evidence.windows import Windows
from invarlock.flow.run_folder import time_stamp
from invarlock.guards.base import StatsGuard, configure_guards
from invarlock.policy.resolve import ResolvedPolicy, profile_values

__all__ = ["Job", "Tick", "no_tick", "open_job", "resolved_metric"]

Tick = Callable[[str, int, int], None]  # what is being done, how much of it, out of how much


def no_tick(what: str, done: int, total: int) -> None:
    """Show nothing."""


@dataclass
class Job:
    """One command at work."""

    policy: ResolvedPolicy
    adapter: AdapterLike
    guards: list[Guard]
    metric: Metric
    device: str
    intent: str = "preserve"
    loading: Loading = Loading()
    tick: Tick = no_tick
    windows: Windows | None = None
    notes: list[str] = field(default_factory=list)
    timings: dict[str, float] = field(default_factory=dict)
    now: datetime.datetime = field(default_factory=lambda: datetime.datetime.now(datetime.UTC))

    @property
    def created(self) -> str:
        """When the work began, as ISO 8601 to the second."""
        return self.now.isoformat(timespec="seconds")

    @property
    def stamp(self) -> str:
        """When it began, as the name of a run's folder."""
        return time_stamp(self.now)

    @property
    def plugins(self) -> list[Guard]:
        """The guards that are not in the measure / pair / judge form."""
        return [guard for guard in self.guards if not isinstance(guard, StatsGuard)]

    @property
    def wants_reference(self) -> bool:
        """Whether the baseline's next-token distributions are kept, to compare the subject's with."""
        return bool(self.policy.values["metrics"]["divergence"]["mode"] != "off")

    def guard_policy(self, name: str) -> dict[str, Any]:
        """Return a guard's part of the policy, with the intent."""
        return {**self.policy.values["guards"].get(name, {}), "intent": self.intent}

    @contextlib.contextmanager
    def timed(self, name: str) -> Iterator[None]:
        """Record how long a step took, in seconds, also where it fails."""
        started = time.perf_counter()
        try:
            yield
        finally:
            self.timings[name] = round(time.perf_counter() - started, 3)

    def facts(self, edit: str) -> dict[str, Any]:
        """Return what a report says of the command: time, tier, policy, intent, device, environment, plugins."""
        return {
            "created": self.created,
            "policy": {**self.policy.provenance(), "values": self.policy.values, "digest": self.policy.digest},
            "intent": self.intent,
            "device": self.device,
            "env_flags": settings.environment_flags(),
            "plugins": {"adapter": self.adapter.name, "edit": edit, "guards": [_origin(g) for g in self._distinct()]},
        }

    def _distinct(self) -> Sequence[Guard]:
        return list({guard.name: guard for guard in self.guards}.values())


def _origin(guard: Guard) -> dict[str, Any]:
    """Say where a guard comes from: its distribution, or the caller who handed over an object of an unregistered name."""
    entry = registry.guards.entries().get(guard.name)
    if entry is None:
        return {"name": guard.name, "origin": "Caller", "version": None}
    return {"name": guard.name, "origin": entry.origin, "version": entry.version}


def resolved_metric(asked: str, adapter: AdapterLike) -> Metric:
    """Return the metric; `auto` follows the model."""
    return metric_of(str(getattr(adapter, "metric_kind", "ppl_causal")) if asked == "auto" else asked)


def open_job(
    policy: ResolvedPolicy,
    adapter: AdapterLike,
    guards: Sequence[Guard],
    *,
    device: str,
    seed: int | None = None,
    **facts: Any,
) -> Job:
    """Resolve the device (the profile's where `auto` is asked for), seed everything and configure the guards.

    The metric stays open until the adapter knows the checkpoint: `facts` may hold it.
    """
    if device == "auto":
        device = str(profile_values(policy.profile).get("device", "auto"))
    device = resolve_device(device)
    make_deterministic(int(policy.values["bootstrap"]["seed"] if seed is None else seed))
    configure_guards(guards, policy.values["guards"])
    metric = facts.pop("metric", None) or metric_of("ppl_causal")
    return Job(policy=policy, adapter=adapter, guards=list(guards), metric=metric, device=device, **facts)
