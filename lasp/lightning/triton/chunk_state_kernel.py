"""Chunk state and state passing: the states between segments.

``chunk_state_kernel`` computes one sum for each segment whose state somebody needs:
``lambda^distance key^T value`` over the tokens that belong to the document at its end. The sum goes
only as far back as tokens matter to a head: a fast head takes few tokens. Long sums are split over
programs. ``state_passing_kernel`` walks the segments in the order of the flow. It turns these sums
into the state that enters each segment.

Example: one document of 6 tokens in segments of 2, lambda = 1/2, and x_t = key_t^T value_t::

    chunk state      U_0 = x_0 / 2 + x_1      U_1 = x_2 / 2 + x_3      (nobody needs the last one)
    state passing    enters 1: U_0            enters 2: U_0 / 4 + U_1

Rows of a segment are counted in the order of the flow: row r is token ``first + STEP r``, with STEP
1 forward and -1 in reverse. A state that enters has decayed by ``lambda^(r + SHIFT)`` at row r, and
row r enters the outgoing state of n rows with ``lambda^(n - r - SHIFT)``: SHIFT is 1 forward and 0
in reverse, where the gradient of the state *after* a token has not yet decayed at that token.
"""

import triton
import triton.language as tl

LOG2E = tl.constexpr(1.4426950408889634)

# Columns of the table of segments (lasp.lightning.triton.segments.Segment).
FIRST = tl.constexpr(0)
LENGTH = tl.constexpr(1)
STATE_LENGTH = tl.constexpr(2)
CHAIN = tl.constexpr(3)
INITIAL_ROW = tl.constexpr(4)
INCOMING_ROW = tl.constexpr(5)
DISTANCE = tl.constexpr(6)
FINAL_ROW = tl.constexpr(7)
SLOT = tl.constexpr(8)
BEGIN = tl.constexpr(9)
SUM_ROW = tl.constexpr(10)
STATE_ROW = tl.constexpr(11)
COLUMNS = tl.constexpr(12)


@triton.jit
def as_operand(x, OPERAND: tl.constexpr, PRECISION: tl.constexpr):
    """What was computed in float32, rounded for a matrix product.

    For tf32 the tensor cores would cut off the last 13 bits instead, twice the error and all of it
    towards zero. Inputs are not rounded: those of float16 have no more digits than tf32.
    """
    x = x.to(OPERAND)
    if PRECISION == "tf32":
        bits = (x.to(tl.int32, bitcast=True) + 0x1000) & -0x2000
        x = tl.where(x == x, bits.to(tl.float32, bitcast=True), x)  # NaN stays
    return x


