"""Calls in which a token crosses to a rank once, whatever number of its experts live there.

One row of a token goes to each EP rank that has some of its experts. That rank makes the rows of
its experts of it, adds up their weighted results in the order of the slots, and sends one row back.
The token's rank adds up one row of each rank, in rank order::

    token's rank       to_rows                                        to_tokens
    experts' rank                by_expert     products    by_arrival
                                 copies rows               adds up by weight

Where all tokens go to all ranks, and each holds as many, they are gathered as they are, before the
rows of their assignments are known. These follow by themselves, as the ends of rows.

The backward is the same with gradients. Those of the weights, which the products make
(:func:`moe_parallel.experts.swiglu.weighted_swiglu_backward`), come back at the ends of its rows.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cached_property
from typing import NamedTuple

import torch
from torch import Tensor

from lasp._core.impl import ChosenImpl
from moe_parallel.dispatch.dispatcher import Dispatch, RowTransfer
from moe_parallel.dispatch.permute import RowOrder, copy_to_rows, sum_of_rows
from moe_parallel.dispatch.plan import RowCounts
from moe_parallel.dispatch.token_rows import ArrivedSlots, RowFormat, TokenSlots
from moe_parallel.mesh import ExpertMesh


class ExpertRows(NamedTuple):
    """The rows that a rank's experts take.

    Attributes:
        ends: where those of each expert end, int32 on the device; None: padded to a capacity.
        memory: rows that have memory, of which some may hold nothing; None: as many as the host
            counts.
    """

    ends: Tensor | None
    memory: int | None = None


class TokenDispatch(Dispatch):
    """One call whose tokens cross once, in one group of experts.

    Args:
        rows: moves its rows, as if each rank had one expert.
        wait: rows each rank of the token group keeps for each expert.
        mesh: the EP x ETP block of this rank.
        weights_Tk: of the assignments.
        slots: of this rank's tokens.
        form: of the rows.
        expert_rows: those of this rank's experts.
        impl: of packing, copies and sums.
        gathered: this rank's tokens on their way to all ranks; None: they are sent in rows.

    Communication: that of ``rows``.
    """

    def __init__(
        self,
        rows: Dispatch,
        wait: Callable[[], RowCounts],
        mesh: ExpertMesh,
        weights_Tk: Tensor,
        slots: TokenSlots,
        form: RowFormat,
        expert_rows: ExpertRows,
        impl: ChosenImpl,
        gathered: RowTransfer | None = None,
    ) -> None:
        self.lanes, self.process_groups = rows.lanes, rows.process_groups
        self.weights, self._weights = weights_Tk, weights_Tk.detach()
        self._rows, self._wait, self._mesh = rows, wait, mesh
        self._slots, self._form, self._impl = slots, form, impl
        self._ends, self._memory = expert_rows
        self.static = self._memory is not None
        # Products leave rows beyond the last end alone; of the others some may have no token.
        self._padded = self._ends is None or (self.static and impl == "eager")
        self._arrived: ArrivedSlots | None = None  # from the forward on
        self._gathered, self.early = gathered, gathered is not None
        self._ends_of_rows: Tensor | None = None  # those sent, then those that arrive
        num_local = slots.num_experts // mesh.ep_size
        self.experts = (range(num_local),)

    @cached_property
    def _kept_E(self) -> tuple[int, ...]:
        first, kept_RE = self._mesh.ep_rank * len(self.experts[0]), self._wait()
        own = (kept_RE[source][first:][: len(self.experts[0])] for source in self._mesh.sources)
        kept_E = tuple(map(sum, zip(*own)))
        return kept_E if self._memory is None else (*kept_E, self._memory - sum(kept_E))

    def expert_rows(self, g: int) -> tuple[int, ...]:
        """See :class:`moe_parallel.dispatch.dispatcher.Dispatch`."""
        return self._kept_E

    def expert_ends(self, g: int) -> Tensor | None:
        """See :class:`moe_parallel.dispatch.dispatcher.Dispatch`."""
        return self._ends

    def to_rows(self, x_TM: Tensor) -> Tensor:
        """Each token, in the backward its gradient, for each rank that has some of its experts."""
        # FSDP and autocast cast what an expert is given, after the call was prepared.
        self._form = form = self._form._replace(dtype=x_TM.dtype)
        sent, width = self._slots.sent, form.width
        if self.early:
            return self._to_gathered(x_TM)
        like = x_TM.new_empty(0, width)
        place = self._rows.place
        rows_AW = (
            like.new_empty(sent.num_rows, width) if place is None else place(sent.num_rows, like)
        )
        copy_to_rows(x_TM, sent, form.hidden(rows_AW), self._impl)
        if self._arrived is None:
            ends = (form.rows(rows_AW), form.weights(rows_AW))
            self._slots.pack(self._weights, *ends, self._impl)
        return rows_AW

    def _to_gathered(self, x_TM: Tensor) -> Tensor:
        """Gather tokens, unless they are on their way, and write the ends that follow.

        Returns:
            The shape of the rows that come back, without memory.
        """
        early = self._gathered
        if early is None or early.rows.dtype != x_TM.dtype:
            if early is not None and early.wait is not None:
                early.wait(None)  # its memory is free from here on
            self._gathered = self._rows.gather(x_TM)
        num_rows, ends = self._slots.sent.num_rows, self._form.ends
        if self._arrived is None:
            self._ends_of_rows = x_TM.new_empty(num_rows, ends.width)
            parts = (ends.rows(self._ends_of_rows), ends.weights(self._ends_of_rows))
            self._slots.pack(self._weights, *parts, self._impl)
        return x_TM.new_empty(1, self._form.width).expand(num_rows, -1)

    def to_tokens(self, rows_AW: Tensor) -> Tensor:
        """The sum of what the ranks sent back for each token."""
        return sum_of_rows(self._form.hidden(rows_AW), None, self._slots.sent.row, self._impl)

    def weight_gradients(self, rows_AW: Tensor) -> Tensor:
        """``[T, k]``, of the weights, out of the rows that came back in the backward."""
        return self._slots.unpack_gradients(self._form.weights(rows_AW), self._impl)

    @property
    def row_weights(self) -> Tensor:
        """``[R]``, of the rows of this rank's experts."""
        assert self._arrived is not None
        return self._arrived.row_weights

    def open(self, rows_AM: Tensor) -> None:
        """Wait for the counts."""
        self._rows.open(rows_AM)

    def close(self) -> None:
        """See :class:`moe_parallel.dispatch.dispatcher.Dispatch`."""
        self._rows.close()

    def own_rows(self, g: int, rows_AM: Tensor) -> Tensor:
        """See :class:`moe_parallel.dispatch.dispatcher.Dispatch`."""
        return self._rows.own_rows(g, rows_AM)

    def dispatch(self, g: int, rows_AM: Tensor, stream: torch.cuda.Stream | None) -> RowTransfer:
        """See :class:`moe_parallel.dispatch.dispatcher.Dispatch`."""
        if not self.early:
            return self._rows.dispatch(g, rows_AM, stream)
        gathered, self._gathered = self._gathered, None
        assert gathered is not None
        if self._ends_of_rows is None:
            return gathered
        ends = self._rows.dispatch(g, self._ends_of_rows, stream)
        self._ends_of_rows = ends.rows

        def wait(stream: torch.cuda.Stream | None) -> None:
            for transfer in (gathered, ends):
                if transfer.wait is not None:
                    transfer.wait(stream)

        return gathered._replace(wait=wait)

    def combine(
        self, g: int, rows_AM: Tensor, into: Tensor, stream: torch.cuda.Stream | None
    ) -> RowTransfer:
        """See :class:`moe_parallel.dispatch.dispatcher.Dispatch`."""
        return self._rows.combine(g, rows_AM, into, stream)

    def by_expert(self, g: int, rows_AM: Tensor) -> Tensor:
        """``[R, M]``: each token, or its gradient, for each of its experts here."""
        form = self._form
        num_rows = sum(self._kept_E) if self._memory is None else self._memory
        if self._arrived is None:
            rows, of = (
                (rows_AM, form) if self._ends_of_rows is None else (self._ends_of_rows, form.ends)
            )
            ends, self._ends_of_rows = (of.rows(rows), of.weights(rows)), None
            self._arrived = ArrivedSlots.unpack(*ends, num_rows, self._impl, padded=self._padded)
        order = RowOrder(self._arrived.row, num_rows, padded=self._padded)
        rows_RM = rows_AM.new_empty(num_rows, form.hidden_size)
        return copy_to_rows(form.hidden(rows_AM), order, rows_RM, self._impl)

    def by_arrival(self, g: int, rows_AM: Tensor) -> Tensor:
        """The weighted sum of each token's results, in the backward the sum of its gradients."""
        assert self._arrived is not None
        form, arrived, gradients = self._form, self._arrived, self.row_gradients
        rows_AW = rows_AM.new_empty(len(arrived.row), form.width)
        weights = arrived.weights if gradients is None else None
        sum_of_rows(rows_AM, weights, arrived.row, self._impl, form.hidden(rows_AW))
        if gradients is not None:
            arrived.pack_gradients(gradients, form.weights(rows_AW), self._impl)
            self.row_gradients = None
        return rows_AW
