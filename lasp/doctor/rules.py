"""What ``"auto"`` takes here, and why not the others."""

from __future__ import annotations

import torch

from lasp import SequenceLayout, decay_rates
from lasp._core.impl import chosen_impl
from lasp.state_exchange import resolve_exchange
from ring.blocks.interface import Operands
from ring.blocks.registry import BLOCKS, resolve_block

HEAD_DIM = 128
DTYPES = (torch.bfloat16, torch.float16, torch.float32, torch.float64)


def _inputs() -> dict[str, tuple[torch.device, torch.dtype]]:
    kinds = ["cpu"] + ["cuda"] * torch.cuda.is_available()
    return {
        f"{kind} {str(dtype).removeprefix('torch.')}": (torch.device(kind), dtype)
        for kind in kinds
        for dtype in DTYPES
    }


def impl_rules() -> dict[str, dict[str, str | None]]:
    """What ``impl="auto"`` takes, and what keeps ``triton`` away."""
    rows: dict[str, dict[str, str | None]] = {}
    for inputs, (device, dtype) in _inputs().items():
        rows[inputs] = {"impl": chosen_impl("auto", device, dtype)}
        try:
            chosen_impl("triton", device, dtype)
        except ValueError as refused:
            rows[inputs]["triton"] = str(refused)
    return rows


def softmax_block_rules() -> dict[str, dict[str, str | None]]:
    """What ``block="auto"`` takes for heads of 128, and the obstacle of each block before it."""
    rows: dict[str, dict[str, str | None]] = {}
    for inputs, (device, dtype) in _inputs().items():
        taken = resolve_block("auto", device, dtype, HEAD_DIM).name
        rows[inputs] = {"block": taken}
        for name, block in BLOCKS.items():
            if name == taken:
                break
            operands = Operands(device, dtype, HEAD_DIM, HEAD_DIM, False)
            rows[inputs][name] = block.obstacle(operands)
    return rows


def exchange_rule() -> dict[str, str]:
    """What ``exchange="auto"`` takes for layers of MiniMax-01: 64 heads of 128, 80 layers."""
    rows, tokens = {}, 32768
    for num_ranks in (2, 8, 64):
        layout = SequenceLayout((tokens * num_ranks,), num_ranks)
        for layer in (0, 70, 78):
            rates = tuple(decay_rates(64, layer, 80).tolist())
            choices = resolve_exchange("auto", layout, rates, 2.0**-32, HEAD_DIM, HEAD_DIM)
            rows[f"P={num_ranks} layer {layer}"] = ", ".join(
                f"{choice.strategy} ({len(choice.heads)} heads)" for choice in choices
            )
    return rows
