"""The exchange does not know lightning attention: a gate of each token and head, out of data.

``S_t = a_t S_{t-1} + k_t^T v_t;  o_t = q_t S_t`` (Mamba-2, gated linear attention). The transition
of a run is the product of its gates, which only its rank knows: one number a run and head is
gathered first. Backward, with ``G_t`` the gradient of S_t: ``G_t = q_t^T do_t + a_{t+1} G_{t+1}``.
"""

from __future__ import annotations

from itertools import pairwise
from typing import NamedTuple

import pytest
import torch
import torch.distributed as dist
from torch import Tensor

from lasp.sequence.layout import Order, SequenceLayout
from lasp.sequence.state_flow import DirectedFragment, StateFlow, flow_of
from lasp.state_exchange import ExchangeChoice, start_exchange
from tests.closeness import assert_equal_to_rounding
from tests.lasp.cases import ORDERS
from tests.ranks import run_on_ranks

HEADS, KEY, VALUE = 2, 3, 4
CHOICES = [
    (ExchangeChoice("all_gather", (0, 1)),),
    (ExchangeChoice("sliced", (0, 1)),),
    (ExchangeChoice("scan", (0, 1)),),
    (ExchangeChoice("scan", (1,), 2), ExchangeChoice("scan", (0,), 4)),
]


class Inputs(NamedTuple):
    q: Tensor
    k: Tensor
    v: Tensor
    gate: Tensor
    do: Tensor


def inputs_of(tokens: int) -> Inputs:
    generator = torch.Generator().manual_seed(3)

    def random(*shape: int) -> Tensor:
        return torch.randn(tokens, HEADS, *shape, generator=generator, dtype=torch.float64)

    return Inputs(random(KEY), random(KEY), random(VALUE), random().add(2).sigmoid(), random(VALUE))


def recurrence(lengths: tuple[int, ...]) -> list[Tensor]:
    """Output and the gradients of q, k, v and the gates, by autograd."""
    inputs = inputs_of(sum(lengths))
    leaves = [x.clone().requires_grad_() for x in inputs[:4]]
    q, k, v, gate = leaves
    outputs = []
    for start, stop in pairwise(SequenceLayout(lengths, 1).borders):
        state = torch.zeros(HEADS, KEY, VALUE, dtype=torch.float64)
        for t in range(start, stop):
            state = gate[t, :, None, None] * state + k[t, :, :, None] * v[t, :, None, :]
            outputs.append((q[t, :, None] @ state).squeeze(1))
    output = torch.stack(outputs)
    return [output.detach(), *torch.autograd.grad(output, leaves, inputs.do)]


def states_of(
    fragment: DirectedFragment, x: Inputs, entering: Tensor, reverse: bool
) -> tuple[Tensor, Tensor]:
    """S_t of each token of a fragment (reverse: G_t), and what leaves the fragment."""
    tokens = range(fragment.offset, fragment.offset + fragment.length)
    states, state = [], entering
    for t in reversed(tokens) if reverse else tokens:
        gate = x.gate[t, :, None, None]
        if reverse:
            states.append(x.q[t, :, :, None] * x.do[t, :, None, :] + state)
            state = gate * states[-1]
        else:
            state = gate * state + x.k[t, :, :, None] * x.v[t, :, None, :]
            states.append(state)
    return torch.stack(states[::-1] if reverse else states), state


def all_states(
    flow: StateFlow, x: Inputs, choices: tuple[ExchangeChoice, ...]
) -> tuple[Tensor, Tensor]:
    """S_t (reverse: G_t) of each token of this rank, and what entered its runs."""
    zero = torch.zeros(HEADS, KEY, VALUE, dtype=torch.float64)
    outgoing = torch.zeros(flow.num_slots, HEADS, KEY, VALUE, dtype=torch.float64)
    sending = [fragment for fragment in flow.fragments if fragment.sends]
    for slot, fragment in enumerate(sending):
        outgoing[slot] = states_of(fragment, x, zero, flow.reverse)[1]
    own = {
        fragment.run: x.gate[fragment.offset : fragment.offset + fragment.length].prod(0)
        for fragment in sending
    }
    products: list[dict[int, Tensor]] = [{}] * dist.get_world_size()
    dist.all_gather_object(products, own)
    transitions = [
        products[step.rank][step.run][:, None, None] if step.passes else None for step in flow.steps
    ]
    passed = [[None if t is None else t[list(c.heads)] for t in transitions] for c in choices]
    incoming = start_exchange(choices, outgoing, flow, passed, dist.group.WORLD)()
    states = torch.empty(len(x.q), HEADS, KEY, VALUE, dtype=torch.float64)
    for fragment in flow.fragments:
        entering = incoming[fragment.run] if fragment.receives else zero
        states[fragment.offset : fragment.offset + fragment.length] = states_of(
            fragment, x, entering, flow.reverse
        )[0]
    return states, incoming


def attend_on_rank(layouts: list[SequenceLayout]) -> list[list[list[Tensor]]]:
    rank, results = dist.get_rank(), []
    for layout in layouts:
        x = Inputs(*(layout.shard(t, rank) for t in inputs_of(layout.num_real_tokens)))
        results.append([])
        for choices in CHOICES:
            flow = flow_of(layout, rank)
            states, incoming = all_states(flow, x, choices)
            grads, _ = all_states(flow_of(layout, rank, reverse=True), x, choices)
            before = torch.zeros_like(states)  # S_{t-1}
            for fragment in flow.fragments:
                first, stop = fragment.offset, fragment.offset + fragment.length
                before[first + 1 : stop] = states[first : stop - 1]
                before[first] = incoming[fragment.run] if fragment.receives else 0
            results[-1].append(
                [
                    (x.q[..., None, :] @ states).squeeze(-2),
                    (states @ x.do[..., None]).squeeze(-1),
                    (grads @ x.v[..., None]).squeeze(-1),
                    (grads.mT @ x.k[..., None]).squeeze(-1),
                    (grads * before).sum((-1, -2)),
                ]
            )
    return results


@pytest.mark.parametrize("order", ORDERS)
def test_a_gated_recurrence_over_ranks(order: Order) -> None:
    packs = [(47,), (5, 0, 20, 1, 33)]
    layouts = [SequenceLayout(lengths, 3, order) for lengths in packs]
    by_rank = run_on_ranks(attend_on_rank, 3, layouts)
    for index, layout in enumerate(layouts):
        expected = recurrence(layout.document_lengths)
        for number, choices in enumerate(CHOICES):
            for what, name in enumerate(("output", "dq", "dk", "dv", "dgate")):
                actual = layout.unshard([ranks[index][number][what] for ranks in by_rank])
                assert_equal_to_rounding(actual, expected[what], what=f"{name} {choices} {layout}")
