"""What does a sequence cut across ranks cost, by exchange, against one rank and against peers?

Every rank holds the same number of tokens. ``local`` is the same rank's kernels without ranks: its
fragments as documents of their own, no communication; it is the bound of the other rows. Peers are
those of ``benchmarks.lasp_peers``, with our kernels.

Samples are those of ``benchmarks.timing``. Bytes are counted at the collectives of the slowest rank
in one call. ``exchange_ms`` is the exchange alone, on states that are there. The defaults take
about four minutes on 2 GPUs.

Run: torchrun --nproc-per-node 2 -m benchmarks.lasp_ranks --commit $(git rev-parse HEAD)
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from functools import partial
from itertools import product
from typing import Any, NamedTuple
from unittest.mock import patch

import torch
import torch.distributed as dist
from torch import Tensor

import lasp.lightning.op_context
from benchmarks import harness, lasp_peers
from benchmarks.harness import Forward, Machine, RankOptions, Row
from benchmarks.timing import Timed, bounded, gathered, most, samples_ms
from benchmarks.wire import measured_bytes
from lasp import SequenceLayout, decay_rates, lightning_attention
from lasp.lightning.op_context import OpContext, start
from lasp.sequence.state_flow import flow_of
from lasp.state_exchange import ExchangeChoice, resolve_exchange

LAYERS, EPS = 80, 2.0**-32
EXCHANGES = ("all_gather", "sliced", "scan", "one_hop", "auto")


class Case(NamedTuple):
    """What is measured; ``tokens`` are those of one rank."""

    heads: int
    tokens: int
    layer_index: int
    documents: int
    order: str
    head_dim: int

    def layout(self) -> SequenceLayout:
        """The whole pack, of log-normal document lengths."""
        num_ranks = dist.get_world_size()
        lengths = harness.pack_lengths(self.tokens * num_ranks, self.documents)
        return SequenceLayout(lengths, num_ranks, self.order)

    def rates(self) -> Tensor:
        """MiniMax's."""
        return decay_rates(self.heads, self.layer_index, LAYERS)

    def inputs(self, machine: Machine) -> list[Tensor]:
        """q, k, v and the gradient of the output, other ones on each rank."""
        return harness.draw(machine, *[(self.tokens, self.heads, self.head_dim)] * 4)

    def choices(self, exchange: str) -> tuple[ExchangeChoice, ...]:
        """What the operator does under this name."""
        rates, dims = tuple(self.rates().tolist()), (self.head_dim, self.head_dim)
        return resolve_exchange(exchange, self.layout(), rates, EPS, *dims)


def ours(case: Case, machine: Machine, exchange: str, eps: float = EPS) -> Forward:
    """The operator over an exchange."""
    layout, rates = case.layout(), case.rates()
    return lambda q, k, v: lightning_attention(
        q, k, v, rates, layout=layout, cp_group=dist.group.WORLD, exchange=exchange,
        impl=machine.impl, output_final_state=False, state_eps=eps,
    ).output  # fmt: skip


def local(case: Case, machine: Machine) -> Forward:
    """This rank's tokens alone."""
    lengths = tuple(f.stop - f.start for f in case.layout().fragments(dist.get_rank()))
    return lasp_peers.attention(case.rates(), lengths, machine.impl)


def one_hop_is_exact(case: Case) -> bool:
    """Whether nothing that matters passes through a run."""
    try:
        case.choices("one_hop")
    except ValueError:
        return False
    return True


class Impl(NamedTuple):
    """What makes its function for a case, which cases it can do, and what is in force meanwhile."""

    build: Callable[[Case, Machine], Forward]
    can: Callable[[Case], bool] = lambda case: True
    in_force: AbstractContextManager[Any] = nullcontext()


IMPLS = {
    "local": Impl(local),
    **{name: Impl(partial(ours, exchange=name)) for name in EXCHANGES},
    "LASP": Impl(
        lambda case, machine: lasp_peers.lasp(case.rates(), machine.impl),
        lambda case: case.order == "contiguous" and case.documents == 1,
    ),
    "LASP-2": Impl(
        partial(ours, exchange="all_gather", eps=0.0),
        in_force=patch.object(lasp.lightning.op_context, "start_exchange", lasp_peers.synchronous),
    ),
    "head parallel": Impl(
        lambda case, machine: lasp_peers.head_parallel(
            case.rates(), case.layout().document_lengths, machine.impl
        ),
        lambda case: case.order == "contiguous" and case.heads % dist.get_world_size() == 0,
    ),
}
IMPLS["one_hop"] = IMPLS["one_hop"]._replace(can=one_hop_is_exact)


