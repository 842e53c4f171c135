from __future__ import annotations

import pytest
import torch
from torch import Tensor

from lasp.lightning import eager as ops
from lasp.lightning.reference import recurrent_lightning_attention
from lasp.sequence.layout import SequenceLayout
from lasp.sequence.state_flow import DirectedFragment, StateFlow, flow_of
from tests.closeness import assert_equal_to_rounding

RATES = torch.tensor([0.0, 0.2, 8.0], dtype=torch.float64)


def random(*shape: int) -> Tensor:
    return torch.randn(shape, dtype=torch.float64)


def one_fragment(length: int, *, receives: bool, sends: bool, reverse: bool) -> StateFlow:
    fragment = DirectedFragment(0, length, 0, 0, receives, sends)
    return StateFlow(0, reverse, (), (fragment,), 1, int(sends), 1, ())


def by_tokens(q: Tensor, k: Tensor, v: Tensor, state: Tensor, reverse: bool) -> tuple:
    """The two recurrences of the module, token by token."""
    decay = torch.exp(-RATES)[:, None, None]
    output = torch.empty(len(q), *v.shape[1:], dtype=torch.float64)
    for t in reversed(range(len(q))) if reverse else range(len(q)):
        added = k[t].unsqueeze(2) * v[t].unsqueeze(1)
        # The state that enters the reverse scan is a gradient *after* its first token.
        state = added + state if reverse else decay * state + added
        output[t] = (q[t].unsqueeze(1) @ state).squeeze(1)
        state = decay * state if reverse else state
    return output, state


# Shorter than a chunk, chunks with and without a tail, longer than a group of chunks.
@pytest.mark.parametrize("length", [1, 63, 64, 65, 128, 200, 1024, 1200])
@pytest.mark.parametrize("reverse", [False, True])
def test_passes_compose_to_the_recurrence(length: int, reverse: bool) -> None:
    q, k, v, state = (
        random(length, 3, 4),
        random(length, 3, 4),
        random(length, 3, 5),
        random(3, 4, 5),
    )
    expected, expected_state = by_tokens(q, k, v, state, reverse)

    # The state is given: scan knows it.
    flow = one_fragment(length, receives=False, sends=False, reverse=reverse)
    output, final_state = ops.chunk_scan(
        q, k, v, RATES, flow, initial_state=state[None], with_final_state=True
    )
    assert final_state is not None
    assert_equal_to_rounding(output, expected)
    assert_equal_to_rounding(final_state[0], expected_state)

    # The state comes in before the scan, as in dq.
    flow = one_fragment(length, receives=True, sends=False, reverse=reverse)
    output, _ = ops.chunk_scan(q, k, v, RATES, flow, initial_state=None, incoming=state[None])
    assert_equal_to_rounding(output, expected)

    # The state comes in after the scan.
    output, final_state = ops.chunk_scan(
        q, k, v, RATES, flow, initial_state=None, with_final_state=True
    )
    assert final_state is not None
    ops.add_incoming(output, q, RATES, flow, state[None], final_state=final_state)
    assert_equal_to_rounding(output, expected)
    assert_equal_to_rounding(final_state[0], expected_state)

    # The state goes out: with the given one, or without the received one.
    flow = one_fragment(length, receives=False, sends=True, reverse=reverse)
    assert_equal_to_rounding(
        ops.chunk_state(k, v, RATES, flow, initial_state=state[None])[0], expected_state
    )
    flow = one_fragment(length, receives=True, sends=True, reverse=reverse)
    own = ops.chunk_state(k, v, RATES, flow, initial_state=state[None])[0]
    assert_equal_to_rounding(own + ops.decay_over(RATES, length) * state, expected_state)


def test_roles_of_the_backward() -> None:
    q, k, v, do = random(70, 3, 4), random(70, 3, 4), random(70, 3, 5), random(70, 3, 5)
    leaves = [x.clone().requires_grad_() for x in (q, k, v)]
    reference, _ = recurrent_lightning_attention(*leaves, RATES)
    expected = torch.autograd.grad(reference, leaves, do)
    forward, reverse = (flow_of(SequenceLayout((70,), 1), 0, reverse=r) for r in (False, True))
    assert_equal_to_rounding(
        ops.chunk_scan(do, v, k, RATES, forward, initial_state=None)[0], expected[0]
    )
    assert_equal_to_rounding(
        ops.chunk_scan(v, do, q, RATES, reverse, initial_state=None)[0], expected[1]
    )
    assert_equal_to_rounding(
        ops.chunk_scan(k, q, do, RATES, reverse, initial_state=None)[0], expected[2]
    )


@pytest.mark.parametrize("reverse", [False, True])
def test_a_shorter_chunk_is_part_of_the_full_one(reverse: bool) -> None:
    full = ops._chunk_decay(RATES, reverse)
    position = torch.arange(ops.CHUNK, dtype=torch.float64)
    for length in (1, 17, ops.CHUNK):
        decay, t = full.of_length(length, reverse), position[:length]
        for h, rate in enumerate(RATES):
            distance = (t[:, None] - t[None, :]).abs()
            within = torch.exp(-rate * distance)
            within = within.triu() if reverse else within.tril()
            assert_equal_to_rounding(decay.within[h], within)
            after, before = torch.exp(-rate * (t + 1)), torch.exp(-rate * (length - 1 - t))
            entering, leaving = (before, after) if reverse else (after, before)
            assert_equal_to_rounding(decay.entering[h, :, 0], entering)
            assert_equal_to_rounding(decay.leaving[h, :, 0], leaving)
            assert_equal_to_rounding(decay.across[h, 0], torch.exp(-rate * length)[None])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_steep_decay_and_ragged_tails_stay_finite(dtype: torch.dtype) -> None:
    rates = torch.tensor([0.0, 8.0, 1e4])
    layout = SequenceLayout((127, 1, 64, 65, 190), 1)
    q, k, v = (torch.randn(layout.num_tokens, 3, 4).to(dtype) for _ in range(3))
    for reverse in (False, True):
        flow = flow_of(layout, 0, reverse=reverse)
        output, final_state = ops.chunk_scan(
            q, k, v, rates, flow, initial_state=None, with_final_state=True
        )
        assert final_state is not None
        assert output.isfinite().all()
        assert final_state.isfinite().all()
        assert output.dtype == final_state.dtype == torch.float32


def test_operands_need_not_be_contiguous() -> None:
    fused = random(150, 3, 12)
    views = fused.split(4, dim=-1)
    flow = flow_of(SequenceLayout((70, 80), 1), 0)
    for operands in (views, [x.flip(0).flip(0)[:, :, :] for x in views]):
        output, _ = ops.chunk_scan(*operands, RATES, flow, initial_state=None)
        contiguous, _ = ops.chunk_scan(
            *(x.contiguous() for x in views), RATES, flow, initial_state=None
        )
        assert torch.equal(output, contiguous)
