"""The form of a built-in guard: measure one model, pair two measurements, judge the pair.

    measure(model) ──▶ stats ─┐
                              ├─ pair ──▶ facts ── judge(policy) ──▶ result
    measure(model) ──▶ stats ─┘

`pair` and `judge` are pure (no torch): a certificate embeds `facts`, and `verify` runs `judge` again on them. A guard
so written never sees both models at once and works with a stored baseline. A guard of activations says with `watch` what
it wants to see while windows are scored, and `measure` then reads what it saw: it never runs the model itself.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from typing import Any, ClassVar, Protocol, TypeAlias, runtime_checkable

from invarlock.core.api import AdapterLike, Context, Guard, ModelLike
from invarlock.core.exceptions import ConfigError, GuardError
from invarlock.core.registry import no_argument
from invarlock.eval.sources.base import Source, Watch
from invarlock.eval.sources.torch_model import TorchSource, task_of_model
from invarlock.evidence.windows import Window, calibration_windows
from invarlock.guards.boundary import Finding, Policy, Result, finding, result

__all__ = [
    "Facts",
    "Finding",
    "GuardWithRemedy",
    "Policy",
    "Result",
    "Stats",
    "StatsGuard",
    "by_name",
    "configure_guards",
    "finding",
    "result",
]

Stats: TypeAlias = dict[str, Any]  # JSON-ready: what `measure` saw on one model
Facts: TypeAlias = dict[str, Any]  # JSON-ready: two Stats side by side, all that `judge` needs


def by_name(baseline: list[Stats], subject: list[Stats]) -> tuple[list[tuple[Stats, Stats]], list[str], list[str]]:
    """Pair the entries of two measurements: (those of one name, the names on the baseline's side alone, the subject's)."""
    before, after = ({entry["name"]: entry for entry in side} for side in (baseline, subject))
    both = [(entry, after[name]) for name, entry in before.items() if name in after]
    return both, [name for name in before if name not in after], [name for name in after if name not in before]


def _check(guard: StatsGuard, given: Mapping[str, Any]) -> None:
    """Raise ConfigError for a constructor argument that the guard's policy does not have, or that is of another type."""
    for key, value in given.items() if guard.defaults else ():
        if key not in guard.defaults:
            raise no_argument(f"guard {guard.name!r}", key, guard.defaults)
        kinds, expected = _KINDS.get(type(guard.defaults[key]), (object, ""))
        wrong = not isinstance(value, kinds) or (isinstance(value, bool) and expected == "a number")
        if value is not None and wrong:
            raise ConfigError(f"guard {guard.name!r} got {key}={value!r}; expected {expected}")


#: type of a default -> the types that stand in its place, and their name
_KINDS: dict[type, tuple[Any, str]] = {
    bool: (bool, "True or False"), int: ((int, float), "a number"), float: ((int, float), "a number"),
    str: ((str, list, tuple), "text or a list"),
    dict: ((Mapping, int, float), "a mapping"), list: ((list, tuple), "a list"),
}  # fmt: skip


class StatsGuard(Guard):
    """A guard in the measure / pair / judge form."""

    #: what a source must provide for it: `weights` or `activations`
    needs: ClassVar[str] = "weights"
    #: names the defaults of every policy key; a constructor argument or the resolved policy overrides them
    defaults: ClassVar[dict[str, Any]] = {}

    def __init__(self, **overrides: Any) -> None:
        _check(self, overrides)
        self.overrides: dict[str, Any] = overrides
        self.policy: dict[str, Any] = {**self.defaults, **overrides}
        self.baseline: Stats | None = None
        self.subject: Stats | None = None

    def configure(self, policy: Policy) -> None:
        """Take the resolved policy; constructor arguments stand above it. Some keys change what is measured."""
        self.policy = {**self.defaults, **dict(policy), **self.overrides}

    @abstractmethod
    def contract(self) -> dict[str, Any]:
        """Return everything that changes what `measure` measures; two sides with other contracts do not compare."""

    def watch(self, model: ModelLike, adapter: AdapterLike, total: int) -> Watch | None:
        """Say which outputs to hand over while `total` windows are scored; None for a guard that looks at weights."""
        return None

    @abstractmethod
    def measure(self, model: ModelLike, adapter: AdapterLike) -> Stats:
        """Measure one model, after the pass whose outputs `watch` asked for."""

    @abstractmethod
    def pair(self, baseline: Stats, subject: Stats) -> Facts:
        """Put two measurements side by side. Pure."""

    @abstractmethod
    def judge(self, facts: Facts, policy: Policy) -> Result:
        """Decide from the facts alone. Pure; never passes on a missing or non-finite value."""

    def prepare(self, model: ModelLike, adapter: AdapterLike, calib: object, policy: Policy | None) -> dict[str, Any]:
        """Measure the unedited model; what a run has measured already is taken from `calib`."""
        self.configure(policy or {})
        self._batches = calib
        ready = getattr(calib, "measurements", {}).get(self.name)
        self.baseline = self.look(model, adapter, calib) if ready is None else ready
        return {"ready": True}

    def validate(self, model: ModelLike, adapter: AdapterLike, context: Context) -> Result:
        """Measure the edited model, unless the run has (`context["measurements"]`), and judge it."""
        if self.baseline is None:
            raise GuardError(f"guard {self.name!r} has no baseline: call prepare(...) on the unedited model first")
        ready = context.get("measurements", {}).get(self.name)
        self.subject = self.look(model, adapter, context.get("batches", self._batches)) if ready is None else ready
        return self.judge(self.pair(self.baseline, self.subject), self.policy)

    def look(self, model: ModelLike, adapter: AdapterLike, batches: object) -> Stats:
        """Measure a model outside a run: the windows that the guard wants to see are scored for its sake alone."""
        windows = [] if batches is None else calibration_windows(batches)
        watch = self.watch(model, adapter, len(windows)) if windows else None
        if watch is not None and hasattr(model, "named_modules"):
            source = TorchSource(model, task_of_model(model, adapter))
            chosen = [windows[index] for index in sorted(watch.windows)]
            if source.task != "causal":  # nothing is judged by the loss here, so windows may do without labels
                chosen = [replace(w, labels=w.input_ids) if w.labels is None else w for w in chosen]
            for _ in source.score(chosen, watch=[replace(watch, windows=frozenset(range(len(chosen))))]):
                pass
        return self.measure(model, adapter)


@runtime_checkable
class GuardWithRemedy(Protocol):
    """A guard that may change the edited model where its policy asks for that; only a run calls it."""

    def remedy(
        self, model: ModelLike, adapter: AdapterLike, outcome: Result, windows: Sequence[Window], source: Source
    ) -> tuple[Result, bool]:
        """Return the result with what was done or tried, and whether the model is another one now."""


def configure_guards(guards: Iterable[object], policies: Mapping[str, Policy]) -> None:
    """Give each built-in guard its part of the resolved policy; a plugin guard gets its own in `prepare`."""
    for guard in guards:
        if isinstance(guard, StatsGuard):
            guard.configure(policies.get(guard.name, {}))
