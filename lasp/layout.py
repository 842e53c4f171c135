"""Which tokens of which documents each context-parallel rank holds: a property of the batch.

Vocabulary (docs/notation.md):
    pack      documents laid end to end, padded once at the tail to S tokens
    run       a maximal interval of the pack that one rank holds contiguously
    fragment  a run cut at document borders
    order     how runs are chosen: contiguous, zigzag or fold

Example: two documents of 5 and 3 tokens over 2 ranks, zigzag (4 pieces of 2 tokens, rank r holds
pieces r and 2P - 1 - r)::

    pack      0 1 2 3 4 | 0 1 2        position within each document
    rank      0 0 1 1 1   1 0 0
    rank 0    runs (0, 2) (6, 8)       fragments: document 0 tokens 0:2, document 1 tokens 1:3
    rank 1    run  (2, 6)              fragments: document 0 tokens 2:5, document 1 tokens 0:1
"""

from __future__ import annotations

import operator
from bisect import bisect_right
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import accumulate, pairwise
from typing import Any, ClassVar, Literal, SupportsIndex, get_args

import torch
from torch import Tensor

from lasp._core.host_constants import to_device
from lasp.fold import WorkIndex, fold_runs
from lasp.runs import Fragment, Run, RunLink, contiguous_runs, cut_at_borders, zigzag_runs

__all__ = ["Fragment", "Order", "Run", "RunLink", "SequenceLayout"]
Order = Literal["contiguous", "zigzag", "fold"]


