"""Moving keys and values to the ranks that need them, and their gradients back.

An exchange is one all-to-all-v of exactly the tokens of the schedule, key heads unexpanded. What
goes from one rank to another is one message: all k, then all v (or dk and dv). So a rank receives
rows ``[2 tokens, Hkv, D]``, from two peers for example::

    k of peer 0 | v of peer 0 | k of peer 1 | v of peer 1

Keys and values travel in one collective and not in two: on a GPU a second one could be left waiting
while attention kernels hold every multiprocessor, long after the first. If nothing moves on any
rank there are no stages and no collective is started: all ranks know it, from the layout.

All ranks start the same exchanges in the same order, even with nothing to send or receive.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator, Sequence
from typing import NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

from ring.planner.schedule import KVSlices, RingSchedule, RingStage, StageExchange

KV = Tensor | tuple[Tensor, Tensor]  # k and v, or dk and dv, [tokens, Hkv, D] each


class KVTransfer(NamedTuple):
    """An exchange under way.

    Attributes:
        exchange: what is sent and received.
        received: messages ``[2 tokens, Hkv, D]``, to be read after :meth:`wait`.
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
        k: ``[T, Hkv, D]``, last dim contiguous.
        v: as ``k``.
        schedule: of this rank.
        cp_group: the context-parallel group; may be None where nothing moves.

    Communication: one all-to-all-v for each stage; it receives ``2 R Hkv D`` elements in all, R =
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
        self._memory = receive_memory(k, schedule)
        self._started, self._transfers = 0, deque[KVTransfer]()
        self._chain = schedule.route == "chain"  # on every rank, whether it forwards or not
        self._forwarded: tuple[Tensor, Tensor] = self._own  # the first stage forwards nothing
        for _ in range(1 if self._chain else 2):
            self._start_next()
        yield_sms(*self._transfers)

    def __iter__(self) -> Iterator[tuple[RingStage, Tensor, Tensor]]:
        """Each stage with k and v of its kv buffer; :meth:`release` it before taking the next."""
        for stage in self._stages:
            yield self._taken(stage)  # no buffer is held here while the next is put together

    def release(self) -> None:
        """Start the transfer that reuses the memory taken last: all that reads it is queued."""
        if not self._chain:
            self._start_next()

    def _taken(self, stage: RingStage) -> tuple[RingStage, Tensor, Tensor]:
        received = self._transfers.popleft().wait()
        kv_buffer = unpack_messages(received, stage.kv_exchange.receive_tokens)
        if self._chain:
            self._forwarded = kv_buffer
            self._start_next()
            self._forwarded = self._own
            yield_sms(*self._transfers)
        return stage, *kv_buffer

    def _start_next(self) -> None:
        number = self._started
        if number < len(self._stages):
            self._started, exchange = number + 1, self._stages[number].kv_exchange
            # Always a copy: no transfer reads memory that a later one is received into.
            sent = pack_messages(exchange.sends, self._own, self._forwarded)
            self._transfers.append(_start(exchange, sent, self._memory[number], self._group))


def receive_memory(k: Tensor, schedule: RingSchedule) -> list[Tensor]:
    """Memory that stages are received into; they take turns in two tensors.

    Args:
        k: gives dtype, device and shape ``[T, Hkv, D]``.
        schedule: of this rank.

    Returns:
        ``[2 tokens, Hkv, D]`` for the messages of each stage.
    """
    rows = [2 * stage.tokens for stage in schedule.stages]
    memory = [k.new_empty(max(rows[i::2], default=0), *k.shape[1:]) for i in (0, 1)]
    return [memory[number % 2][:length] for number, length in enumerate(rows)]


def send_kv_grads(
    stage: RingStage, dkv_buffer: Tensor, cp_group: dist.ProcessGroup | None
) -> KVTransfer:
    """Start sending the gradients of a kv buffer, to the next rank of a chain or to the owner.

    Args:
        stage: the stage they belong to.
        dkv_buffer: dk and dv ``[2, tokens, Hkv, D]``, float32 or float64; not to be changed.
        cp_group: the context-parallel group.

    Returns:
        A transfer of the gradients that come here after this stage, for
        :func:`accumulate_kv_grads`.

    Communication: one all-to-all-v in the dtype of ``dkv_buffer``.
    """
    exchange = stage.grad_exchange
    whole = [list(part.rows) for parts in exchange.sends for part in parts]
    if whole == [[0, stage.tokens]]:
        sent = dkv_buffer.flatten(0, 1)  # to one rank, in order: it is the message
    else:
        sent = pack_messages(exchange.sends, dkv_buffer, dkv_buffer)
    received = dkv_buffer.new_empty(2 * sum(exchange.receive_tokens), *dkv_buffer.shape[2:])
    transfer = _start(exchange, sent, received, cp_group)
    yield_sms(transfer)
    return transfer


def accumulate_kv_grads(transfer: KVTransfer, dkv: KV, dkv_buffer: KV) -> None:
    """Wait for gradients and add them, rank by rank: a fixed order.

    Args:
        transfer: started by :func:`send_kv_grads`.
        dkv: gradients of own tokens; changed.
        dkv_buffer: gradients of the *next* stage, which receives those of a chain; changed.
    """
    exchange = transfer.exchange
    messages = transfer.wait().split([2 * tokens for tokens in exchange.receive_tokens])
    for parts, tokens, message in zip(exchange.receives, exchange.receive_tokens, messages):
        lengths = [part.rows.length for part in parts]
        for i, gradients in enumerate((message[:tokens], message[tokens:])):
            for part, gradient in zip(parts, gradients.split(lengths)):
                (dkv_buffer if part.in_buffer else dkv)[i][slice(*part.rows)] += gradient


def pack_messages(sends: Sequence[KVSlices], own: KV, kv_buffer: KV) -> Tensor:
    """Messages to each rank, end to end: ``[2 tokens, Hkv, D]``, a copy."""
    rows = [
        (kv_buffer if part.in_buffer else own)[i][slice(*part.rows)]
        for parts in sends
        for i in (0, 1)
        for part in parts
    ]
    return torch.cat(rows) if rows else own[0].new_empty(0, *own[0].shape[1:])


def unpack_messages(messages: Tensor, tokens: Sequence[int]) -> tuple[Tensor, Tensor]:
    """Keys and values ``[tokens, Hkv, D]`` of all peers; contiguous, views if one peer sent."""
    sizes = [size for size in tokens if size for _ in "kv"]
    if len(sizes) <= 2:
        k, v = messages.tensor_split(2)
        return k, v
    rows = messages.split(sizes)
    return torch.cat(rows[::2]), torch.cat(rows[1::2])


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
        [2 * tokens for tokens in exchange.receive_tokens],
        [2 * tokens for tokens in exchange.send_tokens],
        group=cp_group,
        async_op=True,
    )
    return KVTransfer(exchange, received, sent, work)
