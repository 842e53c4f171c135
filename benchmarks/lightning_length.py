"""Where does linear time overtake softmax, from 1K to 1M tokens on one GPU?

Forward time, backward time and memory of one layer's attention against the length, bf16, for

- the kernels of this project, and FLA's ``chunk_simple_gla`` if flash-linear-attention is installed
- Lightning Attention-1, the same attention by the left product: ``benchmarks.left_product``
- causal softmax attention of torch by FlashAttention-2 and by cuDNN

Whose time grows with the square of the length stops after the first one at which a call takes more
than the limit. Rows are written as they are measured. Bounds come from the same process: bytes of
q, k, v, o (backward: q, k, v, do, dq, dk, dv) over the bandwidth of a device copy where time is
linear; 2 (backward: 5) causal products at the rate of a matrix product where it is not.
``extra_mib`` is what forward and backward need besides their arguments and results.

Run: python -m benchmarks.lightning_length --commit $(git rev-parse HEAD)
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel

from benchmarks.harness import (
    Forward,
    Machine,
    Options,
    Question,
    Row,
    answer,
    check,
    installed,
    results,
    row,
)
from benchmarks.left_product import left_product_attention
from benchmarks.lightning_kernels import LAYERS, Build, Case, fla, ours
from benchmarks.timing import copy_bytes_per_s, extra_bytes, measure_ms, passes
from lasp.lightning.reference import recurrent_lightning_attention

LENGTHS = tuple(2**n for n in range(10, 21))
LAYER = 40
LONG_MS = 50.0  # a call is long from here on: measured few times


@dataclass(kw_only=True)
class Sweep(Options):
    """Options: lengths in tokens, seconds of the longest call, a part of implementations' names."""

    lengths: tuple[int, ...] = LENGTHS
    heads: int = 16
    head_dim: Literal[64, 128] = 128
    limit: float = 1.0
    only: str = ""


class Impl(NamedTuple):
    """Who computes.

    Attributes:
        build: from the case to a function of q, k and v.
        softmax: it is softmax attention, without decay.
        quadratic: in the length.
    """

    build: Build
    softmax: bool = False
    quadratic: bool = False


class Limits(NamedTuple):
    """What this device can do."""

    bytes_per_s: float
    flops_per_s: float


def left_product(case: Case) -> Forward:
    """Lightning Attention-1."""
    rates = case.rates().cuda()
    return lambda q, k, v: left_product_attention(q, k, v, rates)


