"""Weights, loads and stores of a chunk, for ``lasp.lightning.triton.hopper_scan_kernel``.

A group of four warps holds tiles ``[64, 64]`` in registers: scores are ``[keys, queries]``, the
output is ``[columns, queries]``, the state is ``[columns, key rows]``. Weights that all chunks of a
program share lie in shared memory. A chunk in which a document begins, or which has fewer than 64
tokens, computes its own.
"""

from typing import Any, NamedTuple

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import fence_async_shared, tma

from lasp.lightning.triton import chunk_state_kernel as table_of

# Triton 3.6 has other names.
async_load = getattr(tma, "async_load", None) or tma.async_copy_global_to_shared
barrier = getattr(gl, "barrier", None) or gl.thread_barrier
async_store = getattr(tma, "async_store", None) or tma.async_copy_shared_to_global

CHUNK = gl.constexpr(64)  # tokens of a chunk, and columns of a group
INITIAL_ROW = gl.constexpr(table_of.INITIAL_ROW.value)
INCOMING_ROW = gl.constexpr(table_of.INCOMING_ROW.value)
DISTANCE = gl.constexpr(table_of.DISTANCE.value)
FINAL_ROW = gl.constexpr(table_of.FINAL_ROW.value)
STATE_ROW = gl.constexpr(table_of.STATE_ROW.value)

PRODUCT = gl.constexpr(gl.NVMMADistributedLayout([3, 0], [4, 1], [16, 64, 16]))
LEFT = gl.constexpr(gl.DotOperandLayout(0, PRODUCT.value, 2))  # the left factor of a product
QUERIES = gl.constexpr(gl.SliceLayout(0, PRODUCT.value))
KEYS = gl.constexpr(gl.SliceLayout(1, PRODUCT.value))
TOKENS = gl.constexpr(gl.SliceLayout(0, LEFT.value))
# A tile, 16 bytes a thread; a line of 64 numbers.
ROWS = gl.constexpr(gl.BlockedLayout([1, 8], [4, 8], [4, 1], [1, 0]))
LINE = gl.constexpr(gl.BlockedLayout([1], [32], [4], [0]))


class SegmentOfHead(NamedTuple):
    """What a program walks: a segment of a head, and 128 columns of the output.

    Attributes:
        head: its number.
        first: the first token, in the order of the flow.
        length: number of tokens.
        block: which 128 columns.
        rate: decay rate to base 2: a state shrinks by 2^-rate a token.
        scale: factor of the output; in reverse it is part of the state.
        num_heads: H.
        table: pointer to the row of the segment.
        reach: pointer to ``[T]``, see ``lasp.lightning.triton.segments.Plan``.
    """

    head: Any
    first: Any
    length: Any
    block: Any
    rate: Any
    scale: Any
    num_heads: Any
    table: Any
    reach: Any


class Edges(NamedTuple):
    """States outside the program; see ``lasp.lightning.triton.chunk_scan.EdgeStates``.

    Attributes:
        entering: pointer to the states that enter segments from those before.
        initial: pointer to the states at the start of documents, or None.
        incoming: pointer to the states that runs receive, or None.
        final: where to leave the states at the end of documents, or None.
        stride_d: elements from key row to key row of a state.
        stride_e: elements from column to column of a state.
        leaves: whether this program stores the final state.
    """

    entering: Any
    initial: Any
    incoming: Any
    final: Any
    stride_d: Any
    stride_e: Any
    leaves: Any


@gluon.jit
def flow_rows(layout: gl.constexpr, STEP: gl.constexpr):
    """Rows of a chunk in memory order, counted in the order of the flow."""
    rows = gl.arange(0, CHUNK, layout)
    return rows if STEP > 0 else CHUNK - 1 - rows


# ---- weights ------------------------------------------------------------------------------------


