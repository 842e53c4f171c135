"""What does the next token cost, for one sequence and for a batch?

The floor of a step is its bytes over the bandwidth of a device copy measured in the same process:
every state read and written, q, k, v and o. For one sequence that is less than a launch, so the
time of an empty kernel, measured alike, is added to it there. Lengths of the past do not occur: the
state is all there is of it. ``host_us`` is the time until a call returns, against that of the empty
kernel; in a CUDA graph it is not paid.

Baselines: the same step in plain torch, and FLA's ``fused_recurrent_simple_gla`` if
flash-linear-attention is installed, which writes new states beside the old ones.

Run: python -m benchmarks.lightning_decode --commit $(git rev-parse HEAD)
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import torch
import triton
from torch import Tensor

from benchmarks.harness import Machine, Options, Question, Row, answer, check, draw, installed, row
from benchmarks.timing import copy_bytes_per_s, graph_ms, host_us, measure_ms
from lasp import decay_rates, lightning_decode

HEAD_DIM, LAYERS = 128, 80


class Case(NamedTuple):
    """What is measured."""

    batch: int
    heads: int = 64
    tokens: int = 1

    def inputs(self, machine: Machine) -> list[Tensor]:
        """q, k and v, which are views of a fused projection, rates and states."""
        (fused,) = draw(machine, (self.batch, self.tokens, self.heads, 3 * HEAD_DIM))
        states = torch.randn(self.batch, self.heads, HEAD_DIM, HEAD_DIM, device=machine.device)
        rates = decay_rates(self.heads, 0, LAYERS).to(machine.device)
        return [*fused.split(HEAD_DIM, dim=-1), rates, states]


CASES = [
    *(Case(batch) for batch in (1, 8, 32, 128, 512)),
    Case(32, tokens=4),
    Case(1, heads=8),
    Case(256, heads=8),
]

# q, k, v, rates on the device and state to the output; the state may change or not.
Step = Callable[..., Tensor]


def ours(impl: Any) -> Step:
    """The kernel, or plain torch."""
    return lambda *inputs: lightning_decode(*inputs, in_place=True, impl=impl).output


def fla_step(q: Tensor, k: Tensor, v: Tensor, rates: Tensor, state: Tensor) -> Tensor:
    """The peer."""
    from fla.ops.simple_gla import fused_recurrent_simple_gla

    return fused_recurrent_simple_gla(
        q, k, v, g_gamma=-rates, scale=1.0, initial_state=state, output_final_state=True
    )[0]


@triton.jit
def empty_kernel(x):
    """Nothing."""


def empty(q: Tensor, *_: Tensor) -> Tensor:
    """A launch."""
    empty_kernel[(1,)](q)
    return q


def check_step(name: str, step: Step, machine: Machine) -> None:
    """Against plain torch in float64, which may not change the states that others read."""
    inputs = Case(5, 4, tokens=3).inputs(machine)
    exact = ours("eager")(*(x.double() for x in inputs))
    check(name, [step(*inputs)], [exact])


def measure(case: Case, impl: str, step: Step, machine: Machine, bandwidth: float) -> Iterator[Row]:
    """Rows of the time on the device, the share of the bandwidth, and the time on the host."""
    inputs = case.inputs(machine)
    floor_ms = (2 * inputs[4].nbytes + 4 * inputs[0].numel() * 2) / bandwidth * 1e3
    who = "lightning_decode", case._asdict() | {"head_dim": HEAD_DIM, "dtype": "bfloat16"}, impl
    alone, bytes_name = case.batch == 1, "bytes at copy bandwidth"  # then a launch counts

    def on_device(metric: str, time: Callable[..., Any], launch: Any, where: str = "") -> Row:
        bound = floor_ms + (launch[1] if alone else 0)
        name = f"empty kernel{where} and {bytes_name}" if alone else bytes_name
        times = time(lambda: step(*inputs))
        return row(*who, metric, times, "ms", bound=bound, bound_name=name, samples=None)

    yield on_device("step_ms", measure_ms, alone and measure_ms(lambda: empty(*inputs)))
    if alone:
        own, launch = (host_us(lambda fn=fn: fn(*inputs)) for fn in (step, empty))
        bound = launch[len(launch) // 2]
        yield row(*who, "host_us", own, "us", bound=bound, bound_name="empty kernel")
    if alone and impl == "lasp triton":
        launch = graph_ms(lambda: empty(*inputs))
        yield on_device("graph_step_ms", graph_ms, launch, " in a graph")


def rows(options: Options, machine: Machine) -> Iterator[Row]:
    """Rows of each implementation, after its check."""
    steps = {"lasp triton": ours("triton"), "lasp eager": ours("eager")}
    version = installed("flash-linear-attention", "fla")
    if version:
        steps[f"fla {version} fused_recurrent_simple_gla"] = fla_step
    bandwidth = copy_bytes_per_s()
    for impl, step in steps.items():
        check_step(impl, step, machine)
        for case in CASES:
            yield from measure(case, impl, step, machine, bandwidth)


QUESTION = Question("lightning_decode", Options, rows)

if __name__ == "__main__":
    answer(QUESTION, __doc__)
