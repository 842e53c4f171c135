"""How close to the memory floor is what lies around lightning attention in its layer?

SiLU with the split into heads, and the norm over all heads times the sigmoid gate, forward and
backward. The floors are bytes over the bandwidth of a device copy measured in the same process:

- split: x, and q, k, v of the same bytes; backward x, their gradients, and that of x
- norm and gate: x, gate, y; backward x, gate, dy, and the gradients of x and gate

Baselines: plain torch as in the eager layer, and the same through ``torch.compile`` at the first
shape.

Run: python -m benchmarks.lightning_layer --commit $(git rev-parse HEAD)
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch._functorch.config
from torch import Tensor
from torch.nn import functional as F

from benchmarks.harness import copy_bytes_per_s, environment, measure_ms, write_rows
from lasp.layers.norm_gate import norm_gate, silu_split

HEAD_DIM, EPS = 128, 1e-6
SHAPES = [(64, 32768), (64, 4096), (8, 131072)]

Function = Callable[..., tuple[Tensor, ...]]


class Question(NamedTuple):
    """One operation.

    Attributes:
        name: of the operation.
        impls: who computes.
        make: its inputs, for heads and tokens.
        forward_widths: head dims read and written a token and head, forward.
        backward_widths: likewise, backward.
    """

    name: str
    impls: dict[str, Function]
    make: Callable[[int, int], list[Tensor]]
    forward_widths: int
    backward_widths: int


def eager_split(x: Tensor) -> tuple[Tensor, ...]:
    """The eager layer."""
    return F.silu(x).split(HEAD_DIM, dim=-1)


def eager_norm(x: Tensor, gate: Tensor, weight: Tensor) -> tuple[Tensor]:
    """The eager layer."""
    return (torch.sigmoid(gate) * F.rms_norm(x, weight.shape, weight, EPS),)


def random(*shape: int) -> Tensor:
    """In bf16 on the GPU."""
    return torch.randn(shape, device="cuda", dtype=torch.bfloat16)


def questions() -> list[Question]:
    """The two operations."""
    return [
        Question(
            "silu_split",
            {
                "lasp triton": lambda x: silu_split(x, HEAD_DIM, HEAD_DIM, impl="triton"),
                "torch eager": eager_split,
                "torch compile": torch.compile(eager_split, dynamic=False),
            },
            lambda heads, tokens: [random(tokens, heads, 3 * HEAD_DIM)],
            6,
            9,
        ),
        Question(
            "norm_gate",
            {
                "lasp triton": lambda *t: (norm_gate(*t, eps=EPS, impl="triton"),),
                "torch eager": eager_norm,
                "torch compile": torch.compile(eager_norm, dynamic=False),
            },
            lambda heads, tokens: [
                random(tokens, heads * HEAD_DIM),
                random(tokens, heads * HEAD_DIM),
                random(heads * HEAD_DIM),
            ],
            3,
            5,
        ),
    ]


def run(function: Function, inputs: list[Tensor], grads: list[Tensor]) -> list[Tensor]:
    """Outputs and gradients."""
    leaves = [x.detach().requires_grad_() for x in inputs]
    outputs = function(*leaves)
    return [*(y.detach() for y in outputs), *torch.autograd.grad(outputs, leaves, grads)]


def check(question: Question, impl: str) -> None:
    """Right before fast: against plain torch in float64."""
    inputs = question.make(4, 1000)
    exact_of = {"silu_split": eager_split, "norm_gate": eager_norm}[question.name]
    grads = [torch.randn_like(y) for y in exact_of(*inputs)]
    exact = run(exact_of, [x.double() for x in inputs], [g.double() for g in grads])
    for index, (a, e) in enumerate(zip(run(question.impls[impl], inputs, grads), exact)):
        error = ((a.double() - e).norm() / e.norm()).item()
        print(f"{question.name} {impl}: result {index} relative error {error:.1e}", flush=True)
        if not error < 1e-2:
            raise SystemExit(f"{impl} is wrong here: {question.name}, result {index}")


def measure(
    question: Question, impl: str, heads: int, tokens: int, bandwidth: float
) -> list[dict[str, Any]]:
    """Rows of forward and backward."""
    leaves = [x.requires_grad_() for x in question.make(heads, tokens)]
    function = question.impls[impl]
    outputs = function(*leaves)
    grads = [torch.randn_like(y) for y in outputs]
    times = {
        "forward_ms": (question.forward_widths, measure_ms(lambda: function(*leaves))),
        "backward_ms": (
            question.backward_widths,
            measure_ms(lambda: torch.autograd.grad(outputs, leaves, grads, retain_graph=True)),
        ),
    }
    width_ms = tokens * heads * HEAD_DIM * 2 / bandwidth * 1e3
    case = {"op": question.name, "heads": heads, "tokens": tokens, "head_dim": HEAD_DIM}
    return [
        {"benchmark": "lightning_layer", "impl": impl, "case": case | {"dtype": "bfloat16"},
         "metric": metric, "p20": p20, "p50": p50, "p80": p80, "unit": "ms",
         "bound": widths * width_ms, "bound_name": "bytes at copy bandwidth", "samples": None}
        for metric, (widths, (p20, p50, p80)) in times.items()
    ]  # fmt: skip


def main() -> None:
    """Measure everything and append each row as it comes."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--commit", required=True)
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results"))
    options = parser.parse_args()
    # A graph that is run backward twice must keep what its backward would take over.
    torch._functorch.config.donated_buffer = False
    common, bandwidth = environment(options.commit), copy_bytes_per_s()
    for impl in ("lasp triton", "torch eager", "torch compile"):
        for question in questions():
            check(question, impl)
            for heads, tokens in SHAPES[:1] if impl == "torch compile" else SHAPES:
                for row in measure(question, impl, heads, tokens, bandwidth):
                    path = write_rows([row | common], options.out)
                    print(f"{question.name} {impl:13} H={heads:3} N={tokens:7}"
                          f" {row['metric']:11} {row['p50']:8.4f}"
                          f" = {row['p50'] / row['bound']:.2f} x floor", flush=True)  # fmt: skip
    print(path)


if __name__ == "__main__":
    main()
