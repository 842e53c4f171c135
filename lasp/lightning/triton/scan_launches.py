"""Which kernels scan tensors of given shapes, strides and dtypes, and their block sizes.

Nothing here depends on the pack but the number of tokens. On Hopper the kernels for Hopper run
first where they serve; what is not finite is then repaired by the kernels for all GPUs.
"""

from __future__ import annotations

from functools import lru_cache
from typing import NamedTuple

import torch

from lasp._core.launcher import Launcher, Tile, launcher_of, strides_of
from lasp.lightning.triton import tuning
from lasp.lightning.triton.chunk_scan_kernel import chunk_scan_kernel, key_value_gradients_kernel
from lasp.lightning.triton.device import arithmetic, is_hopper
from lasp.lightning.triton.hopper_scan_kernel import (
    hopper_gradients_kernel,
    hopper_scan_kernel,
)


class Form(NamedTuple):
    """All of a tensor but its memory: what decides which kernel takes it."""

    shape: tuple[int, ...]
    strides: tuple[int, ...]
    dtype: torch.dtype
    device: torch.device


class ScanBlocks(NamedTuple):
    """Block sizes of the kernel for all GPUs, and of that for Hopper; None where it serves less."""

    general: tuning.Blocks
    hopper: tuning.HopperBlocks | None


class Launch(NamedTuple):
    """A kernel for forms of tensors, whatever the pack.

    Attributes:
        launcher: of the kernel.
        programs: how many walk one segment, over all heads.
        tiles: how the copy engine sees operands and results, see :func:`_tiles`.
    """

    launcher: Launcher
    programs: int
    tiles: list[Tile]


