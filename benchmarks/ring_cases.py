"""What ``ring_length`` and ``ring_packed`` share: cases, the check before measuring, and rows."""

from __future__ import annotations

import argparse
import math
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

from benchmarks import ring_peers
from benchmarks.harness import write_rows
from benchmarks.lasp_ranks import Timed, most, samples_ms, surroundings
from benchmarks.ring_peers import Forward
from benchmarks.wire import counted
from lasp import SequenceLayout
from ring import ring_attention
from ring.reference import dense_attention
from tests.lasp.distributions import document_lengths

OURS = "ring"


class Case(NamedTuple):
    """What is measured.

    ``tokens`` are those of one rank; ``documents`` is ``one``, ``equal`` (one a rank) or the name
    of a distribution.
    """

    tokens: int
    heads: int
    kv_heads: int
    head_dim: int
    causal: bool
    documents: str
    order: str

    def lengths(self) -> tuple[int, ...]:
        """Of the whole pack."""
        ranks = dist.get_world_size()
        simple = {"one": (self.tokens * ranks,), "equal": (self.tokens,) * ranks}
        if self.documents in simple:
            return simple[self.documents]
        return document_lengths(self.documents, self.tokens * ranks, 0)

    def layout(self) -> SequenceLayout:
        """Of the whole pack."""
        return SequenceLayout(self.lengths(), dist.get_world_size(), self.order)


class Machine(NamedTuple):
    """Where to compute, in what, how often, and the most seconds for calls that take turns."""

    device: str
    dtype: torch.dtype
    samples: int
    seconds: float = math.inf


def ours(case: Case) -> Forward:
    """The operator."""
    layout = case.layout()
    return lambda q, k, v: (
        ring_attention(q, k, v, layout=layout, cp_group=dist.group.WORLD, causal=case.causal).output
    )


def peers(case: Case, device: str) -> dict[str, Forward]:
    """Those that are installed and can do the case, in the order that they need."""
    if ring_peers.obstacle() is not None:
        return {}
    found = {}
    if case.documents == "one" and case.causal and case.order == "zigzag":
        found[ring_peers.ZIGZAG] = ring_peers.zigzag(case.layout())
    if case.order == "contiguous":
        found[ring_peers.LLAMA3] = ring_peers.llama3(case.layout(), case.causal, device)
    return found


def inputs(case: Case, machine: Machine, tokens: int) -> tuple[list[Tensor], Tensor]:
    """q, k and v, which want gradients, and the gradient of the output; others on every rank."""
    generator = torch.Generator(machine.device).manual_seed(dist.get_rank())
    q, k, v, do = (
        torch.randn(
            tokens, heads, case.head_dim,
            generator=generator, device=machine.device, dtype=machine.dtype,
        )
        for heads in (case.heads, case.kv_heads, case.kv_heads, case.heads)
    )  # fmt: skip
    return [x.requires_grad_() for x in (q, k, v)], do


def row(
    benchmark: str, case: Case, impl: str, metric: str, values: Sequence[float], unit: str
) -> dict[str, Any]:
    """Percentiles of sorted values; bound and environment are filled in by others."""
    p20, p50, p80 = (values[round(share * (len(values) - 1))] for share in (0.2, 0.5, 0.8))
    return {
        "benchmark": benchmark, "impl": impl,
        "case": case._asdict() | {"ranks": dist.get_world_size()}, "metric": metric,
        "p20": p20, "p50": p50, "p80": p80, "unit": unit, "bound": None, "bound_name": None,
        "samples": len(values),
    }  # fmt: skip


def timed(forward: Forward, leaves: list[Tensor], do: Tensor) -> dict[str, Timed]:
    """Forward, and forward with backward."""

    def both() -> None:
        torch.autograd.grad(forward(*leaves), leaves, do)

    return {"forward_ms": Timed(partial(forward, *leaves)), "both_ms": Timed(both)}


def measured_bytes(
    benchmark: str, case: Case, machine: Machine, forward: Forward, leaves: list[Tensor], do: Tensor
) -> Iterator[dict[str, Any]]:
    """Bytes that the rank which receives most receives, by direction; on GPUs the memory too."""
    on_gpu = machine.device == "cuda"
    if on_gpu:
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
    with counted() as received:
        output = forward(*leaves)
        sizes = {"forward_bytes": received.bytes}
        received.bytes = 0
        gradients = torch.autograd.grad(output, leaves, do)
        sizes["backward_bytes"] = received.bytes
    if on_gpu:
        torch.cuda.synchronize()
        results = output.nbytes + sum(x.nbytes for x in gradients)
        sizes["extra_bytes"] = torch.cuda.max_memory_allocated() - before - results
    for metric, count in sizes.items():
        yield row(benchmark, case, OURS, metric, most(count, machine), "bytes")


