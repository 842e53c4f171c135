"""The rows of assignments, counted: by expert, within it in the order of the tokens.

``top_k_kernel`` leaves how many assignments each of its programs has made, a span of tokens each.

Example, k = 1, E = 2, spans of 2 tokens, experts (0, 1, 0, 0)::

    counts    1 1    before    0 0    totals    3 1    row    0, 3, 1, 2
              2 0              1 1
"""

import triton
import triton.language as tl


@triton.jit(do_not_specialize=["num_programs"])
def before_kernel(
    counts,  # [programs, E] int32; after it the sums of the rows before
    totals,  # [E] int64: of all rows
    num_programs,
    E: tl.constexpr,
    PROGRAMS: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    """One program a block of columns, which it reads as a whole."""
    program = tl.arange(0, PROGRAMS)[:, None]
    column = tl.program_id(0) * COLUMNS + tl.arange(0, COLUMNS)
    place = counts + program * E + column[None, :]
    mask = (program < num_programs) & (column < E)[None, :]
    count = tl.load(place, mask=mask, other=0)
    tl.store(place, tl.cumsum(count, axis=0) - count, mask=mask)
    tl.store(totals + column, tl.sum(count, axis=0).to(tl.int64), mask=column < E)


@triton.jit(do_not_specialize=["num_tokens", "span"])
def row_kernel(
    experts,  # [T, K] int64
    before,  # [programs, E] int32
    totals,  # [E] int64
    positions,  # [E] int64: the position of each expert among the rows, or None: its number
    row,  # [T, K] int64
    num_tokens,  # T
    span,  # tokens of a program, a multiple of TOKENS
    E: tl.constexpr,
    K: tl.constexpr,
    E_PAD: tl.constexpr,
    OTHERS: tl.constexpr,
    TOKENS: tl.constexpr,
):
    """One program a span of tokens, the same as of ``top_k_kernel``; ``TOKENS`` at a time."""
    expert = tl.arange(0, E_PAD)[None, :]
    mask = expert < E
    position = expert.to(tl.int64)
    if positions is not None:
        position = tl.load(positions + expert, mask=mask, other=0)
    # The next row of each expert: those of experts that leave before it, those of tokens before.
    following = tl.load(before + tl.program_id(0) * E + expert, mask=mask, other=0)
    for first in range(0, E, OTHERS):
        other = first + tl.arange(0, OTHERS)[:, None]
        total = tl.load(totals + other, mask=other < E, other=0).to(tl.int32)
        other_position = other.to(tl.int64)
        if positions is not None:
            other_position = tl.load(positions + other, mask=other < E, other=0)
        following += tl.sum(tl.where(other_position < position, total, 0), axis=0, keep_dims=True)

    begin = tl.program_id(0) * span
    for first in range(begin, tl.minimum(begin + span, num_tokens), TOKENS):
        token = (first + tl.arange(0, TOKENS)).to(tl.int64)[:, None]
        exists = token < num_tokens
        count = tl.zeros([TOKENS, E_PAD], dtype=tl.int32)  # 0 or 1: a token takes an expert once
        for k in range(K):
            chosen = tl.load(experts + token * K + k, mask=exists, other=-1)
            count += (expert == chosen).to(tl.int32)
        rows = following + tl.cumsum(count, axis=0) - count
        for k in range(K):
            chosen = tl.load(experts + token * K + k, mask=exists, other=-1)
            mine = tl.sum(tl.where(expert == chosen, rows, 0), axis=1, keep_dims=True)
            tl.store(row + token * K + k, mine.to(tl.int64), mask=exists)
        following += tl.sum(count, axis=0, keep_dims=True)
