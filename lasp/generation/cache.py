"""What a model must remember of its sequences: a state a lightning layer, keys a softmax layer.

Lightning layers keep one d x d state a head and slot, whatever the length; every rank of the
context-parallel group has it. Softmax layers keep keys and values, or latents, of every token; each
rank holds those of some of the tokens. Which, the slots know (:mod:`lasp.generation.slots`): the
ranks that a long prompt was cut over hold their parts of it, and blocks of tokens that come one by
one go to the rank that holds the fewest.
"""

from __future__ import annotations

import weakref
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

from lasp._core.checks import check_part, check_sizes
from lasp._core.dtypes import wide_dtype
from lasp.generation import files
from lasp.generation.files import CacheShape
from lasp.generation.slots import PADDING, Slot, SlotTable
from lasp.layers.lightning_attention import LightningAttention
from lasp.lightning.attention import lightning_attention
from lasp.sequence.layout import SequenceLayout


class KeyMemory(NamedTuple):
    """Keys of one softmax layer on this rank.

    Attributes:
        keys: ``[num_slots * rank_tokens + 1, Hkv, D]``: slot after slot; the last row takes what is
            not to be kept.
        values: likewise, ``[..., Hkv, V]``; of latents the first R elements of the keys.
        rank_tokens: rows of a slot.
    """

    keys: Tensor
    values: Tensor
    rank_tokens: int

    @property
    def is_latent(self) -> bool:
        """Whether values are a part of the keys."""
        return self.values.data_ptr() == self.keys.data_ptr()

    def store(self, rows: Tensor, keys: Tensor, values: Tensor | None) -> None:
        """Write tokens ``[T, Hkv, D]`` to ``rows``, int64 ``[T]``."""
        self.keys.index_copy_(0, rows, keys)
        if values is not None:
            self.values.index_copy_(0, rows, values)

    def read(self, slot: int, start: int, stop: int) -> tuple[Tensor, Tensor]:
        """Keys and values of a slot: rows [start, stop) of those that this rank holds."""
        first = slot * self.rank_tokens
        rows = slice(first + start, first + stop)
        return self.keys[rows], self.values[rows]


class DraftedLayer(NamedTuple):
    """Keys and values ``[T, H, d]`` that drafted tokens would add to the states of a layer."""

    attention: LightningAttention
    k: Tensor
    v: Tensor


