"""Chunk scan: launches of the kernels that give the output and the gradients."""

from __future__ import annotations

import torch
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

from lasp.lightning.triton import tuning
from lasp.lightning.triton.chunk_scan_kernel import chunk_scan_kernel, key_value_gradients_kernel
from lasp.lightning.triton.device import arithmetic, device_limits
from lasp.lightning.triton.segments import Plan


def chunk_scan(  # an argument a line, of one launch: longer than our functions are
    query_THD: Tensor,
    key_THD: Tensor,
    value_THE: Tensor,
    rates_H: Tensor,
    plan: Plan,
    states: Tensor,
    *,
    initial_state: Tensor | None,
    incoming: Tensor | None,
    final_state: Tensor | None = None,
    scale: float,
    transposed: bool = False,
) -> Tensor:
    """The output ``[T, H, E]`` in the dtype of the query; fills in ``final_state`` if there is one.

    The output is this scan of (q, k, v), and dq is that of (do, v, k) with transposed states.

    Args:
        query_THD: ``[T, H, D]``.
        key_THD: ``[T, H, D]``.
        value_THE: ``[T, H, E]``.
        rates_H: ``[H]`` float32.
        plan: direction and segments.
        states: ``States.entering``.
        initial_state: state at the start of each document, or None.
        incoming: states that runs receive ``[runs, H, D, E]``, or None.
        final_state: where to leave the state at the end of each document, or None.
        scale: of the output.
        transposed: all states are ``[..., E, D]`` in memory.
    """
    num_tokens, num_heads, dim_in = query_THD.shape
    dim_out = value_THE.shape[2]
    out = query_THD.new_empty(num_tokens, num_heads, dim_out)
    blocks = tuning.output_blocks(
        dim_in, dim_out, query_THD.dtype, device_limits(query_THD.device)[1]
    )
    block_d = tuning.padded(dim_in)
    tensors = (query_THD, key_THD, value_THE, out)
    widths = (block_d, block_d, blocks.columns, blocks.columns)
    tiles = _tiles(tensors, widths, blocks.chunk)
    with torch.cuda.device_of(out):
        for repair in (False, True)[: 1 + plan.shared]:
            chunk_scan_kernel[(len(plan.segments) * num_heads * -(-dim_out // blocks.columns),)](
                *(tiles[:3] if tiles else tensors[:3]),
                out,
                tiles[3] if tiles else None,
                states,
                initial_state,
                incoming,
                final_state,
                rates_H,
                plan.table,
                plan.reach,
                num_heads,
                scale,
                *query_THD.stride()[:2],
                *key_THD.stride()[:2],
                *value_THE.stride()[:2],
                D=dim_in,
                E=dim_out,
                BLOCK_D=block_d,
                BLOCK_E=blocks.columns,
                CHUNK=blocks.chunk,
                STEP=-1 if plan.flow.reverse else 1,
                TRANSPOSED=transposed,
                TMA=bool(tiles),
                **arithmetic(query_THD.dtype),
                num_warps=blocks.num_warps,
                num_stages=blocks.num_stages,
                REPAIR=repair,
            )
    return out


def key_value_gradients(  # as above
    q_THK: Tensor,
    k_THK: Tensor,
    v_THV: Tensor,
    do_THV: Tensor,
    rates_H: Tensor,
    plan: Plan,
    states: Tensor,
    *,
    initial_state: Tensor | None,
    incoming: Tensor | None,
    final_state: Tensor | None = None,
    scale: float,
) -> tuple[Tensor, Tensor]:
    """The gradients dk and dv; fills in ``final_state`` if there is one.

    In reverse dk is the output of (v, do, q) and dv that of (k, q, do): in one launch, where
    K = V, in which q and do come from memory once.

    Args:
        q_THK: ``[T, H, K]``.
        k_THK: ``[T, H, K]``.
        v_THV: ``[T, H, V]``.
        do_THV: gradient of the output ``[T, H, V]``.
        rates_H: ``[H]`` float32.
        plan: reverse direction and segments.
        states: ``States.entering``.
        initial_state: gradient of the state at the end of each document, or None.
        incoming: gradients of states that runs receive ``[runs, H, K, V]``, or None.
        final_state: where to leave the gradient of each document's initial state, or None.
        scale: of the output.
    """
    q, k, v, do = q_THK, k_THK, v_THV, do_THV
    num_heads, dim = q.shape[1:]
    if v.shape[2] != dim:
        dk = chunk_scan(
            v, do, q, rates_H, plan, states,
            initial_state=initial_state, incoming=incoming, scale=scale, transposed=True,
        )  # fmt: skip
        dv = chunk_scan(
            k, q, do, rates_H, plan, states,
            initial_state=initial_state, incoming=incoming, final_state=final_state, scale=scale,
        )  # fmt: skip
        return dk, dv
    dk, dv = k.new_empty(k.shape), v.new_empty(v.shape)
    blocks = tuning.output_blocks(dim, dim, q.dtype, device_limits(q.device)[1])
    block_d = tuning.padded(dim)
    tensors = (q, k, v, do, q, do, dk, dv)
    tiles = _tiles(tensors, (block_d,) * 4 + (blocks.columns,) * 4, blocks.chunk)
    programs = 2 * -(-dim // blocks.columns)
    with torch.cuda.device_of(dk):
        for repair in (False, True)[: 1 + plan.shared]:
            key_value_gradients_kernel[(len(plan.segments) * num_heads * programs,)](
                *(tiles[:6] if tiles else tensors[:6]),
                dk,
                dv,
                *(tiles[6:] if tiles else (None, None)),
                states,
                initial_state,
                incoming,
                final_state,
                rates_H,
                plan.table,
                plan.reach,
                num_heads,
                scale,
                *q.stride()[:2],
                *k.stride()[:2],
                *v.stride()[:2],
                *do.stride()[:2],
                D=dim,
                BLOCK_D=block_d,
                BLOCK_E=blocks.columns,
                CHUNK=blocks.chunk,
                TMA=bool(tiles),
                **arithmetic(q.dtype),
                num_warps=blocks.num_warps,
                num_stages=blocks.num_stages,
                REPAIR=repair,
            )
    return dk, dv


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
