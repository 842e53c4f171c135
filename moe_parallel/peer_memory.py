"""Rows between the GPUs of one host by their copy engines, without a multiprocessor.

An all-to-all of NCCL runs as thread blocks, and takes multiprocessors away from the products beside
it. Ranks that see each other's memory need none: a rank fetches the rows it takes out of the memory
of the ranks that have them, and puts results where they belong, both with plain copies::

    dispatch    wait until all ranks have rows;  copy them from where they are
    combine     copy results to the ranks of their tokens;  wait until all have;  copy mine out

Both buffers of a rank hold the rows that it sends, so that their size does not depend on what the
router does elsewhere. Offsets follow from the counts, which every rank has on the host.

Ranks wait for each other's words: a rank writes 1 into its word on another, which waits for it and
writes 0. A word is not written again before that: the combines of a call have two words in turn,
and between two first words every rank has heard a combine of every other, which says it only after
it has written the first one 0. So a CUDA graph can be replayed.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import accumulate
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

from moe_parallel.stream_memory import CudaStreamMemory, Prepared, StreamMemory, WordOperation

PAGE_BYTES = 2**21  # memory is shared in pages of this size
_OPEN, _EVEN, _ODD = range(3)  # phases


class SharedBuffers(NamedTuple):
    """Memory of all ranks of a group, as one of them sees it.

    Attributes:
        buffers: ``[bytes]``, uint8, of each rank: a page of words, zero at first, then rows.
        streams: what copies and waits there.
        owners: of the memory, which lives as long as they do.
    """

    buffers: list[Tensor]
    streams: StreamMemory
    owners: tuple[object, ...] = ()


class Copied:
    """Copies that were queued: over when a stream is past them."""

    def __init__(self, streams: Any, stream: Any) -> None:
        self._streams, self._event = streams, stream.record_event()

    def wait(self) -> None:
        """The current stream waits, not the host."""
        self._streams.current_stream().wait_event(self._event)


class PeerMemory:
    """Two buffers on every GPU of a group, which all its ranks read and write.

    Make one for the EP group, on all its ranks, and give it to every layer in its
    :class:`moe_parallel.ExpertGroups`. It serves one call after another, on one stream or on
    streams that you order.

    It takes twice the bytes of the rows that the fullest rank can send, T k M b, once for all
    layers. It grows at the first call that needs more: there the host waits for the device. Call
    :meth:`reserve` before a CUDA graph is captured. If a rank dies the streams of the others wait;
    the timeout of a collective that is queued behind them ends their processes.

    Args:
        group: of CUDA ranks that reach each other's memory, in practice on one host.

    Attributes:
        num_bytes: of rows that fit into each buffer.

    Communication: making it and growing it are collective over the group.

    Raises:
        ValueError: if the group is not of CUDA ranks, or they do not reach each other.
    """

    def __init__(self, group: dist.ProcessGroup) -> None:
        self.group, self.rank, self.ranks = group, group.rank(), range(group.size())
        # Beginning with the next rank, so that not all turn to the same one.
        self.others = [*self.ranks[self.rank + 1 :], *self.ranks[: self.rank]]
        self.num_bytes, self.captured = 0, False
        self._shared: SharedBuffers | None = None
        # What cannot be shared shows here, not in a step.
        device = self.reserve(1).buffers[0].device
        self.module = torch.get_device_module(device)
        # Of no priority: copies within a GPU are thread blocks, and should have those that the last
        # tiles of a product leave, not take theirs.
        self.pulls, self.pushes = (self.module.Stream() for _ in range(2))

    def reserve(self, num_bytes: int) -> SharedBuffers:
        """Have buffers for so many bytes of rows, the same number on every rank of the group.

        Raises:
            ValueError: if they would have to grow and a CUDA graph knows the ones there are.
        """
        if self._shared is not None and num_bytes <= self.num_bytes:
            return self._shared
        if self.captured or (
            torch.cuda.is_available() and torch.cuda.is_current_stream_capturing()
        ):
            raise ValueError(
                f"rows must fit into the {self.num_bytes} bytes that a captured CUDA graph uses,"
                f" got {num_bytes}: call reserve({num_bytes}) on all ranks before the capture"
            )
        if self._shared is not None:
            self.module.synchronize()  # what is queued may use what is given back
        self._shared, self.num_bytes = None, 0
        rounded = -(-num_bytes // PAGE_BYTES) * PAGE_BYTES
        with torch.inference_mode(False):  # kept, and used in training too
            shared = self._share(PAGE_BYTES + 2 * rounded)
        self._shared, self.num_bytes, self.streams = shared, rounded, shared.streams
        words = [buffer.data_ptr() for buffer in shared.buffers]
        self.rows_at = [word + PAGE_BYTES for word in words]
        self.results_at = [word + PAGE_BYTES + rounded for word in words]
        self._said, self._heard = zip(*(self._phase(words, phase) for phase in range(3)))
        return shared

    def _share(self, num_bytes: int) -> SharedBuffers:
        if "nccl" not in dist.get_backend_config(self.group):
            raise ValueError(
                "group must be of CUDA ranks for PeerMemory, got one with the backend"
                f" {dist.get_backend(self.group)!r}: without it rows travel by all-to-all"
            )
        from torch.distributed import _symmetric_memory as symmetric_memory

        device = torch.device("cuda", torch.cuda.current_device())
        own = symmetric_memory.empty(num_bytes, dtype=torch.uint8, device=device)
        own[:PAGE_BYTES].zero_()
        torch.cuda.synchronize()  # before others, past the rendezvous, write there
        try:
            handle: Any = symmetric_memory.rendezvous(own, self.group.group_name)
            buffers = [handle.get_buffer(rank, (num_bytes,), torch.uint8) for rank in self.ranks]
            streams = CudaStreamMemory()
        except (torch.OutOfMemoryError, dist.DistError):
            raise
        except (OSError, RuntimeError) as error:  # OSError: there is no CUDA driver
            raise ValueError(
                "group must be of ranks that reach each other's memory for PeerMemory, got ranks"
                f" {dist.get_process_group_ranks(self.group)}: without it rows travel by"
                f" all-to-all. {error}"
            ) from error
        return SharedBuffers(buffers, streams, (own, handle))

    def _phase(self, words: Sequence[int], phase: int) -> tuple[Prepared, Prepared]:
        """To say that this rank is at a phase, and to hear it of the others."""

        def word(of: int, on: int) -> int:
            return words[on] + 4 * (phase * len(words) + of)

        mine = [word(of, self.rank) for of in self.others]
        said = [WordOperation("write", word(self.rank, on), 1) for on in self.others]
        heard = [WordOperation("wait", at, 1) for at in mine]
        heard += [WordOperation("write", at, 0) for at in mine]
        return self.streams.prepared(said), self.streams.prepared(heard)

    def say(self, phase: int, stream: Any) -> None:
        """This rank is at a phase when the stream is here."""
        self.streams.run(self._said[phase], stream)

    def hear(self, phase: int, stream: Any) -> None:
        """The stream waits until all ranks are at a phase."""
        self.streams.run(self._heard[phase], stream)

    def place(self, num_rows: int, like: Tensor) -> Tensor:
        """``[num_rows, M]``: where this rank's rows, like these, travel from."""
        num_bytes = num_rows * like.element_size() * like.shape[1]
        if num_bytes > self.num_bytes:
            raise ValueError(
                f"rows must fit into the {self.num_bytes} bytes that are reserved, got {num_bytes}:"
                f" call reserve({num_bytes}) on all ranks"
            )
        buffer = self.reserve(0).buffers[self.rank].narrow(0, PAGE_BYTES, num_bytes)
        return buffer.view(like.dtype).view(num_rows, like.shape[1])


