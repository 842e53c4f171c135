"""Upstream's tests of MoE layers and token dispatchers with our MoE layer."""

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
    for test, capacity in (("dispatcher_dropless_test", None), ("dispatcher_capacity_test", 0.5)):
        for tp, ep, etp in ((1, 1, 1), (1, 2, 1), (2, 1, 2), (1, 4, 1), (4, 1, 4), (2, 2, 2)):
            sizes = {"tp_size": tp, "ep_size": ep, "moe_tp_size": etp}
            name = f"MoEModelTestContainer.{test}[tp {tp}, ep {ep}, etp {etp}]"
            ranks = max(tp, ep * etp)
            yield Check(name, ranks, token_dispatcher, (test, sizes, capacity))
    for name, why in (
        ("MoEModelTestContainer.dispatcher_drop_and_pad_test", "padding to capacity: refused"),
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


def token_dispatcher(
    folder: str, device: str, test: str, sizes: dict[str, int], capacity: float | None
) -> None:
    """Rows sent to their experts and back are the tokens they came from; so are gradients."""
    module = upstream("transformer.moe.test_token_dispatcher")
    config = supported(module.TransformerConfig, device, **expert_options(device))
    with (
        mock.patch.object(module, "MoELayer", layer_with_dispatcher()),
        mock.patch.object(module, "TransformerConfig", config),
    ):
        container = module.MoEModelTestContainer(
            pp_size=1, moe_expert_capacity_factor=capacity, **sizes
        )
        getattr(container, test)()


def layer_with_dispatcher() -> type:
    """Our layer with its stages under the names of a router and of a dispatcher.

    The tests multiply rows by the probs they get with them and sum; ours are weighted when they
    are back, by the probs of dispatch_preprocess, so those of the rows are 1.
    """
    from moe_parallel.dispatch import all_to_all as exchange
    from moe_parallel.megatron import ExpertParallelMoELayer

    class Router(torch.nn.Module):
        def __init__(self, layer: Any) -> None:
            super().__init__()
            self.route, self.topk = layer.route, layer.config.moe_router_topk

        def forward(self, hidden: torch.Tensor) -> Any:
            return self.route(hidden if hidden.dim() == 3 else hidden.unsqueeze(1))

    class Dispatcher:
        def __init__(self, layer: Any) -> None:
            self.layer, self.etp = layer, layer.moe.groups.etp
            self.token_dispatch, self.token_combine = layer.dispatch, layer.combine

        def dispatch_preprocess(self, hidden: Any, routing_map: Any, probs: Any) -> Any:
            self.shape = hidden.shape
            hidden = hidden if hidden.dim() == 3 else hidden.unsqueeze(1)
            return self.layer.preprocess(hidden, probs, routing_map)

        def dispatch_postprocess(self, rows: Any, probs: Any) -> Any:
            call = self.layer._call
            call.probs = probs
            rows = exchange.gather_etp(rows, call.plan, self.etp)
            rows = exchange.group_by_expert(rows, call.plan)
            counts = torch.tensor(call.plan.expert_rows)
            return rows, counts, rows.new_ones(len(rows))

        def combine_preprocess(self, rows: Any) -> Any:
            plan = self.layer._call.plan
            return exchange.scatter_etp(exchange.group_by_source(rows, plan), plan, self.etp)

        def combine_postprocess(self, rows: Any) -> Any:
            return self.layer.postprocess(rows, None).view(self.shape)

    class Layer(ExpertParallelMoELayer):
        def __init__(self, *args: Any, **kwargs: Any) -> None:
            super().__init__(*args, **kwargs)
            self.router, self.token_dispatcher = Router(self), Dispatcher(self)

    return Layer
