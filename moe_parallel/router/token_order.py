"""Where the tokens of every rank stand in the global order of the batch.

Capacity drops the same tokens however a batch is split, so the router must know which token comes
first. A rank's tokens are segments of the global order laid end to end; what no segment covers is
padding.

Example: 8 tokens over 2 ranks in zigzag order, rank 0 with two rows of padding at its tail::

    global position   0 1 2 3 4 5 6 7
    rank              0 0 1 1 1 1 0 0

    TokenOrder(
        segments=(
            (TokenSegment(start=0, offset=0, length=2), TokenSegment(start=6, offset=2, length=2)),
            (TokenSegment(start=2, offset=0, length=4),),
        ),
        rows_per_rank=(6, 4),
    )
"""

from __future__ import annotations

import hashlib
from array import array
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import accumulate, pairwise
from reprlib import repr as short_repr
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

from lasp._core.cache import remembered
from lasp._core.checks import integers
from lasp._core.host_constants import to_device


class TokenSegment(NamedTuple):
    """Consecutive tokens of the global order on one rank.

    Attributes:
        start: global position of the first token. Positions only order the tokens; gaps are fine.
        offset: row of the first token on its rank.
        length: number of tokens; zero is allowed.
    """

    start: int
    offset: int
    length: int


@dataclass(frozen=True)
class TokenOrder:
    """The segments of every rank of the token group; host data, equal on every rank.

    Build it once per batch and hand it to every layer, on all ranks alike: the object remembers its
    device tensors and that the ranks compared it. A rank that built it anew would wait for a
    comparison that the others have behind them.

    Args:
        segments: for each rank of the token group, in rank order, its segments.
        rows_per_rank: rows each rank passes to the layer, padding included.

    Raises:
        ValueError: if the two differ in length, a segment leaves its rank's rows, or two segments
            overlap, on a rank or in the global order.
    """

    segments: tuple[tuple[TokenSegment, ...], ...]
    rows_per_rank: tuple[int, ...]

    def __post_init__(self) -> None:
        # A rank's segments are kept by global position: tokens are routed in that order.
        try:
            segments = tuple(
                tuple(sorted(TokenSegment(*segment) for segment in of_rank if segment[2] != 0))
                for of_rank in self.segments
            )
        except (TypeError, IndexError):
            raise ValueError(
                "segments must hold (start, offset, length) of each rank, got"
                f" {short_repr(self.segments)}"
            ) from None
        object.__setattr__(self, "segments", segments)
        rows_per_rank = integers("rows_per_rank", self.rows_per_rank)
        if bool in map(type, self.rows_per_rank):
            raise ValueError(f"rows_per_rank must be integers, got {self.rows_per_rank}")
        object.__setattr__(self, "rows_per_rank", rows_per_rank)
        if not segments or len(segments) != len(self.rows_per_rank):
            raise ValueError(
                "segments and rows_per_rank must hold one entry for each rank of the token group,"
                f" got {len(segments)} and {len(self.rows_per_rank)}"
            )
        for rank, (rank_segments, rows) in enumerate(zip(segments, self.rows_per_rank)):
            _check_disjoint(((s.offset, s.length) for s in rank_segments), f"rows of rank {rank}")
            for segment in rank_segments:
                _, offset, length = segment
                if length < 0 or offset < 0 or offset + length > rows:
                    raise ValueError(
                        f"segments of rank {rank} must lie in its {rows} rows, got {segment}"
                    )
        every = (segment for of_rank in segments for segment in of_rank)
        _check_disjoint(((s.start, s.length) for s in every), "global positions")

    @classmethod
    def contiguous(cls, tokens_per_rank: Sequence[int]) -> TokenOrder:
        """Rank 0's tokens first, then rank 1's, and so on; no padding."""
        rows = integers("tokens_per_rank", tokens_per_rank)
        if min(rows, default=0) < 0:
            raise ValueError(f"tokens_per_rank must be >= 0, got {list(rows)}")
        starts = accumulate(rows, initial=0)
        segments = tuple((TokenSegment(start, 0, n),) for start, n in zip(starts, rows))
        return cls(segments, tuple(tokens_per_rank))

    @property
    def num_ranks(self) -> int:
        """Ranks of the token group."""
        return len(self.segments)

    @cached_property
    def num_tokens(self) -> int:
        """N: routed tokens on all ranks, padding not counted."""
        return sum(self._tokens_per_rank)

    def num_local_tokens(self, rank: int) -> int:
        """T: routed tokens of a rank."""
        return self._tokens_per_rank[rank]

    @cached_property
    def _tokens_per_rank(self) -> tuple[int, ...]:
        return tuple(sum(segment.length for segment in own) for own in self.segments)

    @cached_property
    def max_segments(self) -> int:
        """J: most segments of any rank, at least 1."""
        return max(1, *(len(rank_segments) for rank_segments in self.segments))

    @cached_property
    def max_local_tokens(self) -> int:
        """Most routed tokens of any rank."""
        return max(self._tokens_per_rank)

    @cached_property
    def is_even(self) -> bool:
        """Whether every rank holds as many tokens, more than none."""
        return 0 < self.max_local_tokens * self.num_ranks == self.num_tokens

    # ---- do the ranks agree, see moe_parallel.router.checks ----

    @cached_property
    def fingerprint(self) -> int:
        """63 bits that depend on the order alone: the same on every rank that holds it."""
        numbers = array("q", [self.num_ranks, *self.rows_per_rank])
        for rank, rank_segments in enumerate(self.segments):
            for segment in rank_segments:
                numbers.extend((rank, *segment))
        digest = hashlib.blake2b(numbers.tobytes(), digest_size=8).digest()
        return int.from_bytes(digest, "little") >> 1

    @cached_property
    def agreed_groups(self) -> set[tuple[dist.ProcessGroup, bool | None]]:
        """Token groups whose ranks were found to hold this order, all of them, and to train."""
        return set()

    def is_agreed(self, token_group: dist.ProcessGroup | None) -> bool:
        """Whether the ranks of a group were found to hold this order."""
        return any(group is token_group for group, _ in self.agreed_groups)

    # ---- rows <-> tokens -----------------------------------------------------------------------

    def take(self, rows: Tensor, rank: int) -> Tensor:
        """Routed tokens of a rank, ``[T, ...]``, by global position, out of all its rows."""
        if self._are_in_place[rank]:
            return rows
        return rows.index_select(0, self._rows(rank, rows.device))

    def put(self, tokens: Tensor, rank: int) -> Tensor:
        """Inverse of :meth:`take`; padding rows are zero."""
        if self._are_in_place[rank]:
            return tokens
        rows = tokens.new_zeros(self.rows_per_rank[rank], *tokens.shape[1:])
        return rows.index_copy(0, self._rows(rank, tokens.device), tokens)

    @cached_property
    def _are_in_place(self) -> tuple[bool, ...]:
        """For each rank whether its rows are its routed tokens."""
        found = []
        for own, rows in zip(self.segments, self.rows_per_rank):
            ends = [*accumulate((s.length for s in own), initial=0)]
            found.append([*(s.offset for s in own), rows] == ends)
        return tuple(found)

    def _rows(self, rank: int, device: torch.device) -> Tensor:
        def build() -> Tensor:
            ranges = [torch.arange(at, at + n, device="cpu") for _, at, n in self.segments[rank]]
            return torch.cat([torch.zeros(0, dtype=torch.int64, device="cpu"), *ranges])

        return self._cached("rows", rank, device, build)

    # ---- what the router asks, and only reads --------------------------------------------------

    def _segment_bounds(self, rank: int, device: torch.device) -> Tensor:
        """First token of each segment of a rank and T at the end: int64 ``[J + 1]``."""

        def build() -> Tensor:
            ends = list(accumulate((s.length for s in self.segments[rank]), initial=0))
            padded = ends + ends[-1:] * (self.max_segments + 1 - len(ends))
            return torch.tensor(padded, device="cpu")

        return self._cached("bounds", rank, device, build)

    def _segments_by_position(self, device: torch.device) -> Tensor:
        """Index of every segment into ``[ranks * J]``, by global position: int64.

        Missing segments of ranks with fewer than J come last.
        """

        def build() -> Tensor:
            width = self.max_segments
            starts = {
                rank * width + index: segment.start
                for rank, rank_segments in enumerate(self.segments)
                for index, segment in enumerate(rank_segments)
            }
            indices = range(self.num_ranks * width)
            by_start = sorted(indices, key=lambda i: (i not in starts, starts.get(i, 0)))
            return torch.tensor(by_start, device="cpu")

        return self._cached("by_position", 0, device, build)

    def _tokens_by_position(self, device: torch.device) -> Tensor:
        """Index of every token into ``[ranks * max_local_tokens]``, by position: int64 ``[N]``."""

        def build() -> Tensor:
            pieces = []
            for rank, rank_segments in enumerate(self.segments):
                first = rank * self.max_local_tokens
                for segment in rank_segments:
                    pieces.append((segment.start, first, segment.length))
                    first += segment.length
            ranges = [torch.arange(at, at + n, device="cpu") for _, at, n in sorted(pieces)]
            return torch.cat([torch.zeros(0, dtype=torch.int64, device="cpu"), *ranges])

        return self._cached("tokens", 0, device, build)

    # ---- plumbing ------------------------------------------------------------------------------

    @cached_property
    def _tensors(self) -> dict[tuple[str, int, torch.device], Tensor]:
        return {}

    def _cached(
        self, name: str, rank: int, device: torch.device, build: Callable[[], Tensor]
    ) -> Tensor:
        return remembered(self._tensors, (name, rank, device), lambda: to_device(build(), device))

    def __getstate__(self) -> dict[str, Any]:
        """Pickle the definition only; the rest belongs to this process."""
        return {"segments": self.segments, "rows_per_rank": self.rows_per_rank}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)


def to_host(x: Tensor) -> Callable[[], Tensor]:
    """Start to copy to the host; what is returned waits for the copy, and for nothing behind it.

    Raises:
        RuntimeError: while a CUDA graph is captured, in which nobody waits.
    """
    if x.device.type != "cuda":
        return lambda: x
    if torch.cuda.is_current_stream_capturing():
        raise RuntimeError(
            "experts must not need counts of rows on the host while a CUDA graph is captured: use"
            " bfloat16 and static_shapes, or pad_to_capacity, or on one rank few rows an expert"
            " without capacity_factor, max_rows and overlap_groups"
        )
    host = torch.empty(x.shape, dtype=x.dtype, device="cpu", pin_memory=True)
    host.copy_(x, non_blocking=True)
    copied = torch.cuda.Event()
    copied.record(torch.cuda.current_stream(x.device))

    def wait() -> Tensor:
        copied.synchronize()
        return host

    return wait


def _check_disjoint(intervals: Any, what: str) -> None:
    for (start, length), (after, _) in pairwise(sorted(intervals)):
        if start + length > after:
            raise ValueError(
                f"segments must not overlap, got {what} [{start}, {start + length}) and one from"
                f" {after}: each token belongs to one rank, once"
            )
