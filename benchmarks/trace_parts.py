"""Where the time of a GPU goes in a call, by the names of its kernels."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable
from typing import Any, NamedTuple

import torch
from torch.profiler import ProfilerActivity, profile

# The first that matches names the part.
PARTS = {
    "communication": r"nccl",
    "softmax attention": r"fmha|flash|cudnn.*attention|sdpa|merge_tile|FlashAttention",
    "lightning attention": r"hopper_|chunk_|segment_|_scan_kernel|advance|combine_states",
    "products": r"gemm|nvjet|cutlass|cublas|matmul|wgmma",
    "copies": r"[Mm]emcpy|[Mm]emset",
}
REST = "other kernels"


class Span(NamedTuple):
    """One kernel; times in microseconds."""

    name: str
    start: float
    stop: float


def kernels(call: Callable[[], Any]) -> list[Span]:
    """The kernels of a call on this GPU."""
    torch.cuda.synchronize()
    with profile(activities=[ProfilerActivity.CUDA]) as trace:
        call()
        torch.cuda.synchronize()
    return [
        Span(event.name, event.time_range.start, event.time_range.end)
        for event in trace.events()
        if event.device_type == torch.autograd.DeviceType.CUDA
    ]


def part_of(name: str) -> str:
    """The part that a kernel is of."""
    return next((part for part, pattern in PARTS.items() if re.search(pattern, name)), REST)


def shares(spans: Iterable[Span]) -> dict[str, float]:
    """For each part the time of its kernels, and what of communication nothing else hides.

    Shares of the time from the first kernel's start to the last one's end; kernels that run side by
    side both count. ``exposed communication`` is when nothing but communication runs, ``idle`` when
    nothing does.
    """
    spans = list(spans)
    begun, ended = min(s.start for s in spans), max(s.stop for s in spans)
    busy = dict.fromkeys((*PARTS, REST), 0.0)
    for span in spans:
        busy[part_of(span.name)] += span.stop - span.start
    computing = covered(s for s in spans if part_of(s.name) != "communication")
    anything = covered(spans)
    busy |= {"exposed communication": anything - computing, "idle": ended - begun - anything}
    return {part: time / (ended - begun) for part, time in busy.items()}


def under_products(spans: Iterable[Span], pattern: str) -> float:
    """The share of the time of kernels of this pattern during which a product runs too."""
    spans = list(spans)
    some = [s for s in spans if re.search(pattern, s.name)]
    products = [s for s in spans if part_of(s.name) == "products"]
    return 1 - (covered(some + products) - covered(products)) / covered(some)


def covered(spans: Iterable[Span]) -> float:
    """How long at least one of them runs."""
    total, reached = 0.0, float("-inf")
    for span in sorted(spans, key=lambda s: s.start):
        total += max(0.0, span.stop - max(span.start, reached))
        reached = max(reached, span.stop)
    return total
