"""Upstream's tests of MoE layers with our MoE layer."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any
from unittest import mock

import torch

from tests.megatron.upstream.checkout import Check, supported, upstream


def expert_checks() -> Iterator[Check]:
    shared = {"moe_token_dispatcher_type": "alltoall", "num_moe_experts": 4}
    more = {"with_padding_mask": False, "fp8": False}
    for suite, test, extra in (
        ("TestMoELayerFP16", "test_moe_layer_fp16_forward_backward", {}),
        ("TestMoELayerRecompute", "test_moe_layer_recompute_forward_backward", more),
    ):
        for tp, ep in ((1, 1), (1, 2), (2, 2)):
            arguments = shared | extra | {"tp_size": tp, "ep_size": ep}
            yield Check(f"{suite}[tp {tp}, ep {ep}]", tp * ep, moe_layer, (suite, test, arguments))
    why = "a padding mask: refused, padding is what a token order leaves out"
    yield Check("TestMoELayerRecompute[with_padding_mask]", 1, moe_layer, (), why)
    for name, why in (
        ("MoEModelTestContainer", "calls a dispatcher apart from its layer; ours is part of it"),
        ("TestMoELayerInit", "GELU experts without a gate and TransformerEngine's"),
        ("TestMoELayerDispatcherDiscrepancy", "compares Megatron's dispatchers; ours is one"),
        ("TestAuxLoss, TestSeqAuxLoss", "losses in each sequence, refused; ours is global"),
    ):
        yield Check(name, 1, moe_layer, (), why)


def expert_options(device: str) -> dict[str, Any]:
    return {
        "gated_linear_unit": True,
        "activation_func": torch.nn.functional.silu,
        "moe_router_load_balancing_type": "global_aux_loss",
    }


def moe_layer(folder: str, device: str, suite: str, test: str, arguments: dict[str, Any]) -> None:
    """Forward and backward of the layer alone."""
    module = upstream("transformer.moe.test_moe_layer")
    from moe_parallel.megatron import ExpertParallelMoELayer

    config = supported(module.TransformerConfig, device, **expert_options(device))
    with (
        mock.patch.object(module, "MoELayer", ExpertParallelMoELayer),
        mock.patch.object(module, "TransformerConfig", config),
    ):
        getattr(getattr(module, suite)(), test)(**arguments)