def softmax(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Causal softmax attention of ``[T, H, D]``, by the backend that torch is told to take."""
    heads_first = (x.transpose(0, 1).unsqueeze(0) for x in (q, k, v))
    return F.scaled_dot_product_attention(*heads_first, is_causal=True)[0].transpose(0, 1)


def softmax_by(backend: SDPBackend) -> Impl:
    """torch's; an error, never another backend, where this one cannot."""

    def forward(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        with sdpa_kernel(backend):
            return softmax(q, k, v)

    return Impl(lambda case: forward, softmax=True, quadratic=True)


def impls() -> dict[str, Impl]:
    """All that are installed."""
    found = {
        "lasp triton": Impl(ours),
        "lightning attention 1": Impl(left_product, quadratic=True),
        "torch softmax flash 2": softmax_by(SDPBackend.FLASH_ATTENTION),
        "torch softmax cudnn": softmax_by(SDPBackend.CUDNN_ATTENTION),
    }
    version = installed("flash-linear-attention", "fla")
    return found | ({f"fla {version} chunk_simple_gla": Impl(fla)} if version else {})


def check_against_definition(name: str, impl: Impl, options: Sweep, machine: Machine) -> None:
    """Output and gradients, in float64."""
    case = Case(options.heads, 304, LAYER, head_dim=options.head_dim)
    *qkv, do = case.inputs(machine)

    def lightning(*qkv: Tensor) -> Tensor:
        return recurrent_lightning_attention(*qkv, case.rates().to(machine.device))[0]

    definition = softmax if impl.softmax else lightning
    exact = results(definition, [x.double() for x in qkv], do.double())
    check(name, results(impl.build(case), qkv, do), exact)


def flops_per_s() -> float:
    """Rate of a product of two matrices of 8192 x 8192 in bf16."""
    a, b = (torch.randn(8192, 8192, device="cuda", dtype=torch.bfloat16) for _ in range(2))
    return 2 * 8192**3 / measure_ms(lambda: a @ b)[1] * 1e3


def call_ms(fn: Callable[[], Any]) -> float:
    """Time of one call on the device."""
    start, stop = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    start.record()
    fn()
    stop.record()
    stop.synchronize()
    return start.elapsed_time(stop)


def repeat(first: float, again: Callable[[], float]) -> list[float]:
    """Times of a long call: three, or as many as begin within a second."""
    times = [first]
    while len(times) < 3 and sum(times) < 1000:
        times.append(again())
    return times


def timed(fn: Callable[[], Any]) -> tuple[tuple[float, float, float], int | None]:
    """Quantiles of the time of a call, and of how many calls if they were few."""
    fn()  # may compile
    first = call_ms(fn)
    if first < LONG_MS:
        return measure_ms(fn), None
    times = torch.tensor(repeat(first, lambda: call_ms(fn)), dtype=torch.float64)
    p20, p50, p80 = times.quantile(torch.tensor([0.2, 0.5, 0.8], dtype=torch.float64)).tolist()
    return (p20, p50, p80), len(times)


def bounds(impl: Impl, case: Case, limits: Limits) -> tuple[Row, Row]:
    """What forward and backward take at least, in milliseconds."""
    if impl.quadratic:
        seconds = case.tokens * (case.tokens + 1) * case.heads * case.head_dim / limits.flops_per_s
        numbers, name = (2, 5), "causal products at the rate of a matrix product"
    else:
        seconds = case.tokens * case.heads * case.head_dim * 2 / limits.bytes_per_s
        numbers, name = (4, 7), "tensors at copy bandwidth"
    forward, backward = (
        {"bound": number * seconds * 1e3, "bound_name": f"{number} {name}"} for number in numbers
    )
    return forward, backward


def measure(name: str, impl: Impl, case: Case, machine: Machine, limits: Limits) -> Iterator[Row]:
    """Rows of the time of forward and backward, and of the memory that both need."""
    facts = {"tokens": case.tokens, "heads": case.heads, "head_dim": case.head_dim}
    facts |= {"dtype": "bfloat16", "layer_index": case.layer_index, "num_layers": LAYERS}
    forward = impl.build(case)
    *qkv, do = case.inputs(machine)
    leaves = [x.requires_grad_() for x in qkv]
    calls = passes(forward, leaves, do)
    for (metric, call), bound in zip(calls.items(), bounds(impl, case, limits)):
        times, samples = timed(call)
        yield row("lightning_length", facts, name, metric, times, "ms", **bound, samples=samples)
    extra = extra_bytes(forward, leaves, do) / 2**20
    yield row("lightning_length", facts, name, "extra_mib", extra, "MiB", samples=1)


def sweep(
    lengths: Iterable[int], measure_at: Callable[[int], Iterator[Row]], limit_ms: float
) -> Iterator[Row]:
    """Rows length by length, up to the first one at which a call takes more than the limit."""
    for tokens in sorted(lengths):
        slowest = 0.0
        for found in measure_at(tokens):
            yield found
            if found["unit"] == "ms":
                slowest = max(slowest, found["p50"])
        if slowest > limit_ms:
            return


def rows(options: Sweep, machine: Machine) -> Iterator[Row]:
    """Rows of each implementation, after its check."""
    chosen = {name: impl for name, impl in impls().items() if options.only in name}
    if not chosen:
        raise SystemExit(f"--only must be in one of {list(impls())}, got {options.only!r}")
    limits = Limits(copy_bytes_per_s(), flops_per_s())
    for name, impl in chosen.items():
        check_against_definition(name, impl, options, machine)

        def measure_at(tokens: int, name: str = name, impl: Impl = impl) -> Iterator[Row]:
            case = Case(options.heads, tokens, LAYER, head_dim=options.head_dim)
            return measure(name, impl, case, machine, limits)

        yield from sweep(options.lengths, measure_at, options.limit * 1e3)


QUESTION = Question("lightning_length", Sweep, rows)

if __name__ == "__main__":
    answer(QUESTION, __doc__)
