"""The gate's product, and what its bfloat16 parts are held against."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from moe_parallel.router.top_k import wide_product
from tests.closeness import assert_within_budget


def bfloat16_parts(x: Tensor) -> tuple[Tensor, ...]:
    """bfloat16 tensors whose sum is ``x`` in float32, the largest first; one if it is bfloat16.

    Exact for zero and 2^-110 <= |x| < 2^127 (2 - 2^-8). Below, the last part is denormal and the
    sum off by at most 2^-134; above, the first part is infinite and the sum NaN.
    """
    if x.dtype == torch.bfloat16:
        return (x,)
    x = x.float()
    high = x.bfloat16()
    rest = x - high  # exact, as it has no more bits than x had
    middle = rest.bfloat16()
    return high, middle, (rest - middle).bfloat16()


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


def check_single_terms(device: str, function) -> None:
    """One token a number: without a sum nothing rounds, and a part that is left out shows."""
    x = torch.eye(32, device=device).bfloat16().requires_grad_()
    gate = torch.randn(7, 32, device=device).requires_grad_()
    logits = function(x, gate)
    assert torch.equal(logits, gate.T)
    grad = torch.randn(32, 7, device=device)
    (dgate,) = torch.autograd.grad(logits, gate, grad)
    assert torch.equal(dgate, grad.T)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32, torch.float64])
def test_on_cpus_one_product_in_the_gates_dtype(dtype: torch.dtype) -> None:
    x, gate = torch.randn(9, 20).to(dtype), torch.randn(4, 20)
    wide = torch.promote_types(dtype, torch.float32)
    with torch.autocast("cpu", torch.bfloat16):
        logits = wide_product(x, gate.T)
    assert torch.equal(logits, x.to(wide) @ gate.to(wide).T)