class PeerExchange:
    """One call's rows on their way to other ranks and back; the call before is over.

    Args:
        memory: of the group.
        rows_AM: ``[A, M]``, contiguous, what this rank sends, group by group, in each by rank; in
            :meth:`PeerMemory.place`, or copied there. They fit into what is reserved.
    """

    def __init__(self, memory: PeerMemory, rows_AM: Tensor) -> None:
        self._memory, self._row_bytes = memory, rows_AM.element_size() * rows_AM.shape[1]
        self._phases = (_EVEN, _ODD)
        if rows_AM.is_cuda and torch.cuda.is_current_stream_capturing():
            memory.captured = True
        if rows_AM.data_ptr() != memory.rows_at[memory.rank]:
            memory.place(len(rows_AM), rows_AM).copy_(rows_AM)
        memory.pulls.wait_stream(memory.module.current_stream())
        memory.say(_OPEN, memory.pulls)
        memory.hear(_OPEN, memory.pulls)

    def pull(
        self, rows: Tensor, send: Sequence[int], receive: Sequence[int], starts: Sequence[int]
    ) -> tuple[Tensor, Copied]:
        """Start to fetch the rows of a group of experts that this rank takes.

        Args:
            rows: those of the group that it sends.
            send: how many to each rank.
            receive: how many from each rank.
            starts: for each rank, where among all its rows those for this one begin.

        Returns:
            The rows, rank by rank, and the work.

        Communication: copies out of the memory of the other ranks, the bytes of their rows.
        """
        memory, stream = self._memory, self._memory.pulls
        arriving = rows.new_empty(sum(receive), rows.shape[1])
        to = self._starts(arriving, receive)
        stream.wait_stream(memory.module.current_stream())
        for rank in memory.others:
            of = memory.rows_at[rank] + starts[rank] * self._row_bytes
            self._copy(to[rank], of, receive[rank], stream)
        self._copy(
            to[memory.rank], self._starts(rows, send)[memory.rank], send[memory.rank], stream
        )
        return arriving, Copied(memory.module, stream)

    def push(
        self,
        results: Tensor,
        into: Tensor,
        send: Sequence[int],
        receive: Sequence[int],
        starts: Sequence[int],
    ) -> Copied:
        """Start to put results where their tokens are, and to take what others put here.

        Args:
            results: contiguous, of the rows that :meth:`pull` brought, in their order.
            into: for the results of the rows that this rank sent, in theirs.
            send: as for :meth:`pull`.
            receive: likewise.
            starts: likewise.

        Communication: copies into the memory of the other ranks, the bytes of their results.
        """
        memory, stream, mine = self._memory, self._memory.pushes, self._memory.rank
        of, to = self._starts(results, receive), self._starts(into, send)
        stream.wait_stream(memory.module.current_stream())
        for rank in memory.others:
            there = memory.results_at[rank] + starts[rank] * self._row_bytes
            self._copy(there, of[rank], receive[rank], stream)
        phase, self._phases = self._phases[0], self._phases[::-1]
        memory.say(phase, stream)
        self._copy(to[mine], of[mine], send[mine], stream)
        memory.hear(phase, stream)
        # What this rank sends to ranks before it, it has before what it sends to itself.
        first = memory.results_at[mine] + (starts[mine] - sum(send[:mine])) * self._row_bytes
        for rank in memory.others:
            self._copy(to[rank], first + sum(send[:rank]) * self._row_bytes, send[rank], stream)
        return Copied(memory.module, stream)

    def _starts(self, rows: Tensor, counts: Sequence[int]) -> list[int]:
        """Where the rows of each rank begin."""
        before = accumulate(counts[:-1], initial=0)
        return [rows.data_ptr() + count * self._row_bytes for count in before]

    def _copy(self, to: int, of: int, count: int, stream: Any) -> None:
        if count:
            self._memory.streams.copy(to, of, count * self._row_bytes, stream)
