"""Times and memory of calls: on one GPU by Triton's do_bench, on several in turns by events."""

from __future__ import annotations

import math
import random
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

from benchmarks.harness import Forward, Machine, Row, results

FLUSHES = 64


def measure_ms(fn: Callable[[], Any]) -> tuple[float, float, float]:
    """p20, p50 and p80 of the time of ``fn`` on the device."""
    from triton.testing import do_bench

    p20, p50, p80 = do_bench(fn, warmup=20, rep=100, quantiles=[0.2, 0.5, 0.8])
    return p20, p50, p80


def graph_ms(fn: Callable[[], Any]) -> tuple[float, float, float]:
    """As ``measure_ms``, of calls captured in a CUDA graph: no time of the host in it."""
    from triton.testing import do_bench_cudagraph

    p20, p50, p80 = do_bench_cudagraph(fn, rep=50, quantiles=[0.2, 0.5, 0.8])
    return p20, p50, p80


def host_us(fn: Callable[[], Any], *, wait: bool = False, count: int = 20) -> list[float]:
    """Times until a call returns, sorted; with ``wait`` until the device is done with it too."""
    return hosts_us({"": fn}, wait=wait, count=count)[""]


def hosts_us(
    calls: Mapping[str, Callable[[], Any]], *, wait: bool = False, count: int = 20,
    rounds: int = 20,
) -> dict[str, list[float]]:  # fmt: skip
    """:func:`host_us` of several calls that take turns: a core may be half as fast for a while."""
    synchronize = torch.cuda.synchronize if torch.cuda.is_available() else lambda: None
    times: dict[str, list[float]] = {name: [] for name in calls}
    for _ in range(rounds):
        for name, fn in calls.items():
            synchronize()
            start = time.perf_counter()
            for _ in range(count):
                fn()
            if wait:
                synchronize()
            times[name].append((time.perf_counter() - start) / count * 1e6)
    return {name: sorted(some) for name, some in times.items()}


def copy_bytes_per_s() -> float:
    """Bandwidth of a device copy of 4 GiB, bytes read plus bytes written."""
    source = torch.empty(2**32, dtype=torch.int8, device="cuda")
    target = torch.empty_like(source)
    return 2 * source.numel() / measure_ms(lambda: target.copy_(source))[1] * 1e3


def passes(forward: Forward, leaves: list[Tensor], grads: Any) -> dict[str, Callable[[], Any]]:
    """Calls of forward, and of backward alone, by the metric of their time."""
    outputs = forward(*leaves)
    return {
        "forward_ms": lambda: forward(*leaves),
        "backward_ms": lambda: torch.autograd.grad(outputs, leaves, grads, retain_graph=True),
    }


def extra_bytes(forward: Forward, leaves: list[Tensor], grad: Tensor) -> int:
    """Peak memory of forward and backward beside their arguments and results."""
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    made = results(forward, leaves, grad)
    torch.cuda.synchronize()
    return torch.cuda.max_memory_allocated() - before - sum(x.nbytes for x in made)


class Timed(NamedTuple):
    """A call, and what must be in force while it runs."""

    call: Callable[[], Any]
    in_force: AbstractContextManager[Any] = nullcontext()


def samples_ms(timed: Mapping[str, Timed], machine: Machine) -> dict[str, list[float]]:
    """Times of each call by the slowest rank, sorted.

    A sample is: flush the L2 cache for about 5 milliseconds, in which the host runs ahead as it
    does in training, an all-reduce of one number as a barrier on the device, then the call between
    two events. Calls take turns, in another order each round, so that clocks and heat are the same
    for all of them: what follows a call that computes less finds a cooler GPU. There are as many
    rounds as ``machine`` says, after one to warm up, or those that fit into its seconds, but three.
    """
    flag = torch.zeros(1, device=machine.device)
    on_gpu = machine.device == "cuda"
    flush = torch.empty(2**28 if on_gpu else 1, dtype=torch.int8, device=machine.device)
    spans: dict[str, list[Any]] = {name: [] for name in timed}
    number, rounds, begun = 0, machine.samples, 0.0
    while number <= rounds:  # the first warms up, the second tells how long one takes
        if number in (1, 2) and machine.seconds < math.inf:
            if number == 2:
                rounds = min(rounds, _affordable(begun, machine))
            elif on_gpu:
                torch.cuda.synchronize()
            begun = time.perf_counter()
        number += 1
        turns = list(timed.items())
        random.Random(number).shuffle(turns)  # alike on all ranks
        for name, (call, in_force) in turns:
            for _ in range(FLUSHES):
                flush.zero_()
            dist.all_reduce(flag)
            with in_force:
                begin = _now(on_gpu)
                call()
                spans[name].append((begin, _now(on_gpu)))
    if on_gpu:
        torch.cuda.synchronize()
    times = [
        [begin.elapsed_time(end) if on_gpu else 1e3 * (end - begin) for begin, end in some[1:]]
        for some in spans.values()
    ]
    slowest = torch.tensor(times, dtype=torch.float64, device=machine.device)
    dist.all_reduce(slowest, dist.ReduceOp.MAX)
    return {name: sorted(some) for name, some in zip(timed, slowest.tolist())}


def _affordable(begun: float, machine: Machine) -> int:
    """Rounds that fit into the seconds of ``machine`` on the slowest rank, three at least."""
    if machine.device == "cuda":
        torch.cuda.synchronize()
    (took,) = most(time.perf_counter() - begun, machine)
    return max(3, int(machine.seconds / took))


def _now(on_gpu: bool) -> Any:
    if not on_gpu:
        return time.perf_counter()
    event = torch.cuda.Event(enable_timing=True)
    event.record()
    return event


def most(count: float, machine: Machine) -> list[float]:
    """The largest of all ranks, as the one value of a row."""
    value = torch.tensor([float(count)], dtype=torch.float64, device=machine.device)
    dist.all_reduce(value, dist.ReduceOp.MAX)
    return value.tolist()


def bounded(
    row_of: Callable[[str, str, list[float], str], Row], metric: str, timed: Mapping[str, Timed],
    machine: Machine, bound: tuple[str, float, str], without: Sequence[str] = (),
) -> Iterator[Row]:  # fmt: skip
    """Rows of calls that take turns.

    The bound is the median of one of the calls, times a factor, under a name; neither that call nor
    those ``without`` have it.
    """
    reference, factor, name = bound
    rows = {
        impl: row_of(impl, metric, some, "ms") for impl, some in samples_ms(timed, machine).items()
    }
    for impl, found in rows.items():
        if reference in rows and impl not in (reference, *without):
            found |= {"bound": factor * rows[reference]["p50"], "bound_name": name}
        yield found


def gathered(x: Tensor) -> list[Tensor]:
    """A tensor of every rank."""
    parts = [torch.empty_like(x) for _ in range(dist.get_world_size())]
    dist.all_gather(parts, x.detach())
    return parts
