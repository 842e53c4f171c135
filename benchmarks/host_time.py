"""What does a call of lightning attention cost the host, and from which size on does that not show?

``forward_host_us``, ``backward_host_us`` and ``step_host_us`` are the time until a call returns,
where the device is not waited for: forward with gradients enabled, backward alone, and one step of
decoding. Their bound is the time of an empty kernel, measured alike. ``forward_call_us`` is the
time of a call among many behind each other, on the host or on the device, whichever is longer. Its
bound is the time in a CUDA graph, in which the host has no part. The largest pack shows that
documents cost a call nothing.

``first_forward_s`` and ``first_backward_s`` are those of a new process that compiles all kernels,
beside one that finds them in Triton's cache. ``new_pack_host_us`` is the time of forward and
backward of the first layer that sees a pack, ``new_pack_layer_host_us`` that of every further one,
beside a second call; ``compiled_share`` is how many of the packs had to compile a kernel: none
should.

Baseline: causal ``scaled_dot_product_attention`` of torch on as many tokens and heads.

Run: python -m benchmarks.host_time --commit $(git rev-parse HEAD)
"""

from __future__ import annotations

import json
import os
import random
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from functools import partial
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

    def forward(self, impl: Any, layout: SequenceLayout | None = None, layer: int = LAYER) -> Any:
        """Output of q, k and v ``[T, H, head_dim]``, documents of one length by default."""
        lengths = (self.tokens // self.documents,) * self.documents
        layout = SequenceLayout(lengths, 1) if layout is None else layout
        rates = decay_rates(self.heads, layer, LAYERS)

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
FIRST = Case(8192, 64, documents=4)
PACKS, NUM_PACKS = Case(16384, 8), 50


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


def first_calls() -> None:
    """Print the seconds of forward and backward of this process, which made none before."""
    *inputs, grad = FIRST.tensors(Machine())
    leaves = [x.requires_grad_() for x in inputs]
    results: list[Tensor] = []
    forward = once_us(lambda: results.append(FIRST.forward("triton")(*leaves)))
    backward = once_us(lambda: torch.autograd.grad(results[0], leaves, grad))
    print(json.dumps({"forward": forward / 1e6, "backward": backward / 1e6}))


def first_seconds(cache: str) -> dict[str, float]:
    """What :func:`first_calls` prints in a process of its own, with this folder as cache."""
    code = "from benchmarks.host_time import first_calls; first_calls()"
    environment = os.environ | {"TRITON_CACHE_DIR": cache}
    process = subprocess.run(
        [sys.executable, "-c", code], env=environment, stdout=subprocess.PIPE, text=True, check=True
    )
    seconds: dict[str, float] = json.loads(process.stdout.splitlines()[-1])
    return seconds


def measure_first(machine: Machine) -> Iterator[Row]:
    """Rows of the first call of a process, without and with compiled kernels on disk."""
    with tempfile.TemporaryDirectory() as cache:
        compiling, finding = first_seconds(cache), first_seconds(cache)
    who = "host_time", FIRST._asdict() | {"dtype": str(machine.dtype)[6:]}, "lasp triton"
    for metric, seconds in compiling.items():
        bound = {"bound": finding[metric], "bound_name": "compiled before"}
        yield row(*who, f"first_{metric}_s", seconds, "s", **bound)


def measure_packs(machine: Machine) -> Iterator[Row]:
    """Rows of packs of random documents, each for the first time."""
    from triton import knobs

    *inputs, grad = PACKS.tensors(machine)
    leaves = [x.requires_grad_() for x in inputs]
    generator = random.Random(0)
    times: list[list[float]] = [[], [], []]
    compiled: list[int] = []  # in which packs

    def both(forward: Any) -> None:
        torch.autograd.grad(forward(*leaves), leaves, grad)

    with knobs.runtime.scope():
        for pack in range(NUM_PACKS + 1):
            knobs.runtime.jit_post_compile_hook = lambda pack=pack, **_: compiled.append(pack)
            layout = random_pack(generator)
            for call, layer in enumerate((LAYER, LAYER + 1, LAYER + 1)):
                forward = PACKS.forward("triton", layout, layer)
                times[call].append(once_us(partial(both, forward)))
    layout_us, layer_us, again_us = (sorted(call[1:]) for call in times)  # the first one compiles
    who = "host_time", PACKS._asdict() | {"documents": "random"}, "lasp triton"
    bound = {"bound": again_us[NUM_PACKS // 2], "bound_name": "the same call again"}
    yield row(*who, "new_pack_host_us", layout_us, "us", **bound)
    yield row(*who, "new_pack_layer_host_us", layer_us, "us", **bound)
    share = len({pack for pack in compiled if pack > 0}) / NUM_PACKS
    yield row(*who, "compiled_share", share, "share", samples=NUM_PACKS)


def random_pack(generator: random.Random) -> SequenceLayout:
    """Documents from a few tokens to all of them."""
    lengths: list[int] = []
    while (left := PACKS.tokens - sum(lengths)) > 0:
        lengths.append(min(left, int(generator.lognormvariate(7, 1.5)) + 1))
    return SequenceLayout(lengths, 1)


def once_us(call: Callable[[], object]) -> float:
    """Time until one call returns, of a device that is done with all before."""
    torch.cuda.synchronize()
    start = time.perf_counter()
    call()
    return (time.perf_counter() - start) * 1e6


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
    yield from measure_packs(machine)
    yield from measure_first(machine)


QUESTION = Question("host_time", Options, rows)

if __name__ == "__main__":
    answer(QUESTION, __doc__)
