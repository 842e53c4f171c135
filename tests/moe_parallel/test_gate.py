"""Logits and gradients out of bfloat16 parts: as near to the exact ones as a float32 product's."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from moe_parallel.router.gate import bfloat16_parts, gate_logits, split_logits
from tests.closeness import assert_within_budget

SIZES = [(300, 512, 8), (1, 16, 1), (65, 50, 33)]  # tokens, hidden, experts


def test_three_parts_are_the_number() -> None:
    x = torch.randn(10000) * torch.exp2(torch.randint(-100, 120, (10000,)).float())
    x = torch.cat((x, torch.tensor([0.0, -0.0, 1 + 2**-23, 1 - 2**-24, 2.0**-110, 3.39e38])))
    high, middle, low = bfloat16_parts(x)
    assert high.dtype == middle.dtype == low.dtype == torch.bfloat16
    assert torch.equal(high.double() + middle.double() + low.double(), x.double())
    assert torch.equal((low.float() + middle) + high, x)


def test_parts_of_tiny_numbers_are_off_by_less_than_any_normal_one() -> None:
    x = torch.randn(10000) * 2.0**-118
    error = sum(part.double() for part in bfloat16_parts(x)) - x.double()
    assert error.abs().max() <= 2.0**-134


def test_bfloat16_is_one_part() -> None:
    x = torch.randn(3).bfloat16()
    (part,) = bfloat16_parts(x)
    assert part is x


def batch(sizes: tuple[int, int, int], gate_dtype: torch.dtype, device: str) -> list[Tensor]:
    """Tokens, gate and the gradient of the logits."""
    tokens, hidden, experts = sizes
    x = torch.randn(tokens, hidden, device=device).bfloat16()
    gate = (torch.randn(experts, hidden, device=device) / hidden**0.5).to(gate_dtype)
    return [x, gate, torch.randn(tokens, experts, device=device)]


def products(x: Tensor, gate: Tensor, grad: Tensor, dtype: torch.dtype) -> list[Tensor]:
    """Logits and gradients, each one product in ``dtype``."""
    x_wide, gate_wide, grad_wide = x.to(dtype), gate.to(dtype), grad.to(dtype)
    return [x_wide @ gate_wide.T, grad_wide @ gate_wide, grad_wide.T @ x_wide]


def check(function, sizes: tuple[int, int, int], gate_dtype: torch.dtype, device: str) -> None:
    x, gate, grad = batch(sizes, gate_dtype, device)
    leaves = [x.requires_grad_(), gate.requires_grad_()]
    logits = function(x, gate)
    actual = [logits.detach(), *torch.autograd.grad(logits, leaves, grad)]
    x, gate = x.detach(), gate.detach()
    exact = products(x, gate, grad, torch.float64)
    honest = products(x, gate, grad, torch.float32)
    terms = products(x.abs(), gate.abs(), grad.abs(), torch.float64)
    dtypes = [torch.float32, torch.bfloat16, gate_dtype]
    for tensor, wanted, plain, size, dtype in zip(actual, exact, honest, terms, dtypes):
        assert tensor.dtype == dtype
        # Sums round to what they sum; what is rounded to bfloat16 afterwards, to itself.
        size = size if dtype == torch.float32 else wanted
        assert_within_budget(tensor, wanted, plain.to(dtype), terms=size)


@pytest.mark.parametrize("gate_dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("sizes", SIZES)
def test_parts_are_as_exact_as_a_float32_product(
    sizes: tuple[int, int, int], gate_dtype: torch.dtype
) -> None:
    check(split_logits, sizes, gate_dtype, "cpu")


@pytest.mark.gpu
@pytest.mark.parametrize("gate_dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("sizes", SIZES)
def test_a_gpu_is_as_exact_as_a_float32_product(
    sizes: tuple[int, int, int], gate_dtype: torch.dtype
) -> None:
    check(gate_logits, sizes, gate_dtype, "cuda")


@pytest.mark.parametrize("gates_differ", [False, True])
def test_gradients_to_tokens_that_nearly_cancel(gates_differ: bool) -> None:
    check_cancelling(split_logits, gates_differ)


def check_cancelling(function, gates_differ: bool) -> None:
    """What is left of two terms is as exact as in float32: no pair of parts is missing."""
    gate, grad = torch.randn(1, 50), torch.randn(300, 1)
    almost = 2.0**-16 - 1
    gate = torch.cat((gate, gate * almost if gates_differ else gate))
    grad = torch.cat((grad, grad if gates_differ else grad * almost), dim=1)
    x = torch.zeros(300, 50).bfloat16().requires_grad_()
    function(x, gate).backward(grad)
    exact = products(x.detach(), gate, grad, torch.float64)[1]
    honest = products(x.detach(), gate, grad, torch.float32)[1]
    assert_within_budget(x.grad, exact, honest.bfloat16())


def check_single_terms(device: str, function=split_logits) -> None:
    """One token a number: without a sum nothing rounds, and a part that is left out shows."""
    x = torch.eye(32, device=device).bfloat16().requires_grad_()
    gate = torch.randn(7, 32, device=device).requires_grad_()
    logits = function(x, gate)
    assert torch.equal(logits, gate.T)
    grad = torch.randn(32, 7, device=device)
    (dgate,) = torch.autograd.grad(logits, gate, grad)
    assert torch.equal(dgate, grad.T)


def test_a_single_term_is_exact() -> None:
    check_single_terms("cpu")


@pytest.mark.gpu
def test_a_single_term_is_exact_on_a_gpu() -> None:
    check_single_terms("cuda")


def check_ties(device: str) -> None:
    x, gate, _ = batch((70, 200, 1), torch.float32, device)
    logits = split_logits(x, gate.expand(40, -1))
    assert torch.equal(logits, logits[:, :1].expand(-1, 40))


def test_the_same_weights_have_the_same_logits() -> None:
    check_ties("cpu")


@pytest.mark.gpu
def test_the_same_weights_have_the_same_logits_on_a_gpu() -> None:
    check_ties("cuda")


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32, torch.float64])
def test_on_cpus_one_product_in_the_gates_dtype(dtype: torch.dtype) -> None:
    x, gate = torch.randn(9, 20).to(dtype), torch.randn(4, 20)
    wide = torch.promote_types(dtype, torch.float32)
    with torch.autocast("cpu", torch.bfloat16):
        logits = gate_logits(x, gate)
    assert torch.equal(logits, x.to(wide) @ gate.to(wide).T)


def check_autocast(device: str) -> None:
    x, gate, grad = batch((30, 40, 5), torch.float32, device)
    results = []
    for enabled in (False, True):
        leaves = [x.clone().requires_grad_(), gate.clone().requires_grad_()]
        with torch.autocast(device, torch.bfloat16, enabled=enabled):
            logits = split_logits(*leaves)
            results.append([logits, *torch.autograd.grad(logits, leaves, grad)])
    for plain, under_autocast in zip(*results):
        assert plain.dtype == under_autocast.dtype
        assert torch.equal(plain, under_autocast)


def test_autocast_does_not_reach_the_parts() -> None:
    check_autocast("cpu")


@pytest.mark.gpu
def test_autocast_does_not_reach_the_parts_on_a_gpu() -> None:
    check_autocast("cuda")


def check_kept(device: str) -> None:
    """No float32 copy of the tokens waits for the backward."""
    x, gate, _ = batch((30, 40, 5), torch.float32, device)
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        split_logits(x.requires_grad_(), gate.requires_grad_())
    assert [t.data_ptr() for t in kept] == [x.data_ptr(), gate.data_ptr()]


def test_only_the_arguments_are_kept() -> None:
    check_kept("cpu")


@pytest.mark.parametrize("wanted", [0, 1])
def test_either_gradient_alone(wanted: int) -> None:
    x, gate, grad = batch((30, 40, 5), torch.float32, "cpu")
    leaves = [x, gate]
    both = [leaf.clone().requires_grad_() for leaf in leaves]
    expected = torch.autograd.grad(split_logits(*both), both, grad)[wanted]
    leaves[wanted].requires_grad_()
    split_logits(*leaves).backward(grad)
    assert torch.equal(leaves[wanted].grad, expected)


@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
def test_no_tokens(device: str) -> None:
    x = torch.zeros(0, 8, device=device).bfloat16().requires_grad_()
    gate = torch.randn(3, 8, device=device, requires_grad=True)
    logits = split_logits(x, gate)
    assert logits.shape == (0, 3)
    logits.sum().backward()
    assert not gate.grad.any()


def test_a_penalty_on_gradients_raises() -> None:
    x, gate, _ = batch((4, 8, 3), torch.float32, "cpu")
    leaves = [x.requires_grad_(), gate.requires_grad_()]
    for leaf in leaves:
        logits = split_logits(*leaves)
        (gradient,) = torch.autograd.grad(logits.square().sum(), leaf, create_graph=True)
        with pytest.raises(RuntimeError, match="cannot be differentiated again"):
            torch.autograd.grad(gradient.square().sum(), leaves)
