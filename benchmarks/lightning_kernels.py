"""How close do the lightning kernels come to the memory floor of one GPU, and to their peers?

The floor of the forward pass is the bytes of q, k, v and o over the bandwidth of a device copy
measured in the same process; of the backward, those of q, k, v, do, dq, dk and dv. Times are of
whole calls of the operator, states included: as the host launches them, which for few tokens takes
longer than the device, and as a CUDA graph replays them, which is the time of the device alone.
Layer 0 of 80 decays fastest; in layer 78 hardly anything is forgotten, and all tokens of a segment
count for its state.

The baseline is FLA's ``chunk_simple_gla(g_gamma=-rates, scale=1.0)``, if flash-linear-attention is
installed. It tunes itself for the heads of its first call and keeps that for others. It is measured
both ways: as one process has it that runs all cases, 64 heads first, and tuned for each case.

Run: python -m benchmarks.lightning_kernels --commit $(git rev-parse HEAD)
"""

from __future__ import annotations

import argparse
import importlib.metadata
import importlib.util
import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor
from triton.runtime.autotuner import Autotuner
from triton.runtime.jit import KernelInterface

from benchmarks.harness import copy_bytes_per_s, environment, graph_ms, measure_ms, write_rows
from lasp import SequenceLayout, decay_rates, lightning_attention

SHAPES = [(64, 131072), (16, 1048576), (8, 131072), (8, 524288)]
HEAD_DIM, LAYERS = 128, 80

Forward = Callable[..., Tensor]


class Case(NamedTuple):
    """What is measured."""

    heads: int
    tokens: int
    layer_index: int = 0
    documents: int = 1

    def lengths(self) -> tuple[int, ...]:
        """Log-normal document lengths."""
        if self.documents == 1:
            return (self.tokens,)
        generator = torch.Generator().manual_seed(0)
        weights = torch.randn(self.documents, generator=generator).mul(1.5).exp()
        cuts = (weights.cumsum(0) / weights.sum() * self.tokens).long().tolist()[:-1]
        return tuple(b - a for a, b in zip((0, *cuts), (*cuts, self.tokens)))


def ours(case: Case, rates: Tensor) -> Forward:
    """The operator."""
    layout = SequenceLayout(case.lengths(), 1)
    return lambda q, k, v: (
        lightning_attention(
            q, k, v, rates, layout=layout, impl="triton", output_final_state=False
        ).output
    )


def fla(case: Case, rates: Tensor) -> Forward:
    """flash-linear-attention on the same tensors."""
    from fla.ops.simple_gla import chunk_simple_gla

    gamma = -rates.cuda()
    return lambda q, k, v: chunk_simple_gla(
        q[None], k[None], v[None], g_gamma=gamma, scale=1.0
    )[0][0]  # fmt: skip


def check(build: Callable[[Case, Tensor], Forward], name: str) -> None:
    """Right before fast: output and gradients against eager in float64."""
    case = Case(heads=4, tokens=3000)
    rates = decay_rates(case.heads, 0, LAYERS)
    q, k, v, do = (
        torch.randn(case.tokens, case.heads, HEAD_DIM, device="cuda").bfloat16() for _ in range(4)
    )

    def run(forward: Forward, dtype: torch.dtype) -> list[Tensor]:
        leaves = [x.to(dtype).requires_grad_() for x in (q, k, v)]
        output = forward(*leaves)
        return [output.detach(), *torch.autograd.grad(output, leaves, do.to(dtype))]

    exact = run(lambda *qkv: lightning_attention(*qkv, rates).output, torch.float64)
    for what, actual, true in zip(
        ("output", "dq", "dk", "dv"), run(build(case, rates), torch.bfloat16), exact
    ):
        error = ((actual.double() - true).norm() / true.norm()).item()
        print(f"{name}: {what} relative error {error:.1e}", flush=True)
        if not error < 1e-2:
            raise SystemExit(f"{name} is wrong here: {what}")


def both(forward: Forward, inputs: Sequence[Tensor], do: Tensor) -> tuple[Tensor, ...]:
    """Forward and gradients."""
    leaves = [x.detach().requires_grad_() for x in inputs]
    return torch.autograd.grad(forward(*leaves), leaves, do)


