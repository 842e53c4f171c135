"""Memory that the GPUs of one host share, and signals in it by which they wait for each other.

An all-to-all of NCCL runs as thread blocks and takes multiprocessors away from the products beside
it. Ranks that see each other's memory need none: their copy engines move the rows
(:mod:`moe_parallel.dispatch.copy_engine`). A buffer holds the rows that its rank sends and their
results, so its size does not depend on what other ranks route::

    signals (one page)      OPEN    EVEN    ODD      one int32 for each phase and other rank
    rows                    the rows that this rank sends
    results                 one part for each ETP rank: its partial sums of these rows' results

A rank signals a phase by writing 1 into its int32 on every other rank. Their streams wait for the
1, then write 0, without a kernel. One run with three groups::

    rank 0      OPEN   pull 0  pull 1  pull 2   push 0 EVEN   push 1 ODD   push 2 EVEN
    rank 1      OPEN   pull 0  pull 1  pull 2   push 0 EVEN   push 1 ODD   push 2 EVEN
    all wait for OPEN before their first pull, and for each EVEN or ODD after their own push

No signal is overwritten before it was read. A rank is at most one combine ahead of another, so two
phases in turn suffice. OPEN is signalled again only after a combine of every other rank was waited
for, and a rank signals a combine only after it has reset OPEN. So a CUDA graph can be replayed.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

from lasp._core.checks import check_part
from moe_parallel.dispatch.stream_memory import (
    CudaStreamMemory,
    Prepared,
    SignalOperation,
    StreamMemory,
)

PAGE_BYTES = 2**21  # memory is shared in pages of this size
OPEN, EVEN, ODD = range(3)  # phases


class SharedBuffers(NamedTuple):
    """Memory of all ranks of a group, as one of them sees it.

    Attributes:
        buffers: ``[bytes]``, uint8, of each rank: a page of signals, zero at first, then rows.
        streams: what copies and waits there.
        owners: of the memory, which lives as long as they do.
    """

    buffers: list[Tensor]
    streams: StreamMemory
    owners: tuple[object, ...] = ()


def queued_copies(module: Any, stream: Any) -> Callable[[Any], None]:
    """What is queued on a stream of a device module, as a function that makes others wait for it.

    The function takes a stream, None for the current one; the host does not wait.
    """
    event = stream.record_event()

    def wait(other: Any) -> None:
        (other or module.current_stream()).wait_event(event)

    return wait


class SymmetricMemory:
    """Buffers on every GPU of a group, which all its ranks read and write.

    Make one for the EP x ETP block, on all its ranks, and give it to every
    :class:`moe_parallel.ExpertParallelMoE`. It serves one call after another, on one stream or on
    streams that you order.

    It takes 1 + ETP times the bytes of the rows that the fullest rank can send, T k M b: for the
    rows, and for each ETP rank's partial sums of their results. All layers share it. It grows at
    the first call that needs more, where the host waits for the device. Call :meth:`reserve` before
    a CUDA graph is captured. If a rank dies the streams of the others wait; the timeout of a
    collective that is queued behind them ends their processes.

    Args:
        group: of CUDA ranks that reach each other's memory, in practice on one host.

    Attributes:
        num_bytes: bytes of rows that fit.
        num_partial: partial sums of a result for which there is room.
        global_ranks: of the group, in its order.

    Communication: making it and growing it are collective over the group.

    Raises:
        ImportError: without ``cuda-bindings``.
        ValueError: if the group is not of CUDA ranks, or they do not reach each other.
    """

    def __init__(self, group: dist.ProcessGroup) -> None:
        check_part("group", group, dist.ProcessGroup)
        self.group, self.rank, self.ranks = group, group.rank(), range(group.size())
        self.global_ranks = dist.get_process_group_ranks(group)
        # Beginning with the next rank, so that not all turn to the same one.
        self.others = [*self.ranks[self.rank + 1 :], *self.ranks[: self.rank]]
        self.num_bytes, self.num_partial, self.captured = 0, 1, False
        self.num_holders = 0  # calls that took the place for rows so far
        self._shared: SharedBuffers | None = None
        # What cannot be shared shows here, not in a step.
        device = self.reserve(1).buffers[0].device
        self.module = torch.get_device_module(device)
        # Without priority: copies within a GPU are thread blocks. They should run where the last
        # tiles of a product leave room, not take theirs.
        self.pulls, self.pushes = (self.module.Stream() for _ in range(2))

    def fits(self, num_bytes: int, num_partial: int = 1) -> bool:
        """Whether :meth:`reserve` has nothing to do."""
        return num_bytes <= self.num_bytes and num_partial <= self.num_partial

    def reserve(self, num_bytes: int, num_partial: int = 1) -> SharedBuffers:
        """Have buffers for so many bytes of rows, the same number on every rank of the group.

        Args:
            num_bytes: bytes of the rows that the fullest rank sends.
            num_partial: partial sums of each result, the number of ETP ranks.

        Raises:
            ValueError: if they would have to grow and a CUDA graph knows the ones there are.
        """
        if self._shared is not None and self.fits(num_bytes, num_partial):
            return self._shared
        if self.captured or (
            torch.cuda.is_available() and torch.cuda.is_current_stream_capturing()
        ):
            raise ValueError(
                f"rows must fit into the {self.num_bytes} bytes, and results into the"
                f" {self.num_partial} partial sums, that a captured CUDA graph uses, got"
                f" {num_bytes} and {num_partial}: call reserve({num_bytes}, {num_partial})"
                " on all ranks before the capture"
            )
        if self._shared is not None:
            self.module.synchronize()  # what is queued may use what is given back
        pages = -(-max(num_bytes, self.num_bytes) // PAGE_BYTES)
        num_partial = max(num_partial, self.num_partial)
        self._shared, self.num_bytes, self.num_partial = None, 0, 1
        with torch.inference_mode(False):  # kept, and used in training too
            shared = self._share(PAGE_BYTES * (1 + (1 + num_partial) * pages))
        self._shared, self.streams = shared, shared.streams
        self.num_bytes, self.num_partial = pages * PAGE_BYTES, num_partial
        signals = [buffer.data_ptr() for buffer in shared.buffers]
        self.rows_at = [start + PAGE_BYTES for start in signals]
        self.results_at = [rows_at + self.num_bytes for rows_at in self.rows_at]  # part by part
        self._signals, self._waits = zip(*(self._phase(signals, phase) for phase in range(3)))
        return shared

    def _share(self, num_bytes: int) -> SharedBuffers:
        if "nccl" not in dist.get_backend_config(self.group):
            raise ValueError(
                "group must be of CUDA ranks for SymmetricMemory, got one with the backend"
                f" {dist.get_backend(self.group)!r}: without it rows travel by all-to-all"
            )
        from torch.distributed import _symmetric_memory as symmetric_memory

        streams = CudaStreamMemory()
        device = torch.device("cuda", torch.cuda.current_device())
        own = symmetric_memory.empty(num_bytes, dtype=torch.uint8, device=device)
        own[:PAGE_BYTES].zero_()
        torch.cuda.synchronize()  # before others, past the rendezvous, write there
        try:
            handle: Any = symmetric_memory.rendezvous(own, self.group.group_name)
            buffers = [handle.get_buffer(rank, (num_bytes,), torch.uint8) for rank in self.ranks]
        except (torch.OutOfMemoryError, dist.DistError):
            raise
        except RuntimeError as error:
            raise ValueError(
                "group must be of ranks that reach each other's memory for SymmetricMemory, got"
                f" ranks {self.global_ranks}: without it rows travel by all-to-all. {error}"
            ) from error
        return SharedBuffers(buffers, streams, (own, handle))

    def _phase(self, signals: Sequence[int], phase: int) -> tuple[Prepared, Prepared]:
        """Operations that signal a phase to the others, and those that wait for theirs."""

        def address(source: int, on: int) -> int:
            return signals[on] + 4 * (phase * len(signals) + source)

        mine = [address(other, self.rank) for other in self.others]
        signal = [SignalOperation("write", address(self.rank, on), 1) for on in self.others]
        wait = [SignalOperation("wait", at, 1) for at in mine]
        wait += [SignalOperation("write", at, 0) for at in mine]
        return self.streams.prepared(signal), self.streams.prepared(wait)

    def signal(self, phase: int, stream: Any) -> None:
        """Tell all ranks that this one is at a phase, once the stream is here."""
        self.streams.run(self._signals[phase], stream)

    def wait(self, phase: int, stream: Any) -> None:
        """Make the stream wait until all ranks are at a phase."""
        self.streams.run(self._waits[phase], stream)

    def place(self, num_rows: int, like: Tensor) -> Tensor:
        """``[num_rows, M]``: where this rank's rows, like these, travel from."""
        return self._view(0, 1, num_rows, like).squeeze(0)

    def results(self, num_rows: int, like: Tensor) -> Tensor:
        """``[num_partial, num_rows, M]``: where partial sums of these rows' results arrive."""
        return self._view(1, self.num_partial, num_rows, like)

    def _view(self, first: int, count: int, num_rows: int, like: Tensor) -> Tensor:
        """The beginning of ``count`` parts after the signals, from part ``first`` on."""
        num_bytes = num_rows * like.element_size() * like.shape[1]
        if num_bytes > self.num_bytes:
            raise ValueError(
                f"rows must fit into the {self.num_bytes} bytes that are reserved, got {num_bytes}:"
                f" call reserve({num_bytes}) on all ranks"
            )
        start = PAGE_BYTES + first * self.num_bytes
        parts = self.reserve(0).buffers[self.rank].narrow(0, start, count * self.num_bytes)
        rows = parts.view(count, -1)[:, :num_bytes].view(like.dtype)
        view: Tensor = rows.unflatten(1, (num_rows, like.shape[1]))
        return view


class OutgoingRows:
    """The rows of one call in the memory they travel from, in the forward and in the backward.

    Args:
        memory: of the block.
    """

    def __init__(self, memory: SymmetricMemory) -> None:
        self.memory, self._holder = memory, -1

    def place(self, num_rows: int, like: Tensor) -> Tensor:
        """See :meth:`SymmetricMemory.place`; write and send them before another call takes it."""
        self.memory.num_holders += 1
        self._holder = self.memory.num_holders
        return self.memory.place(num_rows, like)

    def hold(self, rows: Tensor) -> bool:
        """Whether these rows lie there.

        Raises:
            RuntimeError: if another call took it since.
        """
        if rows.data_ptr() != self.memory.rows_at[self.memory.rank]:
            return False
        if self.memory.num_holders != self._holder:
            raise RuntimeError(
                "rows in SymmetricMemory were overwritten by another call before their experts were"
                " called, in the backward by one that a checkpoint repeats: let the checkpoint"
                " cover the whole layer"
            )
        return True