class GenerationCache:
    """States and keys of up to ``num_slots`` sequences on one rank.

    Made by :meth:`lasp.hybrid.HybridModel.new_cache`. All ranks call its methods alike.

    Args:
        shape: of the model's layers.
        model: whose sequences these are; not kept alive.
        num_slots: sequences at a time.
        max_tokens: of one sequence, prompt and new tokens together.
        cp_group: the ranks that the keys of each sequence are spread over. None: one rank.
        device: of the memory.

    Raises:
        ValueError: naming the argument.
    """

    def __init__(
        self,
        shape: CacheShape,
        model: object,
        *,
        num_slots: int,
        max_tokens: int,
        cp_group: dist.ProcessGroup | None,
        device: torch.device,
    ) -> None:
        check_sizes(num_slots=num_slots, max_tokens=max_tokens)
        self.model = weakref.ref(model)
        self.shape, self.cp_group, self.device = shape, cp_group, device
        self.rank = 0 if cp_group is None else cp_group.rank()
        rank_tokens = max_tokens
        if shape.num_ranks > 1:  # parts of prompts differ by a few tokens from rank to rank
            rank_tokens = min(max_tokens, max_tokens // shape.num_ranks + max_tokens // 128 + 256)
        self.slots = SlotTable(num_slots, shape.num_ranks, rank_tokens, max_tokens)
        self.layers: tuple[Tensor | KeyMemory, ...] = tuple(map(self._memory, shape.layers))
        self._drafted: tuple[Sequence[int], Sequence[int], list[DraftedLayer]] = ([], [], [])

    def _memory(self, layer: tuple[Any, ...]) -> Tensor | KeyMemory:
        """The memory of a layer: states ``[num_slots, H, K, V]``, or keys."""
        kind, heads, *dims = layer
        num_slots, rank_tokens, dtype = len(self.slots), self.slots.rank_tokens, self.shape.dtype
        if kind == "state":
            dtype = wide_dtype(dtype)
            return torch.zeros(num_slots, heads, *dims, dtype=dtype, device=self.device)
        rows = num_slots * rank_tokens + 1
        keys = torch.zeros(rows, heads, dims[0], dtype=dtype, device=self.device)
        if kind == "latent":
            return KeyMemory(keys, keys[..., : dims[1]], rank_tokens)
        return KeyMemory(keys, keys.new_zeros(rows, heads, dims[1]), rank_tokens)

    # ---- slots -------------------------------------------------------------------------------

    def add(self, count: int = 1) -> list[int]:
        """Take so many slots, for empty sequences.

        Raises:
            ValueError: if fewer are free.
        """
        check_sizes(0, count=count)
        taken = self.slots.take(count)
        for states in self._states():
            states[taken] = 0
        return taken

    def free(self, *slots: int) -> None:
        """Give slots back."""
        self.slots.check(slots)
        for slot in slots:
            self.slots.free(slot)

    def length(self, slot: int) -> int:
        """Tokens of a sequence so far, drafted ones left out."""
        self.slots.check([slot])
        return self.slots[slot].length - self.slots.drafts.get(slot, 0)

    def fork(self, slot: int) -> int:
        """Another slot with the same tokens, which then go on apart: a copy, exact at any length.

        Raises:
            ValueError: if the slot is not in use or has drafted tokens, or none is free.
        """
        self.check_settled([slot])
        (copy,) = self.slots.take(1)
        self.slots.put(copy, self.slots[slot].copy())
        count = self.slots[slot].held[self.rank]
        for memory in self.layers:
            if isinstance(memory, Tensor):
                memory[copy] = memory[slot]
                continue
            pairs = zip(memory.read(copy, 0, count), memory.read(slot, 0, count))
            for target, source in pairs:
                target.copy_(source)
        return copy

    def _states(self) -> list[Tensor]:
        return [memory for memory in self.layers if isinstance(memory, Tensor)]

    def check_settled(self, slots: Sequence[int]) -> None:
        """Raise ValueError unless these slots are in use and have no drafted tokens."""
        self.slots.check_whole(slots)
        if drafted := [slot for slot in slots if slot in self.slots.drafts]:
            raise ValueError(
                f"slots must have no drafted tokens, got {drafted}: call cache.accept first"
            )

    # ---- drafted tokens ------------------------------------------------------------------------

    def keep_draft(
        self, slots: Sequence[int], counts: Sequence[int], layers: list[DraftedLayer]
    ) -> None:
        """Note what a step with drafted tokens has left, for :meth:`accept`."""
        drafts = {slot: n for slot, n in zip(slots, counts) if slot != PADDING}
        self.slots.drafts = drafts
        self._drafted = (slots, counts, layers)

    @torch.no_grad()
    def accept(self, kept: Mapping[int, int]) -> None:
        """Keep the first drafted tokens of each slot and forget the others, exactly.

        Lightning states take the kept tokens in; keys of the others are dropped.

        Args:
            kept: for each slot of the last step, which drafted, how many of its tokens stay.

        Raises:
            ValueError: if these are other slots, or more tokens than were drafted.
        """
        check_part("kept", kept, Mapping)
        slots, counts, layers = self._drafted
        drafts = self.slots.drafts
        if kept.keys() != drafts.keys() or any(not 0 <= kept[s] <= drafts[s] for s in drafts):
            raise ValueError(
                f"kept must say for each slot how many of its drafted tokens {drafts} stay, got"
                f" {dict(kept)}"
            )
        self.slots.check_whole([*drafts])
        starts = [sum(counts[:index]) for index in range(len(slots))]
        some = [(slot, start) for slot, start in zip(slots, starts) if kept.get(slot)]
        lengths = tuple(kept[slot] for slot, _ in some)
        rows = [start + i for (_, start), n in zip(some, lengths) for i in range(n)]
        memories = self._states() if some else []
        self.slots.begun.update(drafts)
        for states, (attention, k, v) in zip(memories, layers):
            k, v = k[rows], v[rows]
            index = [slot for slot, _ in some]
            _, final = lightning_attention(
                *(k, k, v, attention.rates),
                layout=SequenceLayout(lengths, num_ranks=1),
                initial_state=states[index],
                impl=attention.impl,
            )
            assert final is not None
            states[index] = final
        for slot, count in drafts.items():
            self.slots[slot].truncate(self.slots[slot].length - count + kept[slot])
        self.slots.begun.difference_update(drafts)
        self.slots.drafts, self._drafted = {}, ([], [], [])

    # ---- to disk and back ----------------------------------------------------------------------

    def save(self, folder: Path | str) -> None:
        """Write the slots in use to ``folder``, a file a rank; no communication.

        Raises:
            ValueError: if a slot has drafted tokens.
        """
        used = self.slots.used()
        self.check_settled(used)
        files.save(
            Path(folder) / self._file, self.shape, {slot: self._saved(slot) for slot in used}
        )

    def load(self, folder: Path | str) -> None:
        """Read what :meth:`save` wrote into this cache, whose slots must be free.

        Communication: one gather of objects, so that all ranks refuse or none.

        Raises:
            ValueError: if they are not, the file is missing or of other layers, dtype or number of
                ranks, or does not fit; on every rank.
        """
        path = Path(folder) / self._file
        found = files.load(path, self.shape, self.slots, self.device, self.cp_group)
        for slot, (held, stops, ranks, tensors) in found.items():
            self.slots.put(slot, Slot(held, stops, ranks))
            for memory, saved in zip(self.layers, tensors):
                targets: tuple[Tensor, ...]
                if isinstance(memory, KeyMemory):
                    targets = memory.read(slot, 0, held[self.rank])
                else:
                    targets = (memory[slot],)
                for target, source in zip(targets, saved):  # of latents keys alone
                    target.copy_(source)

    @property
    def _file(self) -> str:
        return f"cache-{self.rank}-of-{self.shape.num_ranks}.pt"

    def _saved(self, slot: int) -> files.SavedSlot:
        """What a slot holds on this rank, in memory of its own."""
        of, tensors = self.slots[slot], []
        for memory in self.layers:
            if isinstance(memory, Tensor):
                tensors.append([memory[slot].clone()])
                continue
            keys, values = memory.read(slot, 0, of.held[self.rank])
            tensors.append([keys.clone()] if memory.is_latent else [keys.clone(), values.clone()])
        return of.held, of.stops, of.ranks, tensors
