"""Who computes: the rule of ``impl``, and its defaults."""

from __future__ import annotations

import inspect
import os
import subprocess
import sys
from collections.abc import Callable
from dataclasses import fields
from typing import Any
from unittest.mock import patch

import pytest
import torch

from lasp import LightningAttention, lightning_attention, lightning_decode
from lasp._core import impl as impl_module
from lasp._core.impl import chosen_impl
from lasp.doctor.rules import impl_rules, softmax_block_rules
from lasp.hybrid import HybridConfig
from lasp.layers.norm_gate import norm_gate
from ring.blocks.registry import resolve_block

CPU, CUDA = torch.device("cpu"), torch.device("cuda")
KERNEL_DTYPES = [torch.bfloat16, torch.float16, torch.float32]


@pytest.fixture(autouse=True)
def with_triton() -> Any:
    with patch("lasp._core.impl.HAS_TRITON", True):
        yield


@pytest.mark.parametrize("dtype", KERNEL_DTYPES)
def test_auto_takes_the_kernels_on_cuda(dtype: torch.dtype) -> None:
    assert chosen_impl("auto", CUDA, dtype) == "triton"
    assert chosen_impl("auto", CPU, dtype) == "eager"


def test_auto_is_eager_where_the_kernels_do_not_serve() -> None:
    assert chosen_impl("auto", CUDA, torch.float64) == "eager"
    assert chosen_impl("auto", CUDA, torch.float32, "a head dim of 300") == "eager"
    with patch("lasp._core.impl.HAS_TRITON", False):
        assert chosen_impl("auto", CUDA, torch.float32) == "eager"


def test_explicit_names_are_taken_or_refused() -> None:
    assert chosen_impl("eager", CUDA, torch.bfloat16) == "eager"
    assert chosen_impl("triton", CUDA, torch.bfloat16) == "triton"
    for match, arguments in (
        ("one of", ("cuda", CUDA, torch.float32)),
        ("float64", ("triton", CUDA, torch.float64)),
        ("a head dim of 300", ("triton", CUDA, torch.float32, "a head dim of 300")),
    ):
        with pytest.raises(ValueError, match=rf"impl must.*{match}"):
            chosen_impl(*arguments)
    with (
        patch("lasp._core.impl.HAS_TRITON", False),
        pytest.raises(ValueError, match=r"impl must.*install triton"),
    ):
        chosen_impl("triton", CUDA, torch.float32)


@pytest.mark.parametrize(("interpret", "said"), [("0", "refused"), ("1", "triton")])
def test_kernels_run_on_a_cpu_only_interpreted(interpret: str, said: str) -> None:
    pytest.importorskip("triton", reason="the kernels need triton, which has no wheel here")
    code = """
import torch
from lasp._core.impl import chosen_impl
try:
    print(chosen_impl("triton", torch.device("cpu"), torch.float32))
except ValueError as error:
    assert "TRITON_INTERPRET=1" in str(error)
    print("refused")
"""
    done = subprocess.run(
        [sys.executable, "-c", code],
        capture_output=True,
        text=True,
        check=True,
        env=os.environ | {"TRITON_INTERPRET": interpret},
    )
    assert done.stdout.split() == [said]


@pytest.mark.parametrize(
    ("function", "names"),
    [
        (lightning_attention, ("impl", "exchange")),
        (lightning_decode, ("impl",)),
        (norm_gate, ("impl",)),
        (LightningAttention, ("impl", "exchange")),
    ],
)
def test_the_default_is_auto(function: Callable[..., Any], names: tuple[str, ...]) -> None:
    parameters = inspect.signature(function).parameters
    assert all(parameters[name].default == "auto" for name in names)


def test_the_default_of_the_config_is_auto() -> None:
    defaults = {field.name: field.default for field in fields(HybridConfig)}
    assert defaults["lightning_impl"] == defaults["exchange"] == "auto"


def test_the_printed_rule_is_what_is_taken() -> None:
    assert impl_rules()["cpu bfloat16"]["impl"] == "eager"
    block = resolve_block("auto", CPU, torch.float64, 128)
    assert softmax_block_rules()["cpu float64"]["block"] == block.name


@pytest.mark.gpu
def test_auto_on_a_gpu_is_triton() -> None:
    x, rates = torch.randn(70, 2, 32, device="cuda"), torch.ones(2)
    auto, triton = (lightning_attention(x, x, x, rates, impl=i) for i in ("auto", "triton"))
    assert torch.equal(auto.output, triton.output)


@pytest.mark.parametrize(("hip", "capability"), [("6.4", (9, 4)), (None, (7, 5))])
def test_gpus_that_do_not_compile_the_kernels_take_eager(
    monkeypatch: pytest.MonkeyPatch, hip: str | None, capability: tuple[int, int]
) -> None:
    device = torch.device("cuda", 7)
    monkeypatch.setattr(torch.version, "hip", hip)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _: capability)
    impl_module._runs_kernels.cache_clear()
    try:
        assert chosen_impl("auto", device, torch.bfloat16) == "eager"
        if impl_module.HAS_TRITON:
            with pytest.raises(ValueError, match="on this GPU, got 'triton'"):
                chosen_impl("triton", device, torch.bfloat16)
    finally:
        impl_module._runs_kernels.cache_clear()
