"""Moving keys and values to the ranks that need them, and their gradients back.

One all-to-all-v carries k and v in one slab ``[tokens, 2, Hkv, D]``: exactly the tokens of the
schedule, each once for each receiver, key heads unexpanded. If the schedule says that nothing moves
on any rank, no collective is started: all ranks know it, from the layout.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

from ring.schedule import Interval, RingSchedule


class Transfer(NamedTuple):
    """An all-to-all under way.

    Attributes:
        received: the receive buffer, to be read after :meth:`wait`.
        sent: the send buffer, held until the transfer is over.
        work: None where no collective was started.
    """

    received: Tensor
    sent: Tensor
    work: dist.Work | None

    def wait(self) -> Tensor:
        """The receive buffer; on CUDA its transfer is then ordered before later kernels."""
        if self.work is not None:
            self.work.wait()
        return self.received


def fetch_kv(
    k: Tensor, v: Tensor, schedule: RingSchedule, cp_group: dist.ProcessGroup | None
) -> Transfer:
    """Start bringing the keys and values that this rank's rectangles need.

    Args:
        k: ``[T, Hkv, D]``.
        v: ``[T, Hkv, D]``.
        schedule: of this rank.
        cp_group: the context-parallel group.

    Returns:
        A transfer of ``[R, 2, Hkv, D]``, R = ``sum(schedule.received_tokens)``, in the dtype of
        ``k``; the tokens lie in the order of ``schedule.receives``.

    Communication: one all-to-all-v over ``cp_group``; receives 2 R Hkv D elements.
    """
    sent = k.new_empty(sum(schedule.sent_tokens), 2, *k.shape[1:])
    for (start, stop), piece in _sent_pieces(sent, schedule):
        torch.stack((k[start:stop], v[start:stop]), dim=1, out=piece)
    return _all_to_all(sent, schedule.sent_tokens, schedule.received_tokens, schedule, cp_group)


def return_kv_gradients(
    dkv_received: Tensor, schedule: RingSchedule, cp_group: dist.ProcessGroup | None
) -> Transfer:
    """Start sending the gradients of received keys and values to their owners.

    Args:
        dkv_received: ``[R, 2, Hkv, D]``, float32 or float64, laid out as :func:`fetch_kv` returned.
        schedule: of this rank.
        cp_group: the context-parallel group.

    Returns:
        A transfer of this rank's own tokens as every other rank used them, for
        :func:`add_returned`.

    Communication: one all-to-all-v over ``cp_group``, :func:`fetch_kv` reversed, in the dtype of
    ``dkv_received``.
    """
    return _all_to_all(
        dkv_received, schedule.received_tokens, schedule.sent_tokens, schedule, cp_group
    )


def add_returned(dkv: Tensor, returned: Tensor, schedule: RingSchedule) -> None:
    """Add what came back to ``dkv`` ``[T, 2, Hkv, D]`` in place, rank by rank: a fixed order."""
    for (start, stop), part in _sent_pieces(returned, schedule):
        dkv[start:stop] += part


def _sent_pieces(slab: Tensor, schedule: RingSchedule) -> Iterator[tuple[Interval, Tensor]]:
    """The intervals that this rank sends, each with its view of a slab that holds them in order."""
    intervals = [interval for sent in schedule.sends for interval in sent]
    return zip(intervals, slab.split([interval.tokens for interval in intervals]))


def _all_to_all(
    sent: Tensor,
    send_tokens: list[int],
    receive_tokens: list[int],
    schedule: RingSchedule,
    cp_group: dist.ProcessGroup | None,
) -> Transfer:
    received = sent.new_empty(sum(receive_tokens), *sent.shape[1:])
    work = None
    if schedule.moves:
        work = dist.all_to_all_single(
            received, sent, receive_tokens, send_tokens, group=cp_group, async_op=True
        )
    return Transfer(received, sent, work)
