"""The kernels around the experts' products: interpreted on the CPU, compiled on GPUs."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from lasp._core.impl import chosen_impl
from moe_parallel import ExpertParallelMoE, MoEConfig
from moe_parallel.dispatch.permute import RowOrder, permute, row_order, unpermute
from moe_parallel.experts.swiglu import swiglu, swiglu_backward
from tests.closeness import assert_within_budget
from tests.moe_parallel.layers import build

pytest.importorskip("triton", reason="the kernels need triton, which has no wheel here")

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
DTYPES = [torch.float32, torch.bfloat16, torch.float16]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [(0, 8), (1, 50), (300, 1), (9, 1030)])
def test_swiglu_is_autograds(shape: tuple[int, int], dtype: torch.dtype) -> None:
    rows, width = shape
    hidden = (3 * torch.randn(rows, 2 * width, device=DEVICE)).to(dtype)
    grad = torch.randn(rows, width, device=DEVICE).to(dtype)
    wide = hidden.double().requires_grad_()
    gate, up = wide.chunk(2, dim=-1)
    exact = torch.nn.functional.silu(gate) * up
    exact_grad = torch.autograd.grad(exact, wide, grad.double())[0]
    honest = swiglu(hidden), swiglu_backward(grad, hidden)[0]
    act = swiglu(hidden, "triton")
    dhidden, again = swiglu_backward(grad, hidden, "triton")
    assert torch.equal(act, again)
    if rows:
        assert_within_budget(act, exact.detach(), honest[0])
        assert_within_budget(dhidden, exact_grad, honest[1])


def test_swiglu_far_from_zero() -> None:
    gate = torch.tensor([-1e4, -100.0, 0.0, 100.0, 1e4], device=DEVICE)
    hidden = torch.stack((gate, torch.ones_like(gate))).view(1, -1)
    assert swiglu(hidden, "triton").tolist() == [[0, 0, 0, 100, 1e4]]
    dhidden, _ = swiglu_backward(torch.ones(1, 5, device=DEVICE), hidden, "triton")
    assert dhidden.isfinite().all()


def rows_of(top_k: int, tokens: int = 11) -> RowOrder:
    experts = torch.stack([torch.randperm(7)[:top_k] for _ in range(tokens)]).to(DEVICE)
    kept = torch.rand(tokens, top_k, device=DEVICE) < 0.7
    kept[0] = False
    return row_order(experts, kept, int(kept.sum()), 7)


def through(x: Tensor, weights: Tensor, order: RowOrder, impl: str, grad: Tensor) -> list[Tensor]:
    """Tokens to rows and back, and the gradients."""
    leaves = [x.detach().requires_grad_(), weights.detach().requires_grad_()]
    output = unpermute(permute(leaves[0], order, impl).square(), leaves[1], order, impl)
    return [output.detach(), *torch.autograd.grad(output, leaves, grad)]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("top_k", [1, 2, 4])
@pytest.mark.parametrize("width", [1, 40, 2100])
def test_sums_of_slots_are_the_eager_ones(width: int, top_k: int, dtype: torch.dtype) -> None:
    order = rows_of(top_k)
    x, grad = (torch.randn(11, width, device=DEVICE).to(dtype) for _ in range(2))
    weights = torch.rand(11, top_k, device=DEVICE)
    exact = through(x.double(), weights.double(), order, "eager", grad.double())
    honest = through(x, weights, order, "eager", grad)
    kernels = [through(x, weights, order, "triton", grad) for _ in range(2)]
    for actual, again, wanted, eager in zip(*kernels, exact, honest):
        assert actual.dtype == eager.dtype
        assert torch.equal(actual, again)
        assert_within_budget(actual, wanted, eager)
    assert not kernels[0][0][0].any()  # a token whose assignments were all dropped


def test_no_tokens() -> None:
    nothing = torch.zeros(0, dtype=torch.int64, device=DEVICE)
    order = RowOrder(nothing.view(0, 2), 0)
    x, weights = torch.zeros(0, 8, device=DEVICE), torch.zeros(0, 2, device=DEVICE)
    assert [r.shape for r in through(x, weights, order, "triton", x)] == [(0, 8), (0, 8), (0, 2)]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_layer_with_kernels_is_within_the_budget_of_the_plain_one(dtype: torch.dtype) -> None:
    def results(impl: str, dtype: torch.dtype) -> list[Tensor]:
        config = MoEConfig(24, 40, 8, 2, capacity_factor=1.0, impl=impl, aux_loss_coefficient=0.0)
        layer = build(config, torch.bfloat16, False, device=DEVICE)
        gate = layer.gate.weight.detach()
        layer = layer.to(dtype)
        layer.gate.weight = torch.nn.Parameter(gate.to(torch.promote_types(dtype, torch.float32)))
        x = tokens.to(dtype).requires_grad_()
        output = layer(x).output
        return [output.detach(), *torch.autograd.grad(output, [x, *layer.parameters()], ones)]

    tokens = torch.randn(30, 24, device=DEVICE).bfloat16()
    grad = torch.randn(30, 24, device=DEVICE).bfloat16()
    ones = grad.double()
    exact = results("eager", torch.float64)
    ones = grad.to(dtype)
    for actual, wanted, honest in zip(results("triton", dtype), exact, results("eager", dtype)):
        assert_within_budget(actual, wanted, honest)


def test_rule_of_auto() -> None:
    cuda, cpu = torch.device("cuda"), torch.device("cpu")
    assert chosen_impl("auto", cpu, torch.bfloat16) == "eager"
    assert chosen_impl("auto", cuda, torch.bfloat16) == "triton"
    assert chosen_impl("auto", cuda, torch.float64) == "eager"
    assert chosen_impl("eager", cuda, torch.float32) == "eager"


def test_refuses_what_kernels_cannot_do() -> None:
    with pytest.raises(ValueError, match=r"impl must be 'auto' or 'eager' for torch\.float64"):
        ExpertParallelMoE(MoEConfig(8, 8, 2, 2, impl="triton"), dtype=torch.float64)
    with pytest.raises(ValueError, match="impl must be one of"):
        MoEConfig(8, 8, 2, 2, impl="fast")


@pytest.mark.gpu
@pytest.mark.parametrize("num_experts", [32, 100, 256])
@pytest.mark.parametrize("tokens", [1, 5000, 1_000_000])
def test_router_with_its_own_block_sizes(tokens: int, num_experts: int) -> None:
    from moe_parallel.kernels import router

    logits = torch.randn(tokens, num_experts, device="cuda")
    _, experts, _, histogram = router.top_k(logits, num_experts, 8)
    ranking = logits.sort(dim=1, descending=True, stable=True).indices
    assert torch.equal(experts, ranking[:, :8])
    size = (experts.numel(), num_experts)
    rows = row_order(experts, None, *size, histogram=histogram).row
    assert torch.equal(rows, row_order(experts, None, *size).row)


@pytest.mark.gpu
def test_rows_beyond_two_to_the_31_elements() -> None:
    rows, width = 2**31 // 8192 + 100, 8192
    hidden = torch.randn(rows, width, device="cuda").bfloat16()
    act = swiglu(hidden, "triton")
    tail = swiglu(hidden[-3:].float())
    assert (act[-3:].float() - tail).abs().max() < 0.1
