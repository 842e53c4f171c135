"""What does a sequence cut across ranks cost, by exchange, against one rank and against peers?

Every rank holds the same number of tokens. ``local`` is the same rank's kernels without ranks: its
fragments as documents of their own, no communication; it is the bound of the other rows. Peers are
those of ``benchmarks.lasp_peers``, with our kernels.

A sample is: flush the L2 cache for about 5 milliseconds, in which the host runs ahead as it does in
training, an all-reduce of one number as a barrier on the device, then the call between two events.
Calls take turns. Each sample counts as the slowest rank; p20, p50 and p80 are over samples. Bytes
are counted at the collectives of the slowest rank in one call. ``exchange_ms`` is the exchange
alone, on states that are there.

Run: torchrun --nproc-per-node 2 -m benchmarks.lasp_ranks --commit $(git rev-parse HEAD)
"""

from __future__ import annotations

import argparse
import datetime
import math
import platform
import random
import shlex
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, nullcontext
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

from benchmarks.harness import environment, write_rows
from benchmarks.lasp_cases import (
    EXCHANGES,
    LAYERS,
    PEERS,
    Case,
    Machine,
    builds,
    choices,
    inputs,
    one_hop_is_exact,
)
from benchmarks.wire import counted
from lasp import lightning_attention
from lasp.lightning.op_context import OpContext, start
from lasp.sequence.state_flow import flow_of

FLUSHES = 64


class Timed(NamedTuple):
    """A call, and what must be in force while it runs."""

    call: Callable[[], Any]
    in_force: AbstractContextManager[Any] = nullcontext()