@lru_cache(maxsize=1024)
def scan_launches(
    query: Form,
    key: Form,
    value: Form,
    blocks: ScanBlocks,
    states: tuple[bool, bool, bool],
    shared: bool,
    reverse: bool,
    transposed: bool,
) -> tuple[Launch, ...]:
    """The launches of one output: one, and one more where documents start inside segments.

    Args:
        query: ``[T, H, D]``.
        key: ``[T, H, D]``.
        value: ``[T, H, E]``.
        blocks: of the kernels.
        states: which there are: initial, incoming, final.
        shared: whether documents start inside segments.
        reverse: against the order of the tokens.
        transposed: states are ``[..., E, D]`` in memory.
    """
    num_tokens, num_heads, dim_in = query.shape
    dim_out = value.shape[2]
    tensors = (query, key, value, _contiguous((num_tokens, num_heads, dim_out), query))
    case = query.device, (query.dtype, *states)
    sizes = {"D": dim_in, "E": dim_out, "STEP": -1 if reverse else 1, "TRANSPOSED": transposed}
    hopper, tiles = _hopper(blocks.hopper, tensors, (True, True, False, False))
    launches = []
    if hopper is not None:
        named = _hopper_meta(hopper, shared)
        launcher = launcher_of(hopper_scan_kernel, *case, **sizes, **named)
        launches.append(Launch(launcher, num_heads * -(-dim_out // 128), tiles))
    widths = (blocks.general.operand,) * 2 + (blocks.general.columns,) * 2
    tiles = _tiles(tensors, widths, blocks.general.chunk)
    strides = strides_of("th", query=query.strides, key=key.strides, value=value.strides)
    named = strides | sizes | _meta(blocks.general, query.dtype, bool(tiles))
    programs = num_heads * -(-dim_out // blocks.general.columns)
    for repair in _repairs(hopper is not None, shared):
        launcher = launcher_of(chunk_scan_kernel, *case, **named, REPAIR=repair)
        launches.append(Launch(launcher, programs, tiles))
    return tuple(launches)


@lru_cache(maxsize=1024)
def gradient_launches(
    q: Form,
    k: Form,
    v: Form,
    do: Form,
    blocks: ScanBlocks,
    states: tuple[bool, bool, bool],
    shared: bool,
) -> tuple[Launch, ...]:
    """The launches of dk and dv, both in one: arguments as of :func:`scan_launches`."""
    _, num_heads, dim = q.shape
    tensors = (q, k, v, do, q, do, *(_contiguous(q.shape, q),) * 2)
    case = q.device, (q.dtype, *states)
    hopper, tiles = _hopper(blocks.hopper, tensors, (True,) * 4 + (False,) * 4)
    launches = []
    if hopper is not None:
        launcher = launcher_of(
            hopper_gradients_kernel, *case, D=dim, **_hopper_meta(hopper, shared)
        )
        launches.append(Launch(launcher, num_heads * 2 * -(-dim // 128), tiles))
    widths = (blocks.general.operand,) * 4 + (blocks.general.columns,) * 4
    tiles = _tiles(tensors, widths, blocks.general.chunk)
    strides = strides_of("th", q=q.strides, k=k.strides, v=v.strides, do=do.strides)
    named = strides | {"D": dim} | _meta(blocks.general, q.dtype, bool(tiles))
    programs = num_heads * 2 * -(-dim // blocks.general.columns)
    for repair in _repairs(hopper is not None, shared):
        launcher = launcher_of(key_value_gradients_kernel, *case, **named, REPAIR=repair)
        launches.append(Launch(launcher, programs, tiles))
    return tuple(launches)


def _repairs(on_hopper: bool, shared: bool) -> list[bool]:
    """Values of REPAIR with which the kernel for all GPUs runs, one after the other.

    False computes everything, where no kernel for Hopper has; True computes what is not finite
    again, where documents share segments.
    """
    return [False] * (not on_hopper) + [True] * shared


def _hopper(
    blocks: tuning.HopperBlocks | None, tensors: tuple[Form, ...], operands: tuple[bool, ...]
) -> tuple[tuning.HopperBlocks | None, list[Tile]]:
    """Block sizes and tiles of the kernels for Hopper; None and no tiles where they do not run.

    Args:
        blocks: of those kernels.
        tensors: operands and results.
        operands: for each tensor whether it is a query or key; else it is a value or result.
    """
    if blocks is None or not is_hopper(tensors[0].device):
        return None, []
    widths = tuple(blocks.width if operand else 64 for operand in operands)
    tiles = _tiles(tensors, widths, 64)
    return (blocks, tiles) if tiles else (None, [])


def _hopper_meta(blocks: tuning.HopperBlocks, shared: bool) -> dict[str, object]:
    """What both kernels for Hopper are compiled for."""
    return {
        "STAGES": blocks.stages,
        "WIDTH": blocks.width,
        "APART": blocks.apart,
        "SHARED": shared,
        "num_warps": 4,
        "maxnreg": blocks.max_registers,
    }


def _meta(blocks: tuning.Blocks, dtype: torch.dtype, tma: bool) -> dict[str, object]:
    """What both kernels are compiled for."""
    return {
        "BLOCK_D": blocks.operand,
        "BLOCK_E": blocks.columns,
        "CHUNK": blocks.chunk,
        "TMA": tma,
        "num_warps": blocks.num_warps,
        "num_stages": blocks.num_stages,
        **arithmetic(dtype),
    }


def _contiguous(shape: tuple[int, ...], like: Form) -> Form:
    """The form of a result."""
    _, num_heads, dim = shape
    return Form(shape, (num_heads * dim, dim, 1), like.dtype, like.device)


def _tiles(tensors: tuple[Form, ...], widths: tuple[int, ...], chunk: int) -> list[Tile]:
    """Tiles of ``[H, T, D]`` for the copy engine; empty if not all tensors can be described.

    Columns of a tile that lie past a head are zero in shared memory, and are not stored.
    """
    if not all(_describable(x, width) for x, width in zip(tensors, widths)):
        return []
    return [
        Tile(
            (x.shape[1], x.shape[0], x.shape[2]),
            (x.strides[1], x.strides[0], 1),
            (1, chunk, width),
        )
        for x, width in zip(tensors, widths)
    ]


def _describable(x: Form, width: int) -> bool:
    """Whether the copy engine can find the rows of a head, and take tiles of so many columns."""
    unit = 16 // x.dtype.itemsize
    return width * x.dtype.itemsize <= tuning.LONGEST_TILE_ROW and all(
        stride > 0 and stride % unit == 0 for stride in x.strides[:2]
    )
