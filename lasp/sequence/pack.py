"""What a layout is made from: documents, their padding, ranks and an order; and the sizes of it."""

from __future__ import annotations

import weakref
from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from functools import cached_property
from itertools import accumulate, pairwise
from typing import Any, ClassVar, Literal, Self, get_args

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import unset_fake_temporarily

from lasp._core.checks import check_one_of, check_sizes, integers
from lasp._core.graphs import makes_fake_tensors
from lasp.sequence.runs import Sections, sections_of

Order = Literal["contiguous", "zigzag", "fold", "document_zigzag"]


@dataclass(frozen=True)
class PackDefinition:
    """The arguments of :class:`lasp.SequenceLayout`, checked, and the sizes that follow from them.

    Args and errors: see there.
    """

    _kept_lengths: ClassVar[Tensor]  # each object has its own; no field, so not compared

    document_lengths: tuple[int, ...]
    num_ranks: int
    order: Order = "contiguous"
    padded_lengths: tuple[int, ...] | None = None

    def __post_init__(self) -> None:
        lengths = integers("document_lengths", self.document_lengths)
        object.__setattr__(self, "document_lengths", lengths)
        object.__setattr__(self, "num_ranks", integers("num_ranks", [self.num_ranks])[0])
        check_document_lengths(lengths)
        check_sizes(num_ranks=self.num_ranks)
        check_one_of(Order, order=self.order)
        object.__setattr__(self, "padded_lengths", self._checked_padded_lengths())
        self._keep_lengths_tensor()

    def _checked_padded_lengths(self) -> tuple[int, ...] | None:
        """One form for equal layouts: None where no document is padded, but in document_zigzag."""
        lengths, by_document = self.document_lengths, self.order == "document_zigzag"
        multiple = 2 * self.num_ranks if by_document and self.num_ranks > 1 else 1
        if self.padded_lengths is None:
            rounded = tuple(rounded_up(length, multiple) for length in lengths)
            return rounded if by_document else None
        padded = integers("padded_lengths", self.padded_lengths)
        check_padded_lengths(padded, lengths, multiple)
        return padded if by_document or padded != lengths else None

    def _keep_lengths_tensor(self) -> None:
        # A layout that is made in a trace may be used in real calls.
        with unset_fake_temporarily() if makes_fake_tensors() else nullcontext():
            tensor = self._new_lengths_tensor()
        # Operators hand over this tensor in place of the layout, and find the layout again by it.
        tensor._sequence_layout = weakref.ref(self)  # type: ignore[attr-defined]
        object.__setattr__(self, "_kept_lengths", tensor)

    def _new_lengths_tensor(self) -> Tensor:
        with torch.inference_mode(False):  # a layout made in inference mode may be trained with
            rows = self.document_lengths, self.padded_lengths
            lengths = rows[0] if rows[1] is None else rows
            return torch.tensor(lengths, dtype=torch.int64, device="cpu")

    @classmethod
    def from_cu_seqlens(
        cls,
        cu_seqlens: Sequence[int] | Tensor,
        num_ranks: int,
        order: Order = "contiguous",
        cu_seqlens_padded: Sequence[int] | Tensor | None = None,
    ) -> Self:
        """Layout of a pack given as cumulative lengths (0 first, never falling).

        A CUDA tensor is copied to the host, once: build the layout in the data loader if you can.

        Args:
            cu_seqlens: ``[N + 1]``, of the documents without padding.
            num_ranks: P.
            order: of the layout.
            cu_seqlens_padded: ``[N + 1]``, of the documents with the padding after each.
        """
        lengths, padded = from_cumulative("cu_seqlens", cu_seqlens), None
        if cu_seqlens_padded is not None:
            padded = from_cumulative("cu_seqlens_padded", cu_seqlens_padded)
        return cls(lengths, num_ranks, order, padded)

    @property
    def definition(self) -> tuple[tuple[int, ...], int, Order, tuple[int, ...] | None]:
        """The arguments that make this layout, none of its tensors: a key for caches."""
        return self.document_lengths, self.num_ranks, self.order, self.padded_lengths

    @property
    def numbers(self) -> list[int]:
        """The definition as numbers, which tell it from every other layout."""
        lengths, num_ranks, order, padded = self.definition
        numbers = [num_ranks, get_args(Order).index(order), len(lengths), *lengths]
        return numbers if padded is None else [*numbers, *padded]

    # ---- sizes -------------------------------------------------------------------------------

    @property
    def num_documents(self) -> int:
        """N; padding is none."""
        return len(self.document_lengths)

    @cached_property
    def num_real_tokens(self) -> int:
        """Tokens of the documents, without padding."""
        return sum(self.document_lengths)

    @cached_property
    def num_tokens(self) -> int:
        """S: tokens of the padded pack, a multiple of P (2P for both zigzag orders)."""
        multiple = self.num_ranks * (2 if self.order == "zigzag" and self.num_ranks > 1 else 1)
        return rounded_up(sum(self.padded_lengths or self.document_lengths), multiple)

    @property
    def num_padding_tokens(self) -> int:
        """Tokens of the pack that are of no document."""
        return self.num_tokens - self.num_real_tokens

    @cached_property
    def padding_lengths(self) -> tuple[int, ...]:
        """Padding after each document; after the last one that at the tail of the pack too."""
        padded = self.padded_lengths or self.document_lengths
        paddings = [tokens - length for tokens, length in zip(padded, self.document_lengths)]
        paddings[-1] += self.num_tokens - sum(padded)
        return tuple(paddings)

    @property
    def num_local_tokens(self) -> int:
        """T = S / P, the same on every rank."""
        return self.num_tokens // self.num_ranks

    @cached_property
    def _sections(self) -> Sections:
        return sections_of(self.document_lengths, self.padding_lengths)

    @property
    def borders(self) -> tuple[int, ...]:
        """Cumulative lengths of documents and the paddings between them, 0 first."""
        return self._sections.borders

    @cached_property
    def document_starts(self) -> tuple[int, ...]:
        """Pack position of the first token of each document."""
        both = zip(self.document_lengths, self.padding_lengths)
        return tuple(accumulate((a + b for a, b in both), initial=0))[:-1]

    # ---- plumbing ----------------------------------------------------------------------------

    def __getstate__(self) -> dict[str, Any]:
        """Pickle the definition only; what is derived is rebuilt where it is needed."""
        names = ("document_lengths", "num_ranks", "order", "padded_lengths")
        return dict(zip(names, self.definition))

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self._keep_lengths_tensor()


