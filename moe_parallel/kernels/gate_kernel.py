"""The gate around its products: bfloat16 parts, and the gradient of the logits.

A float32 number is the sum of three bfloat16 ones, high, middle and low
(:mod:`moe_parallel.router.top_k`). The choice of experts, and what ``SCORE`` means:
:mod:`moe_parallel.kernels.top_k_kernel`.
"""

import triton
import triton.language as tl

from moe_parallel.kernels.top_k_kernel import softmax


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
    SIZE: tl.constexpr, PAIRS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
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
def _store_gradient(
    d, grad, token, expert, mask, E: tl.constexpr, PARTS: tl.constexpr, PAIRS: tl.constexpr
):
    """Write a block of the gradient, or its parts side by side."""
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
    E: tl.constexpr, K: tl.constexpr, PARTS: tl.constexpr, PAIRS: tl.constexpr, SCORE: tl.constexpr,
    NORMALIZE: tl.constexpr, E_PAD: tl.constexpr, TOKENS: tl.constexpr,
):  # fmt: skip
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
            d -= softmax(value, expert < E) * mean * scaling
    _store_gradient(d, grad, token, expert, mask, E, PARTS, PAIRS)