def compare(
    benchmark: str,
    case: Case,
    calls: dict[str, dict[str, Timed]],
    machine: Machine,
    bound: tuple[str, float, str],
) -> Iterator[dict[str, Any]]:
    """Rows of times; the bound is the median of one of the calls, times a factor, and its name."""
    reference, factor, bound_name = bound
    for metric in ("forward_ms", "both_ms"):
        times = samples_ms({name: call[metric] for name, call in calls.items()}, machine)
        rows = {n: row(benchmark, case, n, metric, values, "ms") for n, values in times.items()}
        for name, result in rows.items():
            if name != reference:
                result |= {"bound": factor * rows[reference]["p50"], "bound_name": bound_name}
            yield result


def smaller(cases: Sequence[Case]) -> list[Case]:
    """The same in few heads and 12288 tokens at most, and in the order of the other peer too."""
    most_tokens = 12288 // dist.get_world_size()
    return list(
        dict.fromkeys(
            case._replace(
                tokens=min(case.tokens, most_tokens),
                heads=min(case.heads // case.kv_heads, 4), kv_heads=1, order=order,
            )
            for case in cases for order in (case.order, "contiguous")
        )
    )  # fmt: skip


def check(cases: Sequence[Case], machine: Machine) -> None:
    """Right before fast: output and gradients of all that will run against dense in float64."""
    rank = dist.get_rank()
    for case in cases:
        layout = case.layout()
        leaves, do = inputs(case, machine, layout.num_local_tokens)
        whole = [layout.unshard(_gathered(x)).double() for x in (*leaves, do)]
        exact_leaves = [x.requires_grad_() for x in whole[:3]]
        output, _ = dense_attention(
            *exact_leaves, cu_seqlens=layout.borders[: layout.num_documents + 1],
            causal=case.causal, scale=case.head_dim**-0.5,
        )  # fmt: skip
        exact = [output, *torch.autograd.grad(output, exact_leaves, whole[3])]
        for name, forward in {OURS: ours(case), **peers(case, machine.device)}.items():
            output = forward(*leaves)
            actual = [output, *torch.autograd.grad(output, leaves, do)]
            for what, got, true in zip(("output", "dq", "dk", "dv"), actual, exact):
                error = _relative(got.detach(), layout.shard(true.detach(), rank), layout, rank)
                if not error < 3e-2:  # dk of 16 bits, summed over query heads, is off by 1e-2
                    raise SystemExit(f"{name} is wrong here: {what}, relative error {error:.1e}")


def _relative(got: Tensor, true: Tensor, layout: SequenceLayout, rank: int) -> float:
    """Of the rows that are not padding."""
    real = torch.cat([torch.arange(*run) for run in layout.runs(rank)]) < layout.num_real_tokens
    got, true = (x[real.to(x.device)].double() for x in (got, true))
    return ((got - true).norm() / true.norm().clamp(min=1e-30)).item()


def _gathered(x: Tensor) -> list[Tensor]:
    parts = [torch.empty_like(x) for _ in range(dist.get_world_size())]
    dist.all_gather(parts, x.detach())
    return parts


def arguments(doc: str | None) -> argparse.ArgumentParser:
    """Options of both benchmarks."""
    parser = argparse.ArgumentParser(
        description=doc, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--commit", required=True)
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results"))
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda")
    parser.add_argument("--heads", type=int, default=64)
    parser.add_argument("--kv-heads", type=int, default=8)
    parser.add_argument("--head-dim", type=int, default=128)
    parser.add_argument("--samples", type=int, default=10)
    parser.add_argument("--seconds", type=float, default=math.inf, help="for a metric of a case")
    return parser


def run(
    options: argparse.Namespace,
    cases: Callable[[], list[Case]],
    measure: Callable[[Case, Machine], Iterator[dict[str, Any]]],
) -> None:
    """Check, then measure on the ranks that torchrun started; a row is written when it is there."""
    on_gpu = options.device == "cuda"
    if on_gpu:
        # Transfers are few and others wait for them: they may overtake kernels that are queued.
        high = dist.ProcessGroupNCCL.Options(is_high_priority_stream=True)
        dist.init_process_group("nccl", pg_options=high)
        torch.cuda.set_device(dist.get_rank() % torch.cuda.device_count())
    else:
        dist.init_process_group("gloo")
    # The peer is wrong in 32 bits: its buffers are its sums.
    dtype = torch.bfloat16 if on_gpu else torch.float16
    machine = Machine(options.device, dtype, options.samples, options.seconds)
    first = dist.get_rank() == 0
    if first and (reason := ring_peers.obstacle()) is not None:
        print(f"skipped: {ring_peers.ZIGZAG} and {ring_peers.LLAMA3}: {reason}")
    todo = cases()
    check(smaller(todo), machine)
    common = surroundings(options.commit, machine)
    for case in todo:
        for result in measure(case, machine):
            if first:
                write_rows([result | common], options.out)
                p50, bound = result["p50"], result["bound"]
                print(*case, result["impl"], result["metric"], f"{p50:.4g}",
                      f"= {p50 / bound:.3f} x bound" if bound else "", flush=True)  # fmt: skip
    dist.destroy_process_group()