def check_document_lengths(lengths: tuple[int, ...]) -> None:
    """Raise ValueError for a negative length, and for no token at all."""
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


def check_padded_lengths(padded: tuple[int, ...], lengths: tuple[int, ...], multiple: int) -> None:
    """Raise ValueError unless every document fits its padded length, a multiple of ``multiple``."""
    if len(padded) != len(lengths):
        raise ValueError(
            f"padded_lengths must be one length for each of the {len(lengths)} documents, got"
            f" {len(padded)}: add the tail of a pack to its last document"
        )
    for document, (tokens, length) in enumerate(zip(padded, lengths)):
        if tokens < length:
            raise ValueError(
                f"padded_lengths must be at least document_lengths, got {tokens} for the {length}"
                f" tokens of document {document}: padding counts on top of the tokens"
            )
        if tokens % multiple:
            raise ValueError(
                f"padded_lengths must be multiples of {multiple}, twice the ranks, in order"
                f" 'document_zigzag', got {tokens} for document {document}: every document is cut"
                " into that many equal pieces"
            )


def rounded_up(length: int, multiple: int) -> int:
    """The least multiple that is not below ``length``."""
    return -(-length // multiple) * multiple


def from_cumulative(name: str, cumulative: Sequence[int] | Tensor) -> tuple[int, ...]:
    """Lengths out of cumulative lengths; a CUDA tensor is copied to the host."""
    if isinstance(cumulative, Tensor):
        cumulative = cumulative.tolist()
    borders = integers(name, cumulative)
    lengths = tuple(b - a for a, b in pairwise(borders))
    if not borders or borders[0] != 0 or any(length < 0 for length in lengths):
        raise ValueError(
            f"{name} must start at 0 and never fall, got {borders[:8]}...: pass cumulative"
            " document lengths, shape [N + 1]"
        )
    return lengths
