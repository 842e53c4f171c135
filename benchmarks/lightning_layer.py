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

from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import torch
import torch._functorch.config
from torch import Tensor
from torch.nn import functional as F

from benchmarks.harness import (
    Forward,
    Machine,
    Options,
    Question,
    Row,
    answer,
    check,
    draw,
    results,
    row,
)
from benchmarks.timing import copy_bytes_per_s, measure_ms, passes
from lasp.layers.norm_gate import norm_gate
from lasp.layers.options import MINIMAX_OPTIONS
from lasp.layers.parts import heads_of

HEAD_DIM, EPS = 128, 1e-6
SHAPES = [(64, 32768), (64, 4096), (8, 131072)]
NOWHERE: dict[str, Any] = {"layout": None, "cp_group": None, "position_ids": None}


class Op(NamedTuple):
    """One operation.

    Attributes:
        ours: the kernels.
        eager: plain torch, as in the eager layer.
        inputs: their shapes for heads H and tokens T.
        outputs: likewise.
        widths: head dims read and written a token and head, forward and backward.
    """

    ours: Forward
    eager: Forward
    inputs: Callable[[int, int], list[tuple[int, ...]]]
    outputs: Callable[[int, int], list[tuple[int, ...]]]
    widths: tuple[int, int]


def eager_norm(x: Tensor, gate: Tensor, weight: Tensor) -> Tensor:
    """The eager layer."""
    return torch.sigmoid(gate) * F.rms_norm(x, weight.shape, weight, EPS)


OPS = {
    "silu_split": Op(
        lambda x: heads_of(x, MINIMAX_OPTIONS, None, **NOWHERE, impl="triton"),
        lambda x: F.silu(x).split(HEAD_DIM, dim=-1),
        inputs=lambda H, T: [(T, H, 3 * HEAD_DIM)],
        outputs=lambda H, T: [(T, H, HEAD_DIM)] * 3,
        widths=(6, 9),
    ),
    "norm_gate": Op(
        lambda *inputs: norm_gate(*inputs, eps=EPS, impl="triton"),
        eager_norm,
        inputs=lambda H, T: [(T, H * HEAD_DIM), (T, H * HEAD_DIM), (H * HEAD_DIM,)],
        outputs=lambda H, T: [(T, H * HEAD_DIM)],
        widths=(3, 5),
    ),
}


def check_against_eager(name: str, impl: str, function: Forward, machine: Machine) -> None:
    """Results and gradients, in float64."""
    op = OPS[name]
    inputs, grads = (draw(machine, *shapes(4, 1000)) for shapes in (op.inputs, op.outputs))
    exact = results(op.eager, [x.double() for x in inputs], [g.double() for g in grads])
    check(f"{name} {impl}", results(function, inputs, grads), exact)


def measure(
    name: str, impl: str, function: Forward, shape: tuple[int, int], machine: Machine
) -> Iterator[Row]:
    """Rows of forward and backward; the bounds are bytes."""
    (heads, tokens), op = shape, OPS[name]
    leaves = [x.requires_grad_() for x in draw(machine, *op.inputs(*shape))]
    calls = passes(function, leaves, draw(machine, *op.outputs(*shape)))
    case = {"op": name, "heads": heads, "tokens": tokens, "head_dim": HEAD_DIM, "dtype": "bfloat16"}
    for (metric, call), widths in zip(calls.items(), op.widths):
        moved = widths * tokens * heads * HEAD_DIM * 2
        yield row(
            "lightning_layer", case, impl, metric, measure_ms(call), "ms", bound=moved, samples=None
        )


def rows(options: Options, machine: Machine) -> Iterator[Row]:
    """Rows of each implementation, after its check."""
    # A graph that is run backward twice must keep what its backward would take over.
    torch._functorch.config.donated_buffer = False
    bandwidth = copy_bytes_per_s()
    for impl in ("lasp triton", "torch eager", "torch compile"):
        for name, (ours, eager, *_) in OPS.items():
            compiled = torch.compile(eager, dynamic=False)
            function = {"lasp triton": ours, "torch eager": eager, "torch compile": compiled}[impl]
            check_against_eager(name, impl, function, machine)
            for shape in SHAPES[:1] if impl == "torch compile" else SHAPES:
                for found in measure(name, impl, function, shape, machine):
                    bound = found["bound"] / bandwidth * 1e3
                    yield found | {"bound": bound, "bound_name": "bytes at copy bandwidth"}


QUESTION = Question("lightning_layer", Options, rows)

if __name__ == "__main__":
    answer(QUESTION, __doc__)
