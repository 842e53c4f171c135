"""The layer group of the benchmarks of whole models: MiniMax-01's eight layers at a third width."""

from __future__ import annotations

from typing import TypeVar

import torch
from torch import nn

from lasp.hybrid import AttentionConfig, HybridConfig, HybridModel
from moe_parallel import MoEConfig, ParallelGroups, SymmetricMemory

M = TypeVar("M", bound=nn.Module)


def layer_group(
    pattern: str = "7:1",
    *,
    num_layers: int = 8,
    hidden_size: int = 2048,
    num_experts: int = 32,
    vocab_size: int = 1024,
) -> HybridConfig:
    """Heads of 128 and experts one and a half times as wide as the model, two for each token."""
    head_dim = min(128, hidden_size // 2)
    heads = hidden_size // head_dim
    return HybridConfig(
        num_layers=num_layers,
        vocab_size=vocab_size,
        attention=AttentionConfig(
            num_heads=heads,
            num_kv_heads=max(1, heads // 8),
            head_dim=head_dim,
            rotary_dim=head_dim // 2,
            rope_base=10_000_000.0,
        ),
        moe=MoEConfig(hidden_size, hidden_size * 3 // 2, num_experts=num_experts, top_k=2),
        pattern=pattern,
    )


def drawn(module: M, device: torch.device | str) -> M:
    """A module that was made on the meta device, with values drawn where it then lies."""
    module.to_empty(device=device)
    with torch.no_grad():
        for parameter in module.parameters():
            if parameter.dim() == 1:
                parameter.fill_(1.0)
            else:
                parameter.normal_(0, 0.02)
    return module


def quick_model(
    config: HybridConfig,
    device: str,
    dtype: torch.dtype,
    groups: ParallelGroups | None = None,
    memory: SymmetricMemory | None = None,
) -> HybridModel:
    """A model whose values are drawn where it lies, in seconds, other ones on each rank."""
    how = {"groups": groups, "symmetric_memory": memory}
    return drawn(HybridModel(config, **how, device="meta", dtype=dtype), device)
