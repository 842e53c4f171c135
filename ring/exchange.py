"""Moving keys and values to the ranks that need them, and their gradients back.

An exchange is one all-to-all-v of exactly the tokens of the schedule, key heads unexpanded. What
goes from one rank to another is one message: all k, then all v (or dk and dv). So what a rank
receives are rows ``[2 tokens, Hkv, D]``, for two peers::

    k of peer 0 | v of peer 0 | k of peer 1 | v of peer 1

One collective and not two: on a GPU a second one could be left waiting while attention kernels hold
every multiprocessor, long after the first. If nothing moves on any rank there are no stages and no
collective is started: all ranks know it, from the layout.

All ranks start the same exchanges in the same order: those with nothing to send or receive too.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator, Sequence
from typing import NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

from ring.planner.schedule import Exchange, Parts, RingSchedule, Stage

KV = Tensor | tuple[Tensor, Tensor]  # k and v, or dk and dv, [tokens, Hkv, D] each


class Transfer(NamedTuple):
    """An exchange under way.

    Attributes:
        exchange: what it is.
        received: messages ``[2 tokens, Hkv, D]``, to be read after :meth:`wait`.
        sent: what is being sent, held until the transfer is over.
        work: of the collective.
    """

    exchange: Exchange
    received: Tensor
    sent: Tensor
    work: dist.Work

    def wait(self) -> Tensor:
        """What was received; on CUDA its transfer is then ordered before later kernels."""
        self.work.wait()
        return self.received


class Arrivals:
    """The stages of a schedule with their slabs, each transferred while others are used.

    Two transfers start here, each next one as soon as the buffer of one of them is free again. In a
    chain a stage forwards what the one before brought: there one transfer starts here, and the next
    one when the stage before it is taken. The order of transfers is that of the stages either way.

    Args:
        k: ``[T, Hkv, D]``, last dim contiguous.
        v: as ``k``.
        schedule: of this rank.
        cp_group: the context-parallel group; may be None where nothing moves.

    Communication: for each stage one all-to-all-v; in all ``2 R Hkv D`` elements received, R =
    ``schedule.received_tokens``.
    """

    def __init__(
        self,
        k: Tensor,
        v: Tensor,
        schedule: RingSchedule,
        cp_group: dist.ProcessGroup | None,
    ) -> None:
        self._own, self._stages, self._group = (k, v), schedule.stages, cp_group
        self._buffers = make_buffers(k, schedule)
        self._started, self._transfers = 0, deque[Transfer]()
        self._chain = schedule.way == "chain"  # not whether this rank forwards: all ranks as one
        self._slab: tuple[Tensor, Tensor] = self._own  # the first stage forwards nothing
        for _ in range(1 if self._chain else 2):
            self._start_next()
        give_way(*self._transfers)

    def __iter__(self) -> Iterator[tuple[Stage, Tensor, Tensor]]:
        """Each stage with k and v of its slab; :meth:`release` it before taking the next."""
        for stage in self._stages:
            yield self._taken(stage)  # nothing here holds a slab while the next is put together

    def release(self) -> None:
        """All that reads the slab taken last is queued: start what is received in its place."""
        if not self._chain:
            self._start_next()

    def _taken(self, stage: Stage) -> tuple[Stage, Tensor, Tensor]:
        slab = unpacked(self._transfers.popleft().wait(), stage.fetch.receive_tokens)
        if self._chain:
            self._slab = slab
            self._start_next()
            self._slab = self._own
            give_way(*self._transfers)
        return stage, *slab

    def _start_next(self) -> None:
        number = self._started
        if number < len(self._stages):
            self._started, fetch = number + 1, self._stages[number].fetch
            # Always a copy: no transfer reads a buffer that a later one is received into.
            sent = packed(fetch.sends, self._own, self._slab)
            self._transfers.append(_start(fetch, sent, self._buffers[number], self._group))


def make_buffers(k: Tensor, schedule: RingSchedule) -> list[Tensor]:
    """Memory that stages are received into, in turn in two buffers.

    Args:
        k: dtype, device and shape ``[T, Hkv, D]``.
        schedule: of this rank.

    Returns:
        For each stage ``[2 tokens, Hkv, D]`` for its messages.
    """
    rows = [2 * stage.tokens for stage in schedule.stages]
    buffers = [k.new_empty(max(rows[i::2], default=0), *k.shape[1:]) for i in (0, 1)]
    return [buffers[number % 2][:length] for number, length in enumerate(rows)]


def give_back(stage: Stage, dslab: Tensor, cp_group: dist.ProcessGroup | None) -> Transfer:
    """Start sending the gradients of a slab on: to the next rank of a chain, or to the owner.

    Args:
        stage: the stage they belong to.
        dslab: dk and dv ``[2, tokens, Hkv, D]``, float32 or float64; not to be changed.
        cp_group: the context-parallel group.

    Returns:
        A transfer of the gradients that come here after this stage, for :func:`add_returned`.

    Communication: one all-to-all-v in the dtype of ``dslab``.
    """
    exchange = stage.give_back
    whole = [list(part.tokens) for parts in exchange.sends for part in parts]
    if whole == [[0, stage.tokens]]:
        sent = dslab.flatten(0, 1)  # to one rank, in order: it is the message
    else:
        sent = packed(exchange.sends, dslab, dslab)
    received = dslab.new_empty(2 * sum(exchange.receive_tokens), *dslab.shape[2:])
    transfer = _start(exchange, sent, received, cp_group)
    give_way(transfer)
    return transfer


def add_returned(transfer: Transfer, dkv: KV, dslab: KV) -> None:
    """Wait for what comes back and add it, source by source: a fixed order.

    Args:
        transfer: that :func:`give_back` started.
        dkv: of own tokens; changed.
        dslab: of the *next* stage, whose gradients a chain brings here first; changed.
    """
    exchange = transfer.exchange
    messages = transfer.wait().split([2 * tokens for tokens in exchange.receive_tokens])
    for parts, tokens, message in zip(exchange.receives, exchange.receive_tokens, messages):
        lengths = [part.tokens.tokens for part in parts]
        for i, gradients in enumerate((message[:tokens], message[tokens:])):
            for part, gradient in zip(parts, gradients.split(lengths)):
                (dslab if part.of_slab else dkv)[i][slice(*part.tokens)] += gradient


def packed(sends: Sequence[Parts], own: KV, slab: KV) -> Tensor:
    """Messages to each rank, end to end: ``[2 tokens, Hkv, D]``, a copy."""
    rows = [
        (slab if part.of_slab else own)[i][slice(*part.tokens)]
        for parts in sends
        for i in (0, 1)
        for part in parts
    ]
    return torch.cat(rows) if rows else own[0].new_empty(0, *own[0].shape[1:])


def unpacked(messages: Tensor, tokens: Sequence[int]) -> tuple[Tensor, Tensor]:
    """Keys and values ``[tokens, Hkv, D]`` of all peers; contiguous, of one peer views."""
    sizes = [size for size in tokens if size for _ in "kv"]
    if len(sizes) <= 2:
        k, v = messages.tensor_split(2)
        return k, v
    rows = messages.split(sizes)
    return torch.cat(rows[::2]), torch.cat(rows[1::2])


def give_way(*transfers: Transfer) -> None:
    """Let transfers that just started have multiprocessors before the next attention kernel.

    cuDNN's kernels are persistent and take every multiprocessor at once. A transfer's kernel that
    becomes ready at the same moment gets none until such a kernel ends, up to 85 ms later. So the
    stream of the attention does nothing for about 10 us, on one thread: the transfer comes first.
    """
    moves = any(sum(t.exchange.send_tokens) + sum(t.exchange.receive_tokens) for t in transfers)
    if moves and transfers[0].received.is_cuda:
        with torch.cuda.device_of(transfers[0].received):
            torch.cuda._sleep(HEAD_START_CYCLES)


HEAD_START_CYCLES = 4_000  # 10 us on an H100; the transfer is 2 us behind


def _start(
    exchange: Exchange, sent: Tensor, received: Tensor, cp_group: dist.ProcessGroup | None
) -> Transfer:
    work = dist.all_to_all_single(
        received,
        sent,
        [2 * tokens for tokens in exchange.receive_tokens],
        [2 * tokens for tokens in exchange.send_tokens],
        group=cp_group,
        async_op=True,
    )
    return Transfer(exchange, received, sent, work)
