"""The gate around its products: bfloat16 parts, the choice of experts, the gradient of the logits.

A float32 number is the sum of three bfloat16 ones, high, middle and low
(:mod:`moe_parallel.router.top_k`).

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
def _rounded(x):
    """The nearest bfloat16 number of float32 ``x``, the even one of two, and it in float32."""
    # By integers, as hardware does: the interpreter of Triton cuts off.
    bits = x.to(tl.int32, bitcast=True)
    nearest = bits + 0x7FFF + ((bits >> 16) & 1)
    half = tl.where(x == x, nearest, bits | 0x400000) >> 16  # NaN stays NaN
    return half.to(tl.int16).to(tl.bfloat16, bitcast=True), (half << 16).to(
        tl.float32, bitcast=True
    )


@triton.jit
def _parts(x):
    """Three bfloat16 numbers whose sum ``x`` is, the largest first."""
    high, value = _rounded(x)
    rest = x - value  # exact
    middle, value = _rounded(rest)
    low, _ = _rounded(rest - value)
    return high, middle, low


@triton.jit
def split_kernel(
    x,  # [SIZE], contiguous
    parts,  # [3, SIZE] bfloat16, or [6, SIZE] for pairs
    SIZE: tl.constexpr,
    PAIRS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """High, middle, low; or for pairs with parts of another number as below."""
    offset = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    mask = offset < SIZE
    high, middle, low = _parts(tl.load(x + offset, mask=mask, other=0.0).to(tl.float32))
    out = parts + offset
    if PAIRS:
        tl.store(out, low, mask=mask)
        tl.store(out + SIZE, middle, mask=mask)
        tl.store(out + 2 * SIZE, high, mask=mask)
        tl.store(out + 3 * SIZE, middle, mask=mask)
        tl.store(out + 4 * SIZE, high, mask=mask)
        tl.store(out + 5 * SIZE, high, mask=mask)
    else:
        tl.store(out, high, mask=mask)
        tl.store(out + SIZE, middle, mask=mask)
        tl.store(out + 2 * SIZE, low, mask=mask)


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
def _softmax(value, mask):
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
    score,
    TOKENS: tl.constexpr,
    GROUPS: tl.constexpr,
    TOP_GROUPS: tl.constexpr,
    BEST: tl.constexpr,
    SIZE: tl.constexpr,
):
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


@triton.jit(do_not_specialize=["num_tokens", "span"])
def top_k_kernel(
    product,  # [T, PARTS E] float32: logits as a sum of parts, the smallest last
    logits,  # [T, E] float32, or None: the product is the logits
    experts,  # [T, K] int64, best first
    weights,  # [T, K] float32: by default softmax over the chosen
    counts,  # [programs, E] int32: assignments of the program's tokens
    bias,  # [E] float32, added to the scores for the choice alone, or None
    scaling,  # of the weights
    num_tokens,  # T
    span,  # tokens of a program, a multiple of TOKENS
    E: tl.constexpr,
    K: tl.constexpr,
    PARTS: tl.constexpr,
    SCORE: tl.constexpr,
    NORMALIZE: tl.constexpr,
    PLAIN: tl.constexpr,  # the largest logits are chosen: SCORE is 0, and there is no bias
    GROUPS: tl.constexpr,  # 1: none; otherwise it and E are powers of 2
    TOP_GROUPS: tl.constexpr,
    E_PAD: tl.constexpr,
    K_PAD: tl.constexpr,
    TOKENS: tl.constexpr,
):
    """One program a span of tokens, ``TOKENS`` at a time. Equal logits: the lower expert first."""
    expert = tl.arange(0, E_PAD)[None, :]
    slot = tl.arange(0, K_PAD)[None, :]
    count = tl.zeros([E_PAD], dtype=tl.int32)
    begin = tl.program_id(0) * span
    for first in range(begin, tl.minimum(begin + span, num_tokens), TOKENS):
        token = (first + tl.arange(0, TOKENS)).to(tl.int64)[:, None]
        exists = token < num_tokens
        mask = exists & (expert < E)
        part = product + token * (PARTS * E) + expert
        value = tl.load(part + (PARTS - 1) * E, mask=mask, other=0.0)
        for smaller in tl.static_range(1, PARTS):
            value += tl.load(part + (PARTS - 1 - smaller) * E, mask=mask, other=0.0)
        if logits is not None:
            tl.store(logits + token * E + expert, value, mask=mask)

        score = value
        if SCORE == 1:
            score = tl.sigmoid(value)
        if SCORE == 2:
            score = _softmax(value, expert < E)
        if bias is not None:
            score += tl.load(bias + expert, mask=expert < E, other=0.0)
        key = tl.where(expert < E, _key(score), _TAKEN)
        if GROUPS > 1:
            outside = _outside(score, TOKENS, GROUPS, TOP_GROUPS, K // TOP_GROUPS, E // GROUPS)
            key = tl.where(outside != 0, _OUTSIDE, key)
        chosen = tl.zeros([TOKENS, K_PAD], dtype=tl.int32)
        chosen_key = tl.full([TOKENS, K_PAD], _TAKEN, dtype=tl.int32)
        logit = tl.zeros([TOKENS, K_PAD], dtype=tl.float32)
        for k in range(K):
            best, lowest = _largest(key, expert, E_PAD)
            chosen = tl.where(slot == k, lowest, chosen)
            if PLAIN:
                chosen_key = tl.where(slot == k, best, chosen_key)
            else:
                of_best = tl.sum(tl.where(expert == lowest, value, 0.0), axis=1, keep_dims=True)
                logit = tl.where(slot == k, of_best, logit)
            key = tl.where(expert == lowest, _TAKEN, key)

        if PLAIN:
            largest = _value(tl.max(chosen_key, axis=1, keep_dims=True))
            share = tl.where(slot < K, tl.exp(_value(chosen_key) - largest), 0.0)
            weight = share / tl.sum(share, axis=1, keep_dims=True)
        elif NORMALIZE:
            weight = _softmax(_log_sigmoid(logit) if SCORE == 1 else logit, slot < K)
        elif SCORE == 1:
            weight = tl.sigmoid(logit)
        else:
            largest = tl.max(tl.where(expert < E, value, -float("inf")), axis=1, keep_dims=True)
            share = tl.where(expert < E, tl.exp(value - largest), 0.0)
            weight = tl.exp(logit - largest) / tl.sum(share, axis=1, keep_dims=True)
        weight *= scaling
        slots, mask = token * K + slot, exists & (slot < K)
        tl.store(experts + slots, chosen.to(tl.int64), mask=mask)
        tl.store(weights + slots, weight, mask=mask)
        count += tl.sum((exists & (key == _TAKEN)).to(tl.int32), axis=0)
    column = tl.arange(0, E_PAD)
    tl.store(counts + tl.program_id(0) * E + column, count, mask=column < E)


@triton.jit(do_not_specialize=["num_tokens"])
def top_k_backward_kernel(
    dweights,  # [T, K] float32, or None for zeros
    dlogits,  # [T, E] float32, or None for zeros
    weights,  # [T, K] float32
    experts,  # [T, K] int64
    logits,  # [T, E] float32; None for SCORE 0
    grad,  # [T, E] float32; or bfloat16 parts: [T, 6 E] for pairs, else [T, 3 E]
    scaling,  # of the weights
    num_tokens,  # T
    E: tl.constexpr,
    K: tl.constexpr,
    PARTS: tl.constexpr,
    PAIRS: tl.constexpr,
    SCORE: tl.constexpr,
    NORMALIZE: tl.constexpr,
    E_PAD: tl.constexpr,
    TOKENS: tl.constexpr,
):
    """The gradient of the logits d: to those chosen ``w (dw - sum w dw)``, and ``dlogits``.

    That is for normalised weights w, with a sigmoid times its derivative's ``1 - s``. Without
    normalisation sigmoids have no sum, and softmax reaches all logits, ``p (dw - sum w dw)``.

    ``PARTS`` lie side by side, low, middle, high; for pairs with the six parts of ``split_kernel``
    high, middle, low, high, middle, high: products of a pair from the smallest on.
    """
    expert = tl.arange(0, E_PAD)[None, :]
    token = tl.program_id(0).to(tl.int64) * TOKENS + tl.arange(0, TOKENS)[:, None]
    exists = token < num_tokens
    mask = exists & (expert < E)
    d = tl.zeros([TOKENS, E_PAD], dtype=tl.float32)
    if dlogits is not None:
        d += tl.load(dlogits + token * E + expert, mask=mask, other=0.0)
    if dweights is not None:
        mean = tl.zeros([TOKENS, 1], dtype=tl.float32)
        if NORMALIZE or SCORE == 2:
            for k in range(K):
                weight = tl.load(weights + token * K + k, mask=exists, other=0.0)
                mean += weight * tl.load(dweights + token * K + k, mask=exists, other=0.0)
            mean = mean / scaling
        for k in range(K):
            weight = tl.load(weights + token * K + k, mask=exists, other=0.0)
            dweight = tl.load(dweights + token * K + k, mask=exists, other=0.0)
            chosen = tl.load(experts + token * K + k, mask=exists, other=-1)
            if SCORE == 1:
                logit = tl.load(logits + token * E + chosen, mask=exists, other=0.0)
                weight *= tl.sigmoid(-logit)
            if NORMALIZE or SCORE == 1:
                dweight -= mean
            d += tl.where(expert == chosen, weight * dweight, 0.0)
        if SCORE == 2 and not NORMALIZE:
            value = tl.load(logits + token * E + expert, mask=mask, other=0.0)
            d -= _softmax(value, expert < E) * mean * scaling
    if PARTS:
        high, middle, low = _parts(d)
        if PAIRS:
            out = grad + token * (6 * E) + expert
            tl.store(out, high, mask=mask)
            tl.store(out + E, middle, mask=mask)
            tl.store(out + 2 * E, low, mask=mask)
            tl.store(out + 3 * E, high, mask=mask)
            tl.store(out + 4 * E, middle, mask=mask)
            tl.store(out + 5 * E, high, mask=mask)
        else:
            out = grad + token * (3 * E) + expert
            tl.store(out, low, mask=mask)
            tl.store(out + E, middle, mask=mask)
            tl.store(out + 2 * E, high, mask=mask)
    else:
        tl.store(grad + token * E + expert, d, mask=mask)
