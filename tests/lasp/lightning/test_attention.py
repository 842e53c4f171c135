from __future__ import annotations

import pytest
import torch
import torch.distributed as dist
from torch import Tensor

from lasp.lightning.attention import lightning_attention
from lasp.lightning.decay import decay_rates
from lasp.sequence.layout import Order, SequenceLayout
from tests.closeness import assert_equal_to_rounding, assert_within_budget
from tests.lasp.cases import (
    NAMES,
    ORDERS,
    PACKS,
    Case,
    attend,
    attend_on_rank,
    bits_equal,
    check_against_oracle,
    gather,
    make_inputs,
    oracle,
)
from tests.ranks import run_on_ranks, subgroup

EIGHT_IS_SLOW = [1, 2, 3, 4, pytest.param(8, marks=pytest.mark.slow)]


# ---- equal to the oracle, on every rank ---------------------------------------------------------


@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize("num_ranks", EIGHT_IS_SLOW)
def test_every_result_and_gradient_equals_the_oracle(num_ranks: int, order: Order) -> None:
    cases = [Case(lengths, num_ranks, order) for lengths in PACKS.values()]
    check_against_oracle(cases, run_on_ranks(attend_on_rank, num_ranks, cases))


@pytest.mark.parametrize("num_ranks", [1, 2, 3])
def test_without_states_and_other_heads(num_ranks: int) -> None:
    rates = tuple(decay_rates(5, 3, 8).tolist())
    cases = [
        Case((100, 3, 90), num_ranks, with_states=False),
        Case((100, 3, 90), num_ranks, rates=rates, key_dim=5, value_dim=1),
        Case((100, 3, 90), num_ranks, rates=(0.05,), key_dim=1, value_dim=3, scale=1.0),
    ]
    check_against_oracle(cases, run_on_ranks(attend_on_rank, num_ranks, cases))


def test_longer_than_a_group_of_chunks() -> None:
    case = Case((5, 2300), 2, "zigzag", rates=(0.0, 0.001), key_dim=2, value_dim=3)
    check_against_oracle([case], run_on_ranks(attend_on_rank, 2, [case]))


def test_batched_rows_are_documents_of_their_own() -> None:
    rows, tokens = 3, 70
    q, k = torch.randn(2, rows, tokens, 2, 4, dtype=torch.float64).unbind()
    v = torch.randn(rows, tokens, 2, 5, dtype=torch.float64)
    states = torch.randn(rows, 2, 4, 5, dtype=torch.float64)
    leaves = [x.requires_grad_() for x in (q, k, v, states)]
    rates = torch.tensor([0.1, 0.9])
    batched = lightning_attention(q, k, v, rates, initial_state=states)
    packed = lightning_attention(
        *(x.flatten(0, 1) for x in (q, k, v)),
        rates,
        layout=SequenceLayout((tokens,) * rows, 1),
        initial_state=states,
    )
    assert batched.final_state is not None
    assert packed.final_state is not None
    assert batched.output.shape == v.shape
    assert_equal_to_rounding(batched.output.flatten(0, 1), packed.output)
    assert_equal_to_rounding(batched.final_state, packed.final_state)
    weights = (torch.randn_like(v), torch.randn_like(states))
    for got, expected in zip(
        torch.autograd.grad((batched.output, batched.final_state), leaves, weights),
        torch.autograd.grad((packed.output.view_as(v), packed.final_state), leaves, weights),
    ):
        assert_equal_to_rounding(got, expected)


def batched_on_rank(tokens: Tensor, states: Tensor, order: Order) -> tuple[Tensor, Tensor]:
    layout = SequenceLayout((tokens.shape[1],), dist.get_world_size(), order)
    x = layout.shard(tokens, dist.get_rank(), dim=1)
    output, final_state = lightning_attention(
        x, x, x, torch.tensor([0.1, 0.0]), layout=layout, cp_group=dist.group.WORLD,
        initial_state=states,
    )  # fmt: skip
    assert final_state is not None
    return output, final_state