def measure(
    case: Case, impl: str, build: Callable[[Case, Tensor], Forward], bandwidth: float
) -> list[dict[str, Any]]:
    """Rows of forward and backward time, and of the memory that both need besides the tensors."""
    q, k, v, do = (
        torch.randn(case.tokens, case.heads, HEAD_DIM, device="cuda", dtype=torch.bfloat16)
        for _ in range(4)
    )
    forward = build(case, decay_rates(case.heads, case.layer_index, LAYERS))
    tensor_bytes = q.numel() * q.element_size()

    both(forward, (q, k, v), do)
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    both(forward, (q, k, v), do)
    peak = torch.cuda.max_memory_allocated() - before
    leaves = [x.requires_grad_() for x in (q, k, v)]
    output = forward(*leaves)
    times = {
        "forward_ms": (4, *measure_ms(lambda: forward(*leaves))),
        "backward_ms": (
            7,
            *measure_ms(lambda: torch.autograd.grad(output, leaves, do, retain_graph=True)),
        ),
        "forward_graph_ms": (4, *graph_ms(lambda: forward(*leaves))),
        # A backward runs on the streams of its forward and of its leaves: all are in the graph.
        "both_graph_ms": (11, *graph_ms(lambda: both(forward, (q, k, v), do))),
    }

    base = {
        "benchmark": "lightning_kernels",
        "impl": impl,
        "case": case._asdict() | {"head_dim": HEAD_DIM, "num_layers": LAYERS, "dtype": "bfloat16"},
    }
    floor_ms = tensor_bytes / bandwidth * 1e3
    rows = [
        base | {"metric": metric, "p20": p20, "p50": p50, "p80": p80, "unit": "ms",
                "bound": tensors * floor_ms, "bound_name": f"{tensors} tensors at copy bandwidth",
                "samples": None}
        for metric, (tensors, p20, p50, p80) in times.items()
    ]  # fmt: skip
    extra = peak - 4 * tensor_bytes  # the output and three gradients are the caller's
    share = {"p20": None, "p50": extra / (8 * tensor_bytes), "p80": None, "unit": "share"}
    bound = {"bound": None, "bound_name": None, "samples": 1}
    return [*rows, base | {"metric": "extra_memory"} | share | bound]


def our_cases() -> list[Case]:
    """Shapes, decays and packs."""
    plain = [Case(*shape, layer) for shape in SHAPES for layer in (0, 40, 78)]
    return [*plain, Case(16, 32768), Case(16, 1048576, documents=1000)]


def forget_tuning() -> None:
    """Of FLA: what it has found, also on disk."""
    for module in [m for name, m in sys.modules.items() if name.startswith("fla.")]:
        for kernel in list(vars(module).values()):
            while isinstance(kernel, KernelInterface):
                if isinstance(kernel, Autotuner):
                    kernel.cache.clear()
                    kernel.cache_results = False
                kernel = getattr(kernel, "fn", None)


def tune_for(heads: int) -> None:
    """Let FLA tune itself for so many heads."""
    x, do = (torch.randn(32768, heads, HEAD_DIM, device="cuda").bfloat16() for _ in range(2))
    case = Case(heads, len(x))
    both(fla(case, decay_rates(heads, 0, LAYERS)), (x, x, x), do)


def questions(heads: int | None) -> Iterator[tuple[str, Callable[[Case, Tensor], Forward], Case]]:
    """Who computes what; what is to be done before is done in between."""
    check(ours, "lasp triton")
    for case in our_cases():
        if heads in (None, case.heads):
            yield "lasp triton", ours, case
    if not importlib.util.find_spec("fla"):
        print("flash-linear-attention is not installed: no rows of it")
        return
    name = f"fla {importlib.metadata.version('flash-linear-attention')} chunk_simple_gla"
    check(fla, name)
    # Its time does not depend on the decay.
    cases = [Case(*shape) for shape in SHAPES]
    forget_tuning()
    tune_for(cases[0].heads)
    for case in cases:
        if heads in (None, case.heads) and case.heads != cases[0].heads:
            yield f"{name}, tuned for {cases[0].heads} heads", fla, case
    for case in cases:
        if heads in (None, case.heads):
            forget_tuning()
            yield name, fla, case


def main() -> None:
    """Measure everything and append the rows."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--commit", required=True)
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results"))
    parser.add_argument("--heads", type=int, help="only the cases of so many heads")
    options = parser.parse_args()
    common, bandwidth = environment(options.commit), copy_bytes_per_s()
    for impl, build, case in questions(options.heads):
        rows = [row | common for row in measure(case, impl, build, bandwidth)]
        path = write_rows(rows, options.out)  # at once: what comes later may fail
        for row in rows:
            ratio = f"= {row['p50'] / row['bound']:.2f} x floor" if row["bound"] else ""
            print(f"{impl:12} H={case.heads:3} N={case.tokens:8} layer {case.layer_index:2}"
                  f" documents {case.documents:4} {row['metric']:16} {row['p50']:8.3f} {ratio}",
                  flush=True)  # fmt: skip
    print(path)


if __name__ == "__main__":
    main()