@dataclass(kw_only=True)
class Options(RankOptions):
    """Options: the cases are all that these allow; ``only`` names implementations."""

    heads: tuple[int, ...] = (8, 64)
    tokens: tuple[int, ...] = (8192, 32768, 131072)
    documents: tuple[int, ...] = (1, 64)
    layers: tuple[int, ...] = (0, 78)
    orders: tuple[str, ...] = ("contiguous",)
    head_dim: int = 128
    only: tuple[str, ...] = tuple(IMPLS)


def able(case: Case, names: tuple[str, ...]) -> dict[str, Impl]:
    """Those of these names that can do the case."""
    return {name: IMPLS[name] for name in names if IMPLS[name].can(case)}


def row(case: Case, impl: str, metric: str, values: list[float], unit: str) -> Row:
    """With what an exchange comes to in this case."""
    facts = case._asdict() | {"ranks": dist.get_world_size(), "num_layers": LAYERS}
    if impl in EXCHANGES:
        choices = case.choices(impl)
        facts["strategies"] = [[c.strategy, len(c.heads), c.num_blocks] for c in choices]
    return harness.row("lasp_ranks", facts, impl, metric, values, unit)


def measure(case: Case, names: tuple[str, ...], machine: Machine) -> Iterator[Row]:
    """Rows of every implementation that can do the case."""
    *qkv, do = case.inputs(machine)
    leaves = [x.requires_grad_() for x in qkv]
    forwards, backwards = {}, {}
    for name, impl in able(case, names).items():
        forward = impl.build(case, machine)
        with impl.in_force:
            sizes = measured_bytes(forward, leaves, do)
            output = forward(*leaves)
        for metric in ("forward_bytes", "backward_bytes"):
            yield row(case, name, metric, most(sizes[metric], machine), "bytes")
        backward = partial(torch.autograd.grad, output, leaves, do, retain_graph=True)
        forwards[name] = Timed(partial(forward, *leaves), impl.in_force)
        backwards[name] = Timed(backward, impl.in_force)
    bound = ("local", 1.0, "local, no ranks")
    for metric, timed in (("forward_ms", forwards), ("backward_ms", backwards)):
        yield from bounded(partial(row, case), metric, timed, machine, bound)


def measure_exchange(case: Case, names: tuple[str, ...], machine: Machine) -> Iterator[Row]:
    """Rows of the exchange alone, forward."""
    layout, rank = case.layout(), dist.get_rank()
    flow, values = flow_of(layout, rank), tuple(case.rates().tolist())
    shape = (flow.num_slots, case.heads, case.head_dim, case.head_dim)
    outgoing = torch.randn(shape, device=machine.device)
    rates = case.rates().to(machine.device)
    timed = {}
    for name in able(case, tuple(name for name in names if name in EXCHANGES)):
        choices = case.choices(name)
        op = OpContext(layout, rank, dist.group.WORLD, 1.0, choices, False, EPS, values)
        timed[name] = Timed(lambda op=op: start(outgoing, rates, flow, op)())
    for name, times in samples_ms(timed, machine).items():
        yield row(case, name, "exchange_ms", times, "ms")


def check(names: tuple[str, ...], machine: Machine) -> None:
    """Output and gradients of each against eager in float64 on one rank."""
    ranks, rank = dist.get_world_size(), dist.get_rank()
    case = Case(2 * ranks, 400, 0, 1, "contiguous", 16 if machine.device == "cpu" else 64)
    *qkv, do = case.inputs(machine)
    *whole, whole_do = (torch.cat(gathered(x)).double() for x in (*qkv, do))
    exact = harness.results(
        lambda *qkv: lightning_attention(*qkv, case.rates()).output, whole, whole_do
    )
    exact = [x[rank * case.tokens : (rank + 1) * case.tokens] for x in exact]
    for name, impl in able(case, names).items():
        if name != "local":
            with impl.in_force:
                actual = harness.results(impl.build(case, machine), qkv, do)
            harness.check(name, actual, exact)


def rows(options: Options, machine: Machine) -> Iterator[Row]:
    """Check, then every case."""
    check(options.only, machine)
    for tokens, heads, layer, documents, order in product(
        options.tokens, options.heads, options.layers, options.documents, options.orders
    ):
        case = Case(heads, tokens, layer, documents, order, options.head_dim)
        yield from measure(case, options.only, machine)
        yield from measure_exchange(case, options.only, machine)


QUESTION = harness.Question("lasp_ranks", Options, rows)

if __name__ == "__main__":
    harness.answer(QUESTION, __doc__)
