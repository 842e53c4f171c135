"""Chunk scan: the output of every token, chunk by chunk, the state in registers.

One program walks one segment of one head and keeps the state of all key rows and a block of value
columns in float32 registers, transposed. Operands are read once and the output is written once;
what happens to a chunk of tokens is in ``lasp.lightning.triton.chunk_kernel``.

A document must not notice what others of its segment hold, and a weight of zero does not keep out
NaN or infinity. Selecting in every chunk would take registers that the kernels do not have. But
what is not finite stays in the state, through weights of zero too, to the end of the segment, where
the output of the last token shows it. So where documents share segments the kernels run once more,
with REPAIR: a program that finds its last output finite ends, another one walks its segment again,
and selects.
"""

import triton
import triton.language as tl

from lasp.lightning.triton.chunk_kernel import Strides, Tensors, advance_chunk, weights
from lasp.lightning.triton.chunk_state_kernel import COLUMNS, FIRST, LENGTH, LOG2E
from lasp.lightning.triton.segment_state_kernel import entering_state, leave_state


@triton.jit
def _walk(
    tensors,
    strides,
    state,  # before the segment: a tuple, see advance_chunk
    rates,
    table,
    row,  # segment and head
    block,  # of columns
    num_heads, scale, D: tl.constexpr, E: tl.constexpr, BLOCK_D: tl.constexpr,
    BLOCK_E: tl.constexpr, CHUNK: tl.constexpr, STEP: tl.constexpr, TMA: tl.constexpr,
    OPERAND: tl.constexpr, PRECISION: tl.constexpr, SELECT: tl.constexpr,
):  # fmt: skip
    """One segment of one head, a block of its columns; the state after it."""
    head, segment = row % num_heads, row // num_heads
    table += segment * COLUMNS
    first = tl.load(table + FIRST)
    length = tl.load(table + LENGTH)
    rate = tl.load(rates + head) * LOG2E
    column = block * BLOCK_E
    query, key, value, output, output_tiles, reach = tensors
    if not TMA:  # descriptors find a head themselves
        query += head.to(tl.int64) * strides.query_h
        key += head.to(tl.int64) * strides.key_h
        value += head.to(tl.int64) * strides.value_h
    output += head.to(tl.int64) * E
    tensors = Tensors(query, key, value, output, output_tiles, reach)
    if SELECT:
        for begin in tl.range(0, length, CHUNK, num_stages=1):
            n = tl.minimum(length - begin, CHUNK)
            factors = weights(n, rate, scale, CHUNK, STEP)
            state = advance_chunk(
                tensors, strides, state, head, first + STEP * begin, n, factors, num_heads, column,
                D, E, BLOCK_D, BLOCK_E, CHUNK, STEP, True, TMA, OPERAND, PRECISION, True,
            )  # fmt: skip
        return state
    whole = length // CHUNK * CHUNK
    n = tl.full([], CHUNK, tl.int32)
    factors = weights(n, rate, scale, CHUNK, STEP)
    for begin in range(0, whole, CHUNK):
        state = advance_chunk(
            tensors, strides, state, head, first + STEP * begin, n, factors, num_heads, column,
            D, E, BLOCK_D, BLOCK_E, CHUNK, STEP, False, TMA, OPERAND, PRECISION, False,
        )  # fmt: skip
    if whole < length:
        n = length - whole
        factors = weights(n, rate, scale, CHUNK, STEP)
        state = advance_chunk(
            tensors, strides, state, head, first + STEP * whole, n, factors, num_heads, column,
            D, E, BLOCK_D, BLOCK_E, CHUNK, STEP, True, TMA, OPERAND, PRECISION, False,
        )  # fmt: skip
    return state


@triton.jit
def _ends_finite(
    output,
    table,
    row,  # segment and head
    block,  # of columns
    num_heads, E: tl.constexpr, BLOCK_E: tl.constexpr, STEP: tl.constexpr,
):  # fmt: skip
    """Whether the output of the last token of a segment is finite, a block of its columns."""
    head, segment = row % num_heads, row // num_heads
    table += segment * COLUMNS
    last = tl.load(table + FIRST) + STEP * (tl.load(table + LENGTH) - 1)
    e_cols = block * BLOCK_E + tl.arange(0, BLOCK_E)
    offsets = (last.to(tl.int64) * num_heads + head) * E + e_cols
    return tl.sum(tl.load(output + offsets, mask=e_cols < E, other=0.0).to(tl.float32) * 0.0) == 0.0


