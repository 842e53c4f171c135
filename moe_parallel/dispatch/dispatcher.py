"""The dispatcher protocol: how rows reach their experts and how results come back.

A layer has one :class:`Dispatcher`. For each call it makes a :class:`Dispatch`, which the forward
and the backward both run through::

    dispatcher.overlap_groups     how many groups of experts pay
    dispatcher.start_call         -> dispatch
    dispatch.place                rows are written where they travel from
    dispatch.open                 per run: forward, then backward
        dispatch(g)  [etp.gather(g)]  experts  [etp.scatter(g)]  combine(g)      for each group g
    dispatch.close

There are three implementations. The layer, the experts and the pipeline know this protocol alone::

    LocalDispatcher          one rank: rows are with their experts already
    AllToAllDispatcher       NCCL or gloo: all-to-alls over EP, then over ETP
    CopyEngineDispatcher     copies through symmetric memory, over EP x ETP at once
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import cached_property
from typing import Literal, NamedTuple, Protocol

import torch
import torch.distributed as dist
from torch import Tensor

from lasp._core.impl import ChosenImpl
from moe_parallel.dispatch.plan import RowCounts

Lane = Literal["ep", "etp"]
Place = Callable[[int, Tensor], Tensor]


class RowTransfer(NamedTuple):
    """Rows on their way.

    Attributes:
        rows: those that arrive, to be read after ``wait``.
        sent: held until then.
        wait: makes a stream (None: the current one) wait for them, on the CPU the host; None where
            nothing had to move.
        mark: its number in the timeline.
    """

    rows: Tensor
    sent: Tensor
    wait: Callable[[torch.cuda.Stream | None], object] | None = None
    mark: int = -1


class EtpStages(Protocol):
    """Stages over ETP of a dispatcher that exchanges over EP alone."""

    def gather(self, g: int, rows_AM: Tensor) -> RowTransfer:
        """Start to give every ETP rank the dispatched rows of all, in ETP rank order."""

    def scatter(self, g: int, partial_AM: Tensor) -> RowTransfer:
        """Start to send every ETP rank's partial sums to the rank that dispatched the row."""

    def add_up(self, g: int, partial_AM: Tensor) -> Tensor:
        """The sum of what the scatter brought, rounded once."""


class Dispatch(Protocol):
    """The rows of one call, in the forward and in the backward; defaults are of rows that stay.

    Attributes:
        experts: for each group of the pipeline, which of this rank's experts.
        lanes: the axes over which rows travel in stages of their own, none on one rank.
        etp: the stages over ETP; None where there are none.
        process_groups: ranks whose backwards wait for each other.
        place: makes ``[rows, hidden]``, like a given tensor, for the rows that this rank sends; it
            holds them until the next call. None: they may be anywhere.
        weights: ``[T, k]``, by which results are multiplied where the experts are; None: by whoever
            adds them up.
        row_gradients: in the backward of a dispatch with weights the gradient of each row's weight,
            set before :meth:`by_arrival`, which takes it.
        early: rows are on their way before it runs: what does not need them is computed meanwhile.
        static: no shape depends on the routing, and counts stay on the device, if it has them.
        ends: where the rows of each expert end, int32 on the device, if this rank's experts take
            what it sends, in one group, and a kernel has counted them.
    """

    experts: tuple[range, ...]
    lanes: tuple[Lane, ...] = ()
    etp: EtpStages | None = None
    process_groups: tuple[dist.ProcessGroup, ...] = ()
    place: Place | None = None
    weights: Tensor | None = None
    row_gradients: Tensor | None = None
    early: bool = False
    static: bool = False
    ends: Tensor | None = None

    def expert_rows(self, g: int) -> tuple[int, ...]:
        """Rows that each expert of group ``g`` takes; the first call waits for the counts.

        Where memory holds more rows than came, the number of the others is appended.
        """

    def expert_ends(self, g: int) -> Tensor | None:
        """Where the rows of each expert of group ``g`` end, int32 on the device, if it counts them.

        By default it does not: None.
        """
        return None

    def to_rows(self, x_TM: Tensor) -> Tensor:
        """The rows that leave, of tokens or their gradients; by default these are rows."""
        return x_TM

    def to_tokens(self, rows_AM: Tensor) -> Tensor:
        """The results of tokens, or their gradients, of the rows that came back."""
        return rows_AM

    def weight_gradients(self, rows_AM: Tensor) -> Tensor | None:
        """The gradient of ``weights``, out of the rows that came back in the backward."""
        return None

    @property
    def row_weights(self) -> Tensor | None:
        """The weight of each row of this rank's experts; None where tokens' ranks multiply."""
        return None

    def own_rows(self, g: int, rows_AM: Tensor) -> Tensor:
        """The rows of group ``g`` among those that this rank sends, a view."""

    def open(self, rows_AM: Tensor) -> None:
        """Begin a run of these rows; where the counts are wrong all ranks raise here."""

    def close(self) -> None:
        """End a run, however it ends; by default nothing is open."""
        return

    def dispatch(self, g: int, rows_AM: Tensor, stream: torch.cuda.Stream | None) -> RowTransfer:
        """Start to send the rows of a group to their experts, on or after ``stream``."""

    def combine(
        self, g: int, rows_AM: Tensor, into: Tensor, stream: torch.cuda.Stream | None
    ) -> RowTransfer:
        """Start to send results back the way they came, to be found in ``into``."""

    def gather(self, x_TM: Tensor) -> RowTransfer | None:
        """Start to give all EP ranks the rows of all, in rank order, as many of each.

        None where a dispatcher does not gather, as by default.
        """
        return None

    def by_expert(self, g: int, rows_AM: Tensor) -> Tensor:
        """Rows that arrived, expert by expert; by default they arrive so."""
        return rows_AM

    def by_arrival(self, g: int, rows_AM: Tensor) -> Tensor:
        """Inverse of :meth:`by_expert`."""
        return rows_AM