@gluon.jit
def powers_of(rate, scale, STEP: gl.constexpr):
    """Weights of scores ``[keys, queries]``: the decay from key to query, times the scale."""
    back = flow_rows(QUERIES, STEP)[None, :] - flow_rows(KEYS, STEP)[:, None]
    return gl.exp2(gl.where(back >= 0, -rate * back.to(gl.float32), float("-inf"))) * scale


@gluon.jit
def entering_of(rate, scale, STEP: gl.constexpr):
    """Weights of the state on entry, one for each query."""
    rows = flow_rows(QUERIES, STEP).to(gl.float32)
    return gl.exp2(-rate * (rows + 1)) * scale if STEP > 0 else gl.exp2(-rate * rows)


@gluon.jit
def leaving_of(n, rows, rate, scale, STEP: gl.constexpr):
    """Weights of keys in the state after a chunk of n tokens, one for each key."""
    after = gl.maximum(n - 1 - rows, 0).to(gl.float32)
    return gl.exp2(-rate * after) if STEP > 0 else gl.exp2(-rate * (after + 1)) * scale


@gluon.jit
def _load_reach(reach, token, n, layout: gl.constexpr, STEP: gl.constexpr):
    """The reach of the rows of a chunk, in memory order."""
    reach += (token if STEP > 0 else token - (CHUNK - 1)) + gl.arange(0, CHUNK, LINE)
    return gl.convert_layout(gl.load(reach, flow_rows(LINE, STEP) < n, 0), layout)


@gluon.jit
def weigh_scores(scores, powers_tile, segment, token, n, border, STEP: gl.constexpr):
    """Weighted scores in bfloat16, for the product with values."""
    powers = powers_tile.load(PRODUCT)
    # Always zero, which the compiler cannot know: so it computes what follows here, and holds it in
    # no registers elsewhere.
    hidden = gl.minimum(n, 0)
    keys = flow_rows(KEYS, STEP) + hidden
    if border:
        back = flow_rows(QUERIES, STEP)[None, :] - keys[:, None]
        reach = _load_reach(segment.reach, token, n, QUERIES, STEP)
        powers = gl.where(back <= reach[None, :], powers, 0.0)
    scores *= powers
    if n < CHUNK:
        scores = gl.where((keys < n)[:, None], scores, 0.0)
    return scores.to(gl.bfloat16)


@gluon.jit
def edge_weights(
    leaving_row, entering_row, segment, token, n, reach_last, border, STEP: gl.constexpr
):
    """The weights of keys on leaving, of the state on entry, and of the state that stays."""
    rate, scale = segment.rate, segment.scale
    leaving, entering = leaving_row.load(TOKENS), entering_row.load(QUERIES)
    across = gl.exp2(-rate * CHUNK)
    hidden = gl.minimum(n, 0)
    if border | (n < CHUNK):
        rows = flow_rows(TOKENS, STEP) + hidden
        stays = n - 1 - rows <= reach_last
        leaving = gl.where(stays, leaving_of(n, rows, rate, scale, STEP), 0.0)
        across = gl.where(border, 0.0, gl.exp2(-rate * n.to(gl.float32)))
    if border:
        reach = _load_reach(segment.reach, token, n, QUERIES, STEP)
        # What is not finite stays, for a second run to find.
        entering *= gl.where(reach > flow_rows(QUERIES, STEP) + hidden, 1.0, 0.0)
    return leaving, entering, across


# ---- rows ---------------------------------------------------------------------------------------


@gluon.jit
def clear_tiles(
    tiles, first, COUNT: gl.constexpr, n, WIDTH: gl.constexpr, STEP: gl.constexpr
):  # fmt: skip
    """Zero the rows from n on of so many tiles: they are of other documents, and may hold NaN."""
    if n < CHUNK:
        rows = flow_rows(gl.SliceLayout(1, ROWS), STEP)
        for i in gl.static_range(COUNT):
            tile = tiles.index(first + i).reshape([64, WIDTH])
            tile.store(gl.where((rows < n)[:, None], tile.load(ROWS), 0.0))
        fence_async_shared()
        barrier()  # other warps of the group read these rows


