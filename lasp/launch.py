"""The passes of lightning attention as launches of the Triton kernels.

The counterpart of ``lasp.ops``, and like there q, k and v are roles. Nothing here waits for the
device or reads from it.
"""

from __future__ import annotations

from functools import cache
from typing import NamedTuple

import torch
import triton
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

from lasp.kernels import tuning
from lasp.kernels.chunk_output import output_kernel
from lasp.kernels.chunk_state import combine_states_kernel, segment_states_kernel
from lasp.segments import Plan, parts_of

MAX_HEAD_DIM = 256
COMBINE_BLOCK = 128


class States(NamedTuple):
    """The states of one direction.

    Attributes:
        entering: what enters each segment from the one before ``[segments, H, K, V]``; of one
            element if none is needed.
        outgoing: the local part of what runs send on ``[slots, H, K, V]``.
    """

    entering: Tensor
    outgoing: Tensor


def check_inputs(q: Tensor, v: Tensor) -> None:
    """Raise ValueError for what the kernels do not do."""
    if q.dtype not in (torch.bfloat16, torch.float16, torch.float32):
        raise ValueError(f"q must be bf16, fp16 or fp32 for impl='triton', got {q.dtype}: eager")
    for name, dim in (("q", q.shape[-1]), ("v", v.shape[-1])):
        if dim > MAX_HEAD_DIM:
            raise ValueError(
                f"{name} must have a head dim up to {MAX_HEAD_DIM} for impl='triton', got {dim}:"
                " use impl='eager'"
            )
    compiled = isinstance(output_kernel, triton.JITFunction)
    if compiled and q.device.type != "cuda":
        raise ValueError(
            f"q must be on a GPU for impl='triton', got {q.device}: use impl='eager', or set"
            " TRITON_INTERPRET=1 before triton is imported to interpret the kernels"
        )


def segment_cut(q: Tensor, v: Tensor, reaches: tuple[int, ...]) -> tuning.Cut:
    """Segments of tokens, the same for both directions of a call."""
    return tuning.segment_cut(q.shape[0], v.shape[2], _device_limits(q.device)[0], reaches)


@cache
def _device_limits(device: torch.device) -> tuple[int, int]:
    """Multiprocessors, and bytes of shared memory of a program."""
    if device.type != "cuda":  # interpreted
        return 1, tuning.HOPPER_SHARED_BYTES
    properties = triton.runtime.driver.active.utils.get_device_properties(device.index)
    return properties["multiprocessor_count"], properties["max_shared_mem"] - 7 * 1024


def run_states(  # two launches, an argument a line: longer than our functions are
    key_THK: Tensor,
    value_THV: Tensor,
    rates_H: Tensor,
    plan: Plan,
    reaches: tuple[int, ...],
    *,
    given: Tensor | None,
    scale: float,
) -> States:
    """Passes A and B: the states between segments, and those that runs send on.

    Args:
        key_THK: ``[T, H, K]``.
        value_THV: ``[T, H, V]``.
        rates_H: ``[H]`` float32.
        plan: direction and segments.
        reaches: for each head, how many tokens at the end of a segment count.
        given: state at the start of each document ``[N, H, K, V]`` float32, or None.
        scale: of the states.
    """
    num_heads, key_dim = key_THK.shape[1:]
    value_dim = value_THV.shape[2]
    shape = (num_heads, key_dim, value_dim)
    outgoing = rates_H.new_zeros(plan.flow.num_slots, *shape)
    if not any(plan.state_lengths):
        return States(rates_H.new_empty(1), outgoing)
    states = rates_H.new_empty(len(plan.segments), *shape)
    blocks = tuning.state_blocks(
        key_dim, value_dim, key_THK.dtype, _device_limits(key_THK.device)[1]
    )
    programs = triton.cdiv(value_dim, blocks.columns)
    num_sms = _device_limits(key_THK.device)[0]
    length = tuning.part_length(plan.state_lengths, reaches, programs, num_sms)
    parts = parts_of(plan.state_lengths, reaches, length, key_THK.device)
    num_parts = parts.rows.shape[0]
    sums = rates_H.new_empty(len(plan.segments), num_parts, key_dim, value_dim)
    with torch.cuda.device_of(states):
        segment_states_kernel[(len(plan.segments) * num_parts * programs,)](
            key_THK,
            value_THV,
            sums,
            rates_H,
            plan.table,
            parts.rows,
            parts.reaches,
            num_parts,
            parts.length,
            scale,
            *key_THK.stride()[:2],
            *value_THV.stride()[:2],
            K=key_dim,
            V=value_dim,
            BLOCK_K=max(64, triton.next_power_of_2(key_dim)),
            BLOCK_V=blocks.columns,
            CHUNK=blocks.chunk,
            STEP=-1 if plan.flow.reverse else 1,
            **_arithmetic(key_THK.dtype),
            num_warps=blocks.num_warps,
            num_stages=blocks.num_stages,
        )
        combine_states_kernel[(num_heads * triton.cdiv(key_dim * value_dim, COMBINE_BLOCK),)](
            sums,
            states,
            outgoing,
            given,
            rates_H,
            plan.table,
            parts.first,
            parts.reaches,
            len(plan.segments),
            num_heads,
            num_parts,
            parts.length,
            SIZE=key_dim * value_dim,
            BLOCK=COMBINE_BLOCK,
            GROUP=16 if len(plan.segments) <= 16 else 32,
        )
    return States(states, outgoing)


