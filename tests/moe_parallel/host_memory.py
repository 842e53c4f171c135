"""Symmetric memory for ranks on the CPU: files that all of them map."""

from __future__ import annotations

import ctypes
import os
import tempfile
import time
from collections.abc import Sequence
from functools import cache

import torch
import torch.distributed as dist

from moe_parallel import ExpertGroups, SymmetricMemory
from moe_parallel.dispatch.stream_memory import SignalOperation
from moe_parallel.dispatch.symmetric_memory import PAGE_BYTES, SharedBuffers


class HostMemory:
    """What a stream does, done at once; signals are polled, as the front end of a GPU does."""

    def copy(self, to: int, source: int, num_bytes: int, stream: object) -> None:
        ctypes.memmove(to, source, num_bytes)

    def prepared(self, operations: Sequence[SignalOperation]) -> Sequence[SignalOperation]:
        return tuple(operations)

    def run(self, operations: Sequence[SignalOperation], stream: object) -> None:
        deadline = time.monotonic() + 30
        for kind, address, value in operations:
            signal = ctypes.c_int32.from_address(address)
            if kind == "write":
                assert signal.value != value  # whoever waits for the one before has seen it
                signal.value = value
            while kind == "wait" and signal.value != value:
                assert time.monotonic() < deadline
                time.sleep(0)


class FileMemory(SymmetricMemory):
    """As on GPUs, but for whose memory it is."""

    def _share(self, num_bytes: int) -> SharedBuffers:
        paths: list[str] = [""] * len(self.ranks)
        handle, path = tempfile.mkstemp(prefix="memory-")
        os.truncate(handle, num_bytes)
        os.close(handle)
        dist.all_gather_object(paths, path, group=self.group)
        buffers = [
            torch.from_file(path, shared=True, size=num_bytes, dtype=torch.uint8) for path in paths
        ]
        dist.barrier(self.group)
        os.unlink(path)
        buffers[self.rank][PAGE_BYTES:] = 0xFF  # NaN, if anything is read that nobody wrote
        dist.barrier(self.group)
        return SharedBuffers(buffers, HostMemory())


@cache  # as a program has one for all layers: calls follow each other in the same memory
def host_memory(group: dist.ProcessGroup) -> SymmetricMemory:
    """One for a group."""
    return (FileMemory if dist.get_backend(group) == "gloo" else SymmetricMemory)(group)


def memory_of(groups: ExpertGroups, *, own: bool = False) -> SymmetricMemory | None:
    """The memory of the EP x ETP block of these groups; None for one rank.

    ``own``: one that no other test uses, for a CUDA graph: memory that it knows cannot grow.
    """
    block = groups.ep_etp or groups.ep or groups.etp
    if block is None:
        return None
    return SymmetricMemory(block) if own else host_memory(block)
