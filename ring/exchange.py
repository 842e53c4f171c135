"""Moving keys and values to the ranks that need them, and their gradients back.

An exchange is one all-to-all-v of exactly the tokens of the schedule, key heads unexpanded. What
goes from one rank to another is one message: all k, then all v (or dk and dv), whose widths may
differ. A rank receives from two peers for example::

    k of peer 0 | v of peer 0 | k of peer 1 | v of peer 1

So memory for n tokens is ``[n, W]``, W elements a token of k and v together: its rows are counted
by tokens, but do not hold those of one token.

Keys and values travel in one collective and not in two: on a GPU a second one could be left waiting
while attention kernels hold every multiprocessor, long after the first. If nothing moves on any
rank there are no stages and no collective is started: all ranks know it, from the layout.

All ranks start the same exchanges in the same order, even with nothing to send or receive.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable, Iterator, Sequence
from functools import cached_property
from typing import NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

from ring.planner.ranges import RowRange, TokenIndex
from ring.planner.schedule import KVSlices, RingSchedule, RingStage, StageExchange

KV = tuple[Tensor, ...]  # k [tokens, Hkv, D] and v [tokens, Hkv, V], or dk and dv; contiguous


class KVTransfer(NamedTuple):
    """An exchange under way.

    Attributes:
        exchange: what is sent and received.
        received: messages ``[tokens, W]``, to be read after :meth:`wait`.
        sent: the messages being sent, held until the transfer is over.
        work: handle of the collective.
    """

    exchange: StageExchange
    received: Tensor
    sent: Tensor
    work: dist.Work

    def wait(self) -> Tensor:
        """Return what was received; on CUDA its transfer is then ordered before later kernels."""
        self.work.wait()
        return self.received


class KVPrefetcher:
    """The stages of a schedule with their kv buffers, each transferred while others are used.

    Two transfers start here, each next one as soon as the memory of one of them is free again. In a
    chain a stage forwards what the one before brought: there one transfer starts here, and the next
    one when the stage before it is taken. The order of transfers is that of the stages either way::

        direct    start 1, 2 | take 1, release, start 3 | take 2, release, start 4 | ...
        chain     start 1    | take 1, start 2          | take 2, start 3          | ...

    Args:
        own: k and v of the rank's tokens.
        schedule: of this rank.
        cp_group: the context-parallel group; may be None where nothing moves.

    Communication: one all-to-all-v for each stage; it receives ``R W`` elements in all, R =
    ``schedule.received_tokens`` and W those of k and v of a token.
    """

    def __init__(self, own: KV, schedule: RingSchedule, cp_group: dist.ProcessGroup | None) -> None:
        self._own, self._stages, self._group = own, schedule.stages, cp_group
        if not self._stages:
            return
        self._memory = receive_memory(own, schedule)
        self._started, self._transfers = 0, deque[KVTransfer]()
        self._chain = schedule.route == "chain"  # on every rank, whether it forwards or not
        self._forwarded = own  # the first stage forwards nothing
        for _ in range(1 if self._chain else 2):
            self._start_next()
        yield_sms(*self._transfers)

    def __iter__(self) -> Iterator[tuple[RingStage, KV]]:
        """Each stage with its kv buffer; :meth:`release` it before taking the next."""
        for stage in self._stages:
            yield self._taken(stage)  # no buffer is held here while the next is put together

    def release(self) -> None:
        """Start the transfer that reuses the memory taken last: all that reads it is queued."""
        if not self._chain:
            self._start_next()

    def _taken(self, stage: RingStage) -> tuple[RingStage, KV]:
        received = self._transfers.popleft().wait()
        kv_buffer = unpack_messages(received, stage.kv_exchange.receive_tokens, self._own)
        if self._chain:
            self._forwarded = kv_buffer
            self._start_next()
            self._forwarded = self._own
            yield_sms(*self._transfers)
        return stage, kv_buffer

    def _start_next(self) -> None:
        number = self._started
        if number < len(self._stages):
            self._started, exchange = number + 1, self._stages[number].kv_exchange
            # Always a copy: no transfer reads memory that a later one is received into.
            sent = pack_messages(exchange.sends, self._own, self._forwarded)
            self._transfers.append(_start(exchange, sent, self._memory[number], self._group))


def receive_memory(own: KV, schedule: RingSchedule) -> list[Tensor]:
    """Memory that stages are received into; they take turns in two tensors.

    Args:
        own: give dtype, device and widths.
        schedule: of this rank.

    Returns:
        ``[tokens, W]`` for the messages of each stage.
    """
    if not schedule.stages:
        return []
    tokens = [stage.tokens for stage in schedule.stages]
    memory = [own[0].new_empty(max(tokens[i::2], default=0), _width(own)) for i in (0, 1)]
    return [memory[number % 2][:length] for number, length in enumerate(tokens)]


class GradientSums:
    """Sums of gradients to the keys and values of some tokens, in memory once they are asked for.

    Args:
        tokens: which rows have a sum, of the rank's tokens or of a kv buffer.
        like: give widths and device.
        dtype: of the sums.
        once: each row gets one gradient, which is stored and not added to zeros.
    """

    def __init__(self, tokens: TokenIndex, like: KV, dtype: torch.dtype, *, once: bool) -> None:
        self._tokens, self._like, self._dtype, self._once = tokens, like, dtype, once

    @cached_property
    def memory(self) -> Tensor:
        """All sums, ``[tokens, W]``."""
        make = self._like[0].new_empty if self._once else self._like[0].new_zeros
        return make(self._tokens.length, _width(self._like), dtype=self._dtype)

    @cached_property
    def kv(self) -> KV:
        """The views of the memory, shaped as ``like``."""
        return unpack_messages(self.memory, (self._tokens.length,), self._like)

    def add(self, rows: RowRange, gradients: Iterable[Tensor]) -> None:
        """Add the gradients of some rows, all within one of the ranges of ``tokens``."""
        where = slice(*self._tokens.find(*rows))
        for sums, gradient in zip(self.kv, gradients):
            if self._once:
                sums[where].copy_(gradient)
            else:
                sums[where] += gradient

    def add_to(self, gradients: Iterable[Tensor]) -> None:
        """Add the sums to gradients of all rows, rounded to their dtype."""
        if not self._tokens.length:
            return
        lengths = [rows.length for rows in self._tokens.ranges]
        for gradient, sums in zip(gradients, self.kv):
            for rows, part in zip(self._tokens.ranges, sums.split(lengths)):
                gradient[slice(*rows)] += part


def send_kv_grads(
    stage: RingStage, memory: Tensor, dkv_buffer: KV, cp_group: dist.ProcessGroup | None
) -> KVTransfer:
    """Start sending the gradients of a kv buffer, to the next rank of a chain or to the owner.

    Args:
        stage: the stage they belong to.
        memory: ``[tokens, W]``, float32 or float64; not to be changed.
        dkv_buffer: the views of it, see :class:`GradientSums`.
        cp_group: the context-parallel group.

    Returns:
        A transfer of the gradients that come here after this stage, for
        :func:`accumulate_kv_grads`.

    Communication: one all-to-all-v in the dtype of ``memory``.
    """
    exchange = stage.grad_exchange
    whole = [list(part.rows) for parts in exchange.sends for part in parts]
    # What goes to one rank in order is the message as it lies.
    sent = memory
    if whole != [[0, stage.tokens]]:
        sent = pack_messages(exchange.sends, dkv_buffer, dkv_buffer)
    received = memory.new_empty(sum(exchange.receive_tokens), *memory.shape[1:])
    transfer = _start(exchange, sent, received, cp_group)
    yield_sms(transfer)
    return transfer


def accumulate_kv_grads(transfer: KVTransfer, own: GradientSums, dkv_buffer: KV) -> None:
    """Wait for gradients and add them, rank by rank: a fixed order.

    Args:
        transfer: started by :func:`send_kv_grads`.
        own: gradients of own tokens; changed.
        dkv_buffer: gradients of the *next* stage, which receives those of a chain; changed.
    """
    exchange = transfer.exchange
    messages = transfer.wait().split(list(exchange.receive_tokens))
    for parts, tokens, message in zip(exchange.receives, exchange.receive_tokens, messages):
        lengths = [part.rows.length for part in parts]
        gradients = (x.split(lengths) for x in unpack_messages(message, (tokens,), dkv_buffer))
        for part, of_part in zip(parts, zip(*gradients)):
            if not part.in_buffer:
                own.add(part.rows, of_part)
                continue
            for sums, gradient in zip(dkv_buffer, of_part):
                sums[slice(*part.rows)] += gradient


def pack_messages(sends: Sequence[KVSlices], own: KV, kv_buffer: KV) -> Tensor:
    """Messages to each rank, end to end: ``[tokens, W]``, a copy."""
    rows = [
        (kv_buffer if part.in_buffer else own)[i][slice(*part.rows)].flatten()
        for parts in sends
        for i in range(len(own))
        for part in parts
    ]
    return torch.cat(rows or [own[0].new_empty(0)]).view(-1, _width(own))


def unpack_messages(messages: Tensor, tokens: Sequence[int], like: KV) -> KV:
    """Keys and values of all peers, shaped as ``like``; contiguous, views if one peer sent."""
    widths = [x.shape[1:].numel() for x in like]
    lengths = [n for n in tokens if n] or [0]
    parts = messages.flatten().split([n * width for n in lengths for width in widths])
    by_tensor = (parts[i :: len(like)] for i in range(len(like)))
    return tuple(
        (torch.cat(some) if len(some) > 1 else some[0]).view(-1, *x.shape[1:])
        for some, x in zip(by_tensor, like)
    )


def _width(kv: KV) -> int:
    """W: elements of k and v of a token."""
    return sum(x.shape[1:].numel() for x in kv)


def yield_sms(*transfers: KVTransfer) -> None:
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
    exchange: StageExchange, sent: Tensor, received: Tensor, cp_group: dist.ProcessGroup | None
) -> KVTransfer:
    work = dist.all_to_all_single(
        received,
        sent,
        list(exchange.receive_tokens),
        list(exchange.send_tokens),
        group=cp_group,
        async_op=True,
    )
    return KVTransfer(exchange, received, sent, work)
