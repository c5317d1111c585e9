"""Which tensors carry a subject's damage.

1. models: load both, tell which parameters differ; cut windows to search on, and others that are held back
2. blocks: one pass of both over a few windows: where their hidden states part
3. ranking: expected damage of every change alone, from the baseline's gradients
4. alone: give back the first of the ranking one by one, and measure what each recovers; then who recovers most beside it
5. together: give back the first two, three, five ... until what is left passes; the smallest number by halving

Whatever ends it early (a budget, Ctrl-C), what was found is kept.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from invarlock.checkpoints.side import Loading, Side
from invarlock.core.api import ModelLike
from invarlock.core.files import plain
from invarlock.evidence.windows import Windows
from invarlock.flow import steps
from invarlock.flow.damage import Changed, Damage, Trials, changed_tensors, part_ways, rank, share_unchanged
from invarlock.flow.job import Job, Tick, open_job, resolved_metric
from invarlock.flow.sampling import cut_windows
from invarlock.policy.resolve import resolve_policy

__all__ = ["BisectRequest", "Bisection", "Search", "bisect", "open_search", "seconds"]

_PARTING_WINDOWS = 8
_RANKING_WINDOWS = 32
_ALONE = 6
_LARGE = 2  # of those with the largest relative change, tried alone whatever their rank
_PLACES = 3  # places of the ranking that are filled one after the other
_NEXT = 4  # tensors that are tried for the second place and the third
_STEPS = (1, 2, 3, 5, 8, 13, 21, 34, 55, 89, 144, 233, 377, 610)
_HALF = 0.5
_KEPT = (
    "baseline", "subject", "changed", "parameters", "blocks", "explained", "uniform", "stopped", "windows", "timings",
    "notes",
)  # fmt: skip


@dataclass(frozen=True)
class BisectRequest:
    """What to search. `search` and `held` are windows: to choose by, and held back. `budget` is in seconds."""

    baseline: str
    subject: str
    adapter: str = "auto"
    device: str = "auto"
    loading: Loading = Loading()
    tier: str = "balanced"
    dataset: Mapping[str, Any] = field(default_factory=dict)
    search: int = 64
    held: int = 0
    budget: float | None = None
    overrides: Mapping[str, Any] = field(default_factory=dict)


@dataclass
class Search:
    """Both sides loaded, and the windows of a search."""

    job: Job
    sides: tuple[Side, Side]
    baseline: ModelLike
    subject: ModelLike
    windows: Windows
    deadline: float | None = None

    def late(self) -> bool:
        """Say whether the budget is spent."""
        return self.deadline is not None and time.monotonic() > self.deadline


@dataclass
class Bisection:
    """What a search found. `ranking` is worst first; `alone` and `together` hold the damage left when tensors are given
    back, by name and by how many of the ranking; `explained` are the fewest of the ranking that make it pass."""

    baseline: str
    subject: str
    changed: int = 0
    parameters: int = 0
    blocks: dict[str, float] = field(default_factory=dict)
    ranking: list[Changed] = field(default_factory=list)
    whole: Damage | None = None
    alone: dict[str, Damage] = field(default_factory=dict)
    together: dict[int, Damage] = field(default_factory=dict)
    explained: list[str] | None = None
    uniform: bool = False
    stopped: str | None = None
    windows: dict[str, int] = field(default_factory=dict)
    timings: dict[str, float] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)

    @property
    def parting(self) -> str | None:
        """The block after which the distance grew most."""
        before = [0.0, *self.blocks.values()]
        grown = [(now - was, path) for (path, now), was in zip(self.blocks.items(), before, strict=False)]
        return max(grown)[1] if grown and max(grown)[0] > 0 else None

    def recovered(self, name: str) -> float | None:
        """Return the nats of KL that giving back one tensor recovers; None where it was not tried."""
        if self.whole is None or name not in self.alone:
            return None
        return self.whole.kl.estimate - self.alone[name].kl.estimate

    @property
    def lines(self) -> list[str]:
        """Return what was found in words."""
        return list(_words(self))

    def to_dict(self) -> dict[str, Any]:
        """Return all of it as plain data."""
        found = {key: getattr(self, key) for key in _KEPT}
        found |= {"parting": self.parting, "whole": self.whole and self.whole.to_dict(), "summary": self.lines}
        found["ranking"] = [{**change.to_dict(), "recovered": self.recovered(change.name)} for change in self.ranking]
        found["alone"] = {name: damage.to_dict() for name, damage in self.alone.items()}
        found["together"] = {str(count): damage.to_dict() for count, damage in self.together.items()}
        done: dict[str, Any] = plain(found)
        return done


def _words(found: Bisection) -> Iterator[str]:
    if not found.changed:
        yield "no parameter differs: there is no damage to find in the weights"
        return
    if found.whole is not None:
        state = "passes" if found.whole.passes else "fails" if found.whole.fails else "is undecided"
        yield f"the subject {state} on {found.windows.get('search', 0)} windows: {found.whole.words}"
    if found.parting:
        yield f"hidden states part most at {found.parting}"
    for name in list(found.alone)[:3] if not found.uniform else ():
        change = next(change for change in found.ranking if change.name == name)
        recovered, whole = found.recovered(name) or 0.0, found.whole.kl.estimate if found.whole else 0.0
        share = f" ({recovered / whole:.0%})" if whole > 0 else ""
        yield f"{name}: {change.words}; giving it back recovers {recovered:.4f} nats{share}"
    if found.uniform:
        yield f"uniform: no set smaller than half of the changed weights ({found.changed} tensors) explains the damage"
    elif found.explained:
        named = ", ".join(found.explained[:4]) + ", …" * (len(found.explained) > 4)
        yield f"giving back {len(found.explained)} of {found.changed} changed tensors makes it pass: {named}"
    if found.stopped:
        yield f"stopped early ({found.stopped}): this is what was found until then"


def open_search(request: BisectRequest, tick: Tick | None) -> Search:
    """Read and load both sides and cut the windows: those to search on as preview, those held back as final."""
    sample = {"sample": {"preview": request.search, "final": max(request.held, 2)}}
    policy = resolve_policy(request.tier, "dev", overrides={**request.overrides, **sample})
    job = open_job(policy, request.adapter, request.device, (), tick, loading=request.loading)
    started = time.monotonic()
    with job.timed("files"):
        sides = steps.read(job, request.baseline), steps.read(job, request.subject)
    job.metric = resolved_metric("auto", job.adapter)
    with job.timed("data"):
        windows = cut_windows(job, sides[0], request.dataset)
    with job.timed("loading"):
        models = [
            steps.load(job, side, what) for side, what in zip(sides, ("the baseline", "the subject"), strict=True)
        ]
    deadline = None if request.budget is None else started + request.budget
    return Search(job, sides, models[0], models[1], windows, deadline)


def bisect(search: Search, found: Bisection | None = None) -> Bisection:
    """Search. `found` is filled as the search goes, so that who interrupts it has what there is."""
    found = found if found is not None else Bisection(search.sides[0].id, search.sides[1].id)
    try:
        _search(search, found)
    except KeyboardInterrupt:
        found.stopped = "interrupted"
    found.timings, found.notes = dict(search.job.timings), list(search.job.notes)
    return found


def _search(search: Search, found: Bisection) -> None:
    job, windows = search.job, search.windows.preview
    found.windows = {"search": len(windows), "ranking": min(_RANKING_WINDOWS, len(windows))}
    with job.timed("comparing"):
        changes = changed_tensors(search.baseline, search.subject)
        share_unchanged(search.baseline, search.subject, changes)
    found.changed, found.parameters = len(changes), sum(1 for _ in search.baseline.named_parameters())
    if not changes:
        return
    found.ranking = sorted(changes.values(), key=lambda change: -(change.rel_change or 0.0))
    with job.timed("blocks"):
        found.blocks = part_ways(job, search.baseline, search.subject, windows[:_PARTING_WINDOWS])
    with job.timed("ranking"):
        first = windows[:_RANKING_WINDOWS]
        rank(job, search.baseline, search.subject, changes, first, stop=search.late)
    found.ranking = sorted(changes.values(), key=_worst_first)
    with job.timed("baseline"):
        trials = Trials(job, search.baseline, search.subject, windows)
    with job.timed("trials"):
        found.whole = trials.damage()
        _alone(search, found, trials)
        if not found.whole.passes:
            _together(search, found, trials.damage)


def _worst_first(change: Changed) -> float:
    return -change.expected if change.expected == change.expected else float("inf")


def _alone(search: Search, found: Bisection, trials: Trials) -> None:
    """Give back the first of the ranking, and those that changed most, each alone; then order these by what they recover."""
    largest = sorted(found.ranking, key=lambda change: -(change.rel_change or float("inf")))[:_LARGE]
    chosen = list(dict.fromkeys(change.name for change in (*found.ranking[:_ALONE], *largest)))
    tried: dict[str, Damage] = {}
    for done, name in enumerate(chosen):
        if search.late():
            found.stopped = "the budget is spent"
            break
        tried[name] = trials.damage([name])
        found.alone = dict(sorted(tried.items(), key=lambda pair: pair[1].kl.estimate))
        search.job.tick("giving back one tensor", done + 1, len(chosen))
    first = dict.fromkeys([*_one_after_the_other(search, found, trials), *found.alone])
    order = {name: place for place, name in enumerate(first)}
    found.ranking.sort(key=lambda change: order.get(change.name, len(order)))


def _one_after_the_other(search: Search, found: Bisection, trials: Trials) -> list[str]:
    """Return the first places: who recovers most alone, then who does once those before are given back. Beside great damage
    a second one shows nothing alone; its expected damage does not depend on the first."""
    placed = list(found.alone)[:1]
    found.together.update((1, found.alone[name]) for name in placed)
    left = sorted((change for change in found.ranking if change.name in found.alone), key=_worst_first)
    while placed and len(placed) < _PLACES and not found.together[len(placed)].passes and not search.late():
        names = [change.name for change in left if change.name not in placed][:_NEXT]
        tried = {name: trials.damage([*placed, name]) for name in names}
        if not tried:
            break
        placed.append(min(tried, key=lambda name: tried[name].kl.estimate))
        found.together[len(placed)] = tried[placed[-1]]
    return placed


def _together(search: Search, found: Bisection, damage: Callable[[Sequence[str]], Damage]) -> None:
    """Find the fewest of the ranking that make the subject pass when they are given back."""
    names = [change.name for change in found.ranking]

    def passes(count: int) -> bool:
        if count not in found.together:
            found.together[count] = damage(names[:count])
            search.job.tick("giving back together", count, len(names))
        return found.together[count].passes

    below, above = 0, None
    for count in [*(step for step in _STEPS if step < len(names)), len(names)]:
        if search.late():
            found.stopped = "the budget is spent"
            break
        if passes(count):
            above = count
            break
        below = count
    while above is not None and above - below > 1 and not search.late():
        middle = (below + above) // 2
        below, above = (below, middle) if passes(middle) else (middle, above)
    found.together = dict(sorted(found.together.items()))
    if above is not None:
        found.explained = names[:above]
    values = [change.values for change in found.ranking]
    found.uniform = above is not None and above > 1 and sum(values[:above]) > _HALF * sum(values)


def seconds(text: str) -> float:
    """Return a duration such as `90`, `90s`, `3m` or `1h` in seconds. Raises ValueError for anything else."""
    units = {"s": 1.0, "m": 60.0, "h": 3600.0}
    number, unit = (text[:-1], units[text[-1]]) if text and text[-1] in units else (text, 1.0)
    found = float(number) * unit
    if not 0 < found < float("inf"):
        raise ValueError(text)
    return found
