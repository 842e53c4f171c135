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

import argparse
import importlib.metadata
import importlib.util
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel

from benchmarks.harness import copy_bytes_per_s, environment, measure_ms, write_rows
from benchmarks.left_product import left_product_attention
from benchmarks.lightning_kernels import Case, fla, ours
from lasp import decay_rates
from lasp.lightning.reference import recurrent_lightning_attention

LENGTHS = [2**n for n in range(10, 21)]
LAYER, LAYERS = 40, 80
LONG_MS = 50.0  # a call is long from here on: measured few times

Row = dict[str, Any]
Forward = Callable[[Tensor, Tensor, Tensor], Tensor]


class Impl(NamedTuple):
    """Who computes.

    Attributes:
        build: from the case and the decay rates to a function of q, k and v.
        softmax: it is softmax attention, without decay.
        quadratic: in the length.
    """

    build: Callable[[Case, Tensor], Forward]
    softmax: bool = False
    quadratic: bool = False


class Limits(NamedTuple):
    """What this device can do."""

    bytes_per_s: float
    flops_per_s: float


def left_product(case: Case, rates: Tensor) -> Forward:
    """Lightning Attention-1."""
    on_device = rates.cuda()
    return lambda q, k, v: left_product_attention(q, k, v, on_device)


def softmax(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Causal softmax attention of ``[T, H, D]``, by the backend that torch is told to take."""
    heads_first = (x.transpose(0, 1).unsqueeze(0) for x in (q, k, v))
    return F.scaled_dot_product_attention(*heads_first, is_causal=True)[0].transpose(0, 1)


def softmax_by(backend: SDPBackend) -> Impl:
    """Of torch; an error, never another backend, where this one cannot."""

    def forward(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        with sdpa_kernel(backend):
            return softmax(q, k, v)

    return Impl(lambda case, rates: forward, softmax=True, quadratic=True)


def impls() -> dict[str, Impl]:
    """All that are installed."""
    found = {
        "lasp triton": Impl(ours),
        "lightning attention 1": Impl(left_product, quadratic=True),
        "torch softmax flash 2": softmax_by(SDPBackend.FLASH_ATTENTION),
        "torch softmax cudnn": softmax_by(SDPBackend.CUDNN_ATTENTION),
    }
    if importlib.util.find_spec("fla"):
        version = importlib.metadata.version("flash-linear-attention")
        found[f"fla {version} chunk_simple_gla"] = Impl(fla)
    return found


def check(name: str, impl: Impl, heads: int, head_dim: int) -> None:
    """Right before fast: output and gradients against the definition in float64."""
    case, rates = Case(heads, 304), decay_rates(heads, LAYER, LAYERS)
    q, k, v, do = random_inputs(case, head_dim)

    def run(forward: Forward, dtype: torch.dtype) -> list[Tensor]:
        leaves = [x.to(dtype).requires_grad_() for x in (q, k, v)]
        output = forward(*leaves)
        return [output.detach(), *torch.autograd.grad(output, leaves, do.to(dtype))]

    def lightning(*qkv: Tensor) -> Tensor:
        return recurrent_lightning_attention(*qkv, rates.to(q.device))[0]

    exact = run(softmax if impl.softmax else lightning, torch.float64)
    results = run(impl.build(case, rates), torch.bfloat16)
    for what, actual, true in zip(("output", "dq", "dk", "dv"), results, exact):
        error = ((actual.double() - true).norm() / true.norm()).item()
        print(f"{name}: {what} relative error {error:.1e}", flush=True)
        if not error < 1e-2:
            raise SystemExit(f"{name} is wrong here: {what}")


def random_inputs(case: Case, head_dim: int) -> list[Tensor]:
    """q, k, v and the gradient of the output."""
    shape = (case.tokens, case.heads, head_dim)
    return [torch.randn(shape, device="cuda", dtype=torch.bfloat16) for _ in range(4)]


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


def timed(fn: Callable[[], Any]) -> Row:
    """Quantiles of the time of a call, and of how many calls if they were few."""
    fn()  # may compile
    first = call_ms(fn)
    if first < LONG_MS:
        p20, p50, p80 = measure_ms(fn)
        return {"p20": p20, "p50": p50, "p80": p80, "unit": "ms", "samples": None}
    times = torch.tensor(repeat(first, lambda: call_ms(fn)), dtype=torch.float64)
    p20, p50, p80 = times.quantile(torch.tensor([0.2, 0.5, 0.8], dtype=torch.float64)).tolist()
    return {"p20": p20, "p50": p50, "p80": p80, "unit": "ms", "samples": len(times)}


def bounds(impl: Impl, case: Case, head_dim: int, limits: Limits) -> tuple[Row, Row]:
    """What forward and backward take at least, in milliseconds."""
    if impl.quadratic:
        product = case.tokens * (case.tokens + 1) * case.heads * head_dim / limits.flops_per_s
        units = (2, product, "causal products"), (5, product, "causal products")
        rate = "the rate of a matrix product"
    else:
        tensor = case.tokens * case.heads * head_dim * 2 / limits.bytes_per_s
        units = (4, tensor, "tensors"), (7, tensor, "tensors")
        rate = "copy bandwidth"
    forward, backward = (
        {"bound": number * seconds * 1e3, "bound_name": f"{number} {what} at {rate}"}
        for number, seconds, what in units
    )
    return forward, backward


def measure(name: str, impl: Impl, case: Case, head_dim: int, limits: Limits) -> Iterator[Row]:
    """Rows of the time of forward and backward, and of the memory that both need."""
    base = {
        "benchmark": "lightning_length",
        "impl": name,
        "case": {"tokens": case.tokens, "heads": case.heads, "head_dim": head_dim,
                 "dtype": "bfloat16", "layer_index": case.layer_index, "num_layers": LAYERS},
    }  # fmt: skip
    forward = impl.build(case, decay_rates(case.heads, case.layer_index, LAYERS))
    *qkv, do = random_inputs(case, head_dim)
    leaves = [x.requires_grad_() for x in qkv]
    forward_bound, backward_bound = bounds(impl, case, head_dim, limits)
    yield base | {"metric": "forward_ms"} | timed(lambda: forward(*leaves)) | forward_bound

    yield base | {"metric": "backward_ms"} | backward_times(forward, leaves, do) | backward_bound
    yield base | {
        "metric": "extra_mib", "p20": None, "p50": extra_mib(forward, leaves, do), "p80": None,
        "unit": "MiB", "bound": None, "bound_name": None, "samples": 1,
    }  # fmt: skip


def backward_times(forward: Forward, leaves: list[Tensor], do: Tensor) -> Row:
    """Of the backward pass alone."""
    output = forward(*leaves)
    return timed(lambda: torch.autograd.grad(output, leaves, do, retain_graph=True))


def extra_mib(forward: Forward, leaves: list[Tensor], do: Tensor) -> float:
    """What forward and backward need at most beside q, k, v, do, output, dq, dk and dv."""
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    torch.autograd.grad(forward(*leaves), leaves, do)
    results = 4 * do.numel() * do.element_size()
    return (torch.cuda.max_memory_allocated() - before - results) / 2**20


def sweep(
    lengths: Iterable[int], measure_at: Callable[[int], Iterator[Row]], limit_ms: float
) -> Iterator[Row]:
    """Rows length by length, up to the first one at which a call takes more than the limit."""
    for tokens in sorted(lengths):
        slowest = 0.0
        for row in measure_at(tokens):
            yield row
            if row["unit"] == "ms":
                slowest = max(slowest, row["p50"])
        if slowest > limit_ms:
            return


def parse(arguments: list[str] | None = None) -> argparse.Namespace:
    """Options of the command line."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--commit", required=True)
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results"))
    parser.add_argument("--lengths", type=int, nargs="+", default=LENGTHS, help="in tokens")
    parser.add_argument("--heads", type=int, default=16)
    parser.add_argument("--head-dim", type=int, default=128, choices=(64, 128))
    parser.add_argument("--limit", type=float, default=1.0, help="seconds of a call")
    parser.add_argument("--only", default="", help="implementations with this in their name")
    return parser.parse_args(arguments)


def main() -> None:
    """Measure everything and append each row as it comes."""
    options = parse()
    chosen = {name: impl for name, impl in impls().items() if options.only in name}
    if not chosen:
        raise SystemExit(f"--only must be in one of {list(impls())}, got {options.only!r}")
    limits = Limits(copy_bytes_per_s(), flops_per_s())
    common = environment(options.commit)
    for name, impl in chosen.items():
        check(name, impl, options.heads, options.head_dim)

        def measure_at(tokens: int, name: str = name, impl: Impl = impl) -> Iterator[Row]:
            case = Case(options.heads, tokens, LAYER)
            return measure(name, impl, case, options.head_dim, limits)

        for row in sweep(options.lengths, measure_at, options.limit * 1e3):
            path = write_rows([row | common], options.out)
            bound = row["bound"]
            ratio = f"= {row['p50'] / bound:.2f} x {row['bound_name']}" if bound else ""
            print(f"{name:24} N={row['case']['tokens']:8} {row['metric']:11} {row['p50']:10.3f}"
                  f" {row['unit']:3} {ratio}", flush=True)  # fmt: skip
    print(path)


if __name__ == "__main__":
    main()
