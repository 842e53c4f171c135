from __future__ import annotations

import math
from functools import partial

import pytest
import torch
import torch.distributed as dist
from torch import Tensor

from moe_parallel import TokenOrder
from moe_parallel.reference import reference_moe
from moe_parallel.router.counts import Routing
from moe_parallel.router.route import expert_capacity, route
from tests.closeness import assert_equal_to_rounding
from tests.moe_parallel.batch import ORDERS, local_rows, positions, random_batch
from tests.ranks import run_on_ranks

NUM_TOKENS, HIDDEN, NUM_EXPERTS = 37, 6, 5


def gate_weight(kind: str = "random") -> Tensor:
    """[E, hidden] float64; column 0 acts as a bias, see ``random_batch``."""
    generator = torch.Generator().manual_seed(7)
    gate = torch.randn(NUM_EXPERTS, HIDDEN, generator=generator, dtype=torch.float64)
    if kind == "skewed":  # everyone wants expert 1, nobody expert 3
        gate[1, 0] += 20
        gate[3, 0] -= 1000
    if kind == "ties":  # small integers: exact logits, many of them equal
        gate = gate.round()
        gate[:, 2:] = 0
    return gate


def batch(kind: str) -> Tensor:
    x = random_batch(NUM_TOKENS, HIDDEN).x
    return x.round() if kind == "ties" else x


def oracle(x: Tensor, gate: Tensor, **options: object) -> frozenset[tuple[int, int]]:
    w13, w2 = x.new_zeros(NUM_EXPERTS, 2, 1, HIDDEN), x.new_zeros(NUM_EXPERTS, HIDDEN, 1)
    return reference_moe(x, gate, w13, w2, **options).kept


def routed_on_rank(order: TokenOrder, kind: str, options: dict, device: str = "cpu") -> dict:
    rank = dist.get_rank()
    x = local_rows(batch(kind), order, rank, padding=torch.nan).to(device)
    routing = route(
        order.take(x, rank),
        gate_weight(kind).to(device),
        order=order,
        token_group=dist.group.WORLD,
        **options,
    )
    return {
        "kept": kept_pairs(routing, order, rank),
        "counts": [counts.cpu() for counts in routing.counts[:2]],
        "stats": [stat.cpu() for stat in routing.stats],
    }


def kept_pairs(routing: Routing, order: TokenOrder, rank: int) -> set[tuple[int, int]]:
    places, _ = positions(order, rank)
    return {
        (place, expert)
        for place, experts, kept in zip(places, routing.experts.tolist(), routing.kept.tolist())
        for expert, keep in zip(experts, kept)
        if keep
    }


@pytest.mark.parametrize("order_name", ORDERS)
@pytest.mark.parametrize("drop_policy", ["position", "probability"])
@pytest.mark.parametrize("kind", ["random", "skewed", "ties"])
@pytest.mark.parametrize("num_ranks", [2, 4])
def test_the_same_assignments_are_dropped_however_tokens_are_split(
    num_ranks: int, kind: str, drop_policy: str, order_name: str
) -> None:
    check_kept(num_ranks, kind, drop_policy, order_name, "gloo")


@pytest.mark.multi_gpu
@pytest.mark.parametrize("drop_policy", ["position", "probability"])
def test_drops_on_gpus(drop_policy: str) -> None:
    check_kept(2, "skewed", drop_policy, "shuffled", "nccl")


def check_kept(num_ranks: int, kind: str, drop_policy: str, order_name: str, backend: str) -> None:
    order = ORDERS[order_name](NUM_TOKENS, num_ranks)
    for capacity_factor in (None, 0.6, 1.0):
        options = {
            "top_k": 2,
            "capacity_factor": capacity_factor,
            "drop_policy": drop_policy,
        }
        device = "cuda" if backend == "nccl" else "cpu"
        parts = run_on_ranks(
            routed_on_rank, num_ranks, order, kind, options, device, backend=backend
        )
        expected = oracle(batch(kind), gate_weight(kind), **options)
        everything = oracle(batch(kind), gate_weight(kind), top_k=2)
        assert set().union(*(part["kept"] for part in parts)) == expected
        if capacity_factor == 0.6:
            assert len(expected) < len(everything)  # something was dropped at all
        assigned = [sum(e == expert for _, e in everything) for expert in range(NUM_EXPERTS)]
        kept = [sum(e == expert for _, e in expected) for expert in range(NUM_EXPERTS)]
        for part in parts:
            assigned_RE, kept_RE = part["counts"]
            assert assigned_RE.sum(0).tolist() == assigned
            for rank, other in enumerate(parts):
                mine = [sum(e == expert for _, e in other["kept"]) for expert in range(NUM_EXPERTS)]
                assert kept_RE[rank].tolist() == mine
            assert part["stats"][0].tolist() == assigned
            assert part["stats"][1].tolist() == [a - b for a, b in zip(assigned, kept)]


def aux_on_rank(order: TokenOrder, coefficient: float) -> tuple[Tensor, Tensor]:
    rank = dist.get_rank()
    x = order.take(local_rows(batch("random"), order, rank, padding=torch.nan), rank)
    gate = gate_weight().requires_grad_()
    routing = route(
        x,
        gate,
        top_k=2,
        order=order,
        token_group=dist.group.WORLD,
        capacity_factor=0.5,  # the loss counts assignments before drop
        aux_loss_coefficient=coefficient,
    )
    routing.aux_loss.backward()
    return routing.aux_loss.detach(), gate.grad


