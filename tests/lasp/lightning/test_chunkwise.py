"""chunk_state and chunk_scan as a backend of somebody else's exchange, in Megatron's protocol.

From its main branch on (in no release up to 0.19) Megatron drives linear attention over context
parallel ranks itself: it asks a ``LinearAttentionCPBackend`` for a float32 summary of the rank,
gathers those of all ranks, hands the backend a slice of them, and the same backward. It knows one
run a rank, contiguous; with the summary of every sending run, and the slice of all ranks, zigzag
and fold go the same way.
"""

from __future__ import annotations

from functools import cache
from typing import NamedTuple

import pytest
import torch
import torch.distributed as dist
from torch import Tensor

from lasp._core.collectives import all_gather_into
from lasp.lightning.eager import chunk_scan, chunk_state, decay_over
from lasp.sequence.layout import SequenceLayout
from lasp.sequence.state_flow import StateFlow, flow_of
from tests.closeness import assert_equal_to_rounding, assert_within_budget
from tests.lasp.cases import ORDERS, PACKS, Case, attend_on_rank, gather, make_inputs, names, oracle
from tests.ranks import run_on_ranks


class Inputs(NamedTuple):
    """q is scaled; rates are in the dtype of the states."""

    q: Tensor
    k: Tensor
    v: Tensor
    rates: Tensor
    layout: SequenceLayout
    rank: int


class Saved(NamedTuple):
    """What the forward pass saves, and the incoming states of the runs."""

    inputs: Inputs
    incoming: Tensor


class LightningBackend:
    """The four methods of the protocol."""

    def cp_forward_prepare(self, inputs: Inputs) -> tuple[Tensor, Inputs]:
        """chunk_state: what each run adds to the state it sends on."""
        flow = flow_of(inputs.layout, inputs.rank)
        return self.summary(inputs.k, inputs.v, inputs, flow), inputs

    def cp_forward_apply(self, inputs: Inputs, preceding: Tensor) -> tuple[Tensor, Saved]:
        """chunk_scan from the states that came in."""
        flow = flow_of(inputs.layout, inputs.rank)
        incoming = compose(preceding, inputs.rates, flow)
        q, k, v, rates, *_ = inputs
        output, _ = chunk_scan(q, k, v, rates, flow, initial_state=None, incoming=incoming)
        return output, Saved(inputs, incoming)

    def cp_backward_prepare(
        self, output_grad: Tensor, saved: Saved
    ) -> tuple[Tensor, tuple[Tensor, Saved]]:
        """chunk_state with time reversed."""
        inputs = saved.inputs
        back = flow_of(inputs.layout, inputs.rank, reverse=True)
        return self.summary(inputs.q, output_grad, inputs, back), (output_grad, saved)

    def cp_backward_apply(
        self, context: tuple[Tensor, Saved], following: Tensor
    ) -> tuple[Tensor, Tensor, Tensor]:
        """chunk_scan with time reversed: the gradients of q, k and v."""
        do, ((q, k, v, rates, layout, rank), incoming) = context
        flow, back = (flow_of(layout, rank, reverse=reverse) for reverse in (False, True))
        grad_incoming = compose(following, rates, back)
        dq, _ = chunk_scan(do, v, k, rates, flow, initial_state=None, incoming=incoming.mT)
        dk, _ = chunk_scan(v, do, q, rates, back, initial_state=None, incoming=grad_incoming.mT)
        dv, _ = chunk_scan(k, q, do, rates, back, initial_state=None, incoming=grad_incoming)
        return dq, dk, dv

    @staticmethod
    def summary(key: Tensor, value: Tensor, inputs: Inputs, flow: StateFlow) -> Tensor:
        """``[slots, H, K, V]``, at least one slot: Megatron gathers whatever the documents are."""
        states = chunk_state(key, value, inputs.rates, flow, initial_state=None)
        return states if len(states) else states.new_zeros(1, *states.shape[1:])


def compose(summaries: Tensor, rates: Tensor, flow: StateFlow) -> Tensor:
    """States that the runs of this rank receive, out of the summaries of ``sending_ranks``.

    The transitions are no part of the summaries: every rank knows them from the layout.
    """
    incoming = summaries.new_zeros(flow.num_runs, *summaries.shape[2:])
    state, ranks = torch.zeros_like(incoming[0]), sending_ranks(flow)
    for step in flow.steps:
        if step.receives and step.rank == flow.rank:
            incoming[step.run] = state
        if step.sends and ranks.start <= step.rank < ranks.stop:
            summary = summaries[step.rank - ranks.start, step.slot]
            state = summary + decay_over(rates, step.length) * state if step.passes else summary
    return incoming


