"""The kernels of tokens that cross to a rank once, against plain torch."""

from __future__ import annotations

from collections.abc import Iterator
from unittest.mock import patch

import pytest
import torch

from moe_parallel import MoEConfig
from moe_parallel.dispatch import sending
from moe_parallel.dispatch.token_rows import ArrivedSlots, RowFormat
from moe_parallel.experts.swiglu import swiglu, swiglu_backward, weighted_swiglu_backward
from moe_parallel.kernels.histogram import Histogram
from moe_parallel.mesh import ExpertMesh
from moe_parallel.router.counts import AssignmentCounts, Routing, counted, tokens_of_ranks
from tests.closeness import assert_within_budget

pytest.importorskip("triton", reason="the kernels need triton, which has no wheel here")

from moe_parallel.kernels import router, tokens

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


@pytest.fixture(autouse=True)
def several_programs() -> Iterator[None]:
    with (
        patch.multiple(router, ROUTER_TILE=64, MAX_PROGRAMS=4, SCAN_COLUMNS=2),
        patch.object(tokens, "TILE", 16),
    ):
        yield


def routing_of(num_tokens: int, config: MoEConfig, mesh: ExpertMesh, *, kernels: bool) -> Routing:
    """The routing of one of several ranks; the others have counts of their own."""
    num_experts = config.num_experts
    logits = torch.randn(num_tokens, num_experts, device=DEVICE)
    logits[:, 1] += 3  # a hot expert
    choice = router.top_k(logits, num_experts, config.top_k, num_ranks=mesh.ep_size)
    logits, experts, weights, histogram = choice
    kept_RE = torch.randint(9, (mesh.num_token_ranks, num_experts), device=DEVICE)
    kept_RE[mesh.token_rank] = counted(experts, num_experts)
    counts = AssignmentCounts(kept_RE, kept_RE)
    found: Histogram | None = histogram if kernels else None
    return Routing(experts, weights, None, counts, logits, num_tokens, 0.0, found)


@pytest.mark.parametrize("num_tokens", [0, 1, 50])
@pytest.mark.parametrize(
    ("num_experts", "top_k", "ranks"),
    [(8, 2, (0, 1)), (15, 4, (4, 1, 3)), (12, 12, (1, 0, 2, 3)), (70, 5, (1, 0))],
)
def test_rows_of_assignments_and_tokens_are_those_of_plain_torch(
    num_experts: int, top_k: int, ranks: tuple[int, ...], num_tokens: int
) -> None:
    config = MoEConfig(8, 8, num_experts, top_k)
    num_ranks = len(ranks)
    mesh = ExpertMesh(1, 5, ranks.index(1), 0, (ranks,))
    found = []
    for impl in ("triton", "eager"):
        torch.manual_seed(0)
        routing = routing_of(num_tokens, config, mesh, kernels=impl == "triton")
        slots, ends = sending._slots(routing, mesh, config, impl, everywhere=False)
        found.append([slots.row, slots.sent.row, ends])
        if routing.histogram is not None:
            goes_TP = tokens_of_ranks(routing.experts, num_experts, num_ranks)
            both = torch.cat([counted(routing.experts, num_experts), goes_TP.sum(0)])
            assert torch.equal(routing.histogram.totals, both)
    for actual, expected in zip(*found):
        assert torch.equal(actual, expected)
        assert actual.dtype == expected.dtype


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("width", [7, 64])
def test_what_travels_at_the_ends_of_rows_comes_out_again(width: int, dtype: torch.dtype) -> None:
    config, mesh = MoEConfig(width, 8, 6, 3), ExpertMesh(0, 2, 0, 0, ((0, 1),))
    routing = routing_of(40, config, mesh, kernels=True)
    form = RowFormat(width, 3, dtype, torch.float32)
    found = []
    for impl in ("triton", "eager"):
        slots, _ = sending._slots(routing, mesh, config, impl, everywhere=False)
        num_rows = int((slots.sent.row >= 0).sum())
        rows = torch.zeros(slots.sent.num_rows, form.width, dtype=dtype, device=DEVICE)
        slots.pack(routing.weights, form.rows(rows), form.weights(rows), impl)
        assert not form.hidden(rows).any()
        own = rows[: int((slots.sent.row[:, 0] >= 0).sum())]  # those for the first rank
        total = int(routing.counts.kept[:, :3].sum())
        arrived = ArrivedSlots.unpack(form.rows(own), form.weights(own), total, impl, padded=True)
        there = arrived.row >= 0
        assert torch.equal(arrived.row_weights[arrived.row[there]], arrived.weights[there])
        numbers = torch.arange(total, device=DEVICE) + 0.5
        arrived.pack_gradients(numbers, form.weights(own), impl)
        gradients = slots.unpack_gradients(form.weights(rows), impl)
        here = routing.experts < 3
        assert torch.equal(gradients[here], slots.row[here] + 0.5)
        found.append([rows[:num_rows].view(torch.uint8), *arrived, gradients])
    for actual, expected in zip(*found):
        assert torch.equal(actual, expected)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("shape", [(0, 8), (9, 50), (5, 2100)])
def test_weighted_swiglu_is_that_of_weighted_rows(
    shape: tuple[int, int], dtype: torch.dtype
) -> None:
    num_rows, width = shape
    hidden = torch.randn(num_rows, 2 * width, device=DEVICE).to(dtype)
    grad = torch.randn(num_rows, width, device=DEVICE).to(dtype)
    weights = torch.rand(num_rows, device=DEVICE)
    exact_act = swiglu(hidden.double())
    weight = weights.double().unsqueeze(1)
    exact = [
        swiglu_backward(grad.double() * weight, hidden.double())[0],
        exact_act * weight,
        (grad.double() * exact_act).sum(1),
    ]
    actual = weighted_swiglu_backward(grad, hidden, weights, "triton")
    honest = weighted_swiglu_backward(grad, hidden, weights)
    for got, wanted, eager in zip(actual, exact, honest):
        assert got.dtype == eager.dtype
        if num_rows:
            assert_within_budget(got, wanted, eager)
