"""Pass C: the output of every token, chunk by chunk, the state in registers.

One program walks one segment of one head and keeps the state of all key rows and a block of value
columns in float32 registers. Operands are read once and the output is written once. For the rows
r, s of a chunk of n, in the order of the flow (see ``chunk_state``)::

    output_r = lambda^(r + SHIFT) query_r S + sum_(s <= r) lambda^(r - s) (query_r key_s) value_s
    S        = lambda^n S + sum_s lambda^(n - s - SHIFT) key_s^T value_s

Documents are masks on this fixed grid. ``reach_r`` counts the tokens of its document before row r
(a state that the document starts from counts as one): row s matters to row r iff
``r - s <= reach_r``, the state on entry iff ``reach_r > r``, row s to the state on leaving iff
``n - 1 - s <= reach_(n-1)``, the state on entry to that on leaving iff ``reach_(n-1) >= n``.

Example: documents of 3 and 5 tokens, chunks of 4, no state given::

    reach     0 1 2 0 | 1 2 3 4
    chunk 0   row 3 sees itself alone, and it alone enters the state
    chunk 1   rows 0 to 3 see the state (1 > 0, 2 > 1, ...), and the state stays (4 >= 4)
"""

import triton
import triton.language as tl

from lasp.kernels.chunk_state import (
    CHAIN,
    COLUMNS,
    DISTANCE,
    FIRST,
    GIVEN_ROW,
    INCOMING_ROW,
    LENGTH,
    LOG2E,
    RESULT_ROW,
)


@triton.jit
def _load_rows(
    x,
    token,
    column,
    rows,
    n,
    stride_t,
    WIDTH: tl.constexpr,
    BLOCK: tl.constexpr,
    CHUNK: tl.constexpr,
    STEP: tl.constexpr,
    RAGGED: tl.constexpr,
    TMA: tl.constexpr,
    OPERAND: tl.constexpr,
):
    """``[CHUNK, BLOCK]``: the rows of a chunk from ``column`` on, in memory order, zero from n on.

    x is a tensor descriptor, or a pointer to the first column that belongs to this head.
    """
    if TMA:
        block = x.load([token if STEP > 0 else token - (CHUNK - 1), column])
        if RAGGED:
            block = tl.where((rows < n)[:, None], block, 0.0)
    else:
        cols = tl.arange(0, BLOCK)
        x += token.to(tl.int64) * stride_t + column
        x += (STEP * rows)[:, None] * stride_t + cols[None, :]
        if RAGGED:
            block = tl.load(
                x, mask=(rows < n)[:, None] & (column + cols < WIDTH)[None, :], other=0.0
            )
        elif WIDTH % BLOCK == 0:
            block = tl.load(x)
        else:
            block = tl.load(x, mask=(column + cols < WIDTH)[None, :], other=0.0)
    return block.to(OPERAND)


