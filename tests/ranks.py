"""Rank processes for tests: started once per (backend, size), reused by every test.

``run_on_ranks(fn, P, *args)`` runs ``fn(*args)`` on P ranks whose default process group is ready
and returns the P results in rank order. ``fn`` must be a module-level function. If a rank raises,
its traceback is raised here at once, without waiting for the others (their group is dead), and the
pool is replaced: for an error that is expected run ``refusal``, which returns its message.
Rendezvous is a file, so that no port is ever chosen.

Ranks are forked from a server that has imported torch, and Megatron if a test of it was collected:
to import them takes 1 and 3 seconds a process. On machines with GPUs each rank starts afresh.
"""

from __future__ import annotations

import atexit
import multiprocessing
import multiprocessing.connection
import os
import pickle
import tempfile
import time
import traceback
from collections.abc import Callable
from datetime import timedelta
from functools import cache
from multiprocessing.connection import Connection
from typing import Any

import torch
import torch.distributed as dist

START_TIMEOUT_S = 120.0

IMPORTED = ["__main__", "torch", "torch.distributed", "lasp", "ring", "moe_parallel", __name__]
multiprocessing.set_forkserver_preload(IMPORTED)


class RankError(RuntimeError):
    """A rank raised, died or did not answer in time."""


def _serve(rank: int, num_ranks: int, backend: str, store_path: str, pipe: Connection) -> None:
    torch.set_num_threads(1)
    if backend == "nccl":
        torch.cuda.set_device(rank)
    # Poison: reading memory that nothing wrote shows as NaN.
    torch.utils.deterministic.fill_uninitialized_memory = True
    torch.use_deterministic_algorithms(True, warn_only=True)
    dist.init_process_group(
        backend,
        store=dist.FileStore(store_path, num_ranks),
        rank=rank,
        world_size=num_ranks,
        timeout=timedelta(seconds=60),
    )
    pipe.send_bytes(pickle.dumps((True, None)))
    while True:
        try:
            fn, args, kwargs = pickle.loads(pipe.recv_bytes())
        except EOFError:
            break
        try:
            answer = pickle.dumps((True, fn(*args, **kwargs)))
        except BaseException:  # pytest.raises that sees no exception raises none of Exception's
            answer = pickle.dumps((False, traceback.format_exc()))
        pipe.send_bytes(answer)


class RankPool:
    """P processes with one default group."""

    def __init__(self, num_ranks: int, backend: str) -> None:
        forked = not torch.cuda.is_available()  # a forked process could not use CUDA
        context = multiprocessing.get_context("forkserver" if forked else "spawn")
        store_path = os.path.join(tempfile.mkdtemp(prefix="ranks-"), "store")
        self._pipes: list[Connection] = []
        self._processes = []
        for rank in range(num_ranks):
            ours, theirs = context.Pipe()
            process = context.Process(
                target=_serve, args=(rank, num_ranks, backend, store_path, theirs), daemon=True
            )
            process.start()
            theirs.close()
            self._pipes.append(ours)
            self._processes.append(process)
        self._collect(START_TIMEOUT_S)

    def run(self, fn: Callable[..., Any], args: tuple, kwargs: dict, timeout_s: float) -> list[Any]:
        call = pickle.dumps((fn, args, kwargs))
        for pipe in self._pipes:
            pipe.send_bytes(call)
        return self._collect(timeout_s)

    def _collect(self, timeout_s: float) -> list[Any]:
        deadline = time.monotonic() + timeout_s
        waiting = {pipe: rank for rank, pipe in enumerate(self._pipes)}
        results: list[Any] = [None] * len(self._pipes)
        while waiting:
            ready = multiprocessing.connection.wait(
                list(waiting), timeout=max(0.0, deadline - time.monotonic())
            )
            if not ready:
                raise RankError(f"ranks {sorted(waiting.values())} gave no answer in {timeout_s} s")
            for pipe in ready:
                rank = waiting.pop(pipe)
                try:
                    ok, value = pickle.loads(pipe.recv_bytes())
                except EOFError:
                    raise RankError(f"rank {rank} died without a word") from None
                if not ok:
                    raise RankError(f"rank {rank} raised:\n{value}")
                results[rank] = value
        return results

    def close(self) -> None:
        for pipe in self._pipes:
            pipe.close()
        for process in self._processes:
            process.kill()
            process.join()


_pools: dict[tuple[int, str], RankPool] = {}


def run_on_ranks(
    fn: Callable[..., Any],
    num_ranks: int,
    *args: Any,
    backend: str = "gloo",
    timeout_s: float = 120.0,
    **kwargs: Any,
) -> list[Any]:
    """Run ``fn(*args, **kwargs)`` on every rank; results in rank order."""
    key = (num_ranks, backend)
    if key not in _pools:
        _pools[key] = RankPool(num_ranks, backend)
    try:
        return _pools[key].run(fn, args, kwargs, timeout_s)
    except RankError:
        _pools.pop(key).close()
        raise


def refusal(fn: Callable[..., Any], *args: Any, **kwargs: Any) -> str:
    """Rank function: the message of the ValueError that ``fn`` raises."""
    try:
        fn(*args, **kwargs)
    except ValueError as error:
        return str(error)
    raise AssertionError(f"{fn.__name__} must raise ValueError")


@cache
def subgroup(*ranks: int) -> dist.ProcessGroup | None:
    """The group of these global ranks, made once per pool; every rank must call it."""
    return dist.new_group(list(ranks))


@atexit.register
def close_pools() -> None:
    while _pools:
        _pools.popitem()[1].close()
