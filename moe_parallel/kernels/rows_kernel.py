"""The rows of assignments, counted: by expert, within it in the order of the tokens.

``top_k_kernel`` leaves how many assignments each of its programs has made, a span of tokens each.
Where tokens cross to a rank once, an assignment's row is among all that its expert takes, from any
rank, and a token has a row for each rank of its experts.

Example, k = 1, E = 2, spans of 2 tokens, experts (0, 1, 0, 0)::

    counts    1 1    before    0 0    totals    3 1    row    0, 3, 1, 2
              2 0              1 1

Assignments arrive by source, and experts take them by expert: ``chunks_kernel`` has an example in
:mod:`moe_parallel.dispatch.planned`.
"""

import triton
import triton.language as tl


@triton.jit(do_not_specialize=["num_programs"])
def before_kernel(
    counts,  # [programs, E] int32; after it the sums of the rows before
    totals,  # [E] int64: of all rows
    num_programs, E: tl.constexpr, PROGRAMS: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    """One program a block of columns, which it reads as a whole."""
    program = tl.arange(0, PROGRAMS)[:, None]
    column = tl.program_id(0) * COLUMNS + tl.arange(0, COLUMNS)
    place = counts + program * E + column[None, :]
    mask = (program < num_programs) & (column < E)[None, :]
    count = tl.load(place, mask=mask, other=0)
    tl.store(place, tl.cumsum(count, axis=0) - count, mask=mask)
    tl.store(totals + column, tl.sum(count, axis=0).to(tl.int64), mask=column < E)


@triton.jit
def _rows_of_earlier(expert, totals, positions, E: tl.constexpr, OTHERS: tl.constexpr):
    """Rows of the experts that leave before each."""
    position = expert.to(tl.int64)
    if positions is not None:
        position = tl.load(positions + expert, mask=expert < E, other=0)
    rows = tl.zeros_like(expert)
    for first in range(0, E, OTHERS):
        other = first + tl.arange(0, OTHERS)[:, None]
        total = tl.load(totals + other, mask=other < E, other=0).to(tl.int32)
        other_position = other.to(tl.int64)
        if positions is not None:
            other_position = tl.load(positions + other, mask=other < E, other=0)
        leaves = other_position < position
        rows += tl.sum(tl.where(leaves, total, 0), axis=0, keep_dims=True)
    return rows


@triton.jit(do_not_specialize=["num_tokens", "span"])
def row_kernel(
    experts,  # [T, K] int64
    before,  # [programs, E + RANKS] int32
    totals,  # [E + RANKS] int64
    positions,  # [E] int64: the position of each expert among the rows, or None: its number
    starts,  # [E] int64: the first row of each expert, or None: they follow each other
    row,  # [T, K] int64
    token_row,  # [T, RANKS] int64: a token's row for each rank, -1 where it does not go
    ends,  # [E] int32: where the rows of each expert end, in the order of their numbers; or None
    num_tokens,  # T
    span,  # tokens of a program, a multiple of TOKENS
    E: tl.constexpr, K: tl.constexpr, RANKS: tl.constexpr, E_PAD: tl.constexpr, K_PAD: tl.constexpr,
    RANKS_PAD: tl.constexpr, OTHERS: tl.constexpr, TOKENS: tl.constexpr,
):  # fmt: skip
    """One program a span of tokens, the same as of ``top_k_kernel``; ``TOKENS`` at a time."""
    expert = tl.arange(0, E_PAD)[None, :]
    # The next row of each expert: those of experts that leave before it, those of tokens before.
    before += tl.program_id(0) * (E + RANKS)
    following = tl.load(before + expert, mask=expert < E, other=0)
    if starts is not None:
        following += tl.load(starts + expert, mask=expert < E, other=0).to(tl.int32)
    else:
        following += _rows_of_earlier(expert, totals, positions, E, OTHERS)
    if ends is not None:  # the first program has no tokens before its own
        taken = tl.load(totals + expert, mask=expert < E, other=0).to(tl.int32)
        first_mask = expert < tl.where(tl.program_id(0) == 0, E, 0)
        tl.store(ends + expert, following + taken, mask=first_mask)
    rank = tl.arange(0, RANKS_PAD)[None, :]
    following_token = tl.load(before + E + rank, mask=rank < RANKS, other=0)
    total = tl.load(totals + E + rank, mask=rank < RANKS, other=0).to(tl.int32)
    following_token += tl.cumsum(total, axis=1) - total

    begin = tl.program_id(0) * span
    for first in range(begin, tl.minimum(begin + span, num_tokens), TOKENS):
        token = (first + tl.arange(0, TOKENS)).to(tl.int64)[:, None]
        exists = token < num_tokens
        count = tl.zeros([TOKENS, E_PAD], dtype=tl.int32)  # 0 or 1: a token takes an expert once
        goes = tl.zeros([TOKENS, RANKS_PAD], dtype=tl.int32)
        for k in tl.static_range(K):  # unrolled: no load waits for another
            chosen = tl.load(experts + token * K + k, mask=exists, other=-1)
            count += (expert == chosen).to(tl.int32)
            if RANKS:
                goes |= (exists & (rank == chosen // (E // RANKS))).to(tl.int32)
        if RANKS:
            token_rows = following_token + tl.cumsum(goes, axis=0) - goes
            token_rows = tl.where(goes != 0, token_rows, -1).to(tl.int64)
            tl.store(token_row + token * RANKS + rank, token_rows, mask=exists & (rank < RANKS))
            following_token += tl.sum(goes, axis=0, keep_dims=True)
        rows = following + tl.cumsum(count, axis=0) - count
        slot = token * K + tl.arange(0, K_PAD)[None, :]
        mask = exists & (tl.arange(0, K_PAD)[None, :] < K)
        chosen = tl.load(experts + slot, mask=mask, other=0)
        tl.store(row + slot, tl.gather(rows, chosen.to(tl.int32), axis=1).to(tl.int64), mask=mask)
        following += tl.sum(count, axis=0, keep_dims=True)


@triton.jit(do_not_specialize=["count_stride", "me", "ep_rank"])
def starts_kernel(
    counts,  # [R, E] int64: rows of each rank for each expert
    count_stride,  # between its rows
    sources,  # [S] int64: the ranks whose rows this rank's experts take, in order
    starts,  # [E] int64: this rank's first row for each expert, among the rows of its rank
    ends,  # [E_LOCAL] int32: where the rows of this rank's experts end
    me,  # this rank among the sources
    ep_rank,  # this rank in the EP group
    S: tl.constexpr, E_LOCAL: tl.constexpr, E_PAD: tl.constexpr,
):  # fmt: skip
    """One program an EP rank. Rows are in the order of its experts, within them of the sources."""
    local = tl.arange(0, E_PAD)
    mask = local < E_LOCAL
    expert = tl.program_id(0) * E_LOCAL + local
    total = tl.zeros([E_PAD], dtype=tl.int64)
    before = tl.zeros([E_PAD], dtype=tl.int64)
    for source in range(S):
        place = counts + tl.load(sources + source) * count_stride + expert
        count = tl.load(place, mask=mask, other=0)
        before += tl.where(source < me, count, 0)
        total += count
    end = tl.cumsum(total, axis=0)
    tl.store(starts + expert, end - total + before, mask=mask)
    mine = local < tl.where(tl.program_id(0) == ep_rank, E_LOCAL, 0)
    tl.store(ends + local, end.to(tl.int32), mask=mine)


@triton.jit(do_not_specialize=["count_stride", "first"])
def chunks_kernel(
    counts,  # [R, E] int64: rows of each rank for each expert
    count_stride,  # between its rows
    sources,  # [S] int64: the ranks whose rows arrive, in order
    by_expert,  # [A] int64: for each row in the order of the experts its number by arrival, or None
    by_arrival,  # [A] int64: the inverse, or None
    ends,  # [N] int32: where the rows of each expert end
    first,  # the first of the N experts
    S: tl.constexpr, N: tl.constexpr, S_PAD: tl.constexpr, N_PAD: tl.constexpr, PARTS: tl.constexpr,
    BLOCK: tl.constexpr,
):  # fmt: skip
    """``PARTS`` programs a chunk, what one source sends to one expert, blocks of it in turn."""
    chunk, part = tl.program_id(0) // PARTS, tl.program_id(0) % PARTS
    my_source, my_expert = chunk // N, chunk % N
    source, expert = tl.arange(0, S_PAD)[:, None], tl.arange(0, N_PAD)[None, :]
    rank = tl.load(sources + source, mask=source < S, other=0)
    place = counts + rank * count_stride + first + expert
    size = tl.load(place, mask=(source < S) & (expert < N), other=0)
    same_source, same_expert = source == my_source, expert == my_expert
    arrives = (source < my_source) | (same_source & (expert < my_expert))
    begins = (expert < my_expert) | (same_expert & (source < my_source))
    begin = tl.sum(tl.sum(tl.where(begins, size, 0), axis=1), axis=0)
    count = tl.sum(tl.sum(tl.where(same_source & same_expert, size, 0), axis=1), axis=0)
    if by_expert is not None:
        arrival = tl.sum(tl.sum(tl.where(arrives, size, 0), axis=1), axis=0)
        for at in range(part * BLOCK, count, PARTS * BLOCK):
            row = at + tl.arange(0, BLOCK)
            tl.store(by_expert + begin + row, arrival + row, mask=row < count)
            tl.store(by_arrival + arrival + row, begin + row, mask=row < count)
    if (my_source == S - 1) & (part == 0):
        tl.store(ends + my_expert, (begin + count).to(tl.int32))


@triton.jit(do_not_specialize=["count_stride", "memory"])
def fitting_kernel(
    counts,  # [R, E] int64: assignments of each rank to each expert
    count_stride,  # between its rows
    kept,  # [R, E] int64: those that fit
    wanted,  # [R] int64: rows that the experts of each rank would take
    memory,  # rows that they can take
    EP: tl.constexpr,  # ranks that have all experts together
    E_LOCAL: tl.constexpr,
    E_PAD: tl.constexpr,
):
    """One program a rank, the first of whose rows fit: by expert, within it by source."""
    rank = tl.program_id(0)
    first, local = rank // EP * EP, tl.arange(0, E_PAD)
    expert, mask = rank % EP * E_LOCAL + local, local < E_LOCAL
    total = tl.zeros([E_PAD], dtype=tl.int64)
    for source in range(first, first + EP):
        total += tl.load(counts + source * count_stride + expert, mask=mask, other=0)
    tl.store(wanted + rank, tl.sum(total, axis=0))
    begin = tl.cumsum(total) - total
    for source in range(first, first + EP):
        end = begin + tl.load(counts + source * count_stride + expert, mask=mask, other=0)
        fits = tl.minimum(end, memory) - tl.minimum(begin, memory)
        tl.store(kept + source * (EP * E_LOCAL) + expert, fits, mask=mask)
        begin = end