def samples_ms(timed: Mapping[str, Timed], machine: Machine) -> dict[str, list[float]]:
    """Times of each call by the slowest rank, sorted.

    Calls take turns, in another order each round, so that clocks and heat are the same for all of
    them: what follows a call that computes less finds a cooler GPU. There are as many rounds as
    ``machine`` says, after one to warm up, or those that fit into its seconds, but three.
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
    took = torch.tensor([time.perf_counter() - begun], device=machine.device)
    dist.all_reduce(took, dist.ReduceOp.MAX)
    return max(3, int(machine.seconds / took.item()))


def _now(on_gpu: bool) -> Any:
    if not on_gpu:
        return time.perf_counter()
    event = torch.cuda.Event(enable_timing=True)
    event.record()
    return event


def row(case: Case, impl: str, metric: str, values: list[float], unit: str) -> dict[str, Any]:
    """Percentiles of sorted values; bound and environment are filled in by others."""
    p20, p50, p80 = (values[round(share * (len(values) - 1))] for share in (0.2, 0.5, 0.8))
    facts = {"ranks": dist.get_world_size(), "num_layers": LAYERS}
    if impl in EXCHANGES:
        facts["strategies"] = [
            [choice.strategy, len(choice.heads), choice.num_blocks]
            for choice in choices(case, impl)
        ]  # fmt: skip
    return {
        "benchmark": "lasp_ranks", "impl": impl, "case": case._asdict() | facts, "metric": metric,
        "p20": p20, "p50": p50, "p80": p80, "unit": unit, "bound": None, "bound_name": None,
        "samples": len(values),
    }  # fmt: skip


def most(count: float, machine: Machine) -> list[float]:
    """The largest of all ranks."""
    value = torch.tensor([float(count)], dtype=torch.float64, device=machine.device)
    dist.all_reduce(value, dist.ReduceOp.MAX)
    return value.tolist()


def measure(case: Case, names: list[str], machine: Machine) -> Iterator[dict[str, Any]]:
    """Rows of every implementation that can do the case."""
    q, k, v, do = inputs(case, machine)
    leaves = [x.requires_grad_() for x in (q, k, v)]
    forwards, backwards = {}, {}
    for name, forward, in_force in builds(case, names, machine):
        with in_force, counted() as received:
            output = forward(*leaves)
            yield row(case, name, "forward_bytes", most(received.bytes, machine), "bytes")
            received.bytes = 0
            torch.autograd.grad(output, leaves, do, retain_graph=True)
            yield row(case, name, "backward_bytes", most(received.bytes, machine), "bytes")
        backward = partial(torch.autograd.grad, output, leaves, do, retain_graph=True)
        forwards[name] = Timed(partial(forward, *leaves), in_force)
        backwards[name] = Timed(backward, in_force)
    for metric, timed in (("forward_ms", forwards), ("backward_ms", backwards)):
        rows = {
            name: row(case, name, metric, values, "ms")
            for name, values in samples_ms(timed, machine).items()
        }
        for name, result in rows.items():
            if "local" in rows and name != "local":
                result |= {"bound": rows["local"]["p50"], "bound_name": "local, no ranks"}
            yield result


def measure_exchange(case: Case, names: list[str], machine: Machine) -> Iterator[dict[str, Any]]:
    """Rows of the exchange alone, forward."""
    layout, rank = case.layout(), dist.get_rank()
    flow, values = flow_of(layout, rank), tuple(case.rates().tolist())
    shape = (flow.num_slots, case.heads, case.head_dim, case.head_dim)
    outgoing = torch.randn(shape, device=machine.device)
    rates = case.rates().to(machine.device)
    timed = {}
    for name in names:
        if name in EXCHANGES and (name != "one_hop" or one_hop_is_exact(case)):
            op = OpContext(
                layout, rank, dist.group.WORLD, 1.0, choices(case, name), False, 2.0**-32, values
            )
            timed[name] = Timed(partial(_exchange, outgoing, rates, flow, op))
    for name, times in samples_ms(timed, machine).items():
        yield row(case, name, "exchange_ms", times, "ms")


def _exchange(*args: Any) -> Tensor:
    return start(*args)()


def check(names: list[str], machine: Machine) -> None:
    """Right before fast: output and gradients of each against eager in float64 on one rank."""
    ranks, rank = dist.get_world_size(), dist.get_rank()
    case = Case(2 * ranks, 400, 0, 1, "contiguous", 16 if machine.device == "cpu" else 64)
    whole = [
        torch.stack(list(part)).flatten(0, 1)
        for part in zip(*_gathered([x.double() for x in inputs(case, machine)]))
    ]
    leaves = [x.requires_grad_() for x in whole[:3]]
    output = lightning_attention(*leaves, case.rates()).output
    exact = [output, *torch.autograd.grad(output, leaves, whole[3])]
    exact = [x.detach()[rank * case.tokens : (rank + 1) * case.tokens] for x in exact]
    q, k, v, do = inputs(case, machine)
    own = [x.requires_grad_() for x in (q, k, v)]
    for name, forward, in_force in builds(case, [n for n in names if n != "local"], machine):
        with in_force:
            output = forward(*own)
            actual = [output, *torch.autograd.grad(output, own, do)]
        for what, got, true in zip(("output", "dq", "dk", "dv"), actual, exact):
            error = ((got.double() - true).norm() / true.norm()).item()
            if not error < 1e-2:
                raise SystemExit(f"{name} is wrong here: {what}, relative error {error:.1e}")


def _gathered(tensors: list[Tensor]) -> list[list[Tensor]]:
    """By rank."""
    gathered = []
    for x in tensors:
        parts = [torch.empty_like(x) for _ in range(dist.get_world_size())]
        dist.all_gather(parts, x)
        gathered.append(parts)
    return [list(parts) for parts in zip(*gathered)]


def surroundings(commit: str, machine: Machine) -> dict[str, Any]:
    """The part of a row that is the same for all rows of a run."""
    shared = {"num_devices": dist.get_world_size()}
    if machine.device == "cuda":
        nccl = ".".join(map(str, torch.cuda.nccl.version()))
        return environment(commit) | shared | {"nccl": nccl}
    return shared | {
        "command": shlex.join([Path(sys.executable).name, *sys.orig_argv[1:]]),
        "commit": commit, "date": datetime.date.today().isoformat(),
        "device": f"cpu {platform.machine()}", "driver": None, "torch": torch.__version__,
        "triton": None, "nccl": None,
    }  # fmt: skip


def parse() -> argparse.Namespace:
    """Options; the defaults take about four minutes on 2 GPUs."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--commit", required=True)
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results"))
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda")
    parser.add_argument("--heads", type=int, nargs="+", default=[8, 64])
    parser.add_argument("--tokens", type=int, nargs="+", default=[8192, 32768, 131072])
    parser.add_argument("--documents", type=int, nargs="+", default=[1, 64])
    parser.add_argument("--layers", type=int, nargs="+", default=[0, 78])
    parser.add_argument("--orders", nargs="+", default=["contiguous"])
    parser.add_argument("--head-dim", type=int, default=128)
    parser.add_argument("--samples", type=int, default=20)
    parser.add_argument("--only", nargs="+", default=["local", *EXCHANGES, *PEERS])
    return parser.parse_args()


def main() -> None:
    """Check, then measure; every row is written when it is there."""
    options = parse()
    on_gpu = options.device == "cuda"
    dist.init_process_group("nccl" if on_gpu else "gloo")
    if on_gpu:
        torch.cuda.set_device(dist.get_rank() % torch.cuda.device_count())
    machine = Machine(
        options.device, "triton" if on_gpu else "eager",
        torch.bfloat16 if on_gpu else torch.float32, options.samples,
    )  # fmt: skip
    check(options.only, machine)
    common = surroundings(options.commit, machine)
    cases = [
        Case(heads, tokens, layer, documents, order, options.head_dim)
        for tokens in options.tokens for heads in options.heads for layer in options.layers
        for documents in options.documents for order in options.orders
    ]  # fmt: skip
    for case in cases:
        for measured in (measure(case, options.only, machine),
                         measure_exchange(case, options.only, machine)):  # fmt: skip
            for result in measured:
                if dist.get_rank() == 0:
                    write_rows([result | common], options.out)
                    bound = result["bound"]
                    print(*case, result["impl"], result["metric"], f"{result['p50']:.4g}",
                          f"= {result['p50'] / bound:.3f} x local" if bound else "",
                          flush=True)  # fmt: skip
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
