"""Activation, norm and rotation of heads: eager and kernels, forward and backward."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from lasp import LightningAttention, LightningOptions, RopeScaling
from lasp.layers.parts import HeadNorm, heads_of
from tests.closeness import assert_equal_to_rounding, assert_within_budget
from tests.lasp.layers.test_norm_gate import (
    DEVICE,
    DTYPES,
    NEEDS_TRITON,
    Function,
    check,
    results_of,
)

YARN = RopeScaling("yarn", factor=4.0, original_max_position_embeddings=8)
LING = LightningOptions(activation="none", qk_norm=True, rotary_dim=8, scale=None)
MINIMAX = LightningOptions()
OPTIONS = {
    "minimax": MINIMAX,
    "ling": LING,
    "activated": LightningOptions(qk_norm=True, rotary_dim=4, rope_scaling=YARN),
    "norms": LightningOptions(qk_norm=True, norm_eps=0.1),
    "rotation": LightningOptions(activation="none", rotary_dim=12),
}


def heads_with(impl: Any, options: LightningOptions, positions: Tensor | None = None) -> Function:
    """The split of the projection, a function of it and, with norms, of both weights."""

    def function(x: Tensor, *weights: Tensor) -> tuple[Tensor, ...]:
        norms = None
        if weights:
            norms = tuple(HeadNorm(len(w), options.norm_eps, x.device) for w in weights)
            for norm, weight in zip(norms, weights):
                del norm.weight
                norm.weight = weight
        return heads_of(
            x, options, norms, layout=None, cp_group=None, position_ids=positions, impl=impl
        )  # fmt: skip

    return function


def written_out(options: LightningOptions) -> Function:
    """In float64, pair by pair, as complex numbers."""

    def function(x: Tensor, *weights: Tensor) -> tuple[Tensor, ...]:
        if options.activation == "silu":
            x = x / (1 + torch.exp(-x))
        q, k, v = x.tensor_split(3, -1)
        half = options.rotary_dim // 2
        frequencies = options.rope_base ** (-torch.arange(half, device=x.device).double() / half)
        factor = 1.0
        if options.rope_scaling is not None:
            frequencies = options.rope_scaling.scaled(frequencies, options.rope_base)
            factor = options.rope_scaling.rotated_factor
        angle = torch.arange(x.shape[-3], device=x.device)[:, None, None] * frequencies
        parts = []
        for part, weight in zip((q, k), weights or (None, None)):
            y = part
            if weight is not None:
                y = y / (y.square().mean(-1, keepdim=True) + options.norm_eps).sqrt() * weight
            turned = torch.complex(y[..., :half], y[..., half : 2 * half])
            turned = turned * torch.polar(torch.full_like(angle, factor), angle)
            parts.append(torch.cat((turned.real, turned.imag, y[..., 2 * half :]), -1))
        return *parts, v

    return function


def inputs_of(options: LightningOptions, head_dim: int, *shape: int, dtype: Any) -> list[Tensor]:
    x = torch.randn(*shape, 3 * head_dim, device=DEVICE).mul(3).to(dtype)
    weights = [torch.randn(head_dim, device=DEVICE).to(dtype) for _ in "qk"]
    return [x, *(weights if options.qk_norm else [])]


@pytest.mark.parametrize("name", OPTIONS)
def test_eager_is_what_it_says(name: str) -> None:
    options = OPTIONS[name]
    inputs = inputs_of(options, 12, 9, 3, dtype=torch.float64)
    found, expected = (f(*inputs) for f in (heads_with("eager", options), written_out(options)))
    for a, e in zip(found, expected, strict=True):
        assert_equal_to_rounding(a, e)


@NEEDS_TRITON
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", OPTIONS)
def test_kernels_within_budget(name: str, dtype: torch.dtype) -> None:
    options = OPTIONS[name]
    inputs = inputs_of(options, 12, 37, 3, dtype=dtype)
    how = (heads_with("triton", options), heads_with("eager", options), written_out(options))
    check(*how, *inputs)


@NEEDS_TRITON
def test_rows_of_a_batch_and_views_of_a_projection() -> None:
    x, *weights = inputs_of(LING, 12, 2, 9, 6, dtype=torch.float32)
    x = x[:, :, ::2]
    check(heads_with("triton", LING), *[heads_with("eager", LING)] * 2, x, *weights)
    positions = torch.tensor([[7] * 9, [0] * 9], device=DEVICE)
    how = [heads_with(impl, LING, positions) for impl in ("triton", "eager", "eager")]
    check(*how, x, *weights)


@NEEDS_TRITON
@pytest.mark.parametrize("shape", [(50, 2, 96), (1, 1, 1), (0, 3, 4), (2, 5, 3, 11)])
def test_shapes_within_budget(shape: tuple[int, ...]) -> None:
    x = torch.randn(*shape[:-1], 3 * shape[-1], device=DEVICE)
    check(heads_with("triton", MINIMAX), *[heads_with("eager", MINIMAX)] * 2, x)


@NEEDS_TRITON
def test_no_sigmoid_overflows() -> None:
    x = torch.tensor([-1e4, -100.0, 0.0, 100.0, 1e4, 3.0], device=DEVICE).repeat(3, 4, 1)
    check(heads_with("triton", MINIMAX), *[heads_with("eager", MINIMAX)] * 2, x)


@NEEDS_TRITON
def test_views_give_the_same_bits() -> None:
    """Slices of a wider projection, transposed batches, and gradients of any strides."""
    wide, heads = torch.randn(6, 3, 20, device=DEVICE), heads_with("triton", MINIMAX)
    for x in (wide[..., :12], wide.transpose(0, 1)[..., 2:17], wide.transpose(1, 2)[:, :15].mT):
        strided, contiguous = (results_of(heads, t) for t in (x, x.contiguous()))
        assert all(torch.equal(a, e) for a, e in zip(strided, contiguous))
    x = wide[..., :12].contiguous().requires_grad_()
    q, k, _v = heads(x)
    one = torch.ones((), device=DEVICE).expand_as(q)  # and no gradient for v, and none for k
    (from_q,) = torch.autograd.grad(q, x, one, retain_graph=True)
    (from_both,) = torch.autograd.grad((q, k), x, (one.contiguous(), torch.zeros_like(k)))
    assert torch.equal(from_q, from_both)


@NEEDS_TRITON
def test_what_the_kernels_do_not_do() -> None:
    x = torch.ones(2, 3, 12, device=DEVICE)
    for bad, impl in ((x.double(), "triton"), (x, "cuda")):
        with pytest.raises(ValueError, match="impl must be"):
            heads_with(impl, MINIMAX)(bad)


@pytest.mark.gpu
def test_heads_far_apart() -> None:
    heads, stride = 65, 2**25
    memory = torch.empty(heads * stride, dtype=torch.bfloat16, device="cuda")
    x = memory.as_strided((3, heads, 6), (6, stride, 1)).normal_()
    exact, honest = (heads_with("eager", MINIMAX)(y) for y in (x.double(), x))
    for actual, true, fair in zip(heads_with("triton", MINIMAX)(x), exact, honest):
        assert_within_budget(actual, true, fair)


@NEEDS_TRITON
def test_a_layer_of_kernels_is_one_of_plain_torch() -> None:
    """Its parameters have the same names and gradients; gradients are not differentiated again."""
    options = LightningOptions(
        activation="none", qk_norm=True, rotary_dim=8, norm_groups=2, gate="silu", gate_first=True
    )
    gradients = []
    for impl in ("triton", "eager"):
        torch.manual_seed(0)
        layer = LightningAttention(24, 2, 16, 0, 2, options=options, impl=impl, device=DEVICE)
        x = torch.randn(40, 24, device=DEVICE, requires_grad=True)
        layer(x).square().sum().backward()
        named = {n: p.grad for n, p in layer.named_parameters()}
        gradients.append(named | {"x": x.grad})
    assert {"q_norm.weight", "k_norm.weight", "norm.weight"} < gradients[0].keys()
    for name, expected in gradients[1].items():
        error = (gradients[0][name] - expected).abs().max()
        assert error <= 1e-4 * expected.abs().max(), name
    x, *weights = inputs_of(LING, 12, 9, 3, dtype=torch.float32)
    x.requires_grad_()
    q, _, _ = heads_with("triton", LING)(x, *weights)
    (dx,) = torch.autograd.grad(q.sum(), x, create_graph=True)
    with pytest.raises(RuntimeError, match="impl='eager'"):
        dx.sum().backward()


@NEEDS_TRITON
def test_a_checkpoint_computes_a_layer_of_kernels_again() -> None:
    options = LightningOptions(qk_norm=True, rotary_dim=8, norm_groups=2)
    layer = LightningAttention(24, 2, 16, 0, 2, options=options, impl="triton", device=DEVICE)
    x, gradients = torch.randn(40, 24, device=DEVICE, requires_grad=True), []
    for call in (layer, lambda x: checkpoint(layer, x, use_reentrant=False)):
        gradients.append(torch.autograd.grad(call(x).square().sum(), [x, *layer.parameters()]))
    assert all(torch.equal(a, b) for a, b in zip(*gradients))


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("head_dim", [64, 96, 128, 192, 256])
@pytest.mark.parametrize("name", OPTIONS)
def test_on_a_gpu(name: str, head_dim: int, dtype: torch.dtype) -> None:
    options = OPTIONS[name]
    inputs = inputs_of(options, head_dim, 1003, 5, dtype=dtype)
    how = (heads_with("triton", options), heads_with("eager", options), written_out(options))
    check(*how, *inputs)
