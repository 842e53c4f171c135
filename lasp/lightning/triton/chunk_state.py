"""Chunk state and state passing: launches of the kernels for the states between segments."""

from __future__ import annotations

from itertools import accumulate
from math import prod
from typing import NamedTuple

import torch
from torch import Tensor

from lasp._core.cache import tensor_cache
from lasp._core.host_constants import to_device
from lasp._core.launcher import launcher_of, strides_of
from lasp.lightning.triton import tuning
from lasp.lightning.triton.chunk_state_kernel import chunk_state_kernel, state_passing_kernel
from lasp.lightning.triton.device import arithmetic, device_limits
from lasp.lightning.triton.segments import Recurrence


class SegmentParts(NamedTuple):
    """Which programs sum up the states of segments: parts of tokens, counted back from the border.

    Attributes:
        length: tokens of a part.
        rows: int32 ``[parts, 2]``: head, and how many parts of that head lie behind this one.
        first: int32 ``[H + 1]``: the first part of each head.
        reaches: int32 ``[H]``: tokens that matter to the state of a head.
    """

    length: int
    rows: Tensor
    first: Tensor
    reaches: Tensor


class States(NamedTuple):
    """The states of one direction.

    Attributes:
        entering: what enters segments from those before, ``[plan.num_states, H, K, V]`` in a row.
        outgoing: the local part of what runs send on ``[slots, H, K, V]``.
    """

    entering: Tensor
    outgoing: Tensor


@tensor_cache(maxsize=1024)
def parts_of(
    state_lengths: tuple[int, ...], reaches: tuple[int, ...], length: int, device: torch.device
) -> SegmentParts:
    """The parts of the longest state; shorter ones leave some idle."""
    longest = max(state_lengths)
    counts = [-(-min(longest, reach) // length) for reach in reaches]
    rows = [(head, index) for head, count in enumerate(counts) for index in range(count)]
    first = [0, *accumulate(counts)]
    tensors = (torch.tensor(x, dtype=torch.int32, device="cpu") for x in (rows, first, reaches))
    return SegmentParts(length, *(to_device(x, device) for x in tensors))


def segment_length(q: Tensor, v: Tensor, reaches: tuple[int, ...]) -> int:
    """Tokens of a segment, the same for both directions of a call."""
    num_sms, shared_bytes = device_limits(q.device)
    blocks = tuning.output_blocks(q.shape[2], v.shape[2], q.dtype, shared_bytes)
    programs = -(-v.shape[2] // blocks.columns)
    length: int = tuning.segment_length(
        q.shape[0], programs, num_sms, reaches, 2 if blocks.num_warps == 4 else 1
    )
    return length


class ChunkState:
    """The states between segments, and those that runs send on: both kernels.

    Holds what is the same in calls with tensors of the same shapes and strides.

    Args:
        key_THK: ``[T, H, K]``; this and the other only as examples.
        value_THV: ``[T, H, V]``.
        recurrence: rates, segments, and scale of the states.
    """

    def __init__(self, key_THK: Tensor, value_THV: Tensor, recurrence: Recurrence) -> None:
        plan = recurrence.plan
        num_heads, key_dim, value_dim = *key_THK.shape[1:], value_THV.shape[2]
        state = (num_heads, key_dim, value_dim)
        self._rates = recurrence.rates
        self._outgoing = (plan.flow.num_slots, *state)  # a run that sends ends in a segment
        self._entering = plan.num_states * prod(state)
        self._empty = self._rates.new_empty(0)
        self._has_states = any(plan.state_lengths)
        if not self._has_states:
            return
        num_sms, shared_bytes = device_limits(key_THK.device)
        blocks = tuning.state_blocks(key_dim, value_dim, key_THK.dtype, shared_bytes)
        columns = -(-value_dim // blocks.columns)
        reaches = recurrence.reaches
        length = tuning.part_length(plan.state_lengths, reaches, columns, num_sms)
        parts = parts_of(plan.state_lengths, reaches, length, key_THK.device)
        num_parts, num_segments = parts.rows.shape[0], len(plan.segments)
        # Not one a segment: a document of its own has a segment, and mostly no state to hand on.
        num_sums = plan.summed.shape[0]
        self._sums = (num_sums, num_parts, key_dim, value_dim)
        self._sum_programs = num_sums * num_parts * columns
        self._sum_shared = (
            *(self._rates, plan.summed, parts.rows, parts.reaches),
            *(num_parts, parts.length, recurrence.scale),
        )
        self._launch_sums = launcher_of(
            chunk_state_kernel,
            key_THK.device,
            key_THK.dtype,
            **strides_of("th", key=key_THK.stride(), value=value_THV.stride()),
            K=key_dim,
            V=value_dim,
            BLOCK_K=max(64, tuning.power_of_2(key_dim)),
            BLOCK_V=blocks.columns,
            CHUNK=blocks.chunk,
            STEP=-1 if plan.flow.reverse else 1,
            **arithmetic(key_THK.dtype),
            num_warps=blocks.num_warps,
            num_stages=blocks.num_stages,
            maxnreg=blocks.max_registers,
        )
        size = key_dim * value_dim
        group, block = tuning.combine_blocks(num_segments)
        self._pass_programs = num_heads * -(-size // block)
        self._pass_shared = (
            *(self._rates, plan.table, parts.first, parts.reaches),
            *(num_segments, num_heads, num_parts, parts.length),
        )
        self._launch_passing = launcher_of(
            state_passing_kernel, key_THK.device, plan.with_initial,
            SIZE=size, BLOCK=block, GROUP=group,
        )  # fmt: skip

    def __call__(self, key_THK: Tensor, value_THV: Tensor, initial_state: Tensor | None) -> States:
        """The states, shared empty tensors if there are none.

        Args:
            key_THK: like the example.
            value_THV: like the example.
            initial_state: of the start of each document ``[N, H, K, V]`` float32, or None.
        """
        new_empty = self._rates.new_empty
        # Where other ranks send and this one does not, it sends what nobody reads.
        outgoing = new_empty(*self._outgoing) if self._outgoing[0] else self._empty
        if not self._has_states:
            return States(self._empty, outgoing)
        states = States(new_empty(self._entering), outgoing)
        sums = new_empty(*self._sums)
        self._launch_sums(self._sum_programs, key_THK, value_THV, sums, *self._sum_shared)
        self._launch_passing(self._pass_programs, sums, *states, initial_state, *self._pass_shared)
        return states
