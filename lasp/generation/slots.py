"""Slots of a cache on the host: which are in use, how long, and which rank holds which keys."""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any

PADDING = -1  # the slot of tokens that nobody asked for, which fill up a batch
BLOCK = 64  # tokens in a row that one rank stores, of those that come one by one


@dataclass
class Slot:
    """One sequence.

    Attributes:
        held: keys that each rank holds, ``[P]``.
        stops: stretches of tokens by position: one past the last token of each, ascending.
        ranks: the rank that holds the keys of each stretch.
    """

    held: list[int]
    stops: list[int] = field(default_factory=list)
    ranks: list[int] = field(default_factory=list)

    @property
    def length(self) -> int:
        """Tokens of the sequence so far."""
        return self.stops[-1] if self.stops else 0

    def add(self, rank: int, count: int) -> None:
        """The next ``count`` tokens, whose keys ``rank`` holds."""
        length = self.length + count
        if self.ranks and self.ranks[-1] == rank:
            self.stops[-1] = length
        else:
            self.stops.append(length)
            self.ranks.append(rank)
        self.held[rank] += count

    def truncate(self, length: int) -> None:
        """Forget the tokens from ``length`` on: on each rank they are the last ones."""
        keep = bisect_left(self.stops, length) + 1 if length else 0
        self.stops, self.ranks = self.stops[:keep], self.ranks[:keep]
        if keep:
            self.stops[-1] = length
        self.held = [0] * len(self.held)
        for start, stop, rank in zip((0, *self.stops), self.stops, self.ranks):
            self.held[rank] += stop - start

    def next_rank(self) -> int:
        """The rank that stores the next few tokens: the last one up to a block, then the emptiest.

        The same on every rank, without communication.
        """
        if self.ranks:
            start = self.stops[-2] if len(self.stops) > 1 else 0
            if self.stops[-1] - start < BLOCK:
                return self.ranks[-1]
        return min(range(len(self.held)), key=self.held.__getitem__)

    def copy(self) -> Slot:
        """Another one with the same tokens."""
        return Slot([*self.held], [*self.stops], [*self.ranks])


class SlotTable:
    """All slots of a cache, equal on every rank.

    Args:
        num_slots: sequences that there is memory for.
        num_ranks: P, over which the keys of each sequence are spread.
        rank_tokens: keys of a sequence that a rank has memory for.
        max_tokens: tokens of a sequence that there is memory for.
    """

    def __init__(self, num_slots: int, num_ranks: int, rank_tokens: int, max_tokens: int) -> None:
        self.num_ranks, self.rank_tokens, self.max_tokens = num_ranks, rank_tokens, max_tokens
        self._slots: list[Slot | None] = [None] * num_slots
        self.drafts: dict[int, int] = {}  # slots with drafted tokens, and how many of them
        self.begun: set[int] = set()  # slots that a step changes, or has changed and then failed

    def __len__(self) -> int:
        return len(self._slots)

    def __getitem__(self, slot: int) -> Slot:
        """A slot in use."""
        found = self._slots[slot]
        assert found is not None
        return found

    def used(self) -> list[int]:
        """Slots in use, ascending."""
        return [index for index, slot in enumerate(self._slots) if slot is not None]

    def take(self, count: int) -> list[int]:
        """So many free slots, now in use and empty; ValueError if there are not as many."""
        free = [index for index, slot in enumerate(self._slots) if slot is None]
        if count > len(free):
            raise ValueError(
                f"the cache must have {count} free slots, got {len(free)} of {len(self)}: free"
                " some, or make a cache of more num_slots"
            )
        for index in free[:count]:
            self._slots[index] = Slot([0] * self.num_ranks)
        return free[:count]

    def put(self, slot: int, value: Slot) -> None:
        """Set what a slot in use holds."""
        self._slots[slot] = value

    def free(self, slot: int) -> None:
        """Give a slot back."""
        self.check([slot])
        self._slots[slot] = None
        self.drafts.pop(slot, None)
        self.begun.discard(slot)

    def check(self, slots: Iterable[Any]) -> None:
        """Raise ValueError unless these are slots in use."""
        for slot in slots:
            if type(slot) is not int or not 0 <= slot < len(self) or self._slots[slot] is None:
                raise ValueError(
                    f"slots must be in use, of {self.used()}, got {slot!r}: take one by cache.add()"
                )

    def check_whole(self, slots: Sequence[int]) -> None:
        """Raise ValueError unless these are slots in use, without a part of a step that failed."""
        self.check(slots)
        if half := [slot for slot in slots if slot in self.begun]:
            raise ValueError(
                f"slots must hold whole steps, got {half}, whose last step failed after some layers"
                " had changed their states: free them, and read their texts again"
            )

    def check_step(self, slots: Sequence[int], counts: Sequence[int], *, draft: bool) -> None:
        """Raise ValueError unless these slots can take so many new tokens each."""
        real = [slot for slot in slots if slot != PADDING]
        self.check_whole(real)
        if len(set(real)) != len(real):
            raise ValueError(f"slots must differ, got {list(slots)}: give a slot its tokens once")
        if drafted := [slot for slot in self.drafts if draft or slot in real]:
            raise ValueError(
                f"drafted tokens of slots {drafted} must be settled before the next step, got a"
                " step: call cache.accept with how many of them are kept"
            )
        for slot, count in zip(slots, counts):
            if slot != PADDING and self[slot].length + count > self.max_tokens:
                raise ValueError(
                    f"a slot must hold at most max_tokens {self.max_tokens}, got"
                    f" {self[slot].length} tokens in slot {slot} and {count} more: make a cache of"
                    " more max_tokens"
                )
