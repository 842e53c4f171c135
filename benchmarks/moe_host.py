"""What does a call of the experts cost the host, and does the GPU wait for it?

One layer on one rank. ``forward`` is with gradients enabled, ``both`` is forward and backward.

``forward_host_us`` and ``both_host_us`` are the times until a call returns, of few tokens. The
device has done everything before each call: a call behind others would wait for room in the queue,
and a call that reads counts would wait for the work in front of them. Both would be times of the
device. Their bound is what the experts' matrix products alone cost the host, measured alike.

``forward_ms`` and ``both_ms`` are the times of a call among many behind each other, of more tokens,
from a device that is idle to a device that is idle. Their bound is the time in which at least one
kernel or copy of such a call runs, on any stream, read from a trace. The GPU is idle for the rest:
it waits for the host. ``static shapes, one CUDA graph`` is the layer with ``static_shapes``, whose
calls are captured once and replayed: the host queues one graph.

On a CPU the times until a call returns are those of its products, and no trace is read.

Run: python -m benchmarks.moe_host --commit $(git rev-parse HEAD)
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial

import torch

from benchmarks import harness
from benchmarks.harness import DeviceOptions, Machine, Question, Row, answer, say
from benchmarks.moe_cases import BARE, Case, bare_products, build, exact_results, inputs
from benchmarks.timing import host_us, hosts_us
from benchmarks.trace_parts import covered, kernels
from moe_parallel import ExpertGroups, ExpertParallelMoE, TokenOrder

NAME, OURS, GRAPH = "moe_host", "lasp", "lasp, static shapes, one CUDA graph"
ROUNDS = 200  # calls of which each begins on an idle device
TRACED = 10


@dataclass(kw_only=True)
class Options(DeviceOptions):
    """Options: tokens of calls that return, and of calls behind each other; the layer."""

    tokens: int = 256
    busy_tokens: int = 2048
    hidden: int = 2048
    ffn: int = 768
    experts: int = 128
    top_k: int = 8

    def case(self, tokens: int) -> Case:
        """The layer for so many tokens."""
        return Case(tokens, self.hidden, self.ffn, self.experts, self.top_k)


def facts(case: Case) -> dict[str, int]:
    """What a row says of a case: one rank has no mesh."""
    return {name: getattr(case, name) for name in ("tokens", "hidden", "ffn", "experts", "top_k")}


def forward_of(layer: ExpertParallelMoE, tokens: int) -> harness.Forward:
    """The layer's output, with one order for all calls, as models have."""
    order = TokenOrder.contiguous([tokens])
    return lambda x: layer(x, token_order=order).output


def calls(
    case: Case, layer: ExpertParallelMoE, machine: Machine
) -> dict[str, Callable[[], object]]:
    """Forward, and forward and backward, by direction."""
    forward, parameters = forward_of(layer, case.tokens), tuple(layer.parameters())
    x, grad = inputs(case, machine)

    def both() -> None:
        torch.autograd.grad(forward(x), [x, *parameters], grad)

    return {"forward": lambda: forward(x), "both": both}


def check(case: Case, machine: Machine) -> None:
    """Against a loop in float64, at a small size."""
    small = case._replace(tokens=8 * case.experts, hidden=max(64, case.experts), ffn=128)
    layer = build(small, ExpertGroups(), machine)
    x, grad = inputs(small, machine)
    actual = harness.results(forward_of(layer, small.tokens), [x], grad)
    harness.check(OURS, actual, exact_results(small, layer, x, grad, machine))


def measure_host(case: Case, layer: ExpertParallelMoE, machine: Machine) -> Iterator[Row]:
    """Rows of the time until a call returns that an idle device receives."""
    row = partial(harness.row, NAME, facts(case))
    for direction, call in calls(case, layer, machine).items():
        bare = bare_products(layer, inputs(case, machine)[0], backward=direction == "both")
        times = hosts_us({OURS: call, BARE: bare}, count=1, rounds=ROUNDS)
        for impl, some in times.items():
            found = row(impl, f"{direction}_host_us", some, "us")
            if impl == OURS:
                found |= {"bound": times[BARE][ROUNDS // 2], "bound_name": BARE}
            yield found


def measure_wall(case: Case, layer: ExpertParallelMoE, machine: Machine) -> Iterator[Row]:
    """Rows of the time of calls behind each other, beside that of their kernels."""
    row = partial(harness.row, NAME, facts(case))
    ways = {OURS: calls(case, layer, machine)}
    if machine.device == "cuda":
        static = build(case, ExpertGroups(), machine, on_device=True, static_shapes=True)
        ways[GRAPH] = {name: captured(f) for name, f in calls(case, static, machine).items()}
    for name, some in ways.items():
        for direction, call in some.items():
            wall = [us / 1e3 for us in host_us(call, wait=True)]
            found = row(name, f"{direction}_ms", wall, "ms")
            if machine.device == "cuda":
                found |= {"bound": busy_ms(call), "bound_name": "kernels alone"}
            yield found


def captured(call: Callable[[], object]) -> Callable[[], None]:
    """What replays a call as one CUDA graph."""
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(2):
            call()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, stream=stream, capture_error_mode="thread_local"):
        call()
    return graph.replay


def busy_ms(call: Callable[[], object]) -> float:
    """For how long the device runs something for a call, among calls behind each other."""

    def many() -> None:
        for _ in range(TRACED):
            call()

    return covered(kernels(many)) / TRACED / 1e3


def rows(options: Options, machine: Machine) -> Iterator[Row]:
    """Rows of both sizes, after the check."""
    case, more = options.case(options.tokens), options.case(options.busy_tokens)
    if machine.device == "cpu":
        say("left out: the time of kernels alone: traces are of a GPU")
    check(case, machine)
    layer = build(case, ExpertGroups(), machine, on_device=True)
    yield from measure_host(case, layer, machine)
    yield from measure_wall(more, layer, machine)


QUESTION = Question(NAME, Options, rows)

if __name__ == "__main__":
    answer(QUESTION, __doc__)
