"""What does a call of ring attention on one rank cost the host, beside the bare kernel?

``forward_host_us`` and ``backward_host_us`` are the times until a call returns, where the device is
not waited for: forward with gradients enabled, and backward alone. Implementations take turns.
There are so few tokens that the device is done sooner; on a CPU the kernels' own time is in all.

- ``ring NAME``: the operator with that block, for each that serves the tensors here;
- ``bare FA4``: flash-attn-4's own function, where it is installed; the bound of ``ring fa4``;
- ``torch scaled_dot_product_attention``: for one document; the bound of the other blocks.

Packs of several documents take a kernel's varlen form.

Run: python -m benchmarks.ring_host --commit $(git rev-parse HEAD)
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from typing import NamedTuple

import torch

from benchmarks.harness import (
    DeviceOptions,
    Forward,
    Machine,
    Question,
    Row,
    answer,
    check,
    draw,
    results,
    row,
)
from benchmarks.host_time import sdpa
from benchmarks.timing import hosts_us
from lasp import SequenceLayout
from ring import ring_attention
from ring.blocks.interface import Operands
from ring.blocks.registry import BLOCKS
from ring.reference import dense_attention

NAME, SDPA, BARE = "ring_host", "torch scaled_dot_product_attention", "bare FA4"


@dataclass(kw_only=True)
class Options(DeviceOptions):
    """Options: shapes, and numbers of documents of equal length."""

    tokens: int = 256
    heads: int = 8
    head_dim: int = 128
    documents: tuple[int, ...] = (1, 4)


class Case(NamedTuple):
    """What is measured."""

    tokens: int
    heads: int
    head_dim: int
    documents: int

    @property
    def layout(self) -> SequenceLayout:
        """Documents of one length, on one rank."""
        return SequenceLayout((self.tokens // self.documents,) * self.documents, 1)

    def peers(self, machine: Machine) -> dict[str, Forward]:
        """Torch's attention and the bare kernel, where they can do the case."""
        found: dict[str, Forward] = {SDPA: sdpa} if self.documents == 1 else {}
        if "fa4" in self.blocks(machine):
            found[BARE] = self._bare(machine)
        return found

    def _bare(self, machine: Machine) -> Forward:
        from flash_attn.cute import flash_attn_func, flash_attn_varlen_func

        if self.documents == 1:
            return lambda *qkv: flash_attn_func(*(x[None] for x in qkv), causal=True)[0][0]
        longest = self.tokens // self.documents
        borders = torch.arange(self.documents + 1, dtype=torch.int32, device=machine.device)
        kernel = partial(
            flash_attn_varlen_func, cu_seqlens_q=borders * longest, cu_seqlens_k=borders * longest,
            max_seqlen_q=longest, max_seqlen_k=longest, causal=True,
        )  # fmt: skip
        return lambda q, k, v: kernel(q, k, v)[0]

    def blocks(self, machine: Machine) -> list[str]:
        """Blocks that serve the tensors, but for plain torch."""
        operands = Operands(torch.device(machine.device), machine.dtype, *[self.head_dim] * 2)
        served = (name for name, block in BLOCKS.items() if block.obstacle(operands) is None)
        return [name for name in served if name != "eager"]

    def ours(self, machine: Machine) -> dict[str, Forward]:
        """The operator with each of them."""
        layout = self.layout

        def forward(block: str) -> Forward:
            return lambda *qkv: ring_attention(*qkv, layout=layout, block=block).output

        return {f"ring {block}": forward(block) for block in self.blocks(machine)}


def measure(case: Case, machine: Machine) -> Iterator[Row]:
    """Rows of a case, after all that it compares is checked."""
    *inputs, do = draw(machine, *[(case.tokens, case.heads, case.head_dim)] * 4)
    ours, peers = case.ours(machine), case.peers(machine)
    dense = partial(
        dense_attention, cu_seqlens=case.layout.borders, causal=True, scale=case.head_dim**-0.5
    )
    exact = results(lambda *qkv: dense(*qkv)[0], [x.double() for x in inputs], do.double())
    for impl, forward in {**peers, **ours}.items():
        check(impl, results(forward, inputs, do), exact, 3e-2)
    leaves = [x.requires_grad_() for x in inputs]
    forwards = {impl: partial(forward, *leaves) for impl, forward in {**peers, **ours}.items()}
    backwards = {
        impl: partial(torch.autograd.grad, call(), leaves, do, retain_graph=True)
        for impl, call in forwards.items()
    }
    for metric, calls in (("forward_host_us", forwards), ("backward_host_us", backwards)):
        times = hosts_us(calls)
        for impl, some in times.items():
            found = row(NAME, case._asdict(), impl, metric, some, "us")
            bound = BARE if impl == "ring fa4" else SDPA
            if impl in ours and bound in times:
                found |= {"bound": times[bound][len(some) // 2], "bound_name": bound}
            yield found


def rows(options: Options, machine: Machine) -> Iterator[Row]:
    """Rows of every number of documents."""
    for documents in options.documents:
        case = Case(options.tokens, options.heads, options.head_dim, documents)
        yield from measure(case, machine)


QUESTION = Question(NAME, Options, rows)

if __name__ == "__main__":
    answer(QUESTION, __doc__)
