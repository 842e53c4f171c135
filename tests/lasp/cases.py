"""Packs, inputs and rank functions that the tests of lasp share."""

from __future__ import annotations

from functools import cache
from typing import NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

from lasp.lightning.attention import lightning_attention
from lasp.lightning.reference import recurrent_lightning_attention
from lasp.sequence.layout import Order, SequenceLayout
from tests.closeness import assert_equal_to_rounding

# Borders on, before and after the cuts of ranks (T = S / P for P = 2, 3, 4) and chunks (64).
PACKS: dict[str, tuple[int, ...]] = {
    "one over all ranks": (203,),
    "borders on the cuts": (48, 48, 48, 48),
    "borders beside the cuts": (47, 50, 46, 49),
    "chunks and empty ones": (0, 64, 0, 65, 1, 63, 0, 130, 0),
    "many tiny, one long": (1, 2, 0, 3) * 40 + (150,),
    "one token": (1,),
}
ORDERS: tuple[Order, ...] = ("contiguous", "zigzag", "fold")
NAMES = ("output", "final_state", "dq", "dk", "dv", "dinitial")


class Case(NamedTuple):
    """One call of the operator, forward and backward, on the whole pack."""

    lengths: tuple[int, ...]
    num_ranks: int
    order: Order = "contiguous"
    exchange: str = "all_gather"
    rates: tuple[float, ...] = (0.0, 0.25, 8.0)
    key_dim: int = 4
    value_dim: int = 6
    scale: float = 0.7
    with_states: bool = True
    dtype: torch.dtype = torch.float64
    pad_value: float = 0.0
    impl: str = "eager"
    padded: tuple[int, ...] | None = None
    bad: tuple[str, int, float] | None = None  # input, token and what one of its elements is

    @property
    def layout(self) -> SequenceLayout:
        return SequenceLayout(self.lengths, self.num_ranks, self.order, self.padded)

    def one_rank(self) -> Case:
        return self._replace(
            num_ranks=1, order="contiguous", exchange="all_gather", padded=None, pad_value=0.0
        )


class Inputs(NamedTuple):
    q: Tensor
    k: Tensor
    v: Tensor
    initial_state: Tensor
    grad_output: Tensor
    grad_final: Tensor
    rates: Tensor


def make_inputs(case: Case) -> Inputs:
    """The same on every rank: the pack without padding, and random gradients of the results."""
    generator = torch.Generator().manual_seed(len(case.lengths) + sum(case.lengths))
    tokens, documents, heads = sum(case.lengths), len(case.lengths), len(case.rates)

    def random(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator, dtype=torch.float64)

    state_dtype = torch.promote_types(case.dtype, torch.float32)
    rates_dtype = torch.float64 if max(case.rates) > torch.finfo(torch.float32).max else None
    key, value = (tokens, heads, case.key_dim), (tokens, heads, case.value_dim)
    state = (documents, heads, case.key_dim, case.value_dim)
    inputs = Inputs(
        random(*key).to(case.dtype),
        random(*key).to(case.dtype),
        random(*value).to(case.dtype),
        random(*state).to(state_dtype),
        random(*value).to(case.dtype),
        random(*state).to(state_dtype),
        torch.tensor(case.rates, dtype=rates_dtype),
    )
    if case.bad is not None:
        name, token, number = case.bad
        getattr(inputs, name)[token, 0, 1] = number
    return inputs


