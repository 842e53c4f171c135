"""Loading the state before a segment, and leaving the one after it.

What enters is the sum of three parts, each absent or present: the state from the segments before,
the initial state of the document and the state that its run received. The last two have decayed on
the way::

    S = states[STATE_ROW] + lambda^DISTANCE (initial_state[INITIAL_ROW] + incoming[INCOMING_ROW])
"""

import triton
import triton.language as tl

from lasp.lightning.triton.chunk_state_kernel import (
    COLUMNS,
    DISTANCE,
    FINAL_ROW,
    INCOMING_ROW,
    INITIAL_ROW,
    LOG2E,
    STATE_ROW,
)


@triton.jit
def _state_offsets(
    head,
    piece: tl.constexpr,  # of key rows
    block,  # of columns
    D: tl.constexpr, E: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_E: tl.constexpr,
    TRANSPOSED: tl.constexpr,
):  # fmt: skip
    """Offsets of a piece of a head's state ``[BLOCK_E, BLOCK_D]``; which columns exist.

    Which dim is contiguous must be known to the compiler: else it loads number by number, and of
    two programs that read the same rows one falls behind the other, farther than the L2 cache
    reaches.
    """
    d_cols = piece * BLOCK_D + tl.arange(0, BLOCK_D)
    e_cols = block * BLOCK_E + tl.arange(0, BLOCK_E)
    if TRANSPOSED:  # [E, D] in memory
        offsets = d_cols[None, :] + e_cols[:, None] * D
    else:
        offsets = d_cols[None, :] * E + e_cols[:, None]
    return offsets + head.to(tl.int64) * (D * E), d_cols[None, :], (e_cols < E)[:, None]


@triton.jit
def entering_state(
    states, initial_state, incoming, rates, table,
    row,  # segment and head
    block,  # of columns
    num_heads, D: tl.constexpr, E: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_E: tl.constexpr,
    TRANSPOSED: tl.constexpr,
):  # fmt: skip
    """The state before the first token of a segment, as registers hold it.

    A tuple of ``[BLOCK_E, BLOCK_D]``, one for every BLOCK_D key rows: products take one at a time.
    """
    head = row % num_heads
    table += row // num_heads * COLUMNS
    size = (num_heads * (D * E)).to(tl.int64)  # of one row of states
    state_row = tl.load(table + STATE_ROW)
    rate = tl.load(rates + head) * LOG2E
    before = tl.exp2(-rate * tl.load(table + DISTANCE).to(tl.float32))
    pieces = ()
    for piece in tl.static_range((D + BLOCK_D - 1) // BLOCK_D):
        offsets, d_cols, e_inside = _state_offsets(
            head, piece, block, D, E, BLOCK_D, BLOCK_E, TRANSPOSED
        )
        # Where a state is absent no column is loaded: a mask of all False.
        inside = e_inside & (d_cols < tl.where(state_row >= 0, D, 0))
        state = tl.load(states + state_row * size + offsets, mask=inside, other=0.0)
        if initial_state is not None:
            initial_row = tl.load(table + INITIAL_ROW)
            inside = e_inside & (d_cols < tl.where(initial_row >= 0, D, 0))
            state += before * tl.load(
                initial_state + initial_row * size + offsets, mask=inside, other=0.0
            )
        if incoming is not None:
            incoming_row = tl.load(table + INCOMING_ROW)
            inside = e_inside & (d_cols < tl.where(incoming_row >= 0, D, 0))
            state += before * tl.load(
                incoming + incoming_row * size + offsets, mask=inside, other=0.0
            )
        pieces += (state,)
    return pieces


@triton.jit
def leave_state(
    state,  # a tuple, see entering_state
    final_state,
    table,
    row,  # segment and head
    block,  # of columns
    num_heads, D: tl.constexpr, E: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_E: tl.constexpr,
    TRANSPOSED: tl.constexpr,
):  # fmt: skip
    """Store the state after the last token of a segment whose document ends there."""
    head = row % num_heads
    size = (num_heads * (D * E)).to(tl.int64)
    final_row = tl.load(table + row // num_heads * COLUMNS + FINAL_ROW)
    for piece in tl.static_range(len(state)):
        offsets, d_cols, e_inside = _state_offsets(
            head, piece, block, D, E, BLOCK_D, BLOCK_E, TRANSPOSED
        )
        inside = e_inside & (d_cols < tl.where(final_row >= 0, D, 0))
        tl.store(final_state + final_row * size + offsets, state[piece], mask=inside)
