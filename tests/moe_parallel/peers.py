"""Memory of peers for ranks on the CPU: files that all of them map."""

from __future__ import annotations

import ctypes
import os
import tempfile
import time
from collections.abc import Sequence
from functools import cache

import torch
import torch.distributed as dist

from moe_parallel import ExpertGroups, PeerMemory
from moe_parallel.dispatch.stream_memory import WordOperation
from moe_parallel.dispatch.symmetric_memory import PAGE_BYTES, SharedBuffers


class HostMemory:
    """What a stream does, done at once; words are polled, as the front end of a GPU does."""

    def copy(self, to: int, of: int, num_bytes: int, stream: object) -> None:
        ctypes.memmove(to, of, num_bytes)

    def prepared(self, operations: Sequence[WordOperation]) -> Sequence[WordOperation]:
        return tuple(operations)

    def run(self, operations: Sequence[WordOperation], stream: object) -> None:
        deadline = time.monotonic() + 30
        for kind, address, value in operations:
            word = ctypes.c_int32.from_address(address)
            if kind == "write":
                assert word.value != value  # whoever waits for the one before has seen it
                word.value = value
            while kind == "wait" and word.value != value:
                assert time.monotonic() < deadline
                time.sleep(0)


class FileMemory(PeerMemory):
    """As on GPUs, but for whose memory it is."""

    def _share(self, num_bytes: int) -> SharedBuffers:
        paths: list[str] = [""] * len(self.ranks)
        handle, path = tempfile.mkstemp(prefix="peers-")
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
def peer_memory(group: dist.ProcessGroup) -> PeerMemory:
    """One for a group."""
    return (FileMemory if dist.get_backend(group) == "gloo" else PeerMemory)(group)


def with_peers(groups: ExpertGroups) -> ExpertGroups:
    """The groups, and the memory of their EP x ETP block."""
    block = groups.ep_etp or groups.ep or groups.etp
    return groups if block is None else groups._replace(peers=peer_memory(block))
