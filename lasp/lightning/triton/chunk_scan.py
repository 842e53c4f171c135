"""Chunk scan: launches of the kernels that give the output and the gradients."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

from lasp.lightning.triton import tuning
from lasp.lightning.triton.chunk_scan_kernel import chunk_scan_kernel, key_value_gradients_kernel
from lasp.lightning.triton.device import arithmetic, device_limits
from lasp.lightning.triton.segments import Plan


class EdgeStates(NamedTuple):
    """The states that a scan reads and writes, in the order in which the kernels take them.

    In reverse they are gradients: ``initial`` of final states, ``final`` of initial states.

    Attributes:
        entering: what enters segments from those before, ``States.entering``.
        initial: state at the start of each document ``[N, H, K, V]``, or None for zero.
        incoming: states that runs receive ``[runs, H, K, V]``, or None.
        final: where to leave the state at the end of each document ``[N, H, K, V]``, or None.
    """

    entering: Tensor
    initial: Tensor | None
    incoming: Tensor | None
    final: Tensor | None = None


def chunk_scan(
    query_THD: Tensor,
    key_THD: Tensor,
    value_THE: Tensor,
    rates_H: Tensor,
    plan: Plan,
    states: EdgeStates,
    *,
    scale: float,
    transposed: bool = False,
) -> Tensor:
    """The output ``[T, H, E]`` in the dtype of the query; fills in ``states.final``, if given.

    The output is this scan of (q, k, v), and dq is that of (do, v, k) with transposed states.

    Args:
        query_THD: ``[T, H, D]``.
        key_THD: ``[T, H, D]``.
        value_THE: ``[T, H, E]``.
        rates_H: ``[H]`` float32.
        plan: direction and segments.
        states: of documents, runs and segments.
        scale: of the output.
        transposed: all states are ``[..., E, D]`` in memory.
    """
    num_tokens, num_heads, dim_in = query_THD.shape
    dim_out = value_THE.shape[2]
    out = query_THD.new_empty(num_tokens, num_heads, dim_out)
    blocks = _blocks(query_THD, dim_out)
    block_d = tuning.padded(dim_in)
    tensors = (query_THD, key_THD, value_THE, out)
    tiles = _tiles(tensors, (block_d, block_d, blocks.columns, blocks.columns), blocks.chunk)
    meta = _meta(blocks, block_d, query_THD.dtype, bool(tiles))
    with torch.cuda.device_of(out):
        for repair in (False, True)[: 1 + plan.shared]:
            chunk_scan_kernel[(len(plan.segments) * num_heads * -(-dim_out // blocks.columns),)](
                *(tiles[:3] if tiles else tensors[:3]),
                out,
                tiles[3] if tiles else None,
                *states,
                *(rates_H, plan.table, plan.reach, num_heads, scale),
                *_strides(query_THD, key_THD, value_THE),
                D=dim_in,
                E=dim_out,
                STEP=-1 if plan.flow.reverse else 1,
                TRANSPOSED=transposed,
                REPAIR=repair,
                **meta,
            )
    return out


def key_value_gradients(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    do: Tensor,
    rates_H: Tensor,
    plan: Plan,
    states: EdgeStates,
    *,
    scale: float,
) -> tuple[Tensor, Tensor]:
    """The gradients dk and dv; fills in ``states.final``, if given.

    In reverse dk is the output of (v, do, q) and dv that of (k, q, do). With K = V one launch gives
    both and reads q and do from memory once.

    Args:
        q: ``[T, H, K]``.
        k: ``[T, H, K]``.
        v: ``[T, H, V]``.
        do: gradient of the output ``[T, H, V]``.
        rates_H: ``[H]`` float32.
        plan: reverse direction and segments.
        states: gradients of states.
        scale: of the output.
    """
    if v.shape[2] != q.shape[2]:
        args, without_final = (rates_H, plan), states._replace(final=None)
        dk = chunk_scan(v, do, q, *args, without_final, scale=scale, transposed=True)
        return dk, chunk_scan(k, q, do, *args, states, scale=scale)
    return _equal_dims_gradients((q, k, v, do), rates_H, plan, states, scale)


def _equal_dims_gradients(
    inputs: tuple[Tensor, Tensor, Tensor, Tensor],
    rates_H: Tensor,
    plan: Plan,
    states: EdgeStates,
    scale: float,
) -> tuple[Tensor, Tensor]:
    """Dk and dv of (q, k, v, do) with K = V."""
    q, k, v, do = inputs
    num_heads, dim = q.shape[1:]
    dk, dv = k.new_empty(k.shape), v.new_empty(v.shape)
    blocks = _blocks(q, dim)
    block_d = tuning.padded(dim)
    tensors = (*inputs, q, do, dk, dv)
    tiles = _tiles(tensors, (block_d,) * 4 + (blocks.columns,) * 4, blocks.chunk)
    meta = _meta(blocks, block_d, q.dtype, bool(tiles))
    programs = 2 * -(-dim // blocks.columns)
    with torch.cuda.device_of(dk):
        for repair in (False, True)[: 1 + plan.shared]:
            key_value_gradients_kernel[(len(plan.segments) * num_heads * programs,)](
                *(tiles[:6] if tiles else tensors[:6]),
                dk,
                dv,
                *(tiles[6:] if tiles else (None, None)),
                *states,
                *(rates_H, plan.table, plan.reach, num_heads, scale),
                *_strides(*inputs),
                D=dim,
                REPAIR=repair,
                **meta,
            )
    return dk, dv


def _blocks(query: Tensor, dim_out: int) -> tuning.Blocks:
    shared_bytes = device_limits(query.device)[1]
    return tuning.output_blocks(query.shape[2], dim_out, query.dtype, shared_bytes)


def _meta(blocks: tuning.Blocks, block_d: int, dtype: torch.dtype, tma: bool) -> dict[str, object]:
    """What both kernels are compiled for."""
    return {
        "BLOCK_D": block_d,
        "BLOCK_E": blocks.columns,
        "CHUNK": blocks.chunk,
        "TMA": tma,
        "num_warps": blocks.num_warps,
        "num_stages": blocks.num_stages,
        **arithmetic(dtype),
    }


def _strides(*tensors: Tensor) -> tuple[int, ...]:
    """Strides of tokens and heads."""
    return tuple(stride for x in tensors for stride in x.stride()[:2])


def _tiles(
    tensors: tuple[Tensor, ...], widths: tuple[int, ...], chunk: int
) -> list[TensorDescriptor]:
    """Tensor descriptors for the copy engine; empty if not all can be described.

    Heads lie side by side within a token, so a head is a range of columns of ``[T, columns]``.
    """
    if not all(_describable(x, width) for x, width in zip(tensors, widths)):
        return []
    # One for tensors that come twice: each takes microseconds to make.
    tiles: dict[tuple[int, int], TensorDescriptor] = {}
    for x, width in zip(tensors, widths):
        if (id(x), width) not in tiles:
            columns = (x.shape[1] - 1) * x.stride(1) + x.shape[2]
            tiles[id(x), width] = TensorDescriptor(
                x, [x.shape[0], columns], [x.stride(0), 1], [chunk, width]
            )
    return [tiles[id(x), width] for x, width in zip(tensors, widths)]


def _describable(x: Tensor, width: int) -> bool:
    unit = 16 // x.element_size()
    return (
        x.shape[2] % width == 0
        and width * x.element_size() <= tuning.LONGEST_TILE_ROW
        and x.stride(0) % unit == 0
        and x.stride(1) % unit == 0
        and 0 < x.stride(1) * x.shape[1] <= x.stride(0)
        and x.data_ptr() % 16 == 0
    )
