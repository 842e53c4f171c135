"""Chunk state and state passing: launches of the kernels that give the states between segments."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from lasp.lightning.triton import tuning
from lasp.lightning.triton.chunk_state_kernel import chunk_state_kernel, state_passing_kernel
from lasp.lightning.triton.device import arithmetic, device_limits
from lasp.lightning.triton.segments import Plan, parts_of


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


def chunk_state(  # two launches, an argument a line: longer than our functions are
    key_THK: Tensor,
    value_THV: Tensor,
    rates_H: Tensor,
    plan: Plan,
    reaches: tuple[int, ...],
    *,
    initial_state: Tensor | None,
    scale: float,
) -> States:
    """The states between segments, and those that runs send on.

    Args:
        key_THK: ``[T, H, K]``.
        value_THV: ``[T, H, V]``.
        rates_H: ``[H]`` float32.
        plan: direction and segments.
        reaches: for each head, how many tokens at the end of a segment count.
        initial_state: state at the start of each document ``[N, H, K, V]`` float32, or None.
        scale: of the states.
    """
    num_heads, key_dim = key_THK.shape[1:]
    value_dim = value_THV.shape[2]
    shape = (num_heads, key_dim, value_dim)
    outgoing = rates_H.new_empty(plan.flow.num_slots, *shape)  # a run that sends ends in a segment
    if not any(plan.state_lengths):
        return States(rates_H.new_empty(0), outgoing)
    states = rates_H.new_empty(plan.num_states, *shape)
    blocks = tuning.state_blocks(
        key_dim, value_dim, key_THK.dtype, device_limits(key_THK.device)[1]
    )
    programs = -(-value_dim // blocks.columns)
    num_sms = device_limits(key_THK.device)[0]
    length = tuning.part_length(plan.state_lengths, reaches, programs, num_sms)
    parts = parts_of(plan.state_lengths, reaches, length, key_THK.device)
    num_parts = parts.rows.shape[0]
    # Not one a segment: a document of its own has a segment, and mostly no state to hand on.
    num_sums = plan.summed.shape[0]
    sums = rates_H.new_empty(num_sums, num_parts, key_dim, value_dim)
    with torch.cuda.device_of(states):
        chunk_state_kernel[(num_sums * num_parts * programs,)](
            key_THK,
            value_THV,
            sums,
            rates_H,
            plan.summed,
            parts.rows,
            parts.reaches,
            num_parts,
            parts.length,
            scale,
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
        group, block = tuning.combine_blocks(len(plan.segments))
        state_passing_kernel[(num_heads * -(-key_dim * value_dim // block),)](
            sums,
            states,
            outgoing,
            initial_state,
            rates_H,
            plan.table,
            parts.first,
            parts.reaches,
            len(plan.segments),
            num_heads,
            num_parts,
            parts.length,
            SIZE=key_dim * value_dim,
            BLOCK=block,
            GROUP=group,
        )
    return States(states, outgoing)