@triton.jit(do_not_specialize=["num_heads"])
def chunk_scan_kernel(
    query,  # [T, H, D]
    key,  # [T, H, D]
    value,  # [T, H, E]
    output,  # [T, H, E], contiguous
    output_tiles,  # its tensor descriptor, or None
    states,  # [states, H, K, V] float32: what enters segments from those before
    initial_state,  # [N, H, K, V] float32: what each document starts from, or None
    incoming,  # [runs, H, K, V] float32: what runs receive, or None
    final_state,  # [N, H, K, V] float32: what each document leaves, or None
    rates,  # [H] float32
    table,  # [segments, COLUMNS] int32
    reach,  # [T] int32
    num_heads, scale, query_stride_t, query_stride_h, key_stride_t, key_stride_h, value_stride_t,
    value_stride_h, D: tl.constexpr, E: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_E: tl.constexpr,
    CHUNK: tl.constexpr, STEP: tl.constexpr,
    TRANSPOSED: tl.constexpr,  # states are [E, D] in memory
    TMA: tl.constexpr,  # query, key and value are tensor descriptors
    OPERAND: tl.constexpr,
    PRECISION: tl.constexpr,
    REPAIR: tl.constexpr,  # only what is not finite
):  # fmt: skip
    """One program a segment, head and block of columns.

    Programs of one segment and head lie side by side, so that what they share is in the L2 cache.
    """
    blocks = tl.cdiv(E, BLOCK_E)
    program = tl.program_id(0)
    row, block = program // blocks, program % blocks
    if REPAIR:  # noqa: SIM102 (known when this is compiled, the other is not)
        if _ends_finite(output, table, row, block, num_heads, E, BLOCK_E, STEP):
            return
    state = entering_state(
        states, initial_state, incoming, rates, table, row, block, num_heads,
        D, E, BLOCK_D, BLOCK_E, TRANSPOSED,
    )  # fmt: skip
    strides = Strides(
        query_stride_t, query_stride_h, key_stride_t, key_stride_h, value_stride_t, value_stride_h
    )
    state = _walk(
        Tensors(query, key, value, output, output_tiles, reach), strides, state, rates, table,
        row, block, num_heads, scale,
        D, E, BLOCK_D, BLOCK_E, CHUNK, STEP, TMA, OPERAND, PRECISION, REPAIR,
    )  # fmt: skip
    if final_state is not None:
        leave_state(
            state, final_state, table, row, block, num_heads, D, E, BLOCK_D, BLOCK_E, TRANSPOSED
        )


@triton.jit(do_not_specialize=["num_heads"])
def key_value_gradients_kernel(
    q, k, v, do,  # [T, H, D]
    q_columns, do_columns,  # the same tensors by blocks of columns
    dk, dv,  # [T, H, D], contiguous
    dk_tiles, dv_tiles,  # their tensor descriptors, or None
    states,  # [states, H, D, D] float32, and so on: see chunk_scan_kernel
    initial_state, incoming, final_state, rates, table, reach, num_heads, scale,
    q_stride_t, q_stride_h, k_stride_t, k_stride_h,
    v_stride_t, v_stride_h, do_stride_t, do_stride_h,
    D: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_E: tl.constexpr, CHUNK: tl.constexpr,
    TMA: tl.constexpr, OPERAND: tl.constexpr, PRECISION: tl.constexpr,
    REPAIR: tl.constexpr,  # only what is not finite
):  # fmt: skip
    """Both gradients that flow in reverse: dk is the output of (v, do, q), dv that of (k, q, do).

    Programs of the two lie side by side, so that what one has read is in the cache for the other.
    """
    blocks = tl.cdiv(D, BLOCK_E)
    program = tl.program_id(0)
    row, block = program // (blocks * 2), program % (blocks * 2)
    of_dv = block >= blocks
    if REPAIR:
        if of_dv:
            if _ends_finite(dv, table, row, block - blocks, num_heads, D, BLOCK_E, -1):
                return
        else:
            if _ends_finite(dk, table, row, block, num_heads, D, BLOCK_E, -1):
                return
    if of_dv:
        block -= blocks
        query, key, value, output, output_tiles = k, q, do_columns, dv, dv_tiles
        query_t, query_h, key_t, key_h = k_stride_t, k_stride_h, q_stride_t, q_stride_h
        value_t, value_h = do_stride_t, do_stride_h
        state = entering_state(
            states, initial_state, incoming, rates, table, row, block, num_heads,
            D, D, BLOCK_D, BLOCK_E, False,
        )  # fmt: skip
    else:
        query, key, value, output, output_tiles = v, do, q_columns, dk, dk_tiles
        query_t, query_h, key_t, key_h = v_stride_t, v_stride_h, do_stride_t, do_stride_h
        value_t, value_h = q_stride_t, q_stride_h
        state = entering_state(
            states, initial_state, incoming, rates, table, row, block, num_heads,
            D, D, BLOCK_D, BLOCK_E, True,
        )  # fmt: skip
    state = _walk(
        Tensors(query, key, value, output, output_tiles, reach),
        Strides(query_t, query_h, key_t, key_h, value_t, value_h),
        state, rates, table, row, block, num_heads, scale,
        D, D, BLOCK_D, BLOCK_E, CHUNK, -1, TMA, OPERAND, PRECISION, REPAIR,
    )  # fmt: skip
    if final_state is not None:  # noqa: SIM102 (known when this is compiled, the other is not)
        if of_dv:
            leave_state(
                state, final_state, table, row, block, num_heads, D, D, BLOCK_D, BLOCK_E, False
            )
