"""How much a whole call over two ranks queues, whatever the number of experts."""

from __future__ import annotations

from contextlib import ExitStack
from typing import Any
from unittest.mock import patch

import pytest
import torch

from moe_parallel import ExpertTopology, MoEConfig, TokenOrder
from moe_parallel.router import top_k
from tests.moe_parallel.batch import groups_of
from tests.moe_parallel.layers import build
from tests.ranks import run_on_ranks

pytest.importorskip("triton", reason="the kernels need triton, which has no wheel here")

from moe_parallel.kernels import router, slots_kernel, swiglu_kernel, tokens
from tests.moe_parallel.kernels.test_row_kernels import Queued

KERNELS = {
    router: ("split", "top_k", "before", "row", "starts", "chunks", "fitting", "top_k_backward"),
    slots_kernel: ("copy_slots", "sum_slots", "sum_slots_backward"),
    swiglu_kernel: ("swiglu", "swiglu_backward"),
    tokens: ("pack", "unpack", "pack_gradients", "unpack_gradients"),
}


WAYS: dict[str, dict[str, Any]] = {
    "tokens": {"send": "tokens"},
    "tokens to all ranks": {"send": "tokens"},
    "assignments": {"send": "assignments"},
    "static shapes": {"static_shapes": True, "max_rows": 170},
}
AGREED = ("tokens to all ranks", "static shapes")


def queued_on_rank(num_experts: int, send: str) -> tuple[list[str], list[str]]:
    """Rank function: what a forward and a backward queue, without losses and their sums."""
    how = {"aux_loss_coefficient": 0.0, "impl": "triton", "gemm": "grouped", "overlap_groups": None}
    config = MoEConfig(16, 16, num_experts, 4, **how, **WAYS[send])
    groups = groups_of(ExpertTopology(2, ep=2)).experts
    layer = build(config, torch.bfloat16, False, groups=groups).eval()
    x = torch.randn(40, 16).bfloat16().requires_grad_()
    order = layer.agreed_order(x, TokenOrder.contiguous([40, 40]) if send in AGREED else None)
    queued = Queued()
    with ExitStack() as patches:
        for module, names in KERNELS.items():
            for name in names:
                patches.enter_context(queued.kernel(module, f"{name}_kernel"))
        product = queued.one("mm", top_k.parts_product)
        patches.enter_context(patch.object(top_k, "takes_parts", lambda _: True))
        patches.enter_context(patch.object(top_k, "parts_product", product))

        def forward() -> torch.Tensor:
            routing = layer.gate(x, order)
            return layer.through_experts(x, routing, order)[0]

        forward()  # tensors that are made once
        queued.names.clear()
        with queued:
            output = forward()
        names, grad = queued.names, torch.randn_like(output)
        queued.names = []
        with queued:
            torch.autograd.grad(output, [x, *layer.parameters()], grad)
    return names, queued.names


@pytest.mark.parametrize("send", WAYS)
def test_a_call_queues_few_things_for_any_number_of_experts(send: str) -> None:
    for num_experts in (8, 64):
        ((forward, backward), *_) = run_on_ranks(queued_on_rank, 2, num_experts, send)
        assert len(forward) <= (24 if send == "static shapes" else 20), forward
        assert len(backward) <= 20, backward
