"""What a rank says when a collective breaks: which one, and who is missing.

gloo raises on the ranks that wait, with an address for a name, when a connection closes or the
timeout of the group has passed. The ranks that saw it then call the roll through the store that the
group was made with, so that each can name those who did not answer. With NCCL no rank waits on the
host: the watchdog of torch ends the process after the timeout and names the collective.
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager

import torch
import torch.distributed as dist

from lasp._core.checks import check_part

ROLL_CALL_S = 1.0


class ExchangeError(RuntimeError):
    """A state exchange, or the comparison of first calls, failed on this rank."""


@contextmanager
def naming(what: str, group: dist.ProcessGroup) -> Iterator[None]:
    """Errors of the collectives inside become an :class:`ExchangeError` that names them."""
    try:
        yield
    except torch.OutOfMemoryError:
        raise
    except RuntimeError as error:  # what gloo raises
        missing = missing_ranks(group)
        who = f"no word of ranks {missing}" if missing else "all ranks saw it fail"
        raise ExchangeError(
            f"{what} failed on rank {group.rank()} of {group.size()}: {who} (ranks of group"
            f" {group.group_name!r}) after {ROLL_CALL_S} s. A rank that is missing died, raised, or"
            f" never came here: see its log. {error}"
        ) from error


def missing_ranks(group: dist.ProcessGroup) -> list[int]:
    """Ranks of a group that have not reported within a second that a collective of it failed.

    Every rank on which one failed calls this; ranks that still wait for those are missing too.
    """
    check_part("group", group, dist.ProcessGroup)
    waiting = set(range(group.size()))
    deadline = time.monotonic() + ROLL_CALL_S
    try:
        store = group.get_group_store()
        store.set(_key(group.rank()), "")
        while True:
            waiting = {rank for rank in waiting if not store.check([_key(rank)])}
            if not waiting or time.monotonic() > deadline:
                return sorted(waiting)
            time.sleep(0.05)
    except RuntimeError:  # the store died with its rank
        return sorted(waiting - {group.rank()})


def _key(rank: int) -> str:
    return f"lasp.state_exchange failed on {rank}"
