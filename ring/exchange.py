"""Moving keys and values to the ranks that need them, and their gradients back.

An exchange is two all-to-all-v, one for k and one for v (or dk and dv): exactly the tokens of the
schedule, key heads unexpanded. Received k and v are each contiguous, as dense kernels want them;
what lies in one piece is sent from where it lies. If nothing moves on any rank there are no stages
and no collective is started: all ranks know it, from the layout.

All ranks start the same exchanges in the same order: those with nothing to send or receive too.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

from ring.schedule import Exchange, Part, RingSchedule, Stage

DKV = Tensor | tuple[Tensor, Tensor]  # dk and dv, [tokens, Hkv, D] each


class Transfer(NamedTuple):
    """An exchange under way.

    Attributes:
        exchange: what it is.
        received: ``[2, tokens, Hkv, D]``, to be read after :meth:`wait`.
        sent: what is being sent, held until the transfer is over.
        works: of the collectives.
    """

    exchange: Exchange
    received: Tensor
    sent: tuple[Tensor, ...]
    works: tuple[dist.Work, ...]

    def wait(self) -> Tensor:
        """What was received; on CUDA its transfer is then ordered before later kernels."""
        for work in self.works:
            work.wait()
        return self.received


class Arrivals:
    """The stages of a schedule with their slabs, each transferred while its predecessor is used.

    The first transfer starts here, the next ones as a stage is taken: what is queued between two
    stages runs beside the transfer of the second.

    Args:
        k: ``[T, Hkv, D]``, last dim contiguous.
        v: as ``k``.
        schedule: of this rank.
        cp_group: the context-parallel group; may be None where nothing moves.
        slabs: one for each stage, see :func:`make_slabs`.

    Communication: for each stage two all-to-all-v; in all ``2 R Hkv D`` elements received, R =
    ``schedule.received_tokens``.
    """

    def __init__(
        self,
        k: Tensor,
        v: Tensor,
        schedule: RingSchedule,
        cp_group: dist.ProcessGroup | None,
        slabs: Sequence[Tensor],
    ) -> None:
        self._own, self._stages, self._group, self._slabs = (k, v), schedule.stages, cp_group, slabs
        self._transfer = self._start(0) if self._stages else None

    def __iter__(self) -> Iterator[tuple[Stage, Tensor]]:
        for number, stage in enumerate(self._stages):
            assert self._transfer is not None
            slab = self._transfer.wait()
            # Its target is the other buffer: the last kernels that read that are queued before it.
            later = number + 1 < len(self._stages)
            self._transfer = self._start(number + 1) if later else None
            yield stage, slab

    def _start(self, number: int) -> Transfer:
        # The first stage forwards nothing: what stands for the slab before it is not looked at.
        fetch, before = self._stages[number].fetch, self._slabs[max(0, number - 1)]
        sent = tuple(_packed(fetch.sends, own, before[i]) for i, own in enumerate(self._own))
        return _start(fetch, sent, self._slabs[number], self._group)


def make_slabs(k: Tensor, schedule: RingSchedule, *, keep: bool) -> tuple[Tensor, list[Tensor]]:
    """Memory that stages are received into.

    Args:
        k: dtype, device and shape ``[T, Hkv, D]``.
        schedule: of this rank.
        keep: every stage has its own tokens of one tensor ``[2, R, Hkv, D]``; else stages take
            turns in two buffers.

    Returns:
        That tensor, of no tokens if not kept, and for each stage a view ``[2, tokens, Hkv, D]``
        whose k and v are each contiguous.
    """
    lengths = [stage.tokens for stage in schedule.stages]
    if keep:
        kept = k.new_empty(2, sum(lengths), *k.shape[1:])
        return kept, list(kept.split(lengths, 1))
    buffers = [k.new_empty(2, max(lengths[i::2], default=0), *k.shape[1:]) for i in (0, 1)]
    slabs = [buffers[number % 2][:, :length] for number, length in enumerate(lengths)]
    return k.new_empty(2, 0, *k.shape[1:]), slabs


def give_back(stage: Stage, dslab: Tensor, cp_group: dist.ProcessGroup | None) -> Transfer:
    """Start sending the gradients of a slab on: to the next rank of a chain, or to the owner.

    Args:
        stage: the stage they belong to.
        dslab: dk and dv ``[2, tokens, Hkv, D]``, float32 or float64; not to be changed.
        cp_group: the context-parallel group.

    Returns:
        A transfer of the gradients that come here after this stage, for :func:`add_returned`.

    Communication: two all-to-all-v in the dtype of ``dslab``.
    """
    exchange = stage.give_back
    sent = tuple(_packed(exchange.sends, dslab[i], dslab[i]) for i in (0, 1))
    received = dslab.new_empty(2, sum(exchange.receive_tokens), *dslab.shape[2:])
    return _start(exchange, sent, received, cp_group)


def add_returned(transfer: Transfer, dkv: DKV, dslab: DKV) -> None:
    """Wait for what comes back and add it, source by source: a fixed order.

    Args:
        transfer: that :func:`give_back` started.
        dkv: of own tokens; changed.
        dslab: of the *next* stage, whose gradients a chain brings here first; changed.
    """
    returned, parts = transfer.wait(), transfer.exchange.receives
    for part, gradients in zip(parts, returned.split([part.tokens.tokens for part in parts], 1)):
        for into, gradient in zip(dslab if part.of_slab else dkv, gradients):
            into[slice(*part.tokens)] += gradient


def _packed(parts: Sequence[Part], own: Tensor, slab: Tensor) -> Tensor:
    """Tokens end to end; a view where they lie so."""
    pieces = [(slab if part.of_slab else own)[slice(*part.tokens)] for part in parts]
    if len(pieces) == 1 and pieces[0].is_contiguous():
        return pieces[0]
    return torch.cat(pieces) if pieces else own.new_empty(0, *own.shape[1:])


def _start(
    exchange: Exchange,
    sent: tuple[Tensor, ...],
    received: Tensor,
    cp_group: dist.ProcessGroup | None,
) -> Transfer:
    works = tuple(
        dist.all_to_all_single(
            into, of, list(exchange.receive_tokens), list(exchange.send_tokens),
            group=cp_group, async_op=True,
        )
        for into, of in zip(received.unbind(0), sent)
    )  # fmt: skip
    return Transfer(exchange, received, sent, works)
