"""Heads of a projection, and norm with gate, on a GPU: dims of models, past 2^31 elements."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from lasp import LightningOptions
from tests.closeness import assert_within_budget
from tests.lasp.layers.test_heads import heads_with
from tests.lasp.layers.test_norm_gate import (
    DEVICE,
    DTYPES,
    check,
    norm_inputs,
    norm_with,
    written_out_norm,
)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("heads_and_dim", [(64, 128), (8, 96), (3, 192), (16, 256), (128, 128)])
def test_on_a_gpu(heads_and_dim: tuple[int, int], dtype: torch.dtype) -> None:
    heads, dim = heads_and_dim
    inputs = norm_inputs(1003, heads * dim, dtype=dtype)
    check(norm_with("triton"), norm_with("eager"), written_out_norm, *inputs)


@pytest.mark.gpu
@pytest.mark.parametrize("name", ["heads", "norm"])
def test_offsets_past_two_to_the_31(name: str) -> None:
    """The last rows of many, and their gradients where those of the outputs are the outputs."""
    last = slice(-64, None)

    def run(
        impl: str, x: Tensor, *others: Tensor, grads: list[Tensor] | None = None
    ) -> list[Tensor]:
        x = x.detach().requires_grad_()
        function = heads_with(impl, LightningOptions()) if name == "heads" else norm_with(impl)
        outputs = function(x, *others)
        grads = grads or [y.detach() for y in outputs]
        return [
            *(y.detach()[last] for y in outputs),
            torch.autograd.grad(outputs, x, grads)[0][last],
        ]

    heads, width = 64, 384 if name == "heads" else 128
    x = torch.randn(2**31 // (heads * width) + 100, heads, width, device=DEVICE).bfloat16()
    others = []
    if name == "norm":
        x = x.flatten(1)
        others = [torch.randn_like(x), torch.randn(heads * width, device=DEVICE).bfloat16()]
    results = run("triton", x, *others)
    x, others = x[last].clone(), [t[last] if t.dim() == 2 else t for t in others]
    grads = results[:-1]
    fair = run("eager", x, *others, grads=grads)
    wide = [[t.double() for t in ts] for ts in ([x, *others], grads)]
    exact = run("eager", *wide[0], grads=wide[1])
    for a, f, e in zip(results, fair, exact):
        assert_within_budget(a, e, f)