@gluon.jit
def store_rows(
    result, tile, output, output_tiles, segment, token, n, column,
    E: gl.constexpr, STEP: gl.constexpr,
):  # fmt: skip
    """Store the output ``[columns, queries]`` of a chunk, through a tile of shared memory.

    The copy engine stores all rows of a chunk, so pointers and masks store one of fewer tokens.
    """
    matrix = tile.reshape([64, 64])
    matrix.permute((1, 0)).store(result.to(gl.bfloat16))
    if n == CHUNK:
        fence_async_shared()
        first = token if STEP > 0 else token - (CHUNK - 1)
        async_store(output_tiles, [segment.head, first, column], tile)
    else:
        rows = flow_rows(gl.SliceLayout(1, ROWS), STEP)
        e = column + gl.arange(0, 64, gl.SliceLayout(0, ROWS))
        output += (token.to(gl.int64) * segment.num_heads + segment.head) * E
        offsets = (STEP * rows)[:, None] * (segment.num_heads * E) + e[None, :]
        gl.store(output + offsets, matrix.load(ROWS), (rows < n)[:, None] & (e < E)[None, :])


# ---- states -------------------------------------------------------------------------------------


@gluon.jit
def _state_offsets(
    edges, column, piece: gl.constexpr, D: gl.constexpr, E: gl.constexpr, WIDTH: gl.constexpr
):
    """Offsets of a piece of a head's state ``[64 columns, WIDTH key rows]``; which ones exist."""
    layout: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, WIDTH, 16])
    d = piece * WIDTH + gl.arange(0, WIDTH, gl.SliceLayout(0, layout))
    e = column + gl.arange(0, 64, gl.SliceLayout(1, layout))
    offsets = d[None, :] * edges.stride_d + e[:, None] * edges.stride_e
    return offsets, (d < D)[None, :] & (e < E)[:, None]


@gluon.jit
def entering_state(edges, segment, column, D: gl.constexpr, E: gl.constexpr, WIDTH: gl.constexpr):
    """The state before a segment, in pieces; see ``lasp.lightning.triton.segment_state_kernel``."""
    own = segment.head.to(gl.int64) * (D * E)
    size = (segment.num_heads * (D * E)).to(gl.int64)
    before = gl.exp2(-segment.rate * gl.load(segment.table + DISTANCE).to(gl.float32))
    pieces = ()
    for piece in gl.static_range((D + WIDTH - 1) // WIDTH):
        offsets, inside = _state_offsets(edges, column, piece, D, E, WIDTH)
        row = gl.load(segment.table + STATE_ROW)
        state = gl.load(edges.entering + (row * size + own) + offsets, inside & (row >= 0), 0.0)
        if edges.initial is not None:
            row = gl.load(segment.table + INITIAL_ROW)
            there = inside & (row >= 0)
            state += before * gl.load(edges.initial + (row * size + own) + offsets, there, 0.0)
        if edges.incoming is not None:
            row = gl.load(segment.table + INCOMING_ROW)
            there = inside & (row >= 0)
            state += before * gl.load(edges.incoming + (row * size + own) + offsets, there, 0.0)
        pieces += (state,)
    return pieces


@gluon.jit
def leave_state(
    state, edges, segment, column, D: gl.constexpr, E: gl.constexpr, WIDTH: gl.constexpr
):
    """Store the state after a segment whose document ends there."""
    own = segment.head.to(gl.int64) * (D * E)
    size = (segment.num_heads * (D * E)).to(gl.int64)
    row = gl.load(segment.table + FINAL_ROW)
    for piece in gl.static_range(len(state)):
        offsets, inside = _state_offsets(edges, column, piece, D, E, WIDTH)
        there = inside & (row >= 0) & edges.leaves
        gl.store(edges.final + (row * size + own) + offsets, state[piece], there)