@cache
def sending_ranks(flow: StateFlow) -> slice:
    """From the first to the last rank whose tokens a run of this rank hears of, its own counted."""
    on_the_way: set[int] = set()
    heard: set[int] = set()
    for step in flow.steps:
        if step.receives and step.rank == flow.rank:
            heard |= on_the_way
        if step.sends:
            on_the_way = {*on_the_way, step.rank} if step.passes else {step.rank}
    return slice(min(heard, default=0), max(heard, default=-1) + 1)


def gathered(summary: Tensor, ranks: slice) -> Tensor:
    """Megatron's part: all-gather, then the slice."""
    state_dtype = torch.float64 if summary.dtype == torch.float64 else torch.float32
    assert summary.dtype == state_dtype  # Megatron takes float32; float64 is ours, to compare
    assert summary.is_contiguous()
    parts = summary.new_empty(dist.get_world_size(), *summary.shape)
    all_gather_into(parts.flatten(0, 1), summary)
    return parts[ranks]


def backend_on_rank(cases: list[Case]) -> list[list[Tensor]]:
    """Rank function: forward and backward as Megatron's driver calls them."""
    rank, backend, results = dist.get_rank(), LightningBackend(), []
    for case in cases:
        layout, given = case.layout, make_inputs(case)
        flow, back = (flow_of(layout, rank, reverse=reverse) for reverse in (False, True))
        q, k, v, do = (
            layout.shard(x, rank) for x in (given.q, given.k, given.v, given.grad_output)
        )
        rates = given.rates.to(given.initial_state.dtype)
        inputs = Inputs(q.to(rates.dtype) * case.scale, k, v, rates, layout, rank)
        summary, context = backend.cp_forward_prepare(inputs)
        preceding = gathered(summary, sending_ranks(flow))
        output, saved = backend.cp_forward_apply(context, preceding)
        summary, context = backend.cp_backward_prepare(do, saved)
        following = gathered(summary, sending_ranks(back))
        dq, dk, dv = backend.cp_backward_apply(context, following)
        results.append([x.to(case.dtype) for x in (output, dq * case.scale, dk, dv)])
    return results


def cases_of(num_ranks: int, dtype: torch.dtype) -> list[Case]:
    return [
        Case(lengths, num_ranks, order, dtype=dtype, with_states=False)
        for order in ORDERS
        for lengths in PACKS.values()
    ]


@pytest.mark.parametrize("num_ranks", [2, 4])
def test_backend_is_the_operator(num_ranks: int) -> None:
    cases = cases_of(num_ranks, torch.float64)
    backend = run_on_ranks(backend_on_rank, num_ranks, cases)
    operator = run_on_ranks(attend_on_rank, num_ranks, cases)
    for ours, expected in zip(backend, operator, strict=True):
        for case, actual, tensors in zip(cases, ours, expected, strict=True):
            for name, x, y in zip(names(case), actual, tensors, strict=True):
                assert_equal_to_rounding(x, y, what=f"{name} of {case}")


def test_sixteen_bits_within_budget() -> None:
    cases = [case._replace(rates=(0.01, 0.25, 8.0)) for case in cases_of(2, torch.bfloat16)[::3]]
    backend = run_on_ranks(backend_on_rank, 2, cases)
    operator = run_on_ranks(attend_on_rank, 2, cases)
    for index, case in enumerate(cases):
        ours, honest = (gather(case, [of[index] for of in ranks]) for ranks in (backend, operator))
        exact = oracle(case.one_rank(), exactly=True)
        for name, *tensors in zip(names(case), ours, exact, honest, strict=True):
            assert_within_budget(*tensors, what=f"{name} of {case}")


def test_slices_of_contiguous_ranks_are_megatrons() -> None:
    """Before a rank from where its first document starts, after it to where its last one ends."""
    layout = SequenceLayout((20, 4), num_ranks=4)  # the border is in the last run
    flows = [[flow_of(layout, rank, reverse=r) for rank in range(4)] for r in (False, True)]
    before, after = [[sending_ranks(flow) for flow in direction] for direction in flows]
    assert before == [slice(0, 0), slice(0, 1), slice(0, 2), slice(0, 3)]
    assert after == [slice(1, 4), slice(2, 4), slice(3, 4), slice(0, 0)]
    zigzag = SequenceLayout((24,), num_ranks=4, order="zigzag")
    assert sending_ranks(flow_of(zigzag, 0)) == slice(0, 4)  # its second run ends the pack
