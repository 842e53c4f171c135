from __future__ import annotations

from unittest import mock

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from moe_parallel import ExpertParallelMoE, ExpertTopology, MoEConfig
from moe_parallel.experts import gemm as products
from moe_parallel.experts.experts import Experts
from moe_parallel.pipeline.pipeline import local_pipeline
from tests.closeness import assert_equal_to_rounding, assert_within_budget
from tests.moe_parallel.batch import ORDERS, groups_of
from tests.ranks import run_on_ranks

COUNTS = (50, 0, 1, 0, 70)  # experts without rows first, last and in the middle, in turn
COUNT_CASES = [COUNTS, (0, 30, 0, 20, 0), (0, 0, 0, 0, 0)]


def experts_of(gemm: str = "loop", dtype: torch.dtype = torch.float64, **kwargs: int) -> Experts:
    experts = Experts(16, 24, 5, gemm=gemm, dtype=dtype, **kwargs)
    experts.reset_parameters(3)
    return experts


def local(experts: Experts, rows: Tensor, counts: tuple[int, ...]) -> Tensor:
    return experts(rows, local_pipeline(counts), num_rows=sum(counts))


def by_hand(experts: Experts, rows: Tensor, counts: tuple[int, ...]) -> Tensor:
    owner = torch.tensor([e for e, count in enumerate(counts) for _ in range(count)]).long()
    gate, up = torch.einsum("asfm,am->saf", experts.w13[owner], rows)
    return torch.einsum("amf,af->am", experts.w2[owner], F.silu(gate) * up)


def run(experts: Experts, rows: Tensor, grad: Tensor, counts: tuple[int, ...]) -> list[Tensor]:
    rows = rows.detach().requires_grad_()
    output = local(experts, rows, counts)
    return [output.detach(), *torch.autograd.grad(output, [rows, *experts.parameters()], grad)]


@pytest.mark.parametrize("counts", COUNT_CASES)
def test_loop_is_the_formula(counts: tuple[int, ...]) -> None:
    experts = experts_of()
    rows = torch.randn(sum(counts), 16, dtype=torch.float64, requires_grad=True)
    grad = torch.randn_like(rows)
    expected = by_hand(experts, rows, counts)
    expected_grads = torch.autograd.grad(expected, [rows, *experts.parameters()], grad)
    for actual, wanted in zip(run(experts, rows, grad, counts), [expected, *expected_grads]):
        assert_equal_to_rounding(actual, wanted)


@pytest.mark.parametrize("counts", COUNT_CASES)
def test_large_weight_gradients_are_made_in_place(
    counts: tuple[int, ...], monkeypatch: pytest.MonkeyPatch
) -> None:
    experts = experts_of("grouped", torch.float32)
    rows = torch.randn(sum(counts), 16)
    copied = run(experts, rows, rows.cos(), counts)
    monkeypatch.setattr(products, "IN_PLACE", 2 * 24 * 16)  # those of w13
    for actual, expected in zip(run(experts, rows, rows.cos(), counts), copied):
        assert_equal_to_rounding(actual, expected)


def test_what_inference_leaves_behind_serves_training() -> None:
    """Ends of groups are remembered."""
    products._ends.__wrapped__.cache_clear()
    experts = experts_of("grouped", torch.float32)
    rows = torch.randn(sum(COUNTS), 16)
    with torch.inference_mode():
        expected = local(experts, rows, COUNTS)
    found = products._ends.__wrapped__.cache_info().misses
    actual, *_ = run(experts, rows, rows.cos(), COUNTS)
    assert torch.equal(actual, expected)
    assert products._ends.__wrapped__.cache_info().misses == found == 1


