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

from collections.abc import Iterator
from typing import NamedTuple

import torch
import torch._functorch.config
from torch import Tensor
from torch.nn import functional as F

from benchmarks.harness import Forward, Machine, Options, Question, Row, answer, check, results, row
from benchmarks.timing import copy_bytes_per_s, measure_ms
from lasp.layers.norm_gate import norm_gate, silu_split

HEAD_DIM, EPS = 128, 1e-6
SHAPES = [(64, 32768), (64, 4096), (8, 131072)]


class Op(NamedTuple):
    """One operation.

    Attributes:
        ours: the kernels.
        eager: plain torch, as in the eager layer.
        forward_widths: head dims read and written a token and head, forward.
        backward_widths: likewise, backward.
    """

    ours: Forward
    eager: Forward
    forward_widths: int
    backward_widths: int


def eager_norm(x: Tensor, gate: Tensor, weight: Tensor) -> Tensor:
    """The eager layer."""
    return torch.sigmoid(gate) * F.rms_norm(x, weight.shape, weight, EPS)


OPS = {
    "silu_split": Op(
        lambda x: silu_split(x, HEAD_DIM, HEAD_DIM, impl="triton"),
        lambda x: F.silu(x).split(HEAD_DIM, dim=-1),
        forward_widths=6,
        backward_widths=9,
    ),
    "norm_gate": Op(
        lambda *inputs: norm_gate(*inputs, eps=EPS, impl="triton"),
        eager_norm,
        forward_widths=3,
        backward_widths=5,
    ),
}


def make_inputs(op: str, heads: int, tokens: int) -> list[Tensor]:
    """In bf16 on the GPU: the fused projection, or x, gate and weight."""
    width = heads * HEAD_DIM
    shapes = {
        "silu_split": [(tokens, heads, 3 * HEAD_DIM)],
        "norm_gate": [(tokens, width), (tokens, width), (width,)],
    }
    return [torch.randn(shape, device="cuda", dtype=torch.bfloat16) for shape in shapes[op]]


def gradients(outputs: Tensor | tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    """Random ones of the outputs."""
    return tuple(map(torch.randn_like, outputs if isinstance(outputs, tuple) else (outputs,)))


def check_against_eager(op: str, impl: str, function: Forward) -> None:
    """Results and gradients, in float64."""
    inputs, eager = make_inputs(op, 4, 1000), OPS[op].eager
    grads = gradients(eager(*inputs))
    exact = results(eager, [x.double() for x in inputs], [g.double() for g in grads])
    check(f"{op} {impl}", results(function, inputs, grads), exact)


def measure(
    op: str, impl: str, function: Forward, shape: tuple[int, int], bandwidth: float
) -> Iterator[Row]:
    """Rows of forward and backward."""
    heads, tokens = shape
    leaves = [x.requires_grad_() for x in make_inputs(op, heads, tokens)]
    outputs = function(*leaves)
    grads = gradients(outputs)
    case = {"op": op, "heads": heads, "tokens": tokens, "head_dim": HEAD_DIM, "dtype": "bfloat16"}
    for metric, widths, call in (
        ("forward_ms", OPS[op].forward_widths, lambda: function(*leaves)),
        (
            "backward_ms", OPS[op].backward_widths,
            lambda: torch.autograd.grad(outputs, leaves, grads, retain_graph=True),
        ),
    ):  # fmt: skip
        bound = widths * tokens * heads * HEAD_DIM * 2 / bandwidth * 1e3
        named = {"bound": bound, "bound_name": "bytes at copy bandwidth"}
        times = measure_ms(call)
        yield row("lightning_layer", case, impl, metric, times, "ms", **named, samples=None)


def rows(options: Options, machine: Machine) -> Iterator[Row]:
    """Rows of each implementation, after its check."""
    # A graph that is run backward twice must keep what its backward would take over.
    torch._functorch.config.donated_buffer = False
    bandwidth = copy_bytes_per_s()
    for impl in ("lasp triton", "torch eager", "torch compile"):
        for op, (ours, eager, *_) in OPS.items():
            compiled = torch.compile(eager, dynamic=False)
            choice = {"lasp triton": ours, "torch eager": eager, "torch compile": compiled}
            check_against_eager(op, impl, choice[impl])
            for shape in SHAPES[:1] if impl == "torch compile" else SHAPES:
                yield from measure(op, impl, choice[impl], shape, bandwidth)


QUESTION = Question("lightning_layer", Options, rows)

if __name__ == "__main__":
    answer(QUESTION, __doc__)
