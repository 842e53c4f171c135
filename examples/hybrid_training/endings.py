"""How a rank ends: asked to, by what it computed, or because another rank did. One line says which.

torchrun starts ranks again that ended with a status other than 0, up to ``--max-restarts`` times.
"""

from __future__ import annotations

import os
import signal
import sys
import traceback
from types import TracebackType
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.checkpoint.api import CheckpointException

from lasp.hybrid import missing_ranks
from lasp.state_exchange import ExchangeError

ASKED_TO_STOP = 128 + signal.SIGTERM  # what shells call it: not 0, for the run is not done


class Ending:
    """``with Ending() as ending``: ends this process by one line where the run cannot go on.

    Bad options, a full disk, losses that are not finite, and ranks that are gone are one line on
    each rank and status 1; any other error keeps its traceback.

    Attributes:
        doing: what this rank does, for the line.
        asked: whether SIGTERM came: schedulers send it, and torchrun when another rank ended.
        stopping: whether it came on any rank before the last step was gathered.
    """

    def __init__(self) -> None:
        self.doing, self.asked, self.stopping = "start", False, False

    def __enter__(self) -> Ending:
        signal.signal(signal.SIGTERM, self._ask)
        return self

    def _ask(self, *_: Any) -> None:
        self.asked = True

    def gather(self, step: int, loss: Tensor, aux_loss: Tensor) -> tuple[float, float]:
        """Loss and auxiliary loss of a step, whose shares every rank hands in; sets ``stopping``.

        Communication: one all-gather of three numbers a rank.

        Raises:
            FloatingPointError: on every rank, if one of the shares is not finite.
        """
        asked = loss.new_tensor(float(self.asked))
        mine = torch.stack([x.detach().double() for x in (loss, aux_loss, asked)])
        shares = [torch.empty_like(mine) for _ in range(dist.get_world_size())]
        dist.all_gather(shares, mine)
        table = torch.stack(shares).cpu()
        if bad := [rank for rank, row in enumerate(table) if not row.isfinite().all()]:
            raise FloatingPointError(
                f"the loss of step {step} must be finite, got {table[bad[0], 0]:g} and auxiliary"
                f" {table[bad[0], 1]:g} on rank {bad[0]} (such ranks: {bad}); nothing was updated:"
                " docs/when-it-goes-wrong.md says what to look at"
            )
        whole_loss, whole_aux_loss, number_asked = table.sum(0).tolist()
        self.stopping = number_asked > 0
        return whole_loss, whole_aux_loss

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, _: TracebackType | None
    ) -> None:
        if error is None or isinstance(error, SystemExit | KeyboardInterrupt):
            return
        why = _explained(error) or "".join(traceback.format_exception(error))
        rank, ranks = dist.get_rank(), dist.get_world_size()
        sys.stdout.flush()
        print(f"rank {rank} of {ranks}, {self.doing}: {why}", file=sys.stderr, flush=True)
        os._exit(1)  # a regular exit would wait for collectives that never end


def _explained(error: BaseException) -> str | None:
    """A line for what no rank can help; None for any other error."""
    if isinstance(error, CheckpointException):
        failed = {rank: failure for rank, (failure, _) in error.failures.items()}
        return "; ".join(f"rank {rank}: {failure}" for rank, failure in failed.items())
    if isinstance(error, ValueError | FloatingPointError | OSError):
        return str(error)
    of_a_peer = isinstance(error, ExchangeError | dist.DistError)
    if of_a_peer or (isinstance(error, RuntimeError) and "gloo" in str(error)):
        missing = missing_ranks(dist.group.WORLD) if dist.group.WORLD else []
        said = str(error).splitlines()[0]
        return (
            f"another rank ended or does not answer, no word yet from ranks {missing}: see what"
            f" they said last, and go on with --resume ({said})"
        )
    return None
