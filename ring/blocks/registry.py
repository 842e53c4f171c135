"""The block kernels by name, and the rule of ``block="auto"``."""

from __future__ import annotations

from functools import lru_cache

import torch

from ring.blocks.cpu_flash import CpuFlashBlock
from ring.blocks.cudnn import CudnnBlock
from ring.blocks.eager import EagerBlock
from ring.blocks.flash import FlashBlock
from ring.blocks.interface import Block
from ring.blocks.tiling import TiledBlock

_FLASH = FlashBlock()
_CUDNN = TiledBlock("cudnn", CudnnBlock(), _FLASH)
BLOCKS: dict[str, Block] = {b.name: b for b in (_CUDNN, _FLASH, CpuFlashBlock(), EagerBlock())}


def check_block(name: str) -> None:
    """Raise ValueError for a name that is not offered."""
    if name != "auto" and name not in BLOCKS:
        raise ValueError(f"block must be one of {('auto', *BLOCKS)}, got {name!r}: use 'auto'")


def resolve_block(name: str, device: torch.device, dtype: torch.dtype, head_dim: int) -> Block:
    """The block called ``name``, for tensors like these.

    ``auto`` takes the first of ``cudnn``, ``flash``, ``cpu_flash`` and ``eager`` without an
    obstacle: ``cudnn`` on NVIDIA GPUs of compute capability 8.0 and above in bfloat16 or float16
    with a head dim up to 128 (``flash`` up to 256), ``cpu_flash`` on CPUs, ``eager`` for all else.

    Raises:
        ValueError: if the name is unknown or the block cannot run there.
    """
    if name == "auto":
        return _first_without_obstacle(device, dtype, head_dim)
    check_block(name)
    if (obstacle := BLOCKS[name].obstacle(device, dtype, head_dim)) is not None:
        raise ValueError(
            f"block {name!r} {obstacle}, got {dtype} on {device.type}, head dim {head_dim}: use"
            ' "auto", or "eager" for any tensors'
        )
    return BLOCKS[name]


@lru_cache(maxsize=64)
def _first_without_obstacle(device: torch.device, dtype: torch.dtype, head_dim: int) -> Block:
    return next(b for b in BLOCKS.values() if b.obstacle(device, dtype, head_dim) is None)
