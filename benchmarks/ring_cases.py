"""What ``ring_length`` and ``ring_packed`` share: cases, who computes, and their measurement."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

from benchmarks import harness, ring_peers
from benchmarks.harness import Forward, Machine, Question, RankOptions, Row
from benchmarks.timing import Timed, bounded, gathered, most
from benchmarks.wire import measured_bytes
from lasp import SequenceLayout
from ring import ring_attention
from ring.reference import dense_attention
from tests.lasp.distributions import document_lengths

OURS = "ring"


@dataclass(kw_only=True)
class Options(RankOptions):
    """Options of both benchmarks."""

    heads: int = 64
    kv_heads: int = 8
    head_dim: int = 128
    samples: int = 10

    @property
    def shape(self) -> tuple[int, int, int]:
        """Query heads, key heads and head dim."""
        return self.heads, self.kv_heads, self.head_dim


class Case(NamedTuple):
    """What is measured.

    ``tokens`` are those of one rank; ``documents`` is ``one``, ``equal`` (one a rank) or the name
    of a distribution.
    """

    tokens: int
    heads: int
    kv_heads: int
    head_dim: int
    causal: bool
    documents: str
    order: str

    def lengths(self) -> tuple[int, ...]:
        """The document lengths of the whole pack."""
        ranks = dist.get_world_size()
        simple = {"one": (self.tokens * ranks,), "equal": (self.tokens,) * ranks}
        if self.documents in simple:
            return simple[self.documents]
        return document_lengths(self.documents, self.tokens * ranks, 0)

    def layout(self) -> SequenceLayout:
        """Who holds which tokens of the whole pack."""
        return SequenceLayout(self.lengths(), dist.get_world_size(), self.order)

    def inputs(self, machine: Machine, tokens: int) -> tuple[list[Tensor], Tensor]:
        """q, k and v, which want gradients, and that of the output; others on every rank."""
        heads = (self.heads, self.kv_heads, self.kv_heads, self.heads)
        *qkv, do = harness.draw(machine, *((tokens, h, self.head_dim) for h in heads))
        return [x.requires_grad_() for x in qkv], do

    def row(
        self, benchmark: str, impl: str, metric: str, values: float | Sequence[float], unit: str
    ) -> Row:
        """A row of this case."""
        facts = self._asdict() | {"ranks": dist.get_world_size()}
        return harness.row(benchmark, facts, impl, metric, values, unit)


def ours(case: Case) -> Forward:
    """The operator."""
    layout = case.layout()
    return lambda q, k, v: (
        ring_attention(q, k, v, layout=layout, cp_group=dist.group.WORLD, causal=case.causal).output
    )


def peers(case: Case, device: str) -> dict[str, Forward]:
    """Those that are installed and can do the case, in the order that they need."""
    if ring_peers.obstacle() is not None:
        return {}
    found = {}
    if case.documents == "one" and case.causal and case.order == "zigzag":
        found[ring_peers.ZIGZAG] = ring_peers.zigzag(case.layout())
    if case.order == "contiguous":
        found[ring_peers.LLAMA3] = ring_peers.llama3(case.layout(), case.causal, device)
    return found


def timed(forward: Forward, leaves: list[Tensor], do: Tensor) -> dict[str, Timed]:
    """Forward, and forward with backward."""

    def both() -> None:
        torch.autograd.grad(forward(*leaves), leaves, do)

    return {"forward_ms": Timed(partial(forward, *leaves)), "both_ms": Timed(both)}


def compare(
    benchmark: str,
    case: Case,
    machine: Machine,
    others: Mapping[str, Forward],
    reference: tuple[str, Forward, int],
    bound: tuple[float, str],
) -> Iterator[Row]:
    """Rows of bytes and times of ours, and of times of others.

    Args:
        benchmark: name of it.
        case: what is measured.
        machine: where.
        others: by name, on the tokens of a rank.
        reference: name, function and number of tokens of what the bound is made of.
        bound: factor and name of the bound.
    """
    leaves, do = case.inputs(machine, case.layout().num_local_tokens)
    for metric, count in measured_bytes(ours(case), leaves, do).items():
        yield case.row(benchmark, OURS, metric, most(count, machine), "bytes")
    name, forward, tokens = reference
    calls = {name: timed(forward, *case.inputs(machine, tokens))}
    for impl, function in {OURS: ours(case), **others}.items():
        calls[impl] = timed(function, leaves, do)
    for metric in ("forward_ms", "both_ms"):
        chosen = {impl: call[metric] for impl, call in calls.items()}
        yield from bounded(partial(case.row, benchmark), metric, chosen, machine, (name, *bound))


def smaller(cases: Iterable[Case]) -> list[Case]:
    """The same in few heads and 12288 tokens at most, and in the order of the other peer too."""
    most_tokens = 12288 // dist.get_world_size()
    found = {}
    for case in cases:
        heads, tokens = min(case.heads // case.kv_heads, 4), min(case.tokens, most_tokens)
        small = case._replace(tokens=tokens, heads=heads, kv_heads=1)
        found |= dict.fromkeys((small, small._replace(order="contiguous")))
    return list(found)


def check(cases: Iterable[Case], machine: Machine) -> None:
    """Output and gradients of all that will run, against dense attention in float64."""
    rank = dist.get_rank()
    if (reason := ring_peers.obstacle()) is not None:
        harness.say(f"left out: {ring_peers.ZIGZAG} and {ring_peers.LLAMA3}: {reason}")
    for case in smaller(cases):
        layout = case.layout()
        leaves, do = case.inputs(machine, layout.num_local_tokens)
        *whole, whole_do = (layout.unshard(gathered(x)).double() for x in (*leaves, do))
        dense = partial(
            dense_attention, cu_seqlens=layout.borders[: layout.num_documents + 1],
            causal=case.causal, scale=case.head_dim**-0.5,
        )  # fmt: skip
        exact = harness.results(lambda *qkv, dense=dense: dense(*qkv)[0], whole, whole_do)
        real = torch.cat([torch.arange(*run) for run in layout.runs(rank)]) < layout.num_real_tokens
        real = real.to(machine.device)
        for name, forward in {OURS: ours(case), **peers(case, machine.device)}.items():
            actual = harness.results(forward, leaves, do)
            # dk of 16 bits, summed over query heads, is off by 1e-2
            harness.check(
                name, [x[real] for x in actual], [layout.shard(x, rank)[real] for x in exact], 3e-2
            )


def question(
    name: str,
    options: type[Options],
    cases: Callable[[Any], list[Case]],
    measure: Callable[[Case, Machine], Iterator[Row]],
) -> Question:
    """A benchmark that checks its cases, then measures each."""

    def rows(chosen: Options, machine: Machine) -> Iterator[Row]:
        todo = cases(chosen)
        check(todo, machine)
        for case in todo:
            yield from measure(case, machine)

    # Others wait for transfers, which are few. In 32 bits the peer is wrong: its buffers are sums.
    return Question(name, options, rows, cpu_dtype=torch.float16, high_priority=True)
