"""What does a call of lightning attention cost the host, and from which size on does that not show?

``forward_host_us``, ``backward_host_us`` and ``step_host_us`` are the time until a call returns,
where the device is not waited for: forward with gradients enabled, backward alone, and one step of
decoding. Their bound is the time of an empty kernel, measured alike. ``forward_call_us`` is the
time of a call among many behind each other, on the host or on the device, whichever is longer. Its
bound is the time in a CUDA graph, in which the host has no part. The largest pack shows that
documents cost a call nothing.

Baseline: causal ``scaled_dot_product_attention`` of torch on as many tokens and heads.

Run: python -m benchmarks.host_time --commit $(git rev-parse HEAD)
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from benchmarks.harness import Machine, Options, Question, Row, answer, check, draw, results, row
from benchmarks.lightning_decode import empty
from benchmarks.timing import graph_ms, host_us
from lasp import SequenceLayout, decay_rates, lightning_attention, lightning_decode

LAYER, LAYERS = 40, 80


class Case(NamedTuple):
    """What is measured."""

    tokens: int
    heads: int
    head_dim: int = 128
    documents: int = 1

    def forward(self, impl: Any) -> Any:
        """Output of q, k and v ``[T, H, head_dim]``."""
        lengths = (self.tokens // self.documents,) * self.documents
        layout, rates = SequenceLayout(lengths, 1), decay_rates(self.heads, LAYER, LAYERS)

        def output(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
            return lightning_attention(
                q, k, v, rates, layout=layout, impl=impl, output_final_state=False
            ).output

        return output

    def tensors(self, machine: Machine) -> list[Tensor]:
        """q, k, v and the gradient of the output."""
        return draw(machine, *[(self.tokens, self.heads, self.head_dim)] * 4)


CASES = [
    Case(256, 8),
    Case(8192, 16),
    Case(16384, 32),
    Case(100_000, 1, head_dim=64, documents=100_000),
]
STEPS = [Case(1, 8), Case(1, 64)]


def sdpa(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """The peer, of ``[T, H, head_dim]``."""
    q, k, v = (x.transpose(0, 1)[None] for x in (q, k, v))
    return F.scaled_dot_product_attention(q, k, v, is_causal=True)[0].transpose(0, 1)


def check_forward(machine: Machine) -> None:
    """Against plain torch in float64."""
    case = Case(300, 4, documents=3)
    *inputs, grad = case.tensors(machine)
    exact = results(case.forward("eager"), [x.double() for x in inputs], grad.double())
    check("lasp", results(case.forward("triton"), inputs, grad), exact)


def measure(case: Case, impl: str, forward: Any, machine: Machine) -> Iterator[Row]:
    """Rows of both directions on the host, and of calls beside their CUDA graph."""
    *inputs, grad = case.tensors(machine)
    leaves = [x.requires_grad_() for x in inputs]
    output = forward(*leaves)
    who = "host_time", case._asdict() | {"dtype": str(machine.dtype)[6:]}, impl

    def backward() -> None:
        torch.autograd.grad(output, leaves, grad, retain_graph=True)

    for metric, call in (("forward", lambda: forward(*leaves)), ("backward", backward)):
        yield row(*who, f"{metric}_host_us", host_us(call), "us", **empty_bound(leaves[0]))
    with torch.no_grad():
        whole = host_us(lambda: forward(*leaves), wait=True)
        bound = graph_ms(lambda: forward(*leaves))[1] * 1e3
    yield row(*who, "forward_call_us", whole, "us", bound=bound, bound_name="CUDA graph")


def measure_step(case: Case, machine: Machine) -> Row:
    """The row of one step of decoding, of one sequence."""
    q, k, v, _ = (x[None] for x in case.tensors(machine))
    state = torch.zeros(1, case.heads, case.head_dim, case.head_dim, device=machine.device)
    rates = decay_rates(case.heads, LAYER, LAYERS)
    with torch.no_grad():
        step = host_us(
            lambda: lightning_decode(q, k, v, rates, state, in_place=True, impl="triton")
        )
    who = "host_time", case._asdict() | {"batch": 1}, "lasp triton", "step_host_us"
    return row(*who, step, "us", **empty_bound(q))


def empty_bound(x: Tensor) -> dict[str, Any]:
    """The least that a launch by Triton costs the host."""
    times = host_us(lambda: empty(x))
    return {"bound": times[len(times) // 2], "bound_name": "empty kernel"}


def rows(options: Options, machine: Machine) -> Iterator[Row]:
    """Rows of ours after its check, and of the peer for one document."""
    check_forward(machine)
    for case in CASES:
        ours = case.forward("triton")
        yield from measure(case, "lasp triton", ours, machine)
        if case.documents == 1:
            yield from measure(case, "torch scaled_dot_product_attention", sdpa, machine)
    for case in STEPS:
        yield measure_step(case, machine)


QUESTION = Question("host_time", Options, rows)

if __name__ == "__main__":
    answer(QUESTION, __doc__)