def test_gradcheck() -> None:
    experts = Experts(3, 2, 3, dtype=torch.float64)
    experts.reset_parameters(0)
    rows = torch.randn(5, 3, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(
        lambda rows, *_: local(experts, rows, (2, 0, 3)), (rows, *experts.parameters())
    )


@pytest.mark.parametrize("counts", COUNT_CASES)
@pytest.mark.parametrize("gemm", ["loop", "grouped"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_low_precision_is_within_budget(
    dtype: torch.dtype, gemm: str, counts: tuple[int, ...]
) -> None:
    check_budget(dtype, gemm, counts, "cpu")


@pytest.mark.gpu
@pytest.mark.parametrize("counts", COUNT_CASES)
@pytest.mark.parametrize("gemm", ["loop", "auto", "grouped"])
def test_bfloat16_on_a_gpu_is_within_budget(gemm: str, counts: tuple[int, ...]) -> None:
    check_budget(torch.bfloat16, gemm, counts, "cuda")


def check_budget(dtype: torch.dtype, gemm: str, counts: tuple[int, ...], device: str) -> None:
    experts = experts_of(gemm, dtype).to(device)
    exact = experts_of().to(device)
    exact.load_state_dict({name: p.double() for name, p in experts.state_dict().items()})
    rows = torch.randn(sum(counts), 16, device=device).to(dtype)
    grad = torch.randn(sum(counts), 16, device=device).to(dtype)
    rows_honest = rows.clone().requires_grad_()
    honest_output = by_hand(experts, rows_honest, counts)
    honest = [
        honest_output,
        *torch.autograd.grad(honest_output, [rows_honest, *experts.parameters()], grad),
    ]
    oracle = run(exact, rows.double(), grad.double(), counts)
    for actual, wanted, eager in zip(run(experts, rows, grad, counts), oracle, honest):
        if actual.numel():
            assert_within_budget(actual, wanted, eager)


@pytest.mark.gpu
def test_host_does_not_wait_for_a_gpu() -> None:
    experts = experts_of("grouped", torch.bfloat16).cuda()
    rows = torch.randn(sum(COUNTS), 16, device="cuda", dtype=torch.bfloat16, requires_grad=True)
    expected = local(experts, rows, COUNTS)
    expected.square().mean().backward()
    torch.cuda.set_sync_debug_mode("error")
    try:
        actual = local(experts, rows, COUNTS)
        actual.square().mean().backward()
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert torch.equal(actual, expected)


def test_an_expanded_gradient_is_accepted() -> None:
    experts = experts_of("grouped", torch.float32)
    local(experts, torch.randn(sum(COUNTS), 16), COUNTS).sum().backward()
    assert experts.w2.grad.isfinite().all()


@pytest.mark.parametrize(("ep", "etp"), [(1, 3), (5, 1), (5, 2)])
def test_initial_values_do_not_depend_on_the_mesh(ep: int, etp: int) -> None:
    whole = experts_of()
    for name, dims in Experts.sharding().items():
        blocks = [
            torch.cat(
                [
                    getattr(experts_of(ep_rank=i, ep_size=ep, etp_rank=j, etp_size=etp), name)
                    for j in range(etp)
                ],
                dims.etp_dim,
            )
            for i in range(ep)
        ]
        assert torch.equal(torch.cat(blocks, dims.ep_dim), getattr(whole, name))


def test_terms_of_etp_ranks_sum_to_the_whole() -> None:
    rows = torch.randn(sum(COUNTS), 16, dtype=torch.float64)
    terms = [local(experts_of(etp_rank=j, etp_size=3), rows, COUNTS) for j in range(3)]
    assert_equal_to_rounding(sum(terms), local(experts_of(), rows, COUNTS))


def test_initial_values_differ_between_experts_and_seeds() -> None:
    first, second = experts_of(), experts_of()
    second.reset_parameters(4)
    drawn = torch.cat([first.w13, second.w13]).flatten(1)
    assert len(drawn.unique(dim=0)) == 10
    assert first.w2.std().item() == pytest.approx((2 / 40) ** 0.5, rel=0.1)
    scaled = experts_of()
    scaled.reset_parameters(3, gain=0.5)
    assert torch.equal(scaled.w2, first.w2 * 0.5)


def test_rule_of_auto() -> None:
    assert experts_of("auto").chosen_gemm(0) == "loop"
    assert experts_of("auto", torch.bfloat16).chosen_gemm(0) == "loop"  # not on CUDA
    assert experts_of("grouped", torch.bfloat16).chosen_gemm(0) == "grouped"


@pytest.mark.gpu
def test_rule_of_auto_on_a_gpu() -> None:
    fine = experts_of("auto", torch.bfloat16).cuda()
    assert fine.chosen_gemm(2**20) == "grouped"
    coarse = Experts(4096, 4096, 2, dtype=torch.bfloat16, device="cuda")
    assert coarse.chosen_gemm(2 * products.LOOP_ROWS - 1) == "grouped"
    assert coarse.chosen_gemm(2 * products.LOOP_ROWS) == "loop"
    assert experts_of("auto", torch.float32).cuda().chosen_gemm(0) == "loop"
    assert Experts(12, 24, 5, dtype=torch.bfloat16, device="cuda").chosen_gemm(0) == "loop"


def test_meta_device_draws_nothing() -> None:
    experts = Experts(6144, 9216, 32, device="meta", dtype=torch.bfloat16)
    experts.reset_parameters(0)
    assert sum(p.numel() for p in experts.parameters()) == 32 * 3 * 6144 * 9216


def rows_asked_for(topology: ExpertTopology) -> list[int]:
    """Rank function: for how many rows the kind of product is chosen, where tokens are uneven."""
    layer = ExpertParallelMoE(MoEConfig(8, 16, 8, 2), groups=groups_of(topology).experts)
    order = ORDERS["ragged"](24, topology.world_size)
    chosen = Experts.chosen_gemm
    with mock.patch.object(Experts, "chosen_gemm", autospec=True, side_effect=chosen) as asked:
        layer(torch.randn(order.rows_per_rank[layer.mesh.token_rank], 8), token_order=order)
    return [call.args[1] for call in asked.call_args_list]


@pytest.mark.parametrize("topology", [ExpertTopology(4, ep=4), ExpertTopology(4, ep=2, etp=2)])
def test_all_ranks_multiply_alike(topology: ExpertTopology) -> None:
    rows = 24 * 2 // 4 * topology.etp
    assert run_on_ranks(rows_asked_for, 4, topology) == [[rows]] * 4
