"""The norm of residual streams is torch's, and by kernels within its budget."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from lasp.layers.rms_norm import RMSNorm
from tests.lasp.layers.test_norm_gate import (
    DEVICE,
    DTYPES,
    NEEDS_TRITON,
    check,
    norm_of,
    results_of,
)

EPS = 1e-6


def normed(impl: str, x: Tensor, weight: Tensor) -> tuple[Tensor]:
    norm = RMSNorm(len(weight), EPS, impl=impl, device=x.device, dtype=x.dtype)
    return (torch.func.functional_call(norm, {"weight": weight}, (x,)),)


def written_out(x: Tensor, weight: Tensor) -> tuple[Tensor]:
    return (norm_of(x) * weight,)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_a_cpu_computes_torchs_norm(dtype: torch.dtype) -> None:
    ours, torchs = RMSNorm(24, EPS, dtype=dtype), nn.RMSNorm(24, EPS, dtype=dtype)
    ours.load_state_dict(torchs.state_dict())
    x = torch.randn(2, 7, 24).to(dtype)
    for a, b in zip(*(results_of(lambda x, f=f: (f(x),), x) for f in (ours, torchs))):
        assert torch.equal(a, b)


@NEEDS_TRITON
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [(37, 66), (2, 5, 24), (0, 8), (9,)])
def test_kernels_within_budget(shape: tuple[int, ...], dtype: torch.dtype) -> None:
    x, weight = (torch.randn(s, device=DEVICE).to(dtype) for s in (shape, shape[-1:]))
    check(
        lambda *given: normed("triton", *given),
        lambda *given: normed("eager", *given),
        written_out,
        x,
        weight,
    )


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", DTYPES)
def test_kernels_on_a_gpu(dtype: torch.dtype) -> None:
    x, weight = (torch.randn(shape, device="cuda").to(dtype) for shape in ((4099, 2048), (2048,)))
    check(
        lambda *given: normed("triton", *given),
        lambda *given: normed("eager", *given),
        written_out,
        x,
        weight,
    )
    assert torch.equal(*(normed(impl, x, weight)[0] for impl in ("auto", "triton")))


@NEEDS_TRITON
def test_autocast_does_not_narrow_the_stream() -> None:
    norm = RMSNorm(16, EPS, impl="triton")
    with torch.autocast("cpu", torch.bfloat16):
        assert norm(torch.randn(3, 16)).dtype == torch.float32


@pytest.mark.gpu
@pytest.mark.parametrize("impl", ["eager", "triton"])
@pytest.mark.parametrize("dtype", DTYPES)
def test_autocast_does_not_widen_the_stream(impl: str, dtype: torch.dtype) -> None:
    norm = RMSNorm(16, EPS, impl=impl, device="cuda")
    with torch.autocast("cuda", torch.bfloat16):
        assert norm(torch.randn(3, 16, device="cuda").to(dtype)).dtype == dtype


@pytest.mark.parametrize("impl", ["eager", pytest.param("triton", marks=NEEDS_TRITON)])
@pytest.mark.parametrize("width", [8, 32])
def test_a_width_of_another_weight_is_refused(impl: str, width: int) -> None:
    with pytest.raises(ValueError, match=rf"x must be \[\.\.\., 16\], got \[3, {width}\]"):
        RMSNorm(16, EPS, impl=impl)(torch.randn(3, width))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"impl": "cuda"}, "impl must be one of"),
        ({"eps": None}, "eps must be a finite number >= 0, got None"),
        ({"eps": -1.0}, "eps must be a finite number >= 0, got -1"),
        ({"size": 0}, "size must be an integer >= 1, got 0"),
    ],
)
def test_bad_options(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        RMSNorm(**{"size": 16, "eps": EPS} | options)