def attend(
    case: Case, cp_group: dist.ProcessGroup | None, rank: int, device: str = "cpu"
) -> list[Tensor]:
    """Forward and backward on one rank's tokens; the results in the order of ``NAMES``."""
    layout, inputs = case.layout, make_inputs(case)
    q, k, v = (
        layout.shard(x.to(device), rank, pad_value=case.pad_value).clone().requires_grad_()
        for x in inputs[:3]
    )
    initial_state = inputs.initial_state.to(device).requires_grad_() if case.with_states else None
    output, final_state = lightning_attention(
        q,
        k,
        v,
        inputs.rates.to(device),
        layout=layout,
        cp_group=cp_group,
        scale=case.scale,
        initial_state=initial_state,
        exchange=case.exchange,
        impl=case.impl,
        output_final_state=case.with_states,
    )
    results, leaves = [output], [q, k, v]
    gradients = [layout.shard(inputs.grad_output.to(device), rank)]
    if initial_state is not None and final_state is not None:
        results.append(final_state)
        leaves.append(initial_state)
        gradients.append(inputs.grad_final.to(device))
    grads = torch.autograd.grad(results, leaves, gradients)
    return [x.detach().cpu() for x in (*results, *grads)]


def attend_on_rank(cases: list[Case], device: str = "cpu") -> list[list[Tensor]]:
    """Rank function: every case on the default group."""
    return [attend(case, dist.group.WORLD, dist.get_rank(), device) for case in cases]


@cache
def oracle(case: Case, exactly: bool = False) -> list[Tensor]:
    """What ``attend`` must give: the recurrence on the whole pack, in the dtype of the case.

    ``exactly``: in fp64, on the inputs as they are rounded to that dtype.
    """
    inputs = make_inputs(case)
    if exactly:
        inputs = Inputs(*(x.double() for x in inputs))
    q, k, v, initial_state = (x.clone().requires_grad_() for x in inputs[:4])
    borders = SequenceLayout(case.lengths, 1).borders
    results = recurrent_lightning_attention(
        q,
        k,
        v,
        inputs.rates,
        cu_seqlens=borders,
        scale=case.scale,
        initial_state=initial_state if case.with_states else None,
    )
    if not case.with_states:
        grads = torch.autograd.grad(results[0], (q, k, v), inputs.grad_output)
        return [x.detach() for x in (results[0], *grads)]
    gradients = (inputs.grad_output, inputs.grad_final)
    grads = torch.autograd.grad(results, (q, k, v, initial_state), gradients)
    return [x.detach() for x in (*results, *grads)]


def names(case: Case) -> tuple[str, ...]:
    return NAMES if case.with_states else ("output", "dq", "dk", "dv")


def gather(case: Case, parts: list[list[Tensor]]) -> list[Tensor]:
    """Results of all ranks put together: tokens unsharded, states summed.

    A state may be nonzero on its owner only: the rank of the document's last token for a final
    state, of its first token for the gradient of an initial state, rank 0 for an empty document.
    """
    layout = case.layout
    together = []
    for index, name in enumerate(names(case)):
        tensors = [part[index] for part in parts]
        if name in ("final_state", "dinitial"):
            for document in range(layout.num_documents):
                owner = _owner(layout, document, last=name == "final_state")
                for rank, tensor in enumerate(tensors):
                    assert rank == owner or not tensor[document].any(), (
                        f"{name}[{document}] belongs to rank {owner}, rank {rank} has it too"
                    )
            together.append(torch.stack(tensors).sum(0))
        else:
            together.append(layout.unshard(tensors))
    return together


def _owner(layout: SequenceLayout, document: int, last: bool) -> int:
    length = layout.document_lengths[document]
    if length == 0:
        return 0
    for rank in range(layout.num_ranks):
        for fragment in layout.fragments(rank):
            at_border = fragment.stop == length if last else fragment.start == 0
            if fragment.document == document and at_border:
                return rank
    raise AssertionError(f"nobody holds document {document}")


def check_against_oracle(cases: list[Case], results: list[list[list[Tensor]]]) -> None:
    """``results[rank][case]`` of fp64 cases equal the oracle to rounding."""
    for index, case in enumerate(cases):
        together = gather(case, [result[index] for result in results])
        for name, actual, expected in zip(names(case), together, oracle(case.one_rank())):
            assert_equal_to_rounding(actual, expected, what=f"{name} of {case}")


def bits_equal(a: list[Tensor], b: list[Tensor]) -> bool:
    return all(torch.equal(x, y) for x, y in zip(a, b, strict=True))