@pytest.mark.parametrize("order", ORDERS)
def test_batched_over_ranks(order: Order) -> None:
    tokens = torch.randn(3, 91, 2, 4, dtype=torch.float64)
    states = torch.randn(3, 2, 4, 4, dtype=torch.float64)
    results = run_on_ranks(batched_on_rank, 2, tokens, states, order)
    layout = SequenceLayout((91,), 2, order)
    expected = lightning_attention(
        tokens, tokens, tokens, torch.tensor([0.1, 0.0]), initial_state=states
    )
    output = layout.unshard([result[0] for result in results], dim=1)
    assert_equal_to_rounding(output, expected.output)
    assert_equal_to_rounding(results[0][1] + results[1][1], expected.final_state)


def attend_in_halves(case: Case) -> list[Tensor]:
    groups = [subgroup(0, 2), subgroup(1, 3)]
    return attend(case, groups[dist.get_rank() % 2], dist.get_rank() // 2)


@pytest.mark.parametrize("exchange", ["all_gather", "scan"])
def test_strided_groups(exchange: str) -> None:
    case = Case(PACKS["chunks and empty ones"], 2, "zigzag", exchange)
    results = run_on_ranks(attend_in_halves, 4, case)
    for half in (0, 1):
        check_against_oracle([case], [[results[half]], [results[half + 2]]])


class Replicated(torch.autograd.Function):
    """A tensor that all ranks hold: its gradient is the sum of what each rank contributes."""

    @staticmethod
    def forward(ctx, x):
        return x.clone()

    @staticmethod
    def backward(ctx, grad):
        grad = grad.clone()
        dist.all_reduce(grad)
        return grad


class SumOverRanks(torch.autograd.Function):
    """Every rank gets the sum and differentiates the same scalar of it."""

    @staticmethod
    def forward(ctx, x):
        x = x.clone()
        dist.all_reduce(x)
        return x

    @staticmethod
    def backward(ctx, grad):
        return grad


def gradcheck_on_rank(lengths: tuple[int, ...], order: Order, exchange: str) -> bool:
    rank, num_ranks = dist.get_rank(), dist.get_world_size()
    layout = SequenceLayout(lengths, num_ranks, order)
    inputs = make_inputs(Case(lengths, num_ranks, rates=(0.3, 0.0), key_dim=1, value_dim=2))
    place = layout.shard(torch.eye(sum(lengths), dtype=torch.float64), rank)  # [T, tokens]

    def run(q, k, v, state):
        q, k, v, state = (Replicated.apply(x) for x in (q, k, v, state))
        output, final = lightning_attention(
            *(layout.shard(x, rank) for x in (q, k, v)),
            inputs.rates,
            layout=layout,
            cp_group=dist.group.WORLD,
            initial_state=state,
            scale=0.5,
            exchange=exchange,
        )
        output = torch.einsum("tp,thv->phv", place, output)
        return SumOverRanks.apply(output), SumOverRanks.apply(final)

    return torch.autograd.gradcheck(run, [x.requires_grad_() for x in inputs[:4]])


@pytest.mark.parametrize(
    ("lengths", "order", "exchange"),
    [((3, 0, 4), "contiguous", "all_gather"), ((6, 1), "zigzag", "scan")],
)
def test_gradcheck_over_ranks(lengths: tuple[int, ...], order: Order, exchange: str) -> None:
    assert all(run_on_ranks(gradcheck_on_rank, 2, lengths, order, exchange))


# ---- precision ----------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("num_ranks", [1, 2])
def test_error_within_budget(num_ranks: int, dtype: torch.dtype) -> None:
    rates = tuple(decay_rates(5, 5, 8).tolist())
    case = Case((300, 1, 0, 211), num_ranks, rates=rates, key_dim=16, value_dim=16, scale=0.25)
    case = case._replace(dtype=dtype)
    together = gather(case, [r[0] for r in run_on_ranks(attend_on_rank, num_ranks, [case])])
    honest, exact = oracle(case.one_rank()), oracle(case.one_rank(), exactly=True)
    for name, actual, true, fair in zip(NAMES, together, exact, honest):
        assert actual.dtype == fair.dtype
        assert_within_budget(actual, true, fair, what=f"{name} {dtype} {num_ranks} ranks")


@pytest.mark.parametrize("impl", ["eager", "triton"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_autocast_casts_the_inputs_and_nothing_else(impl: str, dtype: torch.dtype) -> None:
    q, v = (torch.randn(100, 2, 4, requires_grad=True) for _ in range(2))
    k = torch.randn(100, 2, 4).to(dtype).requires_grad_()  # as from a linear layer under autocast
    rates, state = torch.tensor([0.01, 0.5]), torch.randn(1, 2, 4, 4)
    expected = lightning_attention(
        q.to(dtype), k, v.to(dtype), rates, initial_state=state, impl=impl
    )
    with torch.autocast("cpu", dtype):
        actual = lightning_attention(q, k, v, rates, initial_state=state, impl=impl)
    assert (actual.output.dtype, actual.final_state.dtype) == (dtype, torch.float32)
    grads = [torch.autograd.grad(result.output.sum(), (q, k, v)) for result in (actual, expected)]
    assert bits_equal([*actual, *grads[0]], [*expected, *grads[1]])


def test_autocast_leaves_float64_alone() -> None:
    q = torch.randn(10, 2, 4, dtype=torch.float64)
    with torch.autocast("cpu", torch.bfloat16):
        assert lightning_attention(q, q, q, torch.tensor([0.01, 0.5])).output.dtype == q.dtype


# ---- results and gradients that only some ranks use ----------------------------------------------


def final_state_alone(lengths: tuple[int, ...]) -> list[Tensor]:
    """The loss is the final state, of which this rank may hold nothing; no output is used."""
    layout, rank = SequenceLayout(lengths, dist.get_world_size()), dist.get_rank()
    inputs = make_inputs(Case(lengths, layout.num_ranks))
    leaves = [layout.shard(x, rank).clone().requires_grad_() for x in inputs[:3]]
    result = lightning_attention(*leaves, inputs.rates, layout=layout, cp_group=dist.group.WORLD)
    assert result.final_state is not None
    loss = (result.final_state * inputs.grad_final).sum()
    if rank == 0:  # one rank uses its output as well
        loss = loss + result.output.sum()
    return list(torch.autograd.grad(loss, leaves))


def test_each_rank_may_use_other_results() -> None:
    lengths = (100, 41)
    parts = run_on_ranks(final_state_alone, 3, lengths)
    layout = SequenceLayout(lengths, 3)
    inputs = make_inputs(Case(lengths, 3))
    leaves = [x.clone().requires_grad_() for x in inputs[:3]]
    result = lightning_attention(*leaves, inputs.rates, layout=SequenceLayout(lengths, 1))
    assert result.final_state is not None
    loss = (result.final_state * inputs.grad_final).sum()
    loss = loss + result.output[: layout.num_local_tokens].sum()
    for index, expected in enumerate(torch.autograd.grad(loss, leaves)):
        assert_equal_to_rounding(layout.unshard([part[index] for part in parts]), expected)


def test_no_final_state_unless_asked_for() -> None:
    x = torch.randn(5, 2, 3)
    assert lightning_attention(x, x, x, torch.ones(2), output_final_state=False).final_state is None


def test_states_continue_where_a_document_was_left() -> None:
    """The final state of a first part is the initial state of the second."""
    q, k, v = (torch.randn(150, 2, 4, dtype=torch.float64) for _ in range(3))
    rates = torch.tensor([0.02, 0.3])
    whole = lightning_attention(q, k, v, rates)
    first = lightning_attention(q[:70], k[:70], v[:70], rates)
    second = lightning_attention(q[70:], k[70:], v[70:], rates, initial_state=first.final_state)
    assert_equal_to_rounding(torch.cat([first.output, second.output]), whole.output)
    assert_equal_to_rounding(second.final_state, whole.final_state)
