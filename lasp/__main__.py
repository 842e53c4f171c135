"""``python -m lasp``: what runs here, and a self check of the three operators on one rank."""

from __future__ import annotations

import platform
from importlib.metadata import version
from importlib.util import find_spec

import torch

from lasp import SequenceLayout, decay_rates, lightning_attention
from lasp._core.impl import chosen_impl
from lasp.lightning.reference import recurrent_lightning_attention
from lasp.state_exchange import resolve_exchange
from moe_parallel import ExpertParallelMoE, MoEConfig
from moe_parallel.reference import reference_moe
from ring import ring_attention
from ring.blocks.registry import resolve_block
from ring.reference import dense_attention

LENGTHS = (70, 1, 0, 129)


def environment() -> dict[str, str]:
    """Versions and devices; a bug report starts from it."""
    rows = {"python": platform.python_version()}
    rows["torch"] = torch.__version__
    rows["triton"] = version("triton") if find_spec("triton") else "not installed"
    devices = [torch.cuda.get_device_name(index) for index in range(torch.cuda.device_count())]
    rows["devices"] = ", ".join(devices) or "CPU only"
    return rows


def kernel_rules() -> dict[str, str]:
    """What ``impl="auto"`` and ``block="auto"`` take for heads of 128."""
    rows: dict[str, str] = {}
    for device in map(torch.device, ["cpu"] + ["cuda"] * torch.cuda.is_available()):
        for dtype in (torch.bfloat16, torch.float32, torch.float64):
            inputs = f"{device} {str(dtype)[6:]}"
            rows[f"impl='auto' {inputs}"] = chosen_impl("auto", device, dtype)
            rows[f"ring block='auto' {inputs}"] = resolve_block("auto", device, dtype, 128).name
    return rows


def exchange_rule() -> dict[str, str]:
    """What ``exchange="auto"`` takes for layers of MiniMax-01: 64 heads of 128, 80 layers."""
    rows, tokens = {}, 32768
    for num_ranks in (2, 8, 64):
        layout = SequenceLayout((tokens * num_ranks,), num_ranks)
        for layer in (0, 70, 78):
            rates = tuple(decay_rates(64, layer, 80).tolist())
            choices = resolve_exchange("auto", layout, rates, 2.0**-32, 128, 128)
            rows[f"lasp exchange='auto' P={num_ranks} layer {layer}"] = ", ".join(
                f"{choice.strategy} ({len(choice.heads)} heads)" for choice in choices
            )
    return rows


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


if __name__ == "__main__":
    for name, value in (environment() | kernel_rules() | exchange_rule()).items():
        print(f"{name:36} {value}")
    for name, error in self_check().items():
        print(f"{name:36} largest difference from the oracle {error:.1e}")
        if not error < 1e-10:
            raise SystemExit(f"{name} is wrong here")
