"""The kernels as operators of ``torch.ops.lasp``: schema, fake tensors, autograd, one graph."""

from __future__ import annotations

import os
import subprocess
import sys
from typing import Any

import pytest
import torch
from torch import Tensor

pytest.importorskip("triton", reason="the kernels need triton, which has no wheel here")

import lasp.layers.triton.heads
import lasp.layers.triton.norm_gate  # noqa: F401 (both register operators)
from lasp import LightningAttention, LightningOptions, lightning_decode
from lasp.layers.norm_gate import norm_gate
from tests.closeness import assert_within_budget
from tests.lasp.layers.test_heads import heads_with
from tests.lasp.layers.test_norm_gate import DEVICE, EPS, Function, check, norm_inputs
from tests.lasp.lightning.test_decode import RATES, make_inputs

BACKENDS = ["aot_eager", pytest.param("inductor", marks=pytest.mark.gpu)]


def operator_arguments(name: str) -> tuple[Any, ...]:
    x, gate, weight = norm_inputs(5, 6, dtype=torch.bfloat16)
    fused, dq = torch.randn(4, 3, 12, device=DEVICE), torch.randn(4, 3, 4, device=DEVICE)
    table = [torch.randn(shape, device=DEVICE) for shape in (4, 4, (4, 1), (4, 1))]
    if name.endswith("backward"):
        if name == "heads_backward":
            return (fused, *table, dq, dq, dq, False, EPS)
        return x, x, gate, weight, torch.rand(5, 1, device=DEVICE), 1, False, False, ""
    if name == "heads":
        return (*(t.requires_grad_() for t in (fused, *table[:2])), *table[2:], False, EPS)
    return (*(t.requires_grad_() for t in (x, gate, weight)), EPS, 1, False, False, "")


@pytest.mark.parametrize(
    "name",
    [f"{name}{way}" for name in ("heads", "norm_gate") for way in ("", "_backward")],
)
def test_layers_are_well_registered(name: str) -> None:
    torch.library.opcheck(getattr(torch.ops.lasp, name).default, operator_arguments(name))


def layer_with(impl: str) -> Function:
    """Both, around a stand-in for the attention."""

    def layer(x: Tensor, gate: Tensor, weight: Tensor) -> tuple[Tensor]:
        q, k, v = heads_with(impl, LightningOptions())(x)
        mixed = (v * (q * k).sum(-1, keepdim=True)).flatten(1)
        return (norm_gate(mixed, gate, weight, eps=EPS, impl=impl),)

    return layer


@pytest.mark.parametrize("backend", BACKENDS)
def test_layers_compile_as_one_graph(backend: str) -> None:
    compiled = torch.compile(layer_with("triton"), fullgraph=True, backend=backend)
    for tokens in (7, 9, 12):
        inputs = [torch.randn(tokens, 3, 12, device=DEVICE), *norm_inputs(tokens, 12)[1:]]
        check(compiled, layer_with("triton"), layer_with("eager"), *inputs)


def test_calls_do_not_load_the_compiler() -> None:
    code = """
import sys, torch
from lasp import LightningOptions, lightning_attention, lightning_decode
from lasp.layers.norm_gate import norm_gate
from lasp.layers.parts import heads_of
x = torch.ones(2, 3, 12, requires_grad=True)
nothing = dict.fromkeys(("layout", "cp_group", "position_ids"))
q, k, v = heads_of(x, LightningOptions(), None, **nothing, impl="triton")
norm_gate(v.flatten(1), q.flatten(1), torch.ones(12), eps=1e-6, impl="triton").sum().backward()
a = q.detach().requires_grad_()
lightning_attention(a, a, a, torch.ones(3), impl="triton").output.sum().backward()
q, k, v = (t.detach()[None] for t in (q, k, v))
for in_place in (False, True):
    state = torch.ones(1, 3, 4, 4)
    lightning_decode(q, k, v, torch.ones(3), state, in_place=in_place, impl="triton")
print("torch._dynamo" in sys.modules)
"""
    done = subprocess.run(
        [sys.executable, "-c", code],
        capture_output=True,
        text=True,
        check=True,
        env=os.environ | {"TRITON_INTERPRET": "1"},
    )
    assert done.stdout.split() == ["False"]


def test_decode_is_well_registered() -> None:
    q, k, v, state = make_inputs(2, 1, 4, 6, torch.float32)
    lightning_decode(q, k, v, RATES, state, impl="triton")  # registers them
    for operator, slots in ((torch.ops.lasp.decode, ()), (torch.ops.lasp.decode_, (None,))):
        torch.library.opcheck(operator.default, (q, k, v, RATES, state.clone(), *slots, 0.5))


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("in_place", [False, True])
def test_decode_compiles_as_one_graph(backend: str, in_place: bool) -> None:
    def step(q: Tensor, k: Tensor, v: Tensor, rates: Tensor, state: Tensor) -> tuple[Tensor, ...]:
        return lightning_decode(q, k, v, rates, state, in_place=in_place, impl="triton")

    compiled = torch.compile(step, fullgraph=True, backend=backend)
    for batch in (2, 3, 5):
        inputs = make_inputs(batch, 1, 4, 6, torch.float32)
        states = [inputs.state, inputs.state.clone()]
        results = [f(*inputs[:3], RATES, x) for f, x in zip((compiled, step), states)]
        for a, e in zip(*results, strict=True):
            assert torch.equal(a, e)
        assert torch.equal(*states)


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_step_of_the_module_compiles_as_one_graph(backend: str) -> None:
    def module_of(impl: str, dtype: torch.dtype) -> LightningAttention:
        torch.manual_seed(0)
        return LightningAttention(10, 3, 4, 2, 6, impl=impl, device=DEVICE).to(dtype)

    hidden = torch.randn(3, 1, 10, device=DEVICE)
    state = torch.randn(3, 3, 4, 4, device=DEVICE)
    step = torch.compile(module_of("triton", torch.float32).step, fullgraph=True, backend=backend)
    results = step(hidden, state)
    honest = module_of("eager", torch.float32).step(hidden, state)
    exact = module_of("eager", torch.float64).step(hidden.double(), state.double())
    for actual, true, fair in zip(results, exact, honest, strict=True):
        assert_within_budget(actual, true, fair)