@pytest.mark.parametrize("order_name", ORDERS)
def test_auxiliary_loss_and_gradient_do_not_depend_on_the_split(order_name: str) -> None:
    gate = gate_weight().requires_grad_()
    w13 = torch.zeros(NUM_EXPERTS, 2, 1, HIDDEN, dtype=torch.float64)
    w2 = torch.zeros(NUM_EXPERTS, HIDDEN, 1, dtype=torch.float64)
    whole = reference_moe(batch("random"), gate, w13, w2, top_k=2, aux_loss_coefficient=0.01)
    whole.aux_loss.backward()
    assert gate.grad.abs().max() > 1e-5
    for num_ranks in (1, 2, 4):
        order = ORDERS[order_name](NUM_TOKENS, num_ranks)
        losses, grads = zip(*run_on_ranks(aux_on_rank, num_ranks, order, 0.01))
        assert_equal_to_rounding(sum(losses), whole.aux_loss, what=f"loss on {num_ranks} ranks")
        assert_equal_to_rounding(sum(grads), gate.grad, what=f"gradient on {num_ranks} ranks")


def local_route(x: Tensor, gate: Tensor, **options: object) -> Routing:
    return route(x, gate, order=TokenOrder.contiguous([len(x)]), **options)


def test_weights_are_the_softmax_over_the_chosen_logits() -> None:
    x, gate = batch("random"), gate_weight()
    routing = local_route(x, gate, top_k=3)
    logits, experts = (x @ gate.T).topk(3)
    assert torch.equal(routing.experts, experts)
    assert_equal_to_rounding(routing.weights, logits.softmax(1))
    assert routing.kept.all()


def test_equal_logits_choose_the_lower_expert_first() -> None:
    routing = local_route(torch.ones(3, 2), torch.ones(200, 2), top_k=4)
    assert routing.experts.tolist() == [[0, 1, 2, 3]] * 3


def test_auxiliary_loss_is_the_coefficient_at_perfect_balance() -> None:
    x = torch.eye(4, dtype=torch.float64)
    loss = local_route(x, torch.eye(4).double(), top_k=1, aux_loss_coefficient=0.25).aux_loss
    assert_equal_to_rounding(loss, torch.tensor(0.25, dtype=torch.float64))


def test_capacity_is_rounded_up() -> None:
    assert expert_capacity(1.0, 37, 2, 5) == math.ceil(14.8)
    assert expert_capacity(1.25, 8, 2, 4) == 5
    assert expert_capacity(0.1, 0, 2, 4) == 0


@pytest.mark.parametrize("drop_policy", ["position", "probability"])
@pytest.mark.parametrize("num_tokens", [0, 1])
def test_hardly_any_token(num_tokens: int, drop_policy: str) -> None:
    x = batch("random")[:num_tokens]
    gate = gate_weight().requires_grad_()
    options = {"capacity_factor": 1.0, "drop_policy": drop_policy, "aux_loss_coefficient": 1.0}
    routing = local_route(x, gate, top_k=2, **options)
    assert routing.kept.shape == (num_tokens, 2)
    assert routing.kept.all()
    routing.aux_loss.backward()
    assert gate.grad.isfinite().all()


@pytest.mark.parametrize("drop_policy", ["position", "probability"])
def test_gate_computes_in_float32_whatever_the_tokens(drop_policy: str) -> None:
    x = batch("random").bfloat16()
    gate = gate_weight().float()
    options = {"top_k": 2, "capacity_factor": 0.7, "drop_policy": drop_policy}
    half, full = local_route(x, gate, **options), local_route(x.float(), gate, **options)
    assert half.weights.dtype == torch.float32
    assert torch.equal(half.weights, full.weights)
    assert torch.equal(half.kept, full.kept)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, torch.float64])
def test_autocast_does_not_reach_the_gate(dtype: torch.dtype) -> None:
    check_autocast(dtype, "cpu")


@pytest.mark.gpu
def test_autocast_does_not_reach_the_gate_on_a_gpu() -> None:
    check_autocast(torch.float32, "cuda")


def check_autocast(dtype: torch.dtype, device: str) -> None:
    results = []
    for enabled in (False, True):
        x = batch("random").to(device, dtype).requires_grad_()
        gate = gate_weight().to(device, torch.promote_types(dtype, torch.float32)).requires_grad_()
        with torch.autocast(device, torch.bfloat16, enabled=enabled):
            routing = local_route(x, gate, top_k=2, capacity_factor=0.7, aux_loss_coefficient=1.0)
        (routing.weights.square().sum() + routing.aux_loss).backward()
        results.append([routing.weights, routing.aux_loss, routing.kept, x.grad, gate.grad])
    for plain, under_autocast in zip(*results):
        assert plain.dtype == under_autocast.dtype
        assert torch.equal(plain, under_autocast)


def test_gradcheck() -> None:
    x = batch("random")[:6].clone().requires_grad_()
    function = partial(local_route, top_k=2, capacity_factor=0.7, aux_loss_coefficient=1.0)

    def outputs(x: Tensor, gate: Tensor) -> tuple[Tensor, Tensor]:
        routing = function(x, gate)
        return routing.weights, routing.aux_loss

    assert torch.autograd.gradcheck(outputs, (x, gate_weight().requires_grad_()))