class Dispatcher(Protocol):
    """The transport of a layer."""

    def overlap_groups(self, num_local: int, rank_bytes: int) -> int:
        """The number of groups that hides most communication, the same on every rank.

        Args:
            num_local: experts of a rank.
            rank_bytes: bytes of the rows that the average rank sends.
        """

    def start_call(
        self,
        kept_RE: Callable[[], RowCounts],
        experts: tuple[range, ...],
        *,
        most_rows: int,
        like: Tensor,
        kept: Tensor | None = None,
        impl: ChosenImpl = "eager",
    ) -> Dispatch:
        """Prepare a call.

        Args:
            kept_RE: waits for the counts: rows each rank of the token group sends to each expert.
            experts: for each group of the pipeline, which of a rank's experts.
            most_rows: no rank sends more.
            like: a tensor of the rows' width and dtype.
            kept: ``[R, E]``, what ``kept_RE`` is to return, on the device; None: it is not there.
            impl: counts rows on the device.
        """


class LocalDispatcher:
    """One rank: nothing travels.

    Args:
        token_rank: this rank in the token group.
    """

    def __init__(self, token_rank: int = 0) -> None:
        self._rank = token_rank

    def overlap_groups(self, num_local: int, rank_bytes: int) -> int:
        """One: there is nothing to hide."""
        return 1

    def start_call(
        self,
        kept_RE: Callable[[], RowCounts],
        experts: tuple[range, ...],
        *,
        most_rows: int,
        like: Tensor,
        kept: Tensor | None = None,
        impl: ChosenImpl = "eager",
    ) -> Dispatch:
        """See :class:`Dispatcher`."""
        mine = None if kept is None else kept[self._rank]
        return LocalDispatch(experts, lambda: kept_RE()[self._rank], mine)


class LocalDispatch(Dispatch):
    """Rows that are with their experts already, expert by expert.

    Args:
        experts: for each group of the pipeline, which of this rank's experts.
        kept_E: waits for the counts: rows of each expert.
        on_device: ``[E]``, the same on the device; None: they are not there.
    """

    def __init__(
        self,
        experts: tuple[range, ...],
        kept_E: Callable[[], Sequence[int]],
        on_device: Tensor | None = None,
    ) -> None:
        self.experts, self._wait, self._on_device = experts, kept_E, on_device
        self._ends: dict[int, Tensor] = {}  # by group

    @cached_property
    def _kept_E(self) -> tuple[int, ...]:
        return tuple(self._wait())

    def expert_rows(self, g: int) -> tuple[int, ...]:
        """See :class:`Dispatch`."""
        return self._kept_E[self.experts[g].start : self.experts[g].stop]

    def expert_ends(self, g: int) -> Tensor | None:
        """See :class:`Dispatch`."""
        if self.ends is not None or self._on_device is None:
            return self.ends
        if g in self._ends:
            return self._ends[g]
        own = self._on_device[self.experts[g].start : self.experts[g].stop]
        self._ends[g] = own.cumsum(0, dtype=torch.int32)
        return self._ends[g]

    def own_rows(self, g: int, rows_AM: Tensor) -> Tensor:
        """See :class:`Dispatch`."""
        first = sum(self._kept_E[: self.experts[g].start])
        return rows_AM.narrow(0, first, sum(self.expert_rows(g)))

    def open(self, rows_AM: Tensor) -> None:
        """Wait for the counts."""
        self.expert_rows(0)

    def dispatch(self, g: int, rows_AM: Tensor, stream: torch.cuda.Stream | None) -> RowTransfer:
        """The rows themselves."""
        return RowTransfer(rows_AM, rows_AM)

    def combine(
        self, g: int, rows_AM: Tensor, into: Tensor, stream: torch.cuda.Stream | None
    ) -> RowTransfer:
        """A copy of the results."""
        return RowTransfer(into.copy_(rows_AM), rows_AM)
