"""The choice of experts and their weights.

Example, k = 2: logits = (1, 3, NaN, 3)    experts = (2, 1), weights NaN
                logits = (1, 3, 0, 3)      experts = (1, 3), weights = (1/2, 1/2)

Scores, biases and groups are those of :mod:`moe_parallel.router.scores`; ``SCORE`` is 0 for logits,
1 for sigmoid and 2 for softmax over all.
"""

import triton
import triton.language as tl

_TAKEN = tl.constexpr(-(2**31))  # below every key
_NAN = tl.constexpr(2**31 - 1)  # above all others
_OUTSIDE = tl.constexpr(-(2**31) + 1)  # of a group that was not chosen: below all but those taken
_BUT_SIGN = tl.constexpr(2**31 - 1)


@triton.jit
def _key(value):
    """Integers in the order of float32 values: NaN above all, 0 and -0 alike."""
    bits = tl.where(value == 0.0, 0.0, value).to(tl.int32, bitcast=True)
    return tl.where(value != value, _NAN, bits ^ ((bits >> 31) & _BUT_SIGN))


@triton.jit
def _value(key):
    """What :func:`_key` was made of."""
    return (key ^ ((key >> 31) & _BUT_SIGN)).to(tl.float32, bitcast=True)


@triton.jit
def _largest(key, index, SIZE: tl.constexpr):
    """The largest key of each row and the lowest index that has it."""
    best = tl.max(key, axis=1, keep_dims=True)
    return best, tl.min(tl.where(key == best, index, SIZE), axis=1, keep_dims=True)


@triton.jit
def softmax(value, mask):
    """Over the second dim, where ``mask`` is."""
    # NaN must stay: a maximum would leave it out.
    share = tl.exp(value - tl.max(tl.where(mask, value, -float("inf")), axis=1, keep_dims=True))
    share = tl.where(mask, share, 0.0)
    return share / tl.sum(share, axis=1, keep_dims=True)


@triton.jit
def _log_sigmoid(value):
    return tl.minimum(value, 0.0) - tl.log(1.0 + tl.exp(-tl.abs(value)))


@triton.jit
def _outside(
    score, TOKENS: tl.constexpr, GROUPS: tl.constexpr, TOP_GROUPS: tl.constexpr, BEST: tl.constexpr,
    SIZE: tl.constexpr,
):  # fmt: skip
    """``[TOKENS, E]``: whether an expert is in none of the token's groups of the largest sums."""
    member, group = tl.arange(0, SIZE)[None, :], tl.arange(0, GROUPS)[None, :]
    total = tl.zeros([TOKENS * GROUPS, 1], dtype=tl.float32)
    key = _key(tl.reshape(score, [TOKENS * GROUPS, SIZE]))
    for _ in range(BEST):
        best, lowest = _largest(key, member, SIZE)
        total += _value(best)
        key = tl.where(member == lowest, _TAKEN, key)
    key = _key(tl.reshape(total, [TOKENS, GROUPS]))
    for _ in range(TOP_GROUPS):
        _best, lowest = _largest(key, group, GROUPS)
        key = tl.where(group == lowest, _TAKEN, key)
    outside = tl.reshape((key != _TAKEN).to(tl.int32), [TOKENS, GROUPS, 1])
    return tl.reshape(tl.broadcast_to(outside, [TOKENS, GROUPS, SIZE]), [TOKENS, GROUPS * SIZE])