@dataclass(frozen=True)
class SequenceLayout:
    """Assignment of a packed batch to context-parallel ranks; equal on every rank.

    Pure host data computed from the lengths alone, without communication. Build it once per batch
    and hand it to every layer; derived tuples and per-device tensors are cached on the object.
    Operators trust it to be equal on every rank: comparing would cost a collective.

    Args:
        document_lengths: tokens of each document, in pack order; zero is allowed.
        num_ranks: P, the size of the context-parallel group.
        order: ``contiguous`` (one run a rank), ``zigzag`` (pieces r and 2P - 1 - r: balanced for
            one document, Megatron's causal order) or ``fold`` (balanced for any pack).

    Raises:
        ValueError: naming the argument, if a length is negative, all are zero, ``num_ranks`` is
            below 1 or the order is unknown.

    Attributes:
        lengths_tensor: the lengths ``[N]``, int64, on the CPU: for compiled graphs data, not code.
    """

    lengths_tensor: ClassVar[Tensor]  # each layout has its own; no field, so not compared

    document_lengths: tuple[int, ...]
    num_ranks: int
    order: Order = "contiguous"

    def __post_init__(self) -> None:
        lengths = _integers("document_lengths", self.document_lengths)
        object.__setattr__(self, "document_lengths", lengths)
        object.__setattr__(self, "num_ranks", _integers("num_ranks", [self.num_ranks])[0])
        if any(length < 0 for length in lengths):
            raise ValueError(
                f"document_lengths must be >= 0, got {min(lengths)}: give one length per document,"
                " not cumulative lengths (see SequenceLayout.from_cu_seqlens)"
            )
        if sum(lengths) == 0:
            raise ValueError(
                f"document_lengths must hold at least one token, got {len(lengths)} documents of"
                " zero tokens in all: drop empty batches before building a layout"
            )
        if self.num_ranks < 1:
            raise ValueError(
                f"num_ranks must be >= 1, got {self.num_ranks}: use cp_group.size(), or 1 locally"
            )
        if self.order not in get_args(Order):
            raise ValueError(f"order must be one of {get_args(Order)}, got {self.order!r}")
        self._make_lengths_tensor()

    def _make_lengths_tensor(self) -> None:
        with torch.inference_mode(False):  # a layout made in inference mode may be trained with
            tensor = torch.tensor(self.document_lengths, dtype=torch.int64, device="cpu")
        object.__setattr__(self, "lengths_tensor", tensor)

    @classmethod
    def from_cu_seqlens(
        cls, cu_seqlens: Sequence[int] | Tensor, num_ranks: int, order: Order = "contiguous"
    ) -> SequenceLayout:
        """Layout of a pack given as cumulative lengths (0 first, never falling).

        A CUDA tensor is copied to the host, once: build the layout in the data loader if you can.
        """
        if isinstance(cu_seqlens, Tensor):
            cu_seqlens = cu_seqlens.tolist()
        borders = _integers("cu_seqlens", cu_seqlens)
        lengths = [b - a for a, b in pairwise(borders)]
        if not borders or borders[0] != 0 or any(length < 0 for length in lengths):
            raise ValueError(
                f"cu_seqlens must start at 0 and never fall, got {borders[:8]}...: pass cumulative"
                " document lengths, shape [N + 1]"
            )
        return cls(tuple(lengths), num_ranks, order)

    # ---- sizes -------------------------------------------------------------------------------

    @property
    def num_documents(self) -> int:
        """N, the padding not counted."""
        return len(self.document_lengths)

    @cached_property
    def num_real_tokens(self) -> int:
        """Tokens of the documents, without padding."""
        return sum(self.document_lengths)

    @cached_property
    def num_tokens(self) -> int:
        """S: tokens of the padded pack, a multiple of P (2P for zigzag)."""
        multiple = self.num_ranks * (2 if self.order == "zigzag" and self.num_ranks > 1 else 1)
        return -(-self.num_real_tokens // multiple) * multiple

    @property
    def num_padding_tokens(self) -> int:
        """Tokens of the padding document at the tail of the pack."""
        return self.num_tokens - self.num_real_tokens

    @property
    def num_local_tokens(self) -> int:
        """T = S / P, the same on every rank."""
        return self.num_tokens // self.num_ranks

    @cached_property
    def borders(self) -> tuple[int, ...]:
        """Cumulative document lengths, 0 first; the last document is the padding, if any."""
        lengths = self.document_lengths + (self.num_padding_tokens,) * (self.num_padding_tokens > 0)
        return tuple(accumulate(lengths, initial=0))

    # ---- who holds what ----------------------------------------------------------------------

    @cached_property
    def _runs(self) -> tuple[tuple[Run, ...], ...]:
        if self.order == "fold":
            plan = fold_runs(self.borders, self.num_ranks)
        elif self.order == "zigzag":
            plan = zigzag_runs(self.num_tokens, self.num_ranks)
        else:
            plan = contiguous_runs(self.num_tokens, self.num_ranks)
        return tuple(tuple(Run(*run) for run in runs) for runs in plan)

    def runs(self, rank: int) -> tuple[Run, ...]:
        """Runs of ``rank``, sorted by pack position; its tokens are these runs end to end."""
        self._check_rank(rank)
        return self._runs[rank]

    @cached_property
    def _fragments(self) -> tuple[tuple[Fragment, ...], ...]:
        return tuple(tuple(cut_at_borders(runs, self.borders)) for runs in self._runs)

    def fragments(self, rank: int) -> tuple[Fragment, ...]:
        """Fragments of ``rank`` in the order of its tokens; never empty ones."""
        self._check_rank(rank)
        return self._fragments[rank]

    @cached_property
    def run_links(self) -> tuple[RunLink, ...]:
        """All runs of all ranks in pack order: predecessor of ``run_links[j]`` is ``[j - 1]``."""
        starts = sorted({a for a, b in pairwise(self.borders) if b > a})
        links: list[RunLink] = []
        for rank, runs in enumerate(self._runs):
            for index, (start, stop) in enumerate(runs):
                after = bisect_right(starts, start)  # document starts at or before the first token
                continues = starts[after - 1] != start
                passes = continues and (after == len(starts) or starts[after] >= stop)
                links.append(RunLink(rank, index, start, stop, continues, passes))
        return tuple(sorted(links, key=lambda link: link.start))

    def work(self, rank: int) -> int:
        """Causal attention work of ``rank`` in (query, key) pairs, padding included."""
        return sum(self._work_index.between(*run) for run in self.runs(rank))

    @cached_property
    def _work_index(self) -> WorkIndex:
        return WorkIndex(self.borders)

    # ---- tensors -----------------------------------------------------------------------------

    def shard(self, x: Tensor, rank: int, *, dim: int = 0, pad_value: float = 0.0) -> Tensor:
        """Tokens of ``rank`` out of the whole pack.

        Args:
            x: ``[..., S, ...]``, with or without the padding tokens along ``dim``.
            rank: rank within the context-parallel group.
            dim: the token dimension.
            pad_value: what the padding tokens hold when ``x`` comes unpadded.

        Returns:
            ``[..., T, ...]``; a view where the rank holds one run without padding.

        Gradients: flow to ``x``.
        """
        if x.shape[dim] not in (self.num_real_tokens, self.num_tokens):
            raise ValueError(
                f"x must have {self.num_real_tokens} tokens (or {self.num_tokens} with padding)"
                f" along dim {dim}, got shape {tuple(x.shape)}: is this the layout of this batch?"
            )
        pieces = []
        for start, stop in self.runs(rank):
            end = min(stop, x.shape[dim])
            if end > start:
                pieces.append(x.narrow(dim, start, end - start))
            if stop > max(end, start):
                shape = list(x.shape)
                shape[dim] = stop - max(end, start)
                pieces.append(x.new_full(shape, pad_value))
        return pieces[0] if len(pieces) == 1 else torch.cat(pieces, dim)

    def unshard(self, parts: Sequence[Tensor], *, dim: int = 0) -> Tensor:
        """The pack, without padding, out of every rank's tokens (inverse of :meth:`shard`).

        Args:
            parts: P tensors ``[..., T, ...]``, in rank order.
            dim: the token dimension.

        Returns:
            ``[..., sum(document_lengths), ...]``.
        """
        if len(parts) != self.num_ranks:
            raise ValueError(f"parts must hold {self.num_ranks} tensors, got {len(parts)}")
        for rank, part in enumerate(parts):
            if part.shape[dim] != self.num_local_tokens:
                raise ValueError(
                    f"parts[{rank}] must have {self.num_local_tokens} tokens along dim {dim},"
                    f" got shape {tuple(part.shape)}"
                )
        pieces: list[Tensor] = []
        taken = [0] * self.num_ranks
        for link in self.run_links:
            length = link.stop - link.start
            pieces.append(parts[link.rank].narrow(dim, taken[link.rank], length))
            taken[link.rank] += length
        return torch.cat(pieces, dim).narrow(dim, 0, self.num_real_tokens)

    def cu_seqlens(self, rank: int, device: torch.device | str = "cpu") -> Tensor:
        """Cumulative fragment lengths of ``rank``: int32 ``[fragments + 1]``, cached per device."""
        fragments = self.fragments(rank)
        ends = [f.offset for f in fragments] + [self.num_local_tokens]
        return self._cached(
            "cu_seqlens", rank, device, lambda: torch.tensor(ends, dtype=torch.int32)
        )

    def position_ids(self, rank: int, device: torch.device | str = "cpu") -> Tensor:
        """Position of each token within its document: int64 ``[T]``, cached per device."""

        def build() -> Tensor:
            return torch.cat([torch.arange(f.start, f.stop) for f in self.fragments(rank)])

        return self._cached("position_ids", rank, device, build)

    # ---- plumbing ----------------------------------------------------------------------------

    @cached_property
    def _tensors(self) -> dict[tuple[str, int, torch.device], Tensor]:
        return {}

    def _cached(self, name: str, rank: int, device: torch.device | str, build: Any) -> Tensor:
        if (key := (name, rank, torch.device(device))) not in self._tensors:
            with torch.inference_mode(False):  # remembered, and used in training too
                self._tensors[key] = to_device(build(), key[2], wait=True)
        return self._tensors[key]

    def _check_rank(self, rank: int) -> None:
        if not 0 <= rank < self.num_ranks:
            raise ValueError(
                f"rank must be in [0, {self.num_ranks}), got {rank}: pass the rank within the"
                " context-parallel group, not the global rank"
            )

    def __getstate__(self) -> dict[str, Any]:
        """Pickle the definition only; what is derived is rebuilt where it is needed."""
        return {name: getattr(self, name) for name in ("document_lengths", "num_ranks", "order")}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self._make_lengths_tensor()


def _integers(name: str, values: Iterable[SupportsIndex]) -> tuple[int, ...]:
    try:
        return tuple(operator.index(value) for value in values)
    except TypeError:
        raise ValueError(f"{name} must be integers, got {values!r}") from None
