"""The rows of a chunk between memory and registers: by the copy engine, or by pointers and masks.

The copy engine takes tiles of tensor descriptors ``[H, T, D]``, whatever the strides of heads and
tokens. Where a tile reaches past a head, it fetches and stores what lies inside: heads of 96 or
192 columns cost no other bytes. Where no descriptor describes a tensor, pointers and masks do.
"""

import triton
import triton.language as tl


@triton.jit
def flow_rows(CHUNK: tl.constexpr, STEP: tl.constexpr):
    """Rows of a chunk in memory order, counted in the order of the flow."""
    return tl.arange(0, CHUNK) if STEP > 0 else CHUNK - 1 - tl.arange(0, CHUNK)


@triton.jit
def load_reach(
    reach, token, rows, n, CHUNK: tl.constexpr, STEP: tl.constexpr, RAGGED: tl.constexpr
):
    """The reach of the rows of a chunk, in memory order."""
    reach += (token if STEP > 0 else token - (CHUNK - 1)) + tl.arange(0, CHUNK)
    return tl.load(reach, mask=rows < n, other=0) if RAGGED else tl.load(reach)


@triton.jit
def load_rows(
    x, head, token, column, rows, n, stride_t, WIDTH: tl.constexpr, BLOCK: tl.constexpr,
    CHUNK: tl.constexpr, STEP: tl.constexpr, RAGGED: tl.constexpr, TMA: tl.constexpr,
    OPERAND: tl.constexpr,
):  # fmt: skip
    """``[CHUNK, BLOCK]``: the rows of a chunk from ``column`` on, in memory order, zero from n on.

    x is a tensor descriptor, or a pointer to the columns of this head. Columns from WIDTH on are
    zero: the copy engine does not fetch what lies outside a tensor.
    """
    if TMA:
        first = token if STEP > 0 else token - (CHUNK - 1)
        block = x.load([head, first, column]).reshape([CHUNK, BLOCK])
        if RAGGED:
            block = tl.where((rows < n)[:, None], block, 0.0)
    else:
        cols = column + tl.arange(0, BLOCK)
        x += token.to(tl.int64) * stride_t
        x += (STEP * rows)[:, None] * stride_t + cols[None, :]
        if RAGGED:
            block = tl.load(x, mask=(rows < n)[:, None] & (cols < WIDTH)[None, :], other=0.0)
        elif WIDTH % BLOCK == 0:
            block = tl.load(x)
        else:
            block = tl.load(x, mask=(cols < WIDTH)[None, :], other=0.0)
    return block.to(OPERAND)


@triton.jit
def load_pieces(
    x, head, token, rows, n, stride_t, WIDTH: tl.constexpr, BLOCK: tl.constexpr,
    CHUNK: tl.constexpr, STEP: tl.constexpr, RAGGED: tl.constexpr, TMA: tl.constexpr,
    OPERAND: tl.constexpr,
):  # fmt: skip
    """All columns of the rows of a chunk: a tuple of ``[CHUNK, BLOCK]``."""
    pieces = ()
    for piece in tl.static_range((WIDTH + BLOCK - 1) // BLOCK):
        pieces += (
            load_rows(
                x, head, token, piece * BLOCK, rows, n, stride_t,
                WIDTH, BLOCK, CHUNK, STEP, RAGGED, TMA, OPERAND,
            ),
        )  # fmt: skip
    return pieces


@triton.jit
def store_rows(
    output,
    output_tiles,
    result,  # [CHUNK, BLOCK]
    head, token, column, rows, n, stride_t, WIDTH: tl.constexpr, BLOCK: tl.constexpr,
    CHUNK: tl.constexpr, STEP: tl.constexpr, RAGGED: tl.constexpr, TMA: tl.constexpr,
):  # fmt: skip
    """Store the rows of a chunk from ``column`` on, those before n, and the columns before WIDTH.

    The copy engine stores whole chunks: what lies outside a head it leaves out, but not rows.
    """
    if TMA and not RAGGED:
        first = token if STEP > 0 else token - (CHUNK - 1)
        output_tiles.store([head, first, column], result.reshape([1, CHUNK, BLOCK]))
    else:
        cols = column + tl.arange(0, BLOCK)
        output += token.to(tl.int64) * stride_t
        pointers = output + ((STEP * rows)[:, None] * stride_t + cols[None, :])
        if RAGGED:
            tl.store(pointers, result, mask=(rows < n)[:, None] & (cols < WIDTH)[None, :])
        elif WIDTH % BLOCK == 0:
            tl.store(pointers, result)
        else:
            tl.store(pointers, result, mask=(cols < WIDTH)[None, :])
