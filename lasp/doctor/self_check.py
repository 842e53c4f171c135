"""The three operators against their oracles, on one rank in some tenths of a second."""

from __future__ import annotations

import torch

from lasp import SequenceLayout, decay_rates, lightning_attention
from lasp.lightning.reference import recurrent_lightning_attention
from moe_parallel import ExpertParallelMoE, MoEConfig
from moe_parallel.reference import reference_moe
from ring import ring_attention
from ring.reference import dense_attention

LENGTHS = (70, 1, 0, 129)


def self_check() -> dict[str, float]:
    """Largest difference of each operator from its oracle, in float64 on the CPU."""
    torch.manual_seed(0)
    layout = SequenceLayout(LENGTHS, 1)
    q, k, v = (torch.randn(layout.num_tokens, 4, 16, dtype=torch.float64) for _ in range(3))
    rates = decay_rates(4, 0, 8)
    ours = lightning_attention(q, k, v, rates, layout=layout).output
    oracle, _ = recurrent_lightning_attention(q, k, v, rates, cu_seqlens=layout.borders)
    errors = {"lightning_attention": (ours - oracle).abs().max().item()}
    ours = ring_attention(q, k, v, layout=layout).output
    dense, _ = dense_attention(q, k, v, cu_seqlens=layout.borders, causal=True, scale=0.25)
    errors["ring_attention"] = (ours - dense).abs().max().item()
    config = MoEConfig(hidden_size=64, ffn_size=32, num_experts=4, top_k=2, capacity_factor=1.0)
    layer, x = ExpertParallelMoE(config, dtype=torch.float64), q.flatten(1)
    weights = (layer.gate.weight, layer.experts.w13, layer.experts.w2)
    oracle = reference_moe(x, *weights, top_k=2, capacity_factor=1.0).output
    errors["ExpertParallelMoE"] = (layer(x).output - oracle).abs().max().item()
    return errors
