"""Norm with gate: eager and kernels, forward and backward."""

from __future__ import annotations

from collections.abc import Callable
from importlib.util import find_spec
from typing import Any

import pytest
import torch
from torch import Tensor

from lasp.layers.norm_gate import norm_gate
from tests.closeness import assert_equal_to_rounding, assert_within_budget

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
EPS = 1e-6
NEEDS_TRITON = pytest.mark.skipif(find_spec("triton") is None, reason="it has no wheel here")
DTYPES = [torch.float32, torch.float16, torch.bfloat16]

Function = Callable[..., tuple[Tensor, ...]]


def results_of(function: Function, *inputs: Tensor) -> list[Tensor]:
    """Outputs, and gradients for random gradients of them."""
    leaves = [x.detach().requires_grad_() for x in inputs]
    outputs = function(*leaves)
    generator = torch.Generator().manual_seed(1)
    grads = [torch.randn(y.shape, generator=generator).to(y) for y in outputs]
    return [*(y.detach() for y in outputs), *torch.autograd.grad(outputs, leaves, grads)]


def check(actual: Function, honest: Function, exact: Function, *inputs: Tensor) -> None:
    """``actual`` as close to ``exact`` in float64 as ``honest``, in the dtype of the inputs."""
    wide = results_of(exact, *(x.double() for x in inputs))
    fair, results = results_of(honest, *inputs), results_of(actual, *inputs)
    for index, (a, f, w) in enumerate(zip(results, fair, wide, strict=True)):
        assert a.dtype == f.dtype
        assert a.shape == f.shape
        if a.numel():
            assert_within_budget(a, w, f, what=f"result {index}")


def norm_with(impl: str) -> Function:
    return lambda x, gate, weight: (norm_gate(x, gate, weight, eps=EPS, impl=impl),)


def written_out_norm(x: Tensor, gate: Tensor, weight: Tensor) -> tuple[Tensor]:
    root = (x.square().sum(-1, keepdim=True) / x.shape[-1] + EPS).sqrt()
    return (x / root * weight / (1 + torch.exp(-gate)),)


def norm_inputs(*shape: int, dtype: torch.dtype = torch.float32, on: str = DEVICE) -> list[Tensor]:
    x, gate = (torch.randn(shape, device=on).to(dtype) for _ in range(2))
    return [x * 3, gate, torch.randn(shape[-1], device=on).to(dtype)]


@pytest.mark.parametrize("shape", [(7, 3), (2, 5, 3), (0, 3), (3,)])
def test_eager_is_what_it_says(shape: tuple[int, ...]) -> None:
    inputs = norm_inputs(*shape, 10, dtype=torch.float64)
    eager, written_out = (results_of(f, *inputs) for f in (norm_with("eager"), written_out_norm))
    for a, e in zip(eager, written_out):
        assert_equal_to_rounding(a, e)


@NEEDS_TRITON
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("rows", "width"), [(5, 96), (50, 200), (1, 1), (7, 2100)])
def test_norm_within_budget(rows: int, width: int, dtype: torch.dtype) -> None:
    inputs = norm_inputs(rows, width, dtype=dtype)
    check(norm_with("triton"), norm_with("eager"), written_out_norm, *inputs)


RULES = [
    {"num_groups": 3},
    {"num_groups": 2, "silu": True},
    {"num_groups": 3, "gate_first": True},
    {"silu": True, "gate_first": True},
]


def by_rule(impl: str, rule: dict[str, Any], gated: bool = True) -> Function:
    def function(x: Tensor, *others: Tensor) -> tuple[Tensor]:
        gate, weight = others if gated else (None, *others)
        return (norm_gate(x, gate, weight, eps=EPS, impl=impl, **rule),)

    return function


def written_out_rule(rule: dict[str, Any], gated: bool = True) -> Function:
    def function(x: Tensor, *others: Tensor) -> tuple[Tensor]:
        groups, factor = rule.get("num_groups", 1), torch.ones_like(x)
        if gated:
            factor = (others[0] if rule.get("silu") else 1) / (1 + torch.exp(-others[0]))
        before, after = (factor, 1) if rule.get("gate_first") else (1, factor)
        parts = [norm_of(part) for part in (x * before).chunk(groups, -1)]
        return (torch.cat(parts, -1) * others[-1] * after,)

    return function


def norm_of(x: Tensor) -> Tensor:
    return x / (x.square().sum(-1, keepdim=True) / x.shape[-1] + EPS).sqrt()


