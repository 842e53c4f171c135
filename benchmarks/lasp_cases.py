"""The cases of ``lasp_ranks``, and every implementation that can do them."""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import AbstractContextManager, nullcontext
from typing import Any, NamedTuple
from unittest.mock import patch

import torch
import torch.distributed as dist
from torch import Tensor

import lasp.lightning.op_context
from benchmarks import lasp_peers
from benchmarks.lasp_peers import Forward
from benchmarks.lightning_kernels import Case as Pack
from lasp import SequenceLayout, decay_rates, lightning_attention
from lasp.state_exchange import ExchangeChoice, resolve_exchange

LAYERS = 80
EXCHANGES = ("all_gather", "sliced", "scan", "one_hop", "auto")
PEERS = ("LASP", "LASP-2", "head parallel")


class Case(NamedTuple):
    """What is measured; ``tokens`` are those of one rank."""

    heads: int
    tokens: int
    layer_index: int
    documents: int
    order: str
    head_dim: int

    def layout(self) -> SequenceLayout:
        """The layout of the whole pack, with log-normal document lengths."""
        num_ranks = dist.get_world_size()
        pack = Pack(self.heads, self.tokens * num_ranks, documents=self.documents)
        return SequenceLayout(pack.lengths(), num_ranks, self.order)

    def rates(self) -> Tensor:
        """Of MiniMax."""
        return decay_rates(self.heads, self.layer_index, LAYERS)


class Machine(NamedTuple):
    """Where and how to compute, how often, and the most seconds for calls that take turns."""

    device: str
    impl: str
    dtype: torch.dtype
    samples: int
    seconds: float = math.inf


def ours(case: Case, name: str, machine: Machine, eps: float = 2.0**-32) -> Forward:
    """The operator over an exchange."""
    layout, rates = case.layout(), case.rates()
    return lambda q, k, v: lightning_attention(
        q, k, v, rates, layout=layout, cp_group=dist.group.WORLD, exchange=name,
        impl=machine.impl, output_final_state=False, state_eps=eps,
    ).output  # fmt: skip


def local(case: Case, machine: Machine) -> Forward:
    """This rank's tokens alone."""
    fragments = case.layout().fragments(dist.get_rank())
    layout, rates = SequenceLayout(tuple(f.stop - f.start for f in fragments), 1), case.rates()
    return lambda q, k, v: (
        lightning_attention(
            q, k, v, rates, layout=layout, impl=machine.impl, output_final_state=False
        ).output
    )


def builds(
    case: Case, names: list[str], machine: Machine
) -> Iterator[tuple[str, Forward, AbstractContextManager[Any]]]:
    """Name, function and what must be in force while it runs, for all that can do the case."""
    contiguous, ranks = case.order == "contiguous", dist.get_world_size()
    for name in names:
        if name == "local":
            yield name, local(case, machine), nullcontext()
        elif name == "LASP" and contiguous and case.documents == 1:
            yield name, lasp_peers.lasp(case.rates(), machine.impl), nullcontext()
        elif name == "LASP-2":
            at_once = patch.object(
                lasp.lightning.op_context, "start_exchange", lasp_peers.synchronous
            )
            yield name, ours(case, "all_gather", machine, 0.0), at_once
        elif name == "head parallel" and contiguous and case.heads % ranks == 0:
            lengths = case.layout().document_lengths
            yield name, lasp_peers.head_parallel(case.rates(), lengths, machine.impl), nullcontext()
        elif name in EXCHANGES and (name != "one_hop" or one_hop_is_exact(case)):
            yield name, ours(case, name, machine), nullcontext()


def one_hop_is_exact(case: Case) -> bool:
    """Whether nothing that matters passes through a run."""
    try:
        choices(case, "one_hop")
    except ValueError:
        return False
    return True


def choices(case: Case, name: str) -> tuple[ExchangeChoice, ...]:
    """What the operator does under this name."""
    rates = tuple(case.rates().tolist())
    return resolve_exchange(name, case.layout(), rates, 2.0**-32, case.head_dim, case.head_dim)


def inputs(case: Case, machine: Machine) -> list[Tensor]:
    """q, k, v and the gradient of the output, other ones on each rank."""
    generator = torch.Generator(machine.device).manual_seed(dist.get_rank())
    shape = (case.tokens, case.heads, case.head_dim)
    draw = {"device": machine.device, "dtype": machine.dtype, "generator": generator}
    return [torch.randn(shape, **draw) for _ in range(4)]
