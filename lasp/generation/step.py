"""One step of a model over new tokens of some slots: whole prompts, parts of them, single tokens.

Steps with few new tokens a slot run whole on every rank, so that lightning states, which every rank
has, need no communication. Longer ones are cut over the ranks as training batches are: states
travel by LASP+, keys of the new tokens by the ring, and a document is spread evenly.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cached_property, lru_cache
from itertools import accumulate
from typing import NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

from lasp._core.collectives import all_gather
from lasp._core.host_constants import to_device
from lasp.generation.cache import DraftedLayer, GenerationCache
from lasp.generation.slots import PADDING
from lasp.sequence.layout import Order, SequenceLayout

FEW = 16  # new tokens a slot: up to here a step runs whole on every rank


class CachedRows(NamedTuple):
    """Rows of a step that meet the same keys.

    Attributes:
        slot: whose keys on this rank they are.
        keys: how many of them the last row sees, those that this step stores among them.
        start: first row. In a step that is cut, of its pack without padding.
        stop: one past the last row.
        causal: whether each row before the last one sees one key less than the next.
    """

    slot: int
    keys: int
    start: int
    stop: int
    causal: bool


@dataclass(frozen=True)
class CacheStep:
    """What a step is besides its tokens; host data and small tensors on the device.

    Attributes:
        cache: whose sequences it continues.
        slots: for each document of the step its slot, or ``PADDING``.
        counts: new tokens of each.
        starts: tokens that each had before.
        few: whether every rank holds all new tokens; else they are cut by ``layout``.
        layout: of the new tokens, over one rank or over those of the cache.
        rank: this one, within ``layout``.
        parts: which rank's keys the new tokens are, for each document in order: (rank, tokens).
        cached: rows by the keys that they meet on this rank.
        draft: whether states stay as they are until ``cache.accept``.
        every_token: whether logits of every new token are wanted, or of the last ones.
        rows: int64 ``[4, T]`` on the device, for each row its position, where its key is stored,
            its slot, and how many of the slot's keys on this rank it sees. The last two only if
            ``few``.
        drafted: filled by the layers of a draft.
    """

    cache: GenerationCache
    slots: tuple[int, ...]
    counts: tuple[int, ...]
    starts: tuple[int, ...]
    few: bool
    layout: SequenceLayout
    rank: int
    parts: tuple[tuple[tuple[int, int], ...], ...]
    cached: tuple[CachedRows, ...]
    draft: bool
    every_token: bool
    rows: Tensor
    drafted: list[DraftedLayer] = field(default_factory=list)

    @property
    def group(self) -> dist.ProcessGroup | None:
        """The ranks that the new tokens are cut over. None: they are whole."""
        return None if self.few else self.cache.cp_group

    @property
    def tokens_a_slot(self) -> int:
        """New tokens of each slot, if few and as many for all; else 0."""
        return self.counts[0] if self.few and min(self.counts) == max(self.counts) else 0

    @cached_property
    def slots_or_first(self) -> Tensor:
        """Slot of each document, the first one for padding: int64 ``[N]`` on the device."""
        return _on_device([[max(slot, 0) for slot in self.slots]], self.cache.device)[0]

    @cached_property
    def real_documents(self) -> Tensor | slice:
        """Which documents are no padding."""
        real = [row for row, slot in enumerate(self.slots) if slot != PADDING]
        if len(real) == len(self.slots):
            return slice(None)
        return _on_device([real], self.cache.device)[0]

    def begin(self) -> None:
        """Note that layers change the states of the slots from now on; not those of a draft."""
        if not self.draft:
            self.cache.slots.begun.update(self.slots)

    def commit(self) -> None:
        """Count the new tokens; after the layers have stored them."""
        table = self.cache.slots
        table.begun.difference_update(self.slots)
        for slot, parts in zip(self.slots, self.parts):
            if slot != PADDING:
                for rank, count in parts:
                    table[slot].add(rank, count)
        if self.draft:
            self.cache.keep_draft(self.slots, self.counts, self.drafted)

    def wanted_rows(self, hidden: Tensor) -> Tensor:
        """``[N, hidden]``, the last new token of each document, or every token; on every rank.

        Communication: where the step is cut one all-reduce of N rows, or an all-gather of all.
        """
        if self.every_token:
            if self.group is None:
                return hidden
            return self.layout.unshard(all_gather(hidden, self.group).unbind())
        if self.few:
            if len(hidden) == len(self.slots):
                return hidden
            ends = [end - 1 for end in accumulate(self.counts)]
            return hidden[_on_device([ends], self.cache.device)[0]]
        found = hidden.new_zeros(len(self.slots), hidden.shape[-1])
        here = {
            f.document: f.offset + f.stop - f.start - 1
            for f in self.layout.fragments(self.rank)
            if f.document < len(self.counts) and f.stop == self.counts[f.document]
        }
        if here:
            found[list(here)] = hidden[list(here.values())]
        if self.group is not None:
            dist.all_reduce(found, group=self.group)
        return found


def plan_step(
    cache: GenerationCache,
    slots: Sequence[int],
    counts: Sequence[int],
    *,
    draft: bool = False,
    every_token: bool = False,
) -> CacheStep:
    """Check a step and lay it out; nothing changes.

    Args:
        cache: whose sequences it continues.
        slots: of the documents, ``PADDING`` for those that leave no trace.
        counts: new tokens of each, at least one.
        draft: whether :meth:`GenerationCache.accept` decides how many stay.
        every_token: see :class:`CacheStep`.

    Raises:
        ValueError: naming the argument.
    """
    table = cache.slots
    if not slots or len(slots) != len(counts) or min(counts) < 1:
        raise ValueError(
            f"tokens must be given for every slot, at least one each, got {list(counts)} for slots"
            f" {slots}: leave a slot out of the step, or give it a token"
        )
    table.check_step(slots, counts, draft=draft)
    few = max(counts) <= FEW
    if draft and not few:
        raise ValueError(f"a draft must have at most {FEW} tokens a slot, got {max(counts)}")
    num_ranks = 1 if few else table.num_ranks
    layout = _layout(tuple(counts), num_ranks)
    rank = 0 if few else cache.rank
    parts = _few_parts(cache, slots, counts) if few else _cut_parts(counts, layout)
    for slot, of_slot in zip(slots, parts):
        _check_memory(cache, slot, of_slot)
    starts = tuple(0 if slot == PADDING else table[slot].length for slot in slots)
    firsts = accumulate(counts, initial=0)
    cached = []
    for slot, count, first, of_slot in zip(slots, counts, firsts, parts):
        mine = few and of_slot[0][0] == cache.rank
        keys = 0 if slot == PADDING else table[slot].held[cache.rank] + (count if mine else 0)
        cached.append(CachedRows(slot, keys, first, first + count, mine and count > 1))
    rows = _few_rows(cache, cached, starts, parts) if few else _cut_rows(cache, slots, layout)
    return CacheStep(
        *(cache, tuple(slots), tuple(counts), starts, few, layout, rank, parts, tuple(cached)),
        draft=draft,
        every_token=every_token,
        rows=_on_device(rows, cache.device),
    )


@lru_cache(maxsize=1024)
def _layout(counts: tuple[int, ...], num_ranks: int) -> SequenceLayout:
    order: Order = "contiguous" if num_ranks == 1 else "document_zigzag"
    return SequenceLayout(counts, num_ranks, order)


Parts = tuple[tuple[tuple[int, int], ...], ...]


def _few_parts(cache: GenerationCache, slots: Sequence[int], counts: Sequence[int]) -> Parts:
    """One rank a document, the one whose turn it is."""
    table = cache.slots
    return tuple(
        ((0 if slot == PADDING else table[slot].next_rank(), count),)
        for slot, count in zip(slots, counts)
    )


def _cut_parts(counts: Sequence[int], layout: SequenceLayout) -> Parts:
    """The ranks that compute the keys, in the order of the tokens."""
    parts: list[list[tuple[int, int, int]]] = [[] for _ in counts]
    for rank in range(layout.num_ranks):
        for f in layout.fragments(rank):
            if f.document < len(counts):
                parts[f.document].append((f.start, rank, f.stop - f.start))
    return tuple(tuple(part[1:] for part in sorted(of_slot)) for of_slot in parts)


def _check_memory(cache: GenerationCache, slot: int, parts: Sequence[tuple[int, int]]) -> None:
    if slot == PADDING:
        return
    held, most = [*cache.slots[slot].held], cache.slots.rank_tokens
    for rank, count in parts:
        held[rank] += count
    if max(held) > most:
        raise ValueError(
            f"max_tokens must leave each rank room for its keys, {most} of a slot, got {held} in"
            f" slot {slot}: make a cache of more max_tokens"
        )


def _few_rows(
    cache: GenerationCache,
    cached: Sequence[CachedRows],
    starts: Sequence[int],
    parts: Sequence[Sequence[tuple[int, int]]],
) -> list[list[int]]:
    """Position, place of the key, slot and keys seen of every row."""
    rows: list[list[int]] = [[], [], [], []]
    nowhere = len(cache.slots) * cache.slots.rank_tokens
    for of_slot, start, part in zip(cached, starts, parts):
        count = of_slot.stop - of_slot.start
        mine = of_slot.slot != PADDING and part[0][0] == cache.rank
        first = of_slot.slot * cache.slots.rank_tokens + of_slot.keys - count
        rows[0] += range(start, start + count)
        rows[1] += range(first, first + count) if mine else [nowhere] * count
        rows[2] += [of_slot.slot] * count
        rows[3] += [of_slot.keys - (count - 1 - i if mine else 0) for i in range(count)]
    return rows


def _cut_rows(cache: GenerationCache, slots: Sequence[int], layout: SequenceLayout) -> list[Tensor]:
    """Position and place of the key of every row of this rank."""
    table = cache.slots
    nowhere = len(table) * table.rank_tokens
    held: dict[int, int] = {}
    positions, places = [], []
    for f in layout.fragments(cache.rank):
        slot = slots[f.document] if f.document < len(slots) else PADDING
        start, count = (0 if slot == PADDING else table[slot].length), f.stop - f.start
        positions.append(torch.arange(start + f.start, start + f.stop))
        if slot == PADDING:
            places.append(torch.full((count,), nowhere))
            continue
        first = held.setdefault(slot, slot * table.rank_tokens + table[slot].held[cache.rank])
        places.append(torch.arange(first, first + count))
        held[slot] = first + count
    return [torch.cat(positions), torch.cat(places)]


def _on_device(rows: Sequence[Sequence[int]] | Sequence[Tensor], device: torch.device) -> Tensor:
    """``rows`` as one tensor, in one copy."""
    if isinstance(rows[0], Tensor):
        host = torch.stack(list(rows))  # type: ignore[arg-type]
    else:
        host = torch.tensor([[*row, *[0] * (len(row) % 2)] for row in rows])  # rows of 16 bytes
    return to_device(host, device)[:, : len(rows[0])]