def output(  # likewise
    query_THD: Tensor,
    key_THD: Tensor,
    value_THE: Tensor,
    rates_H: Tensor,
    plan: Plan,
    states: Tensor,
    *,
    given: Tensor | None,
    incoming: Tensor | None,
    result: Tensor | None = None,
    scale: float,
    wide: bool,
    transposed: bool = False,
) -> Tensor:
    """Pass C: ``[T, H, E]`` in the dtype of the query, and ``result`` filled in if there is one.

    The output is this scan of (q, k, v), and the gradients are it in other roles: dq that of
    (do, v, k), and, with a reverse plan, dv that of (k, q, do) and dk that of (v, do, q).

    Args:
        query_THD: ``[T, H, D]``.
        key_THD: ``[T, H, D]``.
        value_THE: ``[T, H, E]``.
        rates_H: ``[H]`` float32.
        plan: direction and segments.
        states: ``States.entering``.
        given: state at the start of each document, or None.
        incoming: states that runs receive ``[runs, H, D, E]``, or None.
        result: where to leave the state at the end of each document, or None.
        scale: of the output.
        wide: programs of more columns, see ``tuning.Cut``.
        transposed: all states are ``[..., E, D]`` in memory.
    """
    num_tokens, num_heads, dim_in = query_THD.shape
    dim_out = value_THE.shape[2]
    out = query_THD.new_empty(num_tokens, num_heads, dim_out)
    blocks = tuning.output_blocks(
        dim_in, dim_out, query_THD.dtype, wide, _device_limits(query_THD.device)[1]
    )
    block_d = max(64, triton.next_power_of_2(dim_in))
    widths = (block_d, block_d, blocks.columns)
    operands, tma = _operands((query_THD, key_THD, value_THE), widths, blocks.chunk)
    with torch.cuda.device_of(out):
        output_kernel[(len(plan.segments) * num_heads * triton.cdiv(dim_out, blocks.columns),)](
            *operands,
            out,
            states,
            given,
            incoming,
            result,
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
            PACKED=plan.packed,
            TMA=tma,
            **_arithmetic(query_THD.dtype),
            num_warps=blocks.num_warps,
            num_stages=blocks.num_stages,
        )
    return out


def _operands(
    tensors: tuple[Tensor, ...], widths: tuple[int, ...], chunk: int
) -> tuple[list[Tensor | TensorDescriptor], bool]:
    """Tensor descriptors for the copy engine, if all can be described, else the tensors.

    Heads lie side by side within a token, so a head is a range of columns of ``[T, columns]``.
    """
    if not all(_describable(x, width) for x, width in zip(tensors, widths)):
        return list(tensors), False
    return [
        TensorDescriptor(
            x,
            [x.shape[0], (x.shape[1] - 1) * x.stride(1) + x.shape[2]],
            [x.stride(0), 1],
            [chunk, width],
        )
        for x, width in zip(tensors, widths)
    ], True


def _describable(x: Tensor, width: int) -> bool:
    unit = 16 // x.element_size()
    return (
        x.shape[2] % width == 0
        and x.stride(0) % unit == 0
        and x.stride(1) % unit == 0
        and 0 < x.stride(1) * x.shape[1] <= x.stride(0)
        and x.data_ptr() % 16 == 0
    )


def _arithmetic(dtype: torch.dtype) -> dict[str, object]:
    """What matrix products take: fp16 goes as tf32, which has its digits and the range of states.

    ``tf32x3`` adds three tf32 products: float32 to rounding.
    """
    if dtype == torch.bfloat16:
        return {"OPERAND": triton.language.bfloat16, "PRECISION": "ieee"}
    precision = "tf32" if dtype == torch.float16 else "tf32x3"
    return {"OPERAND": triton.language.float32, "PRECISION": precision}