@triton.jit
def _keys(
    value,  # [TOKENS, E_PAD] float32: logits
    bias, expert, E: tl.constexpr, K: tl.constexpr, SCORE: tl.constexpr, GROUPS: tl.constexpr,
    TOP_GROUPS: tl.constexpr, TOKENS: tl.constexpr,
):  # fmt: skip
    """``[TOKENS, E_PAD]``: keys of the scores by which a token's experts are compared."""
    score = value
    if SCORE == 1:
        score = tl.sigmoid(value)
    if SCORE == 2:
        score = softmax(value, expert < E)
    if bias is not None:
        score += tl.load(bias + expert, mask=expert < E, other=0.0)
    key = tl.where(expert < E, _key(score), _TAKEN)
    if GROUPS > 1:
        outside = _outside(score, TOKENS, GROUPS, TOP_GROUPS, K // TOP_GROUPS, E // GROUPS)
        key = tl.where(outside != 0, _OUTSIDE, key)
    return key


@triton.jit
def _weights(
    value,  # [TOKENS, E_PAD] float32: all logits
    logit,  # [TOKENS, K_PAD] float32: those of the chosen, unless PLAIN
    chosen_key,  # [TOKENS, K_PAD]: their keys, if PLAIN
    is_expert,  # where there is an expert
    is_chosen,  # where there is a choice
    SCORE: tl.constexpr, NORMALIZE: tl.constexpr, PLAIN: tl.constexpr,
):  # fmt: skip
    """``[TOKENS, K_PAD]``: weights of the chosen experts, before scaling."""
    if PLAIN:
        largest = _value(tl.max(chosen_key, axis=1, keep_dims=True))
        share = tl.where(is_chosen, tl.exp(_value(chosen_key) - largest), 0.0)
        weight = share / tl.sum(share, axis=1, keep_dims=True)
    elif NORMALIZE:
        weight = softmax(_log_sigmoid(logit) if SCORE == 1 else logit, is_chosen)
    elif SCORE == 1:
        weight = tl.sigmoid(logit)
    else:
        largest = tl.max(tl.where(is_expert, value, -float("inf")), axis=1, keep_dims=True)
        share = tl.where(is_expert, tl.exp(value - largest), 0.0)
        weight = tl.exp(logit - largest) / tl.sum(share, axis=1, keep_dims=True)
    return weight


@triton.jit
def _sum_of_parts(part, mask, E: tl.constexpr, PARTS: tl.constexpr):
    """Logits, the smallest of their parts first."""
    value = tl.load(part + (PARTS - 1) * E, mask=mask, other=0.0)
    for smaller in tl.static_range(1, PARTS):
        value += tl.load(part + (PARTS - 1 - smaller) * E, mask=mask, other=0.0)
    return value


@triton.jit(do_not_specialize=["num_tokens", "span"])
def top_k_kernel(
    product,  # [T, PARTS E] float32: logits as a sum of parts, the smallest last
    logits,  # [T, E] float32, or None: the product is the logits
    experts,  # [T, K] int64, best first
    weights,  # [T, K] float32: by default softmax over the chosen
    counts,  # [programs, E + RANKS] int32: assignments of the program's tokens; tokens a rank
    bias,  # [E] float32, added to the scores for the choice alone, or None
    scaling,  # of the weights
    num_tokens,  # T
    span,  # tokens of a program, a multiple of TOKENS
    E: tl.constexpr, K: tl.constexpr, PARTS: tl.constexpr,
    SCORE: tl.constexpr, NORMALIZE: tl.constexpr,
    PLAIN: tl.constexpr,  # the largest logits are chosen: SCORE is 0, and there is no bias
    GROUPS: tl.constexpr,  # 1: none; otherwise it and E are powers of 2
    TOP_GROUPS: tl.constexpr,
    RANKS: tl.constexpr,  # whose tokens are counted; 0: none
    E_PAD: tl.constexpr, K_PAD: tl.constexpr, RANKS_PAD: tl.constexpr, TOKENS: tl.constexpr,
):  # fmt: skip
    """One program a span of tokens, ``TOKENS`` at a time. Equal logits: the lower expert first."""
    expert = tl.arange(0, E_PAD)[None, :]
    slot = tl.arange(0, K_PAD)[None, :]
    count = tl.zeros([E_PAD], dtype=tl.int32)
    rank = tl.arange(0, RANKS_PAD)[None, :]
    tokens = tl.zeros([RANKS_PAD], dtype=tl.int32)
    begin = tl.program_id(0) * span
    for first in range(begin, tl.minimum(begin + span, num_tokens), TOKENS):
        token = (first + tl.arange(0, TOKENS)).to(tl.int64)[:, None]
        exists = token < num_tokens
        mask = exists & (expert < E)
        value = _sum_of_parts(product + token * (PARTS * E) + expert, mask, E, PARTS)
        if logits is not None:
            tl.store(logits + token * E + expert, value, mask=mask)
        key = _keys(value, bias, expert, E, K, SCORE, GROUPS, TOP_GROUPS, TOKENS)
        chosen = tl.zeros([TOKENS, K_PAD], dtype=tl.int32)
        chosen_key = tl.full([TOKENS, K_PAD], _TAKEN, dtype=tl.int32)
        logit = tl.zeros([TOKENS, K_PAD], dtype=tl.float32)
        goes = tl.zeros([TOKENS, RANKS_PAD], dtype=tl.int32)
        for k in range(K):
            best, lowest = _largest(key, expert, E_PAD)
            chosen = tl.where(slot == k, lowest, chosen)
            if PLAIN:
                chosen_key = tl.where(slot == k, best, chosen_key)
            else:
                of_best = tl.sum(tl.where(expert == lowest, value, 0.0), axis=1, keep_dims=True)
                logit = tl.where(slot == k, of_best, logit)
            key = tl.where(expert == lowest, _TAKEN, key)
            if RANKS:
                goes |= (rank == lowest // (E // RANKS)).to(tl.int32)

        weight = _weights(value, logit, chosen_key, expert < E, slot < K, SCORE, NORMALIZE, PLAIN)
        weight *= scaling
        slots, mask = token * K + slot, exists & (slot < K)
        tl.store(experts + slots, chosen.to(tl.int64), mask=mask)
        tl.store(weights + slots, weight, mask=mask)
        count += tl.sum((exists & (key == _TAKEN)).to(tl.int32), axis=0)
        tokens += tl.sum(tl.where(exists, goes, 0), axis=0)
    column, of_rank = tl.arange(0, E_PAD), tl.arange(0, RANKS_PAD)
    place = counts + tl.program_id(0) * (E + RANKS)
    tl.store(place + column, count, mask=column < E)
    tl.store(place + E + of_rank, tokens, mask=of_rank < RANKS)