@NEEDS_TRITON
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("gated", [True, False])
def test_groups_and_gates_within_budget(
    rule: dict[str, Any], gated: bool, dtype: torch.dtype
) -> None:
    inputs = norm_inputs(37, 6 * 11, dtype=dtype)
    if not gated:
        del inputs[1]
        rule = {"num_groups": rule.get("num_groups", 1)}
    exact = written_out_rule(rule, gated)
    check(by_rule("triton", rule, gated), by_rule("eager", rule, gated), exact, *inputs)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("rule", RULES)
def test_groups_and_gates_on_a_gpu(rule: dict[str, Any], dtype: torch.dtype) -> None:
    inputs = norm_inputs(1003, 6 * 512, dtype=dtype)
    check(by_rule("triton", rule), by_rule("eager", rule), written_out_rule(rule), *inputs)


@NEEDS_TRITON
def test_far_from_zero() -> None:
    """No sigmoid overflows, and a row of zeros is one of zeros."""
    gate = torch.tensor([-1e4, -100.0, 0.0, 100.0, 1e4], device=DEVICE).repeat(3, 4)
    weight = torch.ones(20, device=DEVICE)
    zero = torch.zeros_like(gate)
    for a in results_of(norm_with("triton"), zero, gate, weight):
        assert a.isfinite().all()
    assert not norm_gate(zero, gate, weight, eps=EPS, impl="triton").any()


@NEEDS_TRITON
@pytest.mark.parametrize("shape", [(2, 5, 3), (0, 3), (3,)])
def test_any_leading_dims(shape: tuple[int, ...]) -> None:
    check(*map(norm_with, ("triton", "eager", "eager")), *norm_inputs(*shape, 10))


@NEEDS_TRITON
def test_views_give_the_same_bits() -> None:
    """Slices of wider rows, and gradients of any strides."""
    gates = torch.randn(6, 80, device=DEVICE)
    weight = torch.randn(40, device=DEVICE)[::2]
    one, two, three, four = gates[:, 3:23], gates[:, 30:50].clone(), gates[:, 1::4], gates[:, ::4]

    def gradients(*tensors: Tensor) -> list[Tensor]:
        leaves = [t.detach().requires_grad_() for t in tensors[:3]]
        y = norm_gate(*leaves, eps=EPS, impl="triton")
        return [y.detach(), *torch.autograd.grad(y, leaves, tensors[3])]

    for x, gate, dy in ((one, two, two), (two, one, two), (two, two, one), (three, four, three)):
        strided = gradients(x, gate, weight, dy)
        contiguous = gradients(*(t.contiguous() for t in (x, gate, weight, dy)))
        assert all(torch.equal(a, e) for a, e in zip(strided, contiguous))


@NEEDS_TRITON
def test_the_weight_may_be_wider() -> None:
    x, gate, weight = norm_inputs(9, 40, dtype=torch.bfloat16)
    weight = weight.float()
    kernels, eager = (results_of(norm_with(impl), x, gate, weight) for impl in ("triton", "eager"))
    exact = results_of(written_out_norm, *(t.double() for t in (x, gate, weight)))
    for a, f, e in zip(kernels, eager, exact):
        assert a.dtype == f.dtype
        assert_within_budget(a, e, f)


@NEEDS_TRITON
def test_the_same_bits_every_time_and_no_second_derivative() -> None:
    inputs = norm_inputs(70, 96)
    first, second = (results_of(norm_with("triton"), *inputs) for _ in range(2))
    assert all(torch.equal(a, b) for a, b in zip(first, second))
    x = inputs[0].requires_grad_()
    y = norm_gate(*inputs, eps=EPS, impl="triton")
    (dx,) = torch.autograd.grad(y.sum(), x, create_graph=True)
    with pytest.raises(RuntimeError, match="impl='eager'"):
        torch.autograd.grad(dx.sum(), x)


def test_bad_input() -> None:
    x, gate, weight = norm_inputs(4, 6)
    for match, call in (
        ("impl", lambda: norm_gate(x, gate, weight, eps=EPS, impl="cuda")),
        ("gate", lambda: norm_gate(x, gate[:2], weight, eps=EPS)),
        ("gate", lambda: norm_gate(x, gate.double(), weight, eps=EPS)),
        ("weight", lambda: norm_gate(x, gate, weight[:2], eps=EPS)),
        ("num_groups", lambda: norm_gate(x, gate, weight, eps=EPS, num_groups=4)),
    ):
        with pytest.raises(ValueError, match=match):
            call()


@NEEDS_TRITON
def test_what_the_kernels_do_not_do() -> None:
    wide = [t.double() for t in norm_inputs(4, 6)]
    with pytest.raises(ValueError, match="eager"):
        norm_gate(*wide, eps=EPS, impl="triton")
    with pytest.raises(ValueError, match="features"):
        norm_gate(*norm_inputs(1, 16385), eps=EPS, impl="triton")


# ---- compiled -----------------------------------------------------------------------------------
