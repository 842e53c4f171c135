"""One chunk of the chunk scan: the output of its tokens, and the state after it.

For the rows r, s of a chunk of n, in the order of the flow (see ``chunk_state``)::

    output_r = lambda^(r + SHIFT) query_r S + sum_(s <= r) lambda^(r - s) (query_r key_s) value_s
    S        = lambda^n S + sum_s lambda^(n - s - SHIFT) key_s^T value_s

Documents are masks on this fixed grid. ``reach_r`` counts the tokens of its document before row r
(a state that the document starts from counts as one): row s matters to row r iff
``r - s <= reach_r``, the state on entry iff ``reach_r > r``, row s to the state on leaving iff
``n - 1 - s <= reach_(n-1)``, the state on entry to that on leaving iff ``reach_(n-1) >= n``. That
last one holds iff no document starts in the chunk: then there is nothing to mask.

Example: documents of 3 and 5 tokens, chunks of 4, no initial states::

    reach     0 1 2 0 | 1 2 3 4
    chunk 0   row 3 sees itself alone, and it alone enters the state
    chunk 1   rows 0 to 3 see the state (1 > 0, 2 > 1, ...), and the state stays (4 >= 4)
"""

import triton
import triton.language as tl

from lasp.lightning.triton.chunk_state_kernel import as_operand


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
def weights(n, rate, scale, CHUNK: tl.constexpr, STEP: tl.constexpr):
    """What weighs on scores, the state on entry, rows on leaving, the state on leaving.

    For a chunk of n rows of one document. Forward, the output is scaled and the state is not; in
    reverse the state is, because it is the gradient of a state that does not know the scale, and
    what it gives is not scaled again.
    """
    rows = _flow_rows(CHUNK, STEP)
    # Masks come before exponentials: against the flow they would overflow.
    back = rows[None, :] - rows[:, None]  # [keys, queries]
    powers = tl.exp2(tl.where(back >= 0, -rate * back.to(tl.float32), float("-inf"))) * scale
    shift = 1 if STEP > 0 else 0
    entering = tl.exp2(-rate * (rows + shift).to(tl.float32))
    after = tl.maximum(n - 1 - rows, 0)
    leaving = tl.exp2(-rate * (after + (1 - shift)).to(tl.float32))
    if STEP > 0:
        entering *= scale
    else:
        leaving *= scale
    return powers, entering, leaving, tl.exp2(-rate * n.to(tl.float32))


@triton.jit
def _flow_rows(CHUNK: tl.constexpr, STEP: tl.constexpr):
    """Rows of a chunk in memory order, counted in the order of the flow."""
    return tl.arange(0, CHUNK) if STEP > 0 else CHUNK - 1 - tl.arange(0, CHUNK)


@triton.jit
def _load_reach(
    reach, token, rows, n, CHUNK: tl.constexpr, STEP: tl.constexpr, RAGGED: tl.constexpr
):
    """The reach of the rows of a chunk, in memory order."""
    reach += (token if STEP > 0 else token - (CHUNK - 1)) + tl.arange(0, CHUNK)
    return tl.load(reach, mask=rows < n, other=0) if RAGGED else tl.load(reach)


@triton.jit
def advance_chunk(
    query,
    key,
    value,
    output,
    output_tiles,
    reach,
    state,
    token,
    n,
    powers,
    entering,
    leaving,
    across,
    query_stride_t,
    key_stride_t,
    value_stride_t,
    output_stride_t,
    query_column,
    key_column,
    value_column,
    output_column,
    e_cols,
    D: tl.constexpr,
    E: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_E: tl.constexpr,
    CHUNK: tl.constexpr,
    STEP: tl.constexpr,
    RAGGED: tl.constexpr,  # n < CHUNK
    TMA: tl.constexpr,
    OPERAND: tl.constexpr,
    PRECISION: tl.constexpr,
    SELECT: tl.constexpr,  # documents by selection: 0 * NaN would be NaN
):
    """Write the output of one chunk of n tokens; the state after it."""
    rows = _flow_rows(CHUNK, STEP)
    # The branches cost nothing where no document starts. They also keep Triton from laying out the
    # scores for the product after them, in which two groups of warps would compute them twice.
    reach_last = tl.load(reach + token + STEP * (n - 1))
    border = reach_last < n
    if border:
        reach_r = _load_reach(reach, token, rows, n, CHUNK, STEP, RAGGED)
        entering = tl.where(reach_r > rows, entering, 0.0)
        leaving = tl.where(n - 1 - rows <= reach_last, leaving, 0.0)
        across = tl.zeros_like(across)
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

    scores = tl.dot(k, tl.trans(q), input_precision=PRECISION) * powers
    if border:
        reach_r = _load_reach(reach, token, rows, n, CHUNK, STEP, RAGGED)
        back = rows[None, :] - rows[:, None]  # [keys, queries]
        scores = tl.where(back <= reach_r[None, :], scores, 0.0)
    scores = as_operand(scores, OPERAND, PRECISION)
    rounded = as_operand(state, OPERAND, PRECISION)
    result = tl.dot(rounded, tl.trans(q), input_precision=PRECISION) * entering[None, :]
    if SELECT:
        reach_r = _load_reach(reach, token, rows, n, CHUNK, STEP, RAGGED)
        result = tl.where((reach_r > rows)[None, :], result, 0.0)
    result = tl.trans(tl.dot(tl.trans(v), scores, result, input_precision=PRECISION))
    result = result.to(output.dtype.element_ty)
    if TMA and not RAGGED:
        output_tiles.store([token if STEP > 0 else token - (CHUNK - 1), output_column], result)
    else:
        output += token.to(tl.int64) * output_stride_t
        pointers = output + ((STEP * rows)[:, None] * output_stride_t + e_cols[None, :])
        if RAGGED:
            tl.store(pointers, result, mask=(rows < n)[:, None] & (e_cols < E)[None, :])
        elif E % BLOCK_E == 0:
            tl.store(pointers, result)
        else:
            tl.store(pointers, result, mask=(e_cols < E)[None, :])
    if SELECT:
        stays = (n - 1 - rows <= reach_last)[:, None]
        k, v = tl.where(stays, k, 0.0).to(OPERAND), tl.where(stays, v, 0.0).to(OPERAND)
        state = tl.where(border, 0.0, state)
    weighted = as_operand(tl.trans(v).to(tl.float32) * leaving[None, :], OPERAND, PRECISION)
    return tl.dot(weighted, k, state * across, input_precision=PRECISION)
