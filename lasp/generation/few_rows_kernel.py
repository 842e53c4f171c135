"""A few new rows of each sequence over all its cached keys: many programs, each key is read once.

The keys of a sequence and key head are cut into splits, a program each, which leaves the partial of
its keys; a second kernel merges them. How many keys there are is read on the device, so that a CUDA
graph of the launch is good for every length.

Example, one row and head of 4 keys, 2 splits, scores (0, 0 | log 3, -inf) and values (2, 4 | 8, 0):
the first program leaves output 3 and lse log 2, the second output 8 and lse log 3. Merged with the
weights 2/5 and 3/5 the output is 6 and the lse log 5.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from lasp._core.launcher import aligned, launcher_of
from ring.blocks.merge import Partial

LOG2E = 1.4426950408889634
# Rows (new tokens times query heads of a key head) and keys of a tile, warps, stages.
TILES, LATENT_TILES = (64, 64, 4, 3), (32, 32, 8, 2)
PROGRAMS = 12  # for each multiprocessor, which runs three at a time, so that all end together
SHORTEST = 512  # keys of a split, where the sequence has as many


@triton.jit
def _tile(source, at, there, columns, STRIDE: tl.constexpr, WIDTH: tl.constexpr):
    """The first WIDTH columns of rows ``at``; zeros for rows that are not there."""
    mask = there[:, None] & (columns < WIDTH)[None, :]
    return tl.load(source + at[:, None] * STRIDE + columns[None, :], mask=mask, other=0.0)


@triton.jit
def _add_keys(acc, total, largest, scores, w, PRECISION: tl.constexpr):
    """Weighted values, sum of weights and largest score, with these keys too."""
    higher = tl.maximum(largest, tl.max(scores, 1))
    shift = tl.where(higher == float("-inf"), 0.0, higher)
    p = tl.exp2(scores - shift[:, None])
    kept = tl.exp2(largest - shift)
    acc = acc * kept[:, None] + tl.dot(p.to(w.dtype), w, input_precision=PRECISION)
    return acc, total * kept + tl.sum(p, 1), higher


@triton.jit
def _store_partial(
    output, lse, place, inside, acc, total, largest, v, V: tl.constexpr
):  # fmt: skip
    """Output and lse of a split; no key is seen where the sum of weights is zero."""
    divisor = tl.where(total == 0.0, 1.0, total)
    mask = inside[:, None] & (v < V)[None, :]
    tl.store(output + place[:, None] * V + v[None, :], acc / divisor[:, None], mask=mask)
    found = tl.where(total == 0.0, float("-inf"), largest + tl.log2(divisor))
    tl.store(lse + place, found, mask=inside)


@triton.jit(do_not_specialize=["rank_tokens", "num_splits"])
def few_rows_kernel(
    query,  # [B * n, Hq, D], contiguous
    keys,  # [num_slots * rank_tokens + 1, Hkv, D], contiguous
    values,  # [num_slots * rank_tokens + 1, Hkv, V], contiguous; with LATENT not read
    slots,  # [B * n] int64, negative for padding, whose rows see no key
    limits,  # [B * n] int64: how many keys of its slot a row sees, not falling within a sequence
    output,  # [B * n, Hq, num_splits, V] float32, contiguous
    lse,  # [B * n, Hq, num_splits] float32, contiguous; to the base 2
    rank_tokens,
    num_splits,
    scale,  # of the scores, times log2 e
    KEY_HEADS: tl.constexpr,
    GROUP: tl.constexpr,  # query heads of a key head
    TOKENS: tl.constexpr,  # n
    D: tl.constexpr, V: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr, BLOCK_V: tl.constexpr, BLOCK_P: tl.constexpr,
    LATENT: tl.constexpr,  # values are the first V elements of keys; the others are D - V
    PRECISION: tl.constexpr,
):  # fmt: skip
    """One program a sequence, key head, split and block of rows."""
    blocks: tl.constexpr = (TOKENS * GROUP + BLOCK_M - 1) // BLOCK_M
    program = tl.program_id(0)
    # Blocks that read the same keys stand side by side.
    block, program = program % blocks, program // blocks
    split, program = program % num_splits, program // num_splits
    head, sequence = program % KEY_HEADS, (program // KEY_HEADS).to(tl.int64)

    m = block * BLOCK_M + tl.arange(0, BLOCK_M)
    inside, rows = m < TOKENS * GROUP, sequence * TOKENS + m // GROUP
    heads = rows * (KEY_HEADS * GROUP) + head * GROUP + m % GROUP  # of all rows
    d, v, e = tl.arange(0, BLOCK_D), tl.arange(0, BLOCK_V), tl.arange(0, BLOCK_P)
    q = _tile(query, heads, inside, d, D, V if LATENT else D)
    q_shared = _tile(query + V, heads, inside, e, D, D - V) if LATENT else q
    seen = tl.load(limits + rows, mask=inside, other=0).to(tl.int32)
    longest = tl.load(limits + sequence * TOKENS + TOKENS - 1).to(tl.int32)
    first = tl.maximum(tl.load(slots + sequence * TOKENS), 0) * rank_tokens
    length = tl.cdiv(tl.cdiv(longest, num_splits), BLOCK_N) * BLOCK_N
    stop = tl.minimum((split + 1) * length, longest)
    largest = tl.full([BLOCK_M], float("-inf"), tl.float32)
    total = tl.zeros([BLOCK_M], tl.float32)
    acc = tl.zeros([BLOCK_M, BLOCK_V], tl.float32)
    for begin in range(split * length, stop, BLOCK_N):
        n = begin + tl.arange(0, BLOCK_N)
        at, there = (first + n) * KEY_HEADS + head, n < stop  # int64
        if LATENT:
            w = _tile(keys, at, there, v, D, V)
            k_shared = _tile(keys + V, at, there, e, D, D - V)
            scores = tl.dot(q_shared, tl.trans(k_shared), input_precision=PRECISION)
            scores += tl.dot(q, tl.trans(w), input_precision=PRECISION)
        else:
            w = _tile(values, at, there, v, V, V)
            mask = there[None, :] & (d < D)[:, None]
            k = tl.load(keys + at[None, :] * D + d[:, None], mask=mask, other=0.0)
            scores = tl.dot(q, k, input_precision=PRECISION)
        visible = (n[None, :] < seen[:, None]) & there[None, :]
        scores = tl.where(visible, scores * scale, float("-inf"))
        acc, total, largest = _add_keys(acc, total, largest, scores, w, PRECISION)
    place = heads * num_splits + split
    _store_partial(output, lse, place, inside, acc, total, largest, v, V)


@triton.jit(do_not_specialize=["num_splits"])
def merge_splits_kernel(
    parts,  # [pairs, num_splits, V] float32, contiguous
    lse_of_parts,  # [pairs, num_splits] float32; to the base 2
    output,  # [pairs, V] float32
    lse,  # [pairs] float32; to the base e
    num_splits, V: tl.constexpr, BLOCK_S: tl.constexpr, BLOCK_V: tl.constexpr,
):  # fmt: skip
    """One program a row and head: its partials, in order."""
    pair = tl.program_id(0).to(tl.int64)
    v, s = tl.arange(0, BLOCK_V), tl.arange(0, BLOCK_S)
    largest = float("-inf")
    for begin in range(0, num_splits, BLOCK_S):
        at = begin + s
        some = tl.load(
            lse_of_parts + pair * num_splits + at, mask=at < num_splits, other=float("-inf")
        )
        largest = tl.maximum(largest, tl.max(some, 0))
    shift = tl.where(largest == float("-inf"), 0.0, largest)
    acc, total = tl.zeros([BLOCK_V], tl.float32), 0.0
    for begin in range(0, num_splits, BLOCK_S):
        at = begin + s
        some = tl.load(
            lse_of_parts + pair * num_splits + at, mask=at < num_splits, other=float("-inf")
        )
        weights = tl.exp2(some - shift)
        part = tl.load(
            parts + (pair * num_splits + at)[:, None] * V + v[None, :],
            mask=(at < num_splits)[:, None] & (v < V)[None, :],
            other=0.0,
        )
        acc += tl.sum(weights[:, None] * part, 0)
        total += tl.sum(weights, 0)
    divisor = tl.where(total == 0.0, 1.0, total)
    tl.store(output + pair * V + v, acc / divisor, mask=v < V)
    found = tl.where(total == 0.0, float("-inf"), shift + tl.log2(divisor))
    tl.store(lse + pair, found * 0.6931471805599453)  # ln 2


def few_rows(
    q: Tensor,
    keys: Tensor,
    values: Tensor,
    rows: tuple[Tensor, Tensor],
    *,
    tokens: int,
    rank_tokens: int,
    scale: float,
    num_splits: int,
) -> Partial:
    """Softmax attention of rows over the first keys of their slots.

    Args:
        q: ``[B * tokens, Hq, D]``, ``tokens`` rows a sequence one after the other.
        keys: ``[num_slots * rank_tokens + 1, Hkv, D]``.
        values: ``[num_slots * rank_tokens + 1, Hkv, V]``; the first elements of latents.
        rows: for each row its slot, negative for padding, and how many of the slot's keys it sees.
        tokens: rows of a sequence.
        rank_tokens: rows of a slot.
        scale: of the scores.
        num_splits: programs that share the keys of a sequence and head.

    Returns:
        ``[B * tokens, Hq, V]`` and ``[B * tokens, Hq]``, float32.
    """
    (num_rows, heads, dim), (_, key_heads, value_dim) = q.shape, values.shape
    group, latent = heads // key_heads, values.data_ptr() == keys.data_ptr()
    most, tile, warps, stages = LATENT_TILES if latent else TILES
    block = max(16, min(most, triton.next_power_of_2(tokens * group)))
    shape, wide = (num_rows, heads, num_splits), torch.float32
    parts, lse_of_parts = q.new_empty(*shape, value_dim, dtype=wide), q.new_empty(shape, dtype=wide)
    attend = launcher_of(
        few_rows_kernel, q.device, q.dtype,
        rank_tokens=rank_tokens, num_splits=num_splits, scale=float(scale) * LOG2E,
        KEY_HEADS=key_heads, GROUP=group, TOKENS=tokens, D=dim, V=value_dim,
        BLOCK_M=block, BLOCK_N=tile,
        BLOCK_D=max(16, triton.next_power_of_2(value_dim if latent else dim)),
        BLOCK_V=max(16, triton.next_power_of_2(value_dim)),
        BLOCK_P=max(16, triton.next_power_of_2(dim - value_dim)) if latent else 16,
        LATENT=latent, PRECISION="ieee" if q.dtype == torch.float32 else "tf32",
        num_warps=warps, num_stages=stages,
    )  # fmt: skip
    programs = num_rows // tokens * triton.cdiv(tokens * group, block) * key_heads * num_splits
    given = (aligned(x.contiguous()) for x in (q, keys, keys if latent else values, *rows))
    attend(programs, *given, parts, lse_of_parts)
    return _merged(parts, lse_of_parts)


def _merged(parts: Tensor, lse_of_parts: Tensor) -> Partial:
    """The partials ``[rows, Hq, num_splits, V]`` of all splits as one."""
    *shape, num_splits, value_dim = parts.shape
    output, lse = parts.new_empty(*shape, value_dim), parts.new_empty(shape)
    merge = launcher_of(
        merge_splits_kernel, parts.device, None,
        num_splits=num_splits, V=value_dim, BLOCK_S=16,
        BLOCK_V=triton.next_power_of_2(value_dim), num_warps=4,
    )  # fmt: skip
    merge(lse.numel(), parts, lse_of_parts, output, lse)
    return Partial(output, lse)


def splits_for(device: torch.device, programs: int, keys: int) -> int:
    """How many programs share the keys of a sequence, so that all multiprocessors are busy.

    Args:
        device: to launch on.
        programs: without splits.
        keys: of the longest sequence that there may be.
    """
    most = -(-keys // SHORTEST)
    if device.type != "cuda":
        return min(most, 3)
    count = torch.cuda.get_device_properties(device).multi_processor_count
    return max(1, min(most, PROGRAMS * count // programs))
