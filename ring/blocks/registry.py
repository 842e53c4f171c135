"""The block kernels by name, and the rule of ``block="auto"``."""

from __future__ import annotations

from functools import lru_cache

import torch

from ring.blocks.cpu_flash import CpuFlashBlock
from ring.blocks.cudnn import CudnnBlock
from ring.blocks.eager import EagerBlock
from ring.blocks.fa4 import Fa4Block
from ring.blocks.flash import FlashBlock
from ring.blocks.interface import Block, Operands
from ring.blocks.tiling import TiledBlock

_FLASH = FlashBlock()
_CUDNN = TiledBlock("cudnn", CudnnBlock(), _FLASH)
BLOCKS: dict[str, Block] = {
    b.name: b for b in (Fa4Block(), _CUDNN, _FLASH, CpuFlashBlock(), EagerBlock())
}


def check_block(name: str) -> None:
    """Raise ValueError for a name that is not offered."""
    if name not in ("auto", *BLOCKS):
        raise ValueError(f"block must be one of {('auto', *BLOCKS)}, got {name!r}: use 'auto'")


@lru_cache(maxsize=64)
def resolve_block(
    name: str,
    device: torch.device,
    dtype: torch.dtype,
    head_dim: int,
    value_dim: int | None = None,
    *,
    slides: bool = False,
) -> Block:
    """The block called ``name``, for tensors like these.

    ``auto`` takes the first of these without an obstacle:

    ``fa4``
        On Hopper GPUs in 16 bits, head dims up to 256, where flash-attn-4 is installed.
    ``cudnn``
        On NVIDIA GPUs of compute capability 8.0 and above in 16 bits, without a sliding window: one
        head dim up to 128, or 192 for keys and 128 for values from 9.0 on.
    ``flash``
        There too, head dims up to 256, sliding windows.
    ``cpu_flash``
        On CPUs, one head dim, without a sliding window.
    ``eager``
        For all else.

    Args:
        name: of the block, or ``auto``.
        device: of the tensors.
        dtype: of the tensors.
        head_dim: D, of queries and keys.
        value_dim: V, of values; None: D.
        slides: whether rows see a sliding window.

    Raises:
        ValueError: if the name is unknown or the block cannot run there.
    """
    value_dim = head_dim if value_dim is None else value_dim
    operands = Operands(device, dtype, head_dim, value_dim, slides)
    if name == "auto":
        return next(block for block in BLOCKS.values() if block.obstacle(operands) is None)
    check_block(name)
    if (obstacle := BLOCKS[name].obstacle(operands)) is not None:
        raise ValueError(
            f"block {name!r} {obstacle}, got {dtype} on {device.type}, head dim {head_dim} of keys"
            f" and {value_dim} of values{', a sliding window' if slides else ''}: use"
            ' "auto", or "eager" for any tensors'
        )
    return BLOCKS[name]
