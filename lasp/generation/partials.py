"""Softmax attention of new tokens over the cached keys of their slots, of one rank and of all.

Every rank computes a partial over the keys that it holds. Partials are merged in the order of the
ranks, the new tokens' own partial last, so that every rank gets the same bits.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import reduce

import torch
import torch.distributed as dist
from torch import Tensor

from lasp._core.collectives import all_gather
from lasp._core.dtypes import wide_dtype
from lasp._core.impl import Impl, chosen_impl
from lasp.generation.cache import KeyMemory
from lasp.generation.step import CachedRows, CacheStep
from ring.blocks.interface import QKV, Block
from ring.blocks.merge import Partial, merge, merge_to
from ring.blocks.registry import BLOCKS, resolve_block
from ring.planner.window import CAUSAL, EVERYTHING

KEYS_AT_ONCE = 65_536  # of a tile of a long step
EAGER_KEYS_AT_ONCE = 2_048  # whose scores are all in memory
MAX_HEAD_DIM, MAX_LATENT = 256, 512  # that the kernel for few rows serves

# Keys and values as kernels take them, of those in memory.
Expand = Callable[[Tensor, Tensor], tuple[Tensor, Tensor]]


def over_few(q: Tensor, memory: KeyMemory, step: CacheStep, scale: float, block: str) -> Partial:
    """Each of a few rows over the keys that it sees on this rank, its own among them.

    Args:
        q: ``[T, Hq, D]``.
        memory: keys ``[..., Hkv, D]`` and values ``[..., Hkv, V]``.
        step: with ``few``.
        scale: of the scores.
        block: ``eager`` for plain torch; else a kernel where it can run, see ``lasp._core.impl``.

    Returns:
        ``[T, Hq, V]`` and ``[T, Hq]``, float32 or float64; a row without a key has lse -inf.
    """
    if has_kernel(memory, block):
        return by_kernel(q, memory, step, scale)
    partial = _nothing(q, memory.values.shape[-1])
    for some in step.cached:
        if some.keys > 0:
            rows = slice(some.start, some.stop)
            qkv = QKV(q[rows], *memory.read(some.slot, 0, some.keys))
            window = CAUSAL if some.causal else EVERYTHING
            found = BLOCKS["eager"].forward(qkv, window=window, scale=scale)
            partial.output[rows], partial.lse[rows] = found
    return partial


def by_kernel(q: Tensor, memory: KeyMemory, step: CacheStep, scale: float) -> Partial:
    """:func:`over_few` by ``few_rows_kernel``."""
    from lasp.generation.few_rows_kernel import few_rows, splits_for

    tokens = step.tokens_a_slot or 1
    programs = len(q) // tokens * memory.keys.shape[1]
    found: Partial = few_rows(
        q,
        memory.keys,
        memory.values,
        (step.rows[2], step.rows[3]),
        tokens=tokens,
        rank_tokens=memory.rank_tokens,
        scale=scale,
        num_splits=splits_for(q.device, programs, memory.rank_tokens),
    )
    return found


def has_kernel(memory: KeyMemory, block: str) -> bool:
    """Whether :func:`over_few` takes the kernel for these keys."""
    keys, (dim, value_dim) = memory.keys, (memory.keys.shape[-1], memory.values.shape[-1])
    most = max(dim, value_dim)
    if memory.is_latent:  # of which the shared part is an operand of its own
        served = value_dim <= MAX_LATENT and dim - value_dim <= MAX_HEAD_DIM
    else:
        served = most <= MAX_HEAD_DIM
    unserved = "" if served else f"keys of {most} elements"
    impl: Impl = "eager" if block == "eager" else "auto"
    return chosen_impl(impl, keys.device, keys.dtype, unserved) == "triton"


def over_cached(
    q: Tensor, memory: KeyMemory, step: CacheStep, scale: float, block: str, expand: Expand
) -> Partial | None:
    """The rows of a step that is cut over all keys that were there before it, on all ranks.

    Args:
        q: ``[T, Hq, D]``, the rows of this rank.
        memory: keys on this rank.
        step: without ``few``.
        scale: of the scores.
        block: name of the kernel, see :func:`ring.blocks.registry.resolve_block`.
        expand: makes keys ``[..., D]`` and values of those in memory.

    Returns:
        The partial of this rank's rows; None where no slot had tokens, on any rank.

    Communication: queries to every rank, and partials in float32 back to theirs.
    """
    if not any(step.starts):
        return None
    group, layout = step.group, step.layout
    rows = q if group is None else layout.unshard(all_gather(q, group).unbind())
    k, v = expand(memory.keys[:1], memory.values[:1])
    kernel = resolve_block(block, q.device, q.dtype, k.shape[-1], v.shape[-1])
    partial = _nothing(rows, v.shape[-1])
    for some in step.cached:
        if some.keys > 0:
            of_rows = Partial(*(x[some.start : some.stop] for x in partial))
            _over_slot(rows[some.start : some.stop], of_rows, memory, some, kernel, scale, expand)
    if group is None:
        return partial
    joined = _joined(partial)
    sent = torch.stack([layout.shard(joined, rank) for rank in range(group.size())])
    received = torch.empty_like(sent)
    dist.all_to_all_single(received, sent, group=group)
    return merged(received)


def _over_slot(
    q: Tensor,
    out: Partial,
    memory: KeyMemory,
    rows: CachedRows,
    block: Block,
    scale: float,
    expand: Expand,
) -> None:
    """Merge the keys of a slot, tile by tile, into ``out``."""
    tile = EAGER_KEYS_AT_ONCE if block.name == "eager" else KEYS_AT_ONCE
    for start in range(0, rows.keys, tile):
        keys = memory.read(rows.slot, start, min(start + tile, rows.keys))
        qkv = QKV(q.contiguous(), *(x.contiguous() for x in expand(*keys)))
        merge_to(out, out, block.forward(qkv, window=EVERYTHING, scale=scale))


def over_ranks(partial: Partial, group: dist.ProcessGroup | None) -> Partial:
    """The partials of all ranks over rows that every rank has.

    Communication: one all-gather of the partials, in their dtype.
    """
    return partial if group is None else merged(all_gather(_joined(partial), group))


def merged(joined: Tensor) -> Partial:
    """Partials ``[n, T, H, V + 1]``, merged in order."""
    return reduce(merge, (Partial(x[..., :-1], x[..., -1]) for x in joined))


def _joined(partial: Partial) -> Tensor:
    return torch.cat((partial.output, partial.lse.unsqueeze(-1)), dim=-1)


def _nothing(q: Tensor, value_dim: int) -> Partial:
    """Partials over no key yet."""
    wide = wide_dtype(q.dtype)
    output = q.new_zeros(*q.shape[:2], value_dim, dtype=wide)
    return Partial(output, q.new_full(q.shape[:2], float("-inf"), dtype=wide))


def as_they_are(keys: Tensor, values: Tensor) -> tuple[Tensor, Tensor]:
    """The ``expand`` of keys and values that are in memory themselves."""
    return keys, values
