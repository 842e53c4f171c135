"""The same bits: packed or alone, run after run, by any exchange, whatever other documents hold."""

from __future__ import annotations

from itertools import pairwise
from unittest.mock import patch

import pytest
import torch
import torch.distributed as dist

from lasp.lightning.attention import lightning_attention
from lasp.sequence.layout import Order, SequenceLayout
from lasp.sequence.state_flow import StateFlow, flow_of
from tests.lasp.cases import (
    NAMES,
    ORDERS,
    PACKS,
    Case,
    attend,
    attend_on_rank,
    bits_equal,
    gather,
    make_inputs,
)
from tests.ranks import run_on_ranks

# ---- the same bits ------------------------------------------------------------------------------


def test_a_document_in_a_pack_equals_the_document_alone_bit_for_bit() -> None:
    lengths = (64, 0, 1, 200, 63, 65, 130, 1100, 7)
    packed = Case(lengths, 1, rates=(0.0, 0.25, 8.0))
    results = attend(packed, None, 0)
    inputs, borders = make_inputs(packed), packed.layout.borders
    for n, (start, stop) in enumerate(pairwise(borders)):
        if start == stop:
            continue
        q, k, v = (x[start:stop].clone().requires_grad_() for x in inputs[:3])
        state = inputs.initial_state[n : n + 1].clone().requires_grad_()
        output, final = lightning_attention(
            q, k, v, inputs.rates, scale=packed.scale, initial_state=state
        )
        grads = torch.autograd.grad(
            (output, final),
            (q, k, v, state),
            (inputs.grad_output[start:stop], inputs.grad_final[n : n + 1]),
        )
        for name, alone, together in zip(NAMES, (output, final, *grads), results):
            rows = slice(n, n + 1) if name in ("final_state", "dinitial") else slice(start, stop)
            assert torch.equal(alone, together[rows]), f"{name} of document {n}"


def test_a_document_within_one_rank_equals_the_document_alone_bit_for_bit() -> None:
    """Over ranks too, where its neighbours are cut."""
    case = Case((90, 70, 100), 2)  # the middle document ends up within no cut of rank 1
    layout, inputs = case.layout, make_inputs(case)
    output = layout.unshard([r[0][0] for r in run_on_ranks(attend_on_rank, 2, [case])])
    start, stop = layout.borders[2], layout.borders[3]
    assert {f.document for f in layout.fragments(1)} == {1, 2}
    alone = lightning_attention(
        *(x[start:stop] for x in inputs[:3]),
        inputs.rates,
        scale=case.scale,
        initial_state=inputs.initial_state[2:],
    )
    assert torch.equal(output[start:stop], alone.output)


def attend_twice(cases: list[Case]) -> list[bool]:
    first, second = attend_on_rank(cases), attend_on_rank(cases)
    scanned = attend_on_rank([case._replace(exchange="scan") for case in cases])
    return [bits_equal(a, b) and bits_equal(a, c) for a, b, c in zip(first, second, scanned)]


@pytest.mark.parametrize("order", ORDERS)
def test_runs_and_exchanges_agree_in_every_bit(order: Order) -> None:
    cases = [
        Case(lengths, 3, order, dtype=dtype)
        for lengths in PACKS.values()
        for dtype in (torch.float32, torch.bfloat16)
    ]
    assert all(all(same) for same in run_on_ranks(attend_twice, 3, cases))


# ---- no leak between documents ------------------------------------------------------------------


def leaky_flow(layout: SequenceLayout, rank: int, *, reverse: bool = False) -> StateFlow:
    """What a wrong "continues" would do: every rank border hands the state on (contiguous)."""
    flow = flow_of(layout, rank, reverse=reverse)
    last = len(flow.steps) - 1
    steps = tuple(
        step._replace(receives=j > 0, sends=j < last, slot=0) for j, step in enumerate(flow.steps)
    )
    own = next(step for step in steps if step.rank == rank)
    fragments = list(flow.fragments)
    fragments[0] = fragments[0]._replace(receives=own.receives)
    fragments[-1] = fragments[-1]._replace(sends=own.sends)
    return flow._replace(steps=steps, fragments=tuple(fragments), num_slots=1)


def documents_disturbed(lengths: tuple[int, ...], disturbed: int, planted: bool) -> list[bool]:
    """Which documents' outputs or gradients on this rank change with one document's tokens."""
    rank, num_ranks = dist.get_rank(), dist.get_world_size()
    layout = SequenceLayout(lengths, num_ranks)
    inputs = make_inputs(Case(lengths, num_ranks, rates=(0.01, 0.0)))
    runs = []
    for amount in (0.0, 1.0):
        leaves = []
        for x in inputs[:3]:
            x = x.clone()
            x[layout.borders[disturbed] : layout.borders[disturbed + 1]] += amount
            leaves.append(layout.shard(x, rank).clone().requires_grad_())
        with patch("lasp.lightning.attention.flow_of", leaky_flow if planted else flow_of):
            output, _ = lightning_attention(
                *leaves, inputs.rates, layout=layout, cp_group=dist.group.WORLD
            )
            grads = torch.autograd.grad(output, leaves, layout.shard(inputs.grad_output, rank))
        runs.append((output, *grads))
    changed = [False] * len(lengths)
    for fragment in layout.fragments(rank):
        tokens = slice(fragment.offset, fragment.offset + fragment.stop - fragment.start)
        if fragment.document < len(lengths):
            changed[fragment.document] |= not bits_equal(*([x[tokens] for x in r] for r in runs))
    return changed


@pytest.mark.parametrize("planted", [False, True])
def test_documents_do_not_leak_and_a_planted_leak_shows(planted: bool) -> None:
    lengths = (50, 70, 80)  # rank borders at 50 (between documents) and in the others
    disturbed = [
        [
            any(on_ranks)
            for on_ranks in zip(*run_on_ranks(documents_disturbed, 4, lengths, n, planted))
        ]
        for n in range(3)
    ]
    alone = [[n == m for m in range(3)] for n in range(3)]
    assert (disturbed == alone) is not planted


def test_padding_may_hold_anything() -> None:
    clean = Case((5, 8), 4)
    assert clean.layout.num_padding_tokens == 3
    dirty = clean._replace(pad_value=float("nan"))
    results = run_on_ranks(attend_on_rank, 4, [clean, dirty])
    for a, b in zip(*(gather(clean, [r[i] for r in results]) for i in range(2))):
        assert torch.equal(a, b)
