"""Chunk state and state passing: launches of the kernels for the states between segments."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from lasp.lightning.triton import tuning
from lasp.lightning.triton.chunk_state_kernel import chunk_state_kernel, state_passing_kernel
from lasp.lightning.triton.device import arithmetic, device_limits
from lasp.lightning.triton.segments import Plan, SegmentParts, parts_of


class States(NamedTuple):
    """The states of one direction.

    Attributes:
        entering: what enters segments from those before ``[plan.num_states, H, K, V]``.
        outgoing: the local part of what runs send on ``[slots, H, K, V]``.
    """

    entering: Tensor
    outgoing: Tensor


def segment_length(q: Tensor, v: Tensor, reaches: tuple[int, ...]) -> int:
    """Tokens of a segment, the same for both directions of a call."""
    num_sms, shared_bytes = device_limits(q.device)
    columns = tuning.output_blocks(q.shape[2], v.shape[2], q.dtype, shared_bytes).columns
    blocks = -(-v.shape[2] // columns)
    length: int = tuning.segment_length(q.shape[0], blocks, num_sms, reaches)
    return length


def chunk_state(
    key_THK: Tensor,
    value_THV: Tensor,
    rates_H: Tensor,
    plan: Plan,
    reaches: tuple[int, ...],
    *,
    initial_state: Tensor | None,
    scale: float,
) -> States:
    """The states between segments, and those that runs send on: both kernels.

    Args:
        key_THK: ``[T, H, K]``.
        value_THV: ``[T, H, V]``.
        rates_H: ``[H]`` float32.
        plan: direction and segments.
        reaches: for each head, how many tokens at the end of a segment count.
        initial_state: state at the start of each document ``[N, H, K, V]`` float32, or None.
        scale: of the states.
    """
    shape = (key_THK.shape[1], key_THK.shape[2], value_THV.shape[2])
    outgoing = rates_H.new_empty(plan.flow.num_slots, *shape)  # a run that sends ends in a segment
    if not any(plan.state_lengths):
        return States(rates_H.new_empty(0), outgoing)
    states = States(rates_H.new_empty(plan.num_states, *shape), outgoing)
    num_sms, shared_bytes = device_limits(key_THK.device)
    key_dim, value_dim = shape[1:]
    blocks = tuning.state_blocks(key_dim, value_dim, key_THK.dtype, shared_bytes)
    programs = -(-value_dim // blocks.columns)
    length = tuning.part_length(plan.state_lengths, reaches, programs, num_sms)
    parts = parts_of(plan.state_lengths, reaches, length, key_THK.device)
    with torch.cuda.device_of(outgoing):
        sums = _sum_segments(key_THK, value_THV, rates_H, plan, parts, blocks, scale)
        _pass_states(sums, states, initial_state, rates_H, plan, parts)
    return states


def _sum_segments(
    key_THK: Tensor,
    value_THV: Tensor,
    rates_H: Tensor,
    plan: Plan,
    parts: SegmentParts,
    blocks: tuning.Blocks,
    scale: float,
) -> Tensor:
    """Launch ``chunk_state_kernel``: the sums ``[sums, parts, K, V]``."""
    key_dim, value_dim = key_THK.shape[2], value_THV.shape[2]
    num_parts = parts.rows.shape[0]
    # Not one a segment: a document of its own has a segment, and mostly no state to hand on.
    num_sums = plan.summed.shape[0]
    sums = rates_H.new_empty(num_sums, num_parts, key_dim, value_dim)
    chunk_state_kernel[(num_sums * num_parts * -(-value_dim // blocks.columns),)](
        key_THK,
        value_THV,
        sums,
        *(rates_H, plan.summed, parts.rows, parts.reaches, num_parts, parts.length, scale),
        *key_THK.stride()[:2],
        *value_THV.stride()[:2],
        K=key_dim,
        V=value_dim,
        BLOCK_K=tuning.padded(key_dim),
        BLOCK_V=blocks.columns,
        CHUNK=blocks.chunk,
        STEP=-1 if plan.flow.reverse else 1,
        **arithmetic(key_THK.dtype),
        num_warps=blocks.num_warps,
        num_stages=blocks.num_stages,
        maxnreg=blocks.max_registers,
    )
    return sums


def _pass_states(
    sums: Tensor,
    states: States,
    initial_state: Tensor | None,
    rates_H: Tensor,
    plan: Plan,
    parts: SegmentParts,
) -> None:
    """Launch ``state_passing_kernel``, which fills in ``states``."""
    num_heads, size = rates_H.shape[0], sums.shape[2] * sums.shape[3]
    group, block = tuning.combine_blocks(len(plan.segments))
    state_passing_kernel[(num_heads * -(-size // block),)](
        sums,
        *states,
        initial_state,
        *(rates_H, plan.table, parts.first, parts.reaches),
        *(len(plan.segments), num_heads, sums.shape[1], parts.length),
        SIZE=size,
        BLOCK=block,
        GROUP=group,
    )
