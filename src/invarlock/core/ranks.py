"""Several processes that measure together, started by `torchrun`: who this one is, and what all of them share.

Every rank does the same work in the same order and comes to the same certificate; they share windows out among them and
exchange what these showed. Rank 0 leads: it alone writes and speaks.
"""

from __future__ import annotations

import datetime
import os
from collections.abc import Iterator
from typing import TYPE_CHECKING, NamedTuple, TypeVar

from invarlock.core import settings
from invarlock.core.exceptions import RankError
from invarlock.core.files import first_line

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup

__all__ = ["Ranks", "follows", "join", "under_torchrun"]

T = TypeVar("T")
_groups: list[ProcessGroup] = []  # the one that this process has joined


class Ranks(NamedTuple):
    """This process among `world`; `local` is its number on its machine, and that of its GPU."""

    rank: int
    world: int
    local: int

    def deal(self, count: int) -> Iterator[tuple[int, int | None]]:
        """Yield (first of a round, own number in it or None): `count` pieces of work in rounds of one a rank."""
        for start in range(0, count, self.world):
            own = start + self.rank
            yield start, own if own < count else None

    def share(self, own: T, what: str) -> list[T]:
        """Return what every rank gives, in their order. Raises RankError where one does not come, in bounded time."""
        import torch.distributed as dist

        everyone: list[T | None] = [None] * self.world
        try:
            dist.all_gather_object(everyone, own, group=_groups[0])
        except RuntimeError as error:
            first = first_line(error)[:200]
            raise RankError(
                f"rank {self.rank} of {self.world} waited for the others in {what} and one is gone ({first}); start "
                "again with the same --out: what was measured is kept"
            ) from error
        return everyone  # type: ignore[return-value]  # each was filled


def _told() -> Ranks | None:
    names = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR")
    if not all(name in os.environ for name in names):
        return None
    return Ranks(*(int(os.environ[name]) for name in names[:3]))


def under_torchrun() -> bool:
    """Say whether `torchrun` started this process, alone or with others."""
    return _told() is not None


def follows() -> bool:
    """Say whether another rank leads, which writes and speaks."""
    told = _told()
    return told is not None and told.rank > 0


def join() -> Ranks | None:
    """Join the ranks that `torchrun` started; None where it did not start this process. They exchange plain data over the
    network between their hosts (gloo), whatever computes."""
    told = _told()
    if told is None or _groups:
        return told
    import torch.distributed as dist

    patience = datetime.timedelta(seconds=float(settings.get("INVARLOCK_RANK_TIMEOUT")))
    try:
        if dist.is_initialized():
            _groups.append(dist.new_group(backend="gloo", timeout=patience))
        else:
            dist.init_process_group("gloo", timeout=patience)
            _groups.append(dist.distributed_c10d._get_default_group())
    except (RuntimeError, ValueError) as error:
        raise RankError(f"rank {told.rank} of {told.world} could not join the others: {error}") from error
    return told
