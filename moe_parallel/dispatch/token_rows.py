"""Rows of tokens that cross to a rank once, and what travels at their ends.

A row is a token's numbers, or those of a sum of its experts' results or of a gradient, then of each
of its k slots the row of the assignment where it is multiplied, and its weight::

    hidden        rows, int32 [k]      weights, float32 or wider [k]       each from a 16th byte on
    x_0 ... x_M   12  -1  3  -1        0.4  0.2  0.3  0.1                  -1: an expert elsewhere

The rank that sends knows all counts, so it knows these rows: whoever receives them has nothing to
sort. On the way back of the backward gradients of weights take the place of weights.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from lasp._core.impl import ChosenImpl
from moe_parallel.dispatch.permute import RowOrder

ALIGNMENT_BYTES = 16  # of the parts of a row: what a thread loads at once
ROW_BYTES = 64  # rows are multiples: kernels load more at once if strides divide by 16 numbers


class RowFormat(NamedTuple):
    """Where the parts of a row are.

    Attributes:
        hidden_size: M.
        top_k: k.
        dtype: of the row.
        weight_dtype: of the weights at its end.
    """

    hidden_size: int
    top_k: int
    dtype: torch.dtype
    weight_dtype: torch.dtype

    @property
    def width(self) -> int:
        """Numbers of a row, its end included."""
        num_bytes = self._weights_at + self.top_k * self.weight_dtype.itemsize
        return _aligned(num_bytes, ROW_BYTES) // self.dtype.itemsize

    @property
    def ends(self) -> RowFormat:
        """The format of the ends of such rows, where they travel by themselves."""
        return self._replace(hidden_size=0)

    @property
    def _rows_at(self) -> int:
        return _aligned(self.hidden_size * self.dtype.itemsize)

    @property
    def _weights_at(self) -> int:
        return self._rows_at + _aligned(4 * self.top_k)

    def hidden(self, rows_AW: Tensor) -> Tensor:
        """``[A, M]``, a view."""
        return rows_AW[:, : self.hidden_size]

    def rows(self, rows_AW: Tensor) -> Tensor:
        """``[A, k]`` int32, a view."""
        return rows_AW.view(torch.int32)[:, self._rows_at // 4 :][:, : self.top_k]

    def weights(self, rows_AW: Tensor) -> Tensor:
        """``[A, k]``, a view."""
        first = self._weights_at // self.weight_dtype.itemsize
        return rows_AW.view(self.weight_dtype)[:, first:][:, : self.top_k]


def _aligned(num_bytes: int, to: int = ALIGNMENT_BYTES) -> int:
    return -(-num_bytes // to) * to


class TokenSlots(NamedTuple):
    """This rank's tokens and their assignments.

    Attributes:
        experts: ``[T, k]``, chosen experts.
        row: ``[T, k]`` int64, of each assignment its row among those that its expert takes, from
            any rank, -1 if it was dropped.
        sent: of ``[T, P]`` rows, the one in which a token travels to each EP rank.
        num_experts: E.
    """

    experts: Tensor
    row: Tensor
    sent: RowOrder
    num_experts: int

    @property
    def _ranks(self) -> Tensor:
        """``[T, k]``: the EP rank of each assignment."""
        num_local = self.num_experts // self.sent.row.shape[1]
        return self.experts.div(num_local, rounding_mode="floor")

    def pack(
        self, weights_Tk: Tensor, rows_Ak: Tensor, weights_Ak: Tensor, impl: ChosenImpl
    ) -> None:
        """Write rows and weights of all slots into views of the rows that leave."""
        if impl == "triton":
            from moe_parallel.kernels import tokens

            if self.sent.padded:
                rows_Ak.fill_(-1)
            choice = (self.experts, self.row, weights_Tk, self.sent.row, self.num_experts)
            tokens.pack(*choice, (rows_Ak, weights_Ak))
        elif not len(self.row):
            rows_Ak.fill_(-1)
        else:
            sent_A, num_ranks = self.sent.assignment, self.sent.row.shape[1]
            token_A = sent_A.clamp(min=0).div(num_ranks, rounding_mode="floor")
            here_Ak = self._ranks[token_A] == sent_A.remainder(num_ranks).unsqueeze(1)
            here_Ak &= (sent_A >= 0).unsqueeze(1)
            rows_Ak.copy_(self.row[token_A].masked_fill(~here_Ak, -1))
            weights_Ak.copy_(weights_Tk[token_A])

    def unpack_gradients(self, arrived_Ak: Tensor, impl: ChosenImpl) -> Tensor:
        """``[T, k]``: gradients of weights, out of a view of the rows that came back."""
        if impl == "triton":
            from moe_parallel.kernels import tokens

            where = (self.experts, self.sent.row, self.num_experts)
            return tokens.unpack_gradients(*where, arrived_Ak)
        slots_k = torch.arange(self.experts.shape[1], device=arrived_Ak.device)
        return arrived_Ak[self.sent.row.gather(1, self._ranks), slots_k]


class ArrivedSlots(NamedTuple):
    """The slots of the rows that arrived at the rank of their experts.

    Attributes:
        row: ``[A, k]`` int64, -1 where the expert is elsewhere.
        weights: ``[A, k]``.
        row_weights: ``[R]``, by row of the experts; 0 for rows without a token.
    """

    row: Tensor
    weights: Tensor
    row_weights: Tensor

    @classmethod
    def unpack(
        cls, rows_Ak: Tensor, weights_Ak: Tensor, num_rows: int, impl: ChosenImpl, *, padded: bool
    ) -> ArrivedSlots:
        """Read the slots from views of the rows that arrived; padded rows belong to no slot."""
        if impl == "triton":
            from moe_parallel.kernels import tokens

            return cls(*tokens.unpack(rows_Ak, weights_Ak, num_rows, padded=padded))
        row, weights = rows_Ak.long(), weights_Ak.contiguous()
        by_row = weights.new_zeros(num_rows + 1)  # the last one is of no row
        by_row[row.masked_fill(row < 0, num_rows).flatten()] = weights.flatten()
        return cls(row, weights, by_row[:num_rows])

    def pack_gradients(self, gradients_R: Tensor, sent_Ak: Tensor, impl: ChosenImpl) -> None:
        """Write gradients of weights, by row, into a view of the rows that leave."""
        if impl == "triton":
            from moe_parallel.kernels import tokens

            tokens.pack_gradients(gradients_R, self.row, sent_Ak)
        else:
            padded = torch.cat([gradients_R, gradients_R.new_zeros(1)])  # the last is of no row
            sent_Ak.copy_(padded[self.row])
