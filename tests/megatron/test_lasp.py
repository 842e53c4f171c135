"""Lightning self-attention in Megatron: spec, weights, rates; the rest is test_attention.py."""

from __future__ import annotations

import subprocess
import sys

import pytest
import torch
from megatron.core.transformer.spec_utils import build_module
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from lasp.lightning.decay import decay_rates
from lasp.megatron import (
    LightningSelfAttention,
    lightning_attention_spec,
    merge_projections,
    split_projections,
)
from tests.megatron.attention import HEAD_DIM, HEADS, HIDDEN, LAYERS, LIGHTNING, config
from tests.megatron.cpu import initialize
from tests.ranks import run_on_ranks

pytestmark = pytest.mark.megatron


def test_kernels_and_exchange_are_picked_by_spec() -> None:
    pytest.importorskip("triton", reason="the kernels need triton")
    spec = lightning_attention_spec(impl="triton", exchange="sliced")
    LIGHTNING._replace(spec=spec).check_float32(2, {"cp": 2}, "zigzag")


class OperatorNames(TorchDispatchMode):
    def __init__(self) -> None:
        super().__init__()
        self.called: set[str] = set()

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        self.called.add(str(function))
        return function(*args, **(kwargs or {}))


def operators_of_a_call(impl: str) -> set[str]:
    spec = lightning_attention_spec(impl=impl)
    options = config(params_dtype=torch.float32)
    module = build_module(spec, config=options, layer_number=1, pg_collection=initialize())
    with OperatorNames() as names:
        output, _ = module(torch.randn(5, 1, HIDDEN, requires_grad=True))
        output.sum().backward()
    return {name.removesuffix(".default") for name in names.called if name.startswith("lasp.")}


def test_kernels_compute_all_that_is_not_a_projection() -> None:
    pytest.importorskip("triton", reason="the kernels need triton")
    (called,) = run_on_ranks(operators_of_a_call, 1, "triton")
    around = {"lasp.heads", "lasp.norm_gate"}
    assert called >= around | {f"{name}_backward" for name in around}
    assert run_on_ranks(operators_of_a_call, 1, "eager") == [set()]


def test_projections_merge_and_split() -> None:
    qkv, gate = torch.randn(3 * HEADS * HEAD_DIM, HIDDEN), torch.randn(HEADS * HEAD_DIM, HIDDEN)
    for actual, expected in zip(
        split_projections(merge_projections(qkv, gate, HEADS), HEADS), (qkv, gate), strict=True
    ):
        assert torch.equal(actual, expected)


def build(**options: object) -> LightningSelfAttention:
    return build_module(
        lightning_attention_spec(),
        config=config(**options),
        layer_number=3,
        pg_collection=initialize(),
    )


def rates_of_a_cast_module() -> list[Tensor]:
    module = build()
    return [module.rates, module.bfloat16().rates, module.out_norm.weight]


def test_rates_are_those_of_the_global_layer_and_stay_float32() -> None:
    ((rates, cast, weight),) = run_on_ranks(rates_of_a_cast_module, 1)
    assert torch.equal(rates, decay_rates(HEADS, 2, LAYERS))
    assert torch.equal(cast, rates)
    assert weight.dtype == torch.bfloat16


@pytest.mark.parametrize("module", ["lasp.megatron", "ring.megatron", "moe_parallel.megatron"])
def test_other_versions_are_refused(module: str) -> None:
    """Before a part of Megatron is imported, which they may not have."""
    code = (
        "import sys, megatron.core\n"
        "megatron.core.__version__ = '0.15.3'\n"
        "for part in ('packed_seq_params', 'process_groups_config'):\n"
        "    sys.modules[f'megatron.core.{part}'] = None\n"
        f"try:\n    import {module}\n"
        "except ImportError as error:\n    print(error)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert "must be >= 0.16 and < 0.21, got 0.15.3" in done.stdout
