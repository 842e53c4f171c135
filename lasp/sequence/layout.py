"""Which tokens of which documents each context-parallel rank holds: a property of the batch.

Vocabulary (docs/notation.md):
    pack      documents laid end to end, each followed by its padding if any, S tokens
    run       a maximal interval of the pack that one rank holds contiguously
    fragment  a run cut at the borders of documents and of padding
    order     how runs are chosen: contiguous, zigzag, fold or document_zigzag

Example: two documents of 5 and 3 tokens over 2 ranks, zigzag (4 pieces of 2 tokens, rank r holds
pieces r and 2P - 1 - r)::

    pack      0 1 2 3 4 | 0 1 2        position within each document
    rank      0 0 1 1 1   1 0 0
    rank 0    runs (0, 2) (6, 8)       fragments: document 0 tokens 0:2, document 1 tokens 1:3
    rank 1    run  (2, 6)              fragments: document 0 tokens 2:5, document 1 tokens 0:1

The same documents as document_zigzag: each is padded to a multiple of 4 and cut into 4 pieces::

    pack      0 1 2 3 4 . . . | 0 1 2 .    a dot is padding
    rank      0 0 1 1 1 1 0 0   0 1 1 0
    rank 0    runs (0, 2) (6, 9) (11, 12)  document 0 0:2, 2 dots, document 1 0:1, 1 dot
    rank 1    runs (2, 6) (9, 11)          document 0 2:5, 1 dot, document 1 1:3

Padding is never part of a document: no state flows through it, no document's token attends to it,
no initial or final state belongs to it. Operators compute its rows, which mean nothing; a loss and
the experts leave them out.
"""

from __future__ import annotations

from array import array
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property, lru_cache

import torch
import torch.distributed as dist
from torch import Tensor

from lasp._core.cache import ByteCache, hash_once
from lasp._core.consistency import check_same_on_ranks, digest_of
from lasp._core.graphs import makes_fake_tensors
from lasp._core.host_constants import to_device
from lasp.sequence.fold import WorkIndex, fold_runs
from lasp.sequence.pack import Order, PackDefinition
from lasp.sequence.runs import (
    Fragment,
    RealTokens,
    Run,
    RunLink,
    contiguous_runs,
    cut_at_borders,
    link_runs,
    real_tokens,
    zigzag_runs,
)

__all__ = ["Fragment", "Order", "RealTokens", "Run", "RunLink", "SequenceLayout"]