@triton.jit
def _advance_chunk(
    query,
    key,
    value,
    output,
    reach,
    state,
    token,
    n,
    rate,
    scale,
    query_stride_t,
    key_stride_t,
    value_stride_t,
    output_stride_t,
    query_column,
    key_column,
    value_column,
    e_cols,
    D: tl.constexpr,
    E: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_E: tl.constexpr,
    CHUNK: tl.constexpr,
    STEP: tl.constexpr,
    PACKED: tl.constexpr,
    RAGGED: tl.constexpr,  # n < CHUNK
    TMA: tl.constexpr,
    OPERAND: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """Write the output of one chunk of n tokens; the state after it.

    Forward, the output is scaled and the state is not; in reverse the state is, because it is the
    gradient of a state that does not know the scale, and what it gives is not scaled again.
    """
    # Rows of memory, counted in the order of the flow.
    rows = tl.arange(0, CHUNK) if STEP > 0 else CHUNK - 1 - tl.arange(0, CHUNK)
    if PACKED:
        reach_r = tl.load(reach + token + STEP * rows, mask=rows < n, other=0)
        reach_last = tl.load(reach + token + STEP * (n - 1))
    q = _load_rows(
        query, token, query_column, rows, n, query_stride_t,
        D, BLOCK_D, CHUNK, STEP, RAGGED, TMA, OPERAND,
    )  # fmt: skip
    k = _load_rows(
        key, token, key_column, rows, n, key_stride_t,
        D, BLOCK_D, CHUNK, STEP, RAGGED, TMA, OPERAND,
    )  # fmt: skip
    v = _load_rows(
        value, token, value_column, rows, n, value_stride_t,
        E, BLOCK_E, CHUNK, STEP, RAGGED, TMA, OPERAND,
    )  # fmt: skip

    # Masks come before exponentials: against the flow they would overflow.
    back = rows[None, :] - rows[:, None]  # [keys, queries]
    within = back >= 0
    if PACKED:
        within = within & (back <= reach_r[None, :])
    powers = tl.exp2(tl.where(within, -rate * back.to(tl.float32), float("-inf")))
    scores = (tl.dot(k, tl.trans(q), input_precision=PRECISION) * (powers * scale)).to(OPERAND)

    shift = 1 if STEP > 0 else 0
    entering = tl.exp2(-rate * (rows + shift).to(tl.float32))
    if STEP > 0:
        entering *= scale
    if PACKED:
        entering = tl.where(reach_r > rows, entering, 0.0)
    result = tl.dot(state.to(OPERAND), tl.trans(q), input_precision=PRECISION) * entering[None, :]
    result = tl.trans(tl.dot(tl.trans(v), scores, result, input_precision=PRECISION))
    output += token.to(tl.int64) * output_stride_t
    pointers = output + ((STEP * rows)[:, None] * output_stride_t + e_cols[None, :])
    result = result.to(output.dtype.element_ty)
    if RAGGED:
        tl.store(pointers, result, mask=(rows < n)[:, None] & (e_cols < E)[None, :])
    elif E % BLOCK_E == 0:
        tl.store(pointers, result)
    else:
        tl.store(pointers, result, mask=(e_cols < E)[None, :])

    after = tl.maximum(n - 1 - rows, 0)
    leaving = tl.exp2(-rate * (after + (1 - shift)).to(tl.float32))
    if STEP < 0:
        leaving *= scale
    across = tl.exp2(-rate * n.to(tl.float32))
    if PACKED:
        leaving = tl.where(after <= reach_last, leaving, 0.0)
        across = tl.where(reach_last >= n, across, 0.0)
    weighted = (tl.trans(v).to(tl.float32) * leaving[None, :]).to(OPERAND)
    return tl.dot(weighted, k, state * across, input_precision=PRECISION)


@triton.jit(do_not_specialize=["num_heads"])
def output_kernel(
    query,  # [T, H, D]
    key,  # [T, H, D]
    value,  # [T, H, E]
    output,  # [T, H, E], contiguous
    states,  # [segments, H, K, V] float32: what enters each segment from the one before
    given,  # [N, H, K, V] float32: what each document starts from, or None
    incoming,  # [runs, H, K, V] float32: what runs receive, or None
    result,  # [N, H, K, V] float32: what each document leaves, or None
    rates,  # [H] float32
    table,  # [segments, COLUMNS] int32
    reach,  # [T] int32
    num_heads,
    scale,
    query_stride_t,
    query_stride_h,
    key_stride_t,
    key_stride_h,
    value_stride_t,
    value_stride_h,
    D: tl.constexpr,
    E: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_E: tl.constexpr,
    CHUNK: tl.constexpr,
    STEP: tl.constexpr,
    TRANSPOSED: tl.constexpr,  # states are [E, D] in memory
    PACKED: tl.constexpr,  # documents start inside of segments
    TMA: tl.constexpr,  # query, key and value are tensor descriptors
    OPERAND: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """One program a segment, head and block of columns.

    Programs of one segment and head lie side by side, so that what they share is in the L2 cache.
    """
    blocks = tl.cdiv(E, BLOCK_E)
    program = tl.program_id(0)
    block, row = program % blocks, program // blocks
    head, segment = row % num_heads, row // num_heads
    table += segment * COLUMNS
    first = tl.load(table + FIRST)
    length = tl.load(table + LENGTH)
    distance = tl.load(table + DISTANCE)
    rate = tl.load(rates + head) * LOG2E

    d_cols = tl.arange(0, BLOCK_D)
    e_cols = block * BLOCK_E + tl.arange(0, BLOCK_E)
    e_inside = e_cols < E
    if TRANSPOSED:
        state_offsets = d_cols[None, :] + e_cols[:, None] * D
    else:
        state_offsets = d_cols[None, :] * E + e_cols[:, None]
    size = (num_heads * (D * E)).to(tl.int64)  # of one row of states
    state_offsets += head.to(tl.int64) * (D * E)

    # Where a state is absent no column is loaded: a mask of all False.
    inside = e_inside[:, None] & (
        d_cols[None, :] < tl.where(tl.load(table + CHAIN) < segment, D, 0)
    )
    state = tl.load(states + segment * size + state_offsets, mask=inside, other=0.0)
    before = tl.exp2(-rate * distance.to(tl.float32))
    if given is not None:
        row = tl.load(table + GIVEN_ROW)
        inside = e_inside[:, None] & (d_cols[None, :] < tl.where(row >= 0, D, 0))
        state += before * tl.load(given + row * size + state_offsets, mask=inside, other=0.0)
    if incoming is not None:
        row = tl.load(table + INCOMING_ROW)
        inside = e_inside[:, None] & (d_cols[None, :] < tl.where(row >= 0, D, 0))
        state += before * tl.load(incoming + row * size + state_offsets, mask=inside, other=0.0)

    query_column, key_column, value_column = 0, 0, block * BLOCK_E
    if TMA:
        query_column += head * query_stride_h
        key_column += head * key_stride_h
        value_column += head * value_stride_h
    else:
        query += head.to(tl.int64) * query_stride_h
        key += head.to(tl.int64) * key_stride_h
        value += head.to(tl.int64) * value_stride_h
    output += head.to(tl.int64) * E

    whole = length // CHUNK * CHUNK
    for begin in range(0, whole, CHUNK):
        state = _advance_chunk(
            query, key, value, output, reach, state,
            first + STEP * begin, tl.full([], CHUNK, tl.int32),
            rate, scale, query_stride_t, key_stride_t, value_stride_t, num_heads * E,
            query_column, key_column, value_column, e_cols,
            D, E, BLOCK_D, BLOCK_E, CHUNK, STEP, PACKED, False, TMA, OPERAND, PRECISION,
        )  # fmt: skip
    if whole < length:
        state = _advance_chunk(
            query, key, value, output, reach, state, first + STEP * whole, length - whole,
            rate, scale, query_stride_t, key_stride_t, value_stride_t, num_heads * E,
            query_column, key_column, value_column, e_cols,
            D, E, BLOCK_D, BLOCK_E, CHUNK, STEP, PACKED, True, TMA, OPERAND, PRECISION,
        )  # fmt: skip

    if result is not None:
        row = tl.load(table + RESULT_ROW)
        inside = e_inside[:, None] & (d_cols[None, :] < tl.where(row >= 0, D, 0))
        tl.store(result + row * size + state_offsets, state, mask=inside)
