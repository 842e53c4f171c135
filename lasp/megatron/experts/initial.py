"""Initial values of an expert layer, as Megatron's config says."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from megatron.core.transformer.transformer_config import TransformerConfig
from torch import Tensor

from moe_parallel.experts.experts import generator_of
from moe_parallel.layer import ExpertParallelMoE


@torch.no_grad()
def draw_initial_values(moe: ExpertParallelMoE, config: TransformerConfig, gain: float) -> None:
    """Fill the router and every expert by Megatron's init methods; they do not depend on the mesh.

    ``config.init_method`` draws the weight of the router and, of every expert, the gate and the up
    projection; ``config.output_layer_init_method`` draws the down projection. Each of them
    fills a whole matrix in float32 on the CPU.

    Args:
        moe: with parameters of any values.
        config: Megatron's; without ``perform_initialization`` nothing is drawn.
        gain: factor of the experts' values.
    """
    if not config.perform_initialization:
        return
    # Megatron seeds the CPU generator alike on the ranks of a stage.
    for_experts, for_gate = (int(torch.randint(2**31, ())) for _ in range(2))

    def draw(name: str, whole: Tensor, generator: torch.Generator) -> None:
        if name == "w13":
            for projection in whole:
                _apply(config.init_method, projection, generator)
        else:
            _apply(config.output_layer_init_method, whole, generator)
        whole.mul_(gain)

    moe.experts.fill(for_experts, draw)
    gate = torch.empty(moe.gate.weight.shape, device="cpu", dtype=torch.float32)
    _apply(config.init_method, gate, generator_of(for_gate))
    moe.gate.weight.copy_(gate)


def _apply(init_method: Callable[[Tensor], Any], x: Tensor, generator: torch.Generator) -> None:
    """An init method takes no generator: it draws from torch's own, which is as before after it."""
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(
            int(torch.randint(2**63 - 1, (), generator=generator, device="cpu"))
        )
        init_method(x)
