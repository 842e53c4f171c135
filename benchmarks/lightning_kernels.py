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

import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import NamedTuple

from torch import Tensor

from benchmarks.harness import (
    Forward,
    Machine,
    Options,
    Question,
    Row,
    answer,
    check,
    draw,
    installed,
    pack_lengths,
    results,
    row,
)
from benchmarks.timing import copy_bytes_per_s, extra_bytes, graph_ms, measure_ms, passes
from lasp import SequenceLayout, decay_rates, lightning_attention

SHAPES = [(64, 131072), (16, 1048576), (8, 131072), (8, 524288)]
# Head dim, heads and tokens of models with other heads than those of 128.
OTHER_DIMS = [(64, 32, 262144), (96, 40, 65536), (192, 16, 65536), (256, 12, 65536)]
HEAD_DIM, LAYERS = 128, 80


@dataclass(kw_only=True)
class Choice(Options):
    """Options; only the cases of so many heads, and of this head dim."""

    heads: int | None = None
    head_dim: int | None = None


class Case(NamedTuple):
    """What is measured."""

    heads: int
    tokens: int
    layer_index: int = 0
    documents: int = 1
    head_dim: int = HEAD_DIM

    def rates(self) -> Tensor:
        """The decay rates of MiniMax."""
        return decay_rates(self.heads, self.layer_index, LAYERS)

    def inputs(self, machine: Machine) -> list[Tensor]:
        """q, k, v and the gradient of the output."""
        return draw(machine, *[(self.tokens, self.heads, self.head_dim)] * 4)


Build = Callable[[Case], Forward]


def ours(case: Case) -> Forward:
    """The operator."""
    layout = SequenceLayout(pack_lengths(case.tokens, case.documents), 1)
    rates = case.rates()
    return lambda q, k, v: (
        lightning_attention(
            q, k, v, rates, layout=layout, impl="triton", output_final_state=False
        ).output
    )


def fla(case: Case) -> Forward:
    """flash-linear-attention on the same tensors."""
    from fla.ops.simple_gla import chunk_simple_gla

    gamma = -case.rates().cuda()
    return lambda *qkv: chunk_simple_gla(*(x[None] for x in qkv), g_gamma=gamma, scale=1.0)[0][0]


def check_against_eager(name: str, build: Build, machine: Machine) -> None:
    """Output and gradients, in float64."""
    case = Case(heads=4, tokens=3000)
    *qkv, do = case.inputs(machine)

    def eager(*qkv: Tensor) -> Tensor:
        return lightning_attention(*qkv, case.rates()).output

    exact = results(eager, [x.double() for x in qkv], do.double())
    check(name, results(build(case), qkv, do), exact)


def measure(
    case: Case, impl: str, build: Build, machine: Machine, bandwidth: float
) -> Iterator[Row]:
    """Rows of forward and backward time, and of the memory that both need besides the tensors."""
    *qkv, do = case.inputs(machine)
    forward = build(case)
    results(forward, qkv, do)
    extra = extra_bytes(forward, qkv, do)
    leaves = [x.requires_grad_() for x in qkv]
    calls = passes(forward, leaves, do)
    facts = {"num_layers": LAYERS, "dtype": "bfloat16"}
    who = ("lightning_kernels", case._asdict() | facts, impl)
    for metric, tensors, time, call in (
        ("forward_ms", 4, measure_ms, calls["forward_ms"]),
        ("backward_ms", 7, measure_ms, calls["backward_ms"]),
        ("forward_graph_ms", 4, graph_ms, calls["forward_ms"]),
        # A backward runs on the streams of its forward and of its leaves: all are in the graph.
        ("both_graph_ms", 11, graph_ms, lambda: results(forward, leaves, do)),
    ):
        bound, name = tensors * do.nbytes / bandwidth * 1e3, f"{tensors} tensors at copy bandwidth"
        yield row(*who, metric, time(call), "ms", bound=bound, bound_name=name, samples=None)
    yield row(*who, "extra_memory", extra / (8 * do.nbytes), "share", samples=1)


def our_cases() -> list[Case]:
    """Shapes, decays and packs."""
    plain = [Case(*shape, layer) for shape in SHAPES for layer in (0, 40, 78)]
    others = [Case(heads, tokens, 40, head_dim=dim) for dim, heads, tokens in OTHER_DIMS]
    return [*plain, Case(16, 32768), Case(16, 1048576, documents=1000), *others]


def forget_tuning() -> None:
    """Drop what FLA has found, also on disk."""
    from triton.runtime.autotuner import Autotuner
    from triton.runtime.jit import KernelInterface

    for module in [m for name, m in sys.modules.items() if name.startswith("fla.")]:
        for kernel in list(vars(module).values()):
            while isinstance(kernel, KernelInterface):
                if isinstance(kernel, Autotuner):
                    kernel.cache.clear()
                    kernel.cache_results = False
                kernel = getattr(kernel, "fn", None)


def todo(machine: Machine) -> Iterator[tuple[str, Build, Case]]:
    """Who computes what; what is to be done before is done in between."""
    check_against_eager("lasp triton", ours, machine)
    for case in our_cases():
        yield "lasp triton", ours, case
    version = installed("flash-linear-attention", "fla")
    if version is None:
        return
    name = f"fla {version} chunk_simple_gla"
    check_against_eager(name, fla, machine)
    # Its time does not depend on the decay.
    first, *others = cases = [Case(*shape) for shape in SHAPES]
    forget_tuning()
    small = first._replace(tokens=32768)
    *qkv, do = small.inputs(machine)
    results(fla(small), qkv, do)  # tunes
    for case in others:
        if case.heads != first.heads:
            yield f"{name}, tuned for {first.heads} heads", fla, case
    for case in [*cases, *(case for case in our_cases() if case.head_dim != HEAD_DIM)]:
        forget_tuning()
        yield name, fla, case


def rows(options: Choice, machine: Machine) -> Iterator[Row]:
    """Rows of every case and implementation."""
    bandwidth = copy_bytes_per_s()
    for impl, build, case in todo(machine):
        if options.heads in (None, case.heads) and options.head_dim in (None, case.head_dim):
            yield from measure(case, impl, build, machine, bandwidth)


QUESTION = Question("lightning_kernels", Choice, rows)

if __name__ == "__main__":
    answer(QUESTION, __doc__)