@triton.jit(do_not_specialize=["num_parts", "part_length"])
def chunk_state_kernel(
    key,  # [T, H, K], any strides but that of the last dim, which is 1
    value,  # [T, H, V]
    sums,  # [sums, parts, K, V] float32, contiguous
    rates,  # [H] float32
    table,  # [sums, COLUMNS] int32: of the segments whose state somebody needs
    parts,  # [parts, 2] int32: head, and how many parts of that head lie behind it
    reaches,  # [H] int32: tokens that matter to the state of a head
    num_parts,
    part_length,  # tokens
    scale, key_stride_t, key_stride_h, value_stride_t, value_stride_h, K: tl.constexpr,
    V: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_V: tl.constexpr, CHUNK: tl.constexpr,
    STEP: tl.constexpr, OPERAND: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Chunk state: one program a sum, part and block of value columns."""
    blocks = tl.cdiv(V, BLOCK_V)
    program = tl.program_id(0)
    block, row = program % blocks, program // blocks
    part, sum_row = row % num_parts, row // num_parts
    table += sum_row * COLUMNS
    head = tl.load(parts + 2 * part)
    begin = tl.load(parts + 2 * part + 1) * part_length  # counted back from the border
    end = tl.minimum(tl.load(table + STATE_LENGTH), tl.load(reaches + head))
    end = tl.minimum(end, begin + part_length)
    if begin < end:
        rate = tl.load(rates + head) * LOG2E
        last = tl.load(table + FIRST) + STEP * (tl.load(table + LENGTH) - 1)
        rows = tl.arange(0, CHUNK)
        k_cols = tl.arange(0, BLOCK_K)
        v_cols = block * BLOCK_V + tl.arange(0, BLOCK_V)
        key += head.to(tl.int64) * key_stride_h
        value += head.to(tl.int64) * value_stride_h
        k_offsets = -STEP * rows[:, None] * key_stride_t + k_cols[None, :]
        v_offsets = -STEP * rows[:, None] * value_stride_t + v_cols[None, :]
        state = tl.zeros([BLOCK_V, BLOCK_K], dtype=tl.float32)
        for first in range(begin, end, CHUNK):
            distance = first + rows
            live = distance < end
            token = (last - STEP * first).to(tl.int64)
            k_mask = live[:, None] & (k_cols < K)[None, :]
            v_mask = live[:, None] & (v_cols < V)[None, :]
            k = tl.load(key + token * key_stride_t + k_offsets, mask=k_mask, other=0.0)
            v = tl.load(value + token * value_stride_t + v_offsets, mask=v_mask, other=0.0)
            weight = tl.exp2(-rate * (distance + (STEP < 0)).to(tl.float32)) * scale
            weighted = as_operand(tl.trans(v).to(tl.float32) * weight[None, :], OPERAND, PRECISION)
            state = tl.dot(weighted, k.to(OPERAND), state, input_precision=PRECISION)
        sums += (sum_row.to(tl.int64) * num_parts + part) * (K * V)
        mask = (k_cols < K)[:, None] & (v_cols < V)[None, :]
        tl.store(sums + k_cols[:, None] * V + v_cols[None, :], tl.trans(state), mask=mask)


@triton.jit
def _sum_parts(
    sums,
    row,  # of the table
    exists,
    kept,  # tokens that count; 0 where there is no sum: nothing is loaded
    cols, inside, num_parts, first_part, head_parts, part_length, SIZE: tl.constexpr,
    BLOCK: tl.constexpr, GROUP: tl.constexpr,
):  # fmt: skip
    """``[GROUP, BLOCK]``: what each segment of a group adds to the state."""
    sum_row = tl.load(row + SUM_ROW, mask=exists, other=0).to(tl.int64)
    rows = sums + (sum_row * num_parts + first_part)[:, None] * SIZE + cols[None, :]
    own = tl.zeros([GROUP, BLOCK], dtype=tl.float32)
    for part in tl.range(0, head_parts, loop_unroll_factor=4):  # loads in flight together
        there = inside & (kept > part * part_length)[:, None]
        own += tl.load(rows + part * SIZE, mask=there, other=0.0)
    return own


@triton.jit
def _enter_group(
    own,  # what each segment of the group adds
    carry,  # the state after the group before
    s, chain, begin, length, table, first, rate, GROUP: tl.constexpr,
):  # fmt: skip
    """``[GROUP, BLOCK]``: the state that enters each segment of a group."""
    linked = (s[None, :] < s[:, None]) & (s[None, :] >= chain[:, None])
    between = begin[:, None] - (begin + length)[None, :]
    weights = tl.exp2(tl.where(linked, -rate * between.to(tl.float32), float("-inf")))
    if GROUP < 16:  # too few rows for a matrix product
        entering = tl.sum(weights[:, :, None] * own[None, :, :], axis=1)
    else:
        entering = tl.dot(weights, own, input_precision="ieee")
    since = begin - tl.load(table + first * COLUMNS + BEGIN)
    decay = tl.exp2(tl.where(chain < first, -rate * since.to(tl.float32), float("-inf")))
    return entering + decay[:, None] * carry[None, :]


@triton.jit
def _add_initial(after, initial_state, row, exists, length, rate, offsets, inside, size):
    """Add what is left of the initial state of each segment's document."""
    if initial_state is not None:
        initial_row = tl.load(row + INITIAL_ROW, mask=exists, other=-1)
        whole = length + tl.load(row + DISTANCE, mask=exists, other=0)
        pointers = initial_state + initial_row.to(tl.int64)[:, None] * size + offsets
        start = tl.load(pointers, mask=inside & (initial_row >= 0)[:, None], other=0.0)
        after += tl.exp2(-rate * whole.to(tl.float32))[:, None] * start
    return after


@triton.jit
def _store_rows(x, target, rows, exists, offsets, inside, size):
    """Store the rows of ``x`` at the rows of the target that the table names; -1: nowhere."""
    rows = tl.load(rows, mask=exists, other=-1)
    pointers = target + rows.to(tl.int64)[:, None] * size + offsets
    tl.store(pointers, x, mask=inside & (rows >= 0)[:, None])


@triton.jit
def _load_group(row, exists):
    """Length, state length, chain and begin of segments; no part of a sum where there is none."""
    length = tl.load(row + LENGTH, mask=exists, other=0)
    state_length = tl.load(row + STATE_LENGTH, mask=exists, other=0)
    chain = tl.load(row + CHAIN, mask=exists, other=2**30)
    return length, state_length, chain, tl.load(row + BEGIN, mask=exists, other=0)


@triton.jit(do_not_specialize=["num_segments", "num_heads", "num_parts", "part_length"])
def state_passing_kernel(
    sums,  # [sums, parts, K, V] float32: from chunk_state_kernel
    states,  # [states, H, K, V] float32: the states that enter segments
    outgoing,  # [slots, H, K, V] float32: what the runs send on
    initial_state,  # [N, H, K, V] float32 or None
    rates,  # [H]
    table,  # [segments, COLUMNS]
    first_parts,  # [H + 1] int32: where the parts of a head begin
    reaches,  # [H] int32
    num_segments, num_heads, num_parts, part_length,
    SIZE: tl.constexpr,  # K V
    BLOCK: tl.constexpr,
    GROUP: tl.constexpr,
):  # fmt: skip
    """State passing: one program a head and block of the state, a group of segments at a time.

    What enters segment s is the sum over the segments j of its document before it of
    ``lambda^(tokens between j and s) U_j``: one small triangular product a group, in float32, plus
    what the group before it left.

    A weight of zero does not keep out NaN or infinity, but what is not finite stays in what groups
    leave, to the end: a program that finds it there takes its segments again, one by one.
    """
    program, blocks = tl.program_id(0), tl.cdiv(SIZE, BLOCK)
    head = program // blocks
    cols = program % blocks * BLOCK + tl.arange(0, BLOCK)
    rate = tl.load(rates + head) * LOG2E
    reach = tl.load(reaches + head)
    first_part = tl.load(first_parts + head)
    head_parts = tl.load(first_parts + head + 1) - first_part
    size = (num_heads * SIZE).to(tl.int64)  # of one row of states
    offsets = head.to(tl.int64) * SIZE + cols[None, :]
    inside = cols[None, :] < SIZE
    carry = tl.zeros([BLOCK], dtype=tl.float32)
    for first in range(0, num_segments, GROUP):
        s = first + tl.arange(0, GROUP)
        exists = s < num_segments
        row = table + s * COLUMNS
        length, state_length, chain, begin = _load_group(row, exists)
        own = _sum_parts(
            sums, row, exists, tl.minimum(state_length, reach), cols, inside,
            num_parts, first_part, head_parts, part_length, SIZE, BLOCK, GROUP,
        )  # fmt: skip
        entering = _enter_group(own, carry, s, chain, begin, length, table, first, rate, GROUP)
        _store_rows(entering, states, row + STATE_ROW, exists, offsets, inside, size)
        passes = state_length == length
        through = tl.exp2(tl.where(passes, -rate * length.to(tl.float32), float("-inf")))
        after = own + through[:, None] * entering
        carry = tl.sum(tl.where((s == first + GROUP - 1)[:, None], after, 0.0), axis=0)
        after = _add_initial(after, initial_state, row, exists, length, rate, offsets, inside, size)
        _store_rows(after, outgoing, row + SLOT, exists, offsets, inside, size)
    if tl.sum(carry * 0.0) != 0.0:  # NaN is not 0 either
        tl.debug_barrier()  # what is stored again must come after what was stored above
        _combine_one_by_one(
            sums, states, outgoing, initial_state, table, reach, rate, offsets, inside, cols, size,
            first_part, head_parts, num_segments, num_parts, part_length, SIZE, BLOCK,
        )  # fmt: skip


@triton.jit
def _combine_one_by_one(
    sums, states, outgoing, initial_state, table, reach, rate, offsets, inside, cols, size,
    first_part, head_parts, num_segments, num_parts, part_length, SIZE: tl.constexpr,
    BLOCK: tl.constexpr,
):  # fmt: skip
    """As above, one segment after another; states of other documents are selected away."""
    after = tl.zeros([1, BLOCK], dtype=tl.float32)
    for first in range(num_segments):
        s = first + tl.arange(0, 1)
        exists = s < num_segments
        row = table + s * COLUMNS
        length, state_length, chain, _ = _load_group(row, exists)
        own = _sum_parts(
            sums, row, exists, tl.minimum(state_length, reach), cols, inside,
            num_parts, first_part, head_parts, part_length, SIZE, BLOCK, 1,
        )  # fmt: skip
        entering = tl.where((chain < s)[:, None], after, 0.0)
        _store_rows(entering, states, row + STATE_ROW, exists, offsets, inside, size)
        through = tl.exp2(-rate * length.to(tl.float32))[:, None] * entering
        after = own + tl.where((state_length == length)[:, None], through, 0.0)
        leaving = _add_initial(
            after, initial_state, row, exists, length, rate, offsets, inside, size
        )
        _store_rows(leaving, outgoing, row + SLOT, exists, offsets, inside, size)