@dataclass(frozen=True)
class SequenceLayout(PackDefinition):
    """Assignment of a packed batch to context-parallel ranks; equal on every rank.

    Pure host data computed from the lengths alone, without communication. Build it once per batch
    and hand it to every layer; derived tuples and per-device tensors are cached on the object.
    Operators compare it in their first call on a group, and then trust it to be equal on every
    rank: comparing would cost a collective. Where the ranks make a batch each by itself,
    :meth:`check_same_on_ranks` compares it, once.

    Args:
        document_lengths: tokens of each document, in pack order; zero is allowed.
        num_ranks: P, the size of the context-parallel group.
        order: ``contiguous`` (one run a rank), ``zigzag`` (pieces r and 2P - 1 - r: balanced for
            one document, Megatron's causal order), ``fold`` (balanced for any pack) or
            ``document_zigzag`` (zigzag in every document, each padded to a multiple of 2P: as
            Megatron's and TransformerEngine's packs are cut; for data that comes so).
        padded_lengths: tokens of each document and the padding that follows it, where documents of
            the pack are padded, in any order; the padding at the tail belongs to the last. In
            ``document_zigzag`` multiples of 2P (of 1 if P is 1), and if not given the least ones.
            None where no document is padded.

    Raises:
        ValueError: naming the argument, if a length is negative, all are zero, ``num_ranks`` is
            below 1, the order is unknown or a document does not fit its padded length.

    Attributes:
        lengths_tensor: the lengths ``[N]``, or ``[2, N]`` with the padded lengths, int64, on the
            CPU: for compiled graphs data, not code. A copy. See :meth:`from_lengths_tensor`.
    """

    @property
    def lengths_tensor(self) -> Tensor:
        """See the class."""
        return self._lengths.clone()

    @property
    def _lengths(self) -> Tensor:
        """``lengths_tensor``, not to be written to; a fake one under FakeTensorMode."""
        return self._new_lengths_tensor() if makes_fake_tensors() else self._kept_lengths

    @classmethod
    def from_lengths_tensor(cls, lengths: Tensor, num_ranks: int, order: Order) -> SequenceLayout:
        """The layout with this ``lengths_tensor``; the last ones are kept, with what is derived.

        How operators and compiled graphs carry a layout: the lengths are data, so a graph is good
        for every pack. That of a layout itself, which lives, is not looked into.
        """
        known = getattr(lengths, "_sequence_layout", None)
        layout: SequenceLayout | None = None if known is None else known()
        if layout is not None and layout.num_ranks == num_ranks and layout.order == order:
            return layout
        rows = lengths.tolist()
        documents, padded = rows if lengths.dim() == 2 else (rows, None)
        definition = tuple(documents), num_ranks, order, padded and tuple(padded)
        return _LAYOUTS.get(definition, lambda: cls(*definition))

    def check_same_on_ranks(self, group: dist.ProcessGroup) -> None:
        """Raise ValueError on every rank of ``group`` unless all hold this layout.

        Call it where a batch is made, on every rank of the context-parallel group: ranks with
        different packs would compute nonsense, or wait for each other for ever.

        Communication: one all-gather of 128 bytes a rank, and a wait for it.
        """
        check_same_on_ranks(
            "the layout", self.numbers, self._description(), group,
            "build it from the same document lengths on every rank, or broadcast them first",
        )  # fmt: skip

    @property
    def summary(self) -> str:
        """What ranks compare of a layout: its sizes, and a digest that tells it from others."""
        return f"{self._description()} (digest {digest_of(array('q', self.numbers)).hex()})"

    def _description(self) -> str:
        return (
            f"{self.num_documents} documents of {self.num_real_tokens} tokens over"
            f" {self.num_ranks} ranks, order {self.order}"
        )

    __hash__ = hash_once  # a dataclass makes one of its own, which looks at every length

    # ---- who holds what ----------------------------------------------------------------------

    @cached_property
    def _runs(self) -> tuple[tuple[Run, ...], ...]:
        if self.order == "fold":
            plan = fold_runs(self.borders, self.num_ranks)
        elif self.order == "zigzag":
            plan = zigzag_runs((0, self.num_tokens), self.num_ranks)
        elif self.order == "document_zigzag":
            plan = zigzag_runs((*self.document_starts, self.num_tokens), self.num_ranks)
        else:
            plan = contiguous_runs(self.num_tokens, self.num_ranks)
        return tuple(tuple(Run(*run) for run in runs) for runs in plan)

    def runs(self, rank: int) -> tuple[Run, ...]:
        """Runs of ``rank``, sorted by pack position; its tokens are these runs end to end."""
        self._check_rank(rank)
        return self._runs[rank]

    @property
    def host_bytes(self) -> int:
        """About what it holds on the host with all that is derived of it: lists of documents."""
        return 256 * (self.num_documents + sum(len(fragments) for fragments in self._fragments))

    @cached_property
    def _fragments(self) -> tuple[tuple[Fragment, ...], ...]:
        return tuple(tuple(cut_at_borders(runs, self._sections)) for runs in self._runs)

    def fragments(self, rank: int) -> tuple[Fragment, ...]:
        """Fragments of ``rank`` in the order of its tokens; never empty ones."""
        self._check_rank(rank)
        return self._fragments[rank]

    def real_tokens(self, rank: int) -> tuple[RealTokens, ...]:
        """Tokens of ``rank`` that are no padding, as few stretches as can be."""
        return tuple(real_tokens(self.fragments(rank), self.document_lengths))

    @cached_property
    def run_links(self) -> tuple[RunLink, ...]:
        """All runs of all ranks in pack order: predecessor of ``run_links[j]`` is ``[j - 1]``."""
        return tuple(link_runs(self._runs, self._sections))

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
            x: ``[..., S, ...]``, with or without all padding tokens along ``dim``.
            rank: rank within the context-parallel group.
            dim: the token dimension.
            pad_value: what the padding tokens hold when ``x`` comes unpadded.

        Returns:
            ``[..., T, ...]``; a view where the rank holds one run without padding.

        Gradients: flow to ``x``.
        """
        if x.shape[dim] == self.num_tokens:
            pieces = [x.narrow(dim, start, stop - start) for start, stop in self.runs(rank)]
        elif x.shape[dim] == self.num_real_tokens:
            pieces = self._padded_pieces(x, rank, dim, pad_value)
        else:
            raise ValueError(
                f"x must have {self.num_real_tokens} tokens (or {self.num_tokens} with padding)"
                f" along dim {dim}, got shape {tuple(x.shape)}: is this the layout of this batch?"
            )
        return pieces[0] if len(pieces) == 1 else torch.cat(pieces, dim)

    def _padded_pieces(self, x: Tensor, rank: int, dim: int, pad_value: float) -> list[Tensor]:
        pieces, end, shape = [], 0, list(x.shape)
        for position, offset, length in (
            *self.real_tokens(rank),
            RealTokens(0, self.num_local_tokens, 0),
        ):
            if offset > end:
                shape[dim] = offset - end
                pieces.append(x.new_full(shape, pad_value))
            if length:
                pieces.append(x.narrow(dim, position, length))
            end = offset + length
        return pieces

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
        pieces = sorted(
            (position, rank, offset, length)
            for rank in range(self.num_ranks)
            for position, offset, length in self.real_tokens(rank)
        )
        return torch.cat([parts[rank].narrow(dim, a, n) for _, rank, a, n in pieces], dim)

    def cu_seqlens(self, rank: int, device: torch.device | str = "cpu") -> Tensor:
        """Cumulative fragment lengths of ``rank``: int32 ``[fragments + 1]``; the caller's own."""
        ends = [*(f.offset for f in self.fragments(rank)), self.num_local_tokens]
        host = torch.tensor(ends, dtype=torch.int32, device="cpu")
        return to_device(host, torch.device(device), wait=True)

    def position_ids(self, rank: int, device: torch.device | str = "cpu") -> Tensor:
        """Position of each token within its document: int64 ``[T]``; the caller's own.

        A copy of what is remembered, so that every layer may ask. Padding counts from its own
        start: no document's token sees it.
        """
        device = torch.device(device)

        def build() -> Tensor:
            ranges = [torch.arange(f.start, f.stop, device="cpu") for f in self.fragments(rank)]
            with torch.inference_mode(False):  # remembered, and used in training too
                return to_device(torch.cat(ranges), device, wait=True)

        return _POSITIONS.get((self.definition, rank, device), build).clone()

    def _check_rank(self, rank: int) -> None:
        if rank not in range(self.num_ranks):
            raise ValueError(
                f"rank must be in [0, {self.num_ranks}), got {rank!r}: pass the rank within the"
                " context-parallel group, not the global rank"
            )


@lru_cache(maxsize=64)
def one_document(
    num_tokens: int, num_ranks: int = 1, order: Order = "contiguous"
) -> SequenceLayout:
    """The layout of a pack that is one document; the last ones are kept."""
    return SequenceLayout((num_tokens,), num_ranks, order)


_LAYOUTS: ByteCache[SequenceLayout] = ByteCache(64 * 2**20, lambda layout: layout.host_bytes)
_POSITIONS: ByteCache[Tensor] = ByteCache(64 * 2**20, lambda positions: positions.nbytes)
