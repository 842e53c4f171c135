"""The router's decision, and counts of assignments: before each, of every rank, on the host.

``rows_before`` is a counting sort of assignments by expert, for the router, padding and the order
of rows.

Example: 4 tokens, k = 1, experts (0, 1, 0, 0), E = 2::

    chosen      1 0 1 1        before      0 1 1 2 3
                0 1 0 0                    3 3 4 4 4

Token 2's assignment to expert 0 is row 1, token 1's to expert 1 row 3.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from moe_parallel.config import ScoreFunction
from moe_parallel.kernels.histogram import Histogram
from moe_parallel.router.token_order import TokenOrder, to_host


def rows_before(experts_Tk: Tensor, num_experts: int) -> Tensor:
    """Number of assignments before each expert and token: by expert, then by token.

    Args:
        experts_Tk: chosen experts, int64, each at most once a token.
        num_experts: E.

    Returns:
        ``[E, T + 1]`` int32: at (e, t) the assignments to experts below e, and those to e of tokens
        before t. Differences along a line count the assignments to e alone. A rank's T k
        assignments fit: the rows that they become are in its memory, each of many bytes.
    """
    chosen = experts_Tk.new_zeros(num_experts, experts_Tk.shape[0] + 1, dtype=torch.int32)
    chosen[:, 1:].scatter_(0, experts_Tk.T, 1)
    # As one line: for that torch has a scan that reads the GPU's memory once. Over the tokens of
    # [T, E] a thread would walk down each column by itself: 7 ms for 32768 tokens on an H100.
    return chosen.flatten().cumsum(0, dtype=torch.int32).view_as(chosen)


def at_assignments(counts_ET: Tensor, experts_Tk: Tensor) -> Tensor:
    """``[T, k]`` int64: for each assignment the count at its expert and token."""
    return counts_ET.gather(0, experts_Tk.T).T.to(
        torch.int64, memory_format=torch.contiguous_format
    )


def counted(experts_Tk: Tensor, num_experts: int) -> Tensor:
    """``[E]`` int64: the assignments to every expert."""
    experts_A = experts_Tk.flatten()
    # Integers: the order of the sums does not matter. bincount would wait for the device.
    return experts_A.new_zeros(num_experts).index_add_(0, experts_A, torch.ones_like(experts_A))


def tokens_of_ranks(experts_Tk: Tensor, num_experts: int, num_ranks: int) -> Tensor:
    """``[T, P]`` bool: whether some of a token's experts live on an EP rank, before drop."""
    goes_TP = experts_Tk.new_zeros(experts_Tk.shape[0], num_ranks, dtype=torch.bool)
    ranks_Tk = experts_Tk.div(max(1, num_experts // max(1, num_ranks)), rounding_mode="floor")
    return goes_TP.scatter_(1, ranks_Tk, True) if num_ranks else goes_TP


class AssignmentCounts(NamedTuple):
    """Assignments of every rank of the token group to every expert, ``[R, E]`` int64.

    Attributes:
        assigned: before drop.
        kept: after drop; without drops the same tensor.
        training: ``[R]`` int64, 1 for ranks that drop and 0 for ranks that do not, where ranks must
            be asked; else None.
        tokens: ``[R, P]`` int64, of every rank the tokens that have experts on each EP rank, before
            drop; None: they were not counted.
        message: ``[R, E + P]``, assigned and tokens side by side, if they were gathered so.
    """

    assigned: Tensor
    kept: Tensor
    training: Tensor | None = None
    tokens: Tensor | None = None
    message: Tensor | None = None


class RouterLosses(NamedTuple):
    """This rank's shares of other losses than the global auxiliary loss; None where there is none.

    Attributes:
        preferred: ``[E]`` int64, all ranks' load by the best scores, where these do not decide.
        sequence: the auxiliary loss of the sequences, a scalar in the gate dtype.
        z: the z-loss, a scalar in the gate dtype.
    """

    preferred: Tensor | None = None
    sequence: Tensor | None = None
    z: Tensor | None = None


class RoutingStats(NamedTuple):
    """Expert balance over the whole token group; the same on every rank, on the device.

    Attributes:
        assigned: ``[E]``, assignments of each expert before drop, int64.
        dropped: ``[E]``, of these, how many exceeded the capacity, int64.
    """

    assigned: Tensor
    dropped: Tensor


class Routing(NamedTuple):
    """The decision for this rank's T tokens.

    Attributes:
        experts: ``[T, k]``, chosen experts, best first, int64.
        weights: ``[T, k]``, by default softmax over the k chosen logits, gate dtype,
            differentiable. Dropped assignments keep their weight here; the kept ones are not
            renormalised.
        mask: ``[T, k]``, False where the assignment is dropped; None if none can be.
        counts: of all ranks.
        logits: ``[T, E]``, gate dtype, differentiable.
        num_tokens: N, of all ranks.
        aux_loss_coefficient: as given.
        histogram: this rank's assignments as kernels have counted them; None by plain torch, and
            with drops, where it counts too many.
        score_function: that of the gate probabilities.
        losses: beside the global auxiliary loss.
        loss: ``aux_loss``, once it was computed.
    """

    experts: Tensor
    weights: Tensor
    mask: Tensor | None
    counts: AssignmentCounts
    logits: Tensor
    num_tokens: int
    aux_loss_coefficient: float
    histogram: Histogram | None = None
    score_function: ScoreFunction = "softmax_of_top_k"
    losses: RouterLosses = RouterLosses()
    loss: Tensor | None = None

    @property
    def dropless(self) -> bool:
        """No assignment can be dropped: known on the host, as their numbers then are."""
        return self.mask is None

    # These three are computed at every access: no token waits for them. Read each once.
    @property
    def kept(self) -> Tensor:
        """``[T, k]``, False where the assignment is dropped."""
        return torch.ones_like(self.experts, dtype=torch.bool) if self.mask is None else self.mask

    @property
    def stats(self) -> RoutingStats:
        """Balance over all ranks."""
        assigned_E = _over_ranks(self.counts.assigned)
        if self.counts.kept is self.counts.assigned:
            return RoutingStats(assigned_E, torch.zeros_like(assigned_E))
        return RoutingStats(assigned_E, assigned_E - _over_ranks(self.counts.kept))

    @property
    def aux_loss(self) -> Tensor:
        """This rank's share of all losses of the router, a scalar in the gate dtype."""
        if self.loss is not None:
            return self.loss
        _, *others = self.losses
        losses = [loss for loss in others if loss is not None]
        if self.aux_loss_coefficient:
            losses.insert(0, self.balance_loss(self.load, self.num_tokens))
        return sum(losses[1:], losses[0]) if losses else self.logits.new_zeros(())

    @property
    def load(self) -> Tensor:
        """``[E]`` int64: the assignments of all ranks that the auxiliary loss counts."""
        preferred_E = self.losses.preferred
        return _over_ranks(self.counts.assigned) if preferred_E is None else preferred_E

    @property
    def probabilities(self) -> Tensor:
        """``[T, E]``: gate probabilities, which sum to 1, differentiable."""
        sigmoid = self.score_function == "sigmoid"
        return (F.logsigmoid(self.logits) if sigmoid else self.logits).softmax(1)

    def balance_loss(self, assigned_E: Tensor, num_tokens: int) -> Tensor:
        """The global one, with f_i of the assignments of more tokens: of several micro-batches."""
        assignments = max(num_tokens, 1) * self.experts.shape[1]  # without tokens 0, not 0 / 0
        total = self.probabilities.sum(0).dot(assigned_E.to(self.logits.dtype))
        scaled = self.aux_loss_coefficient * assigned_E.shape[0]
        return total * (scaled / (assignments * max(self.num_tokens, 1)))


def _over_ranks(counts_RE: Tensor) -> Tensor:
    """The sum over the ranks; nothing is launched for one."""
    return counts_RE[0] if counts_RE.shape[0] == 1 else counts_RE.sum(0)


class HostTokenCounts:
    """How many assignments each rank keeps for each expert, on their way to the host.

    The one device-to-host copy: collectives and buffers after it need sizes on the host. It starts
    here. Sums over the experts are known before it arrives if nothing can be dropped: what needs no
    more is queued meanwhile, so that the device has work while the host reads.

    Args:
        routing: whose counts.
        order: where the tokens of every rank stand.
        start: start the copy now; False: where :meth:`wait` is called, if at all.

    Attributes:
        dropless: no assignment can be dropped.
    """

    def __init__(self, routing: Routing, order: TokenOrder, *, start: bool = True) -> None:
        self.dropless, self._order = routing.dropless, order
        self._top_k, self._counts = routing.experts.shape[1], routing.counts
        self._copied = self._start() if start else None
        self._parts: dict[str, list[list[int]]] = {}

    def _start(self) -> Callable[[], Tensor]:
        """Start the copy of all that is asked for, side by side."""
        counts = self._counts
        kept_RE = None if self.dropless else counts.kept
        training_R1 = None if counts.training is None else counts.training.unsqueeze(1)
        told = {"assigned": counts.assigned, "tokens": counts.tokens}
        told |= {"kept": kept_RE, "training": training_R1}
        parts = {name: part for name, part in told.items() if part is not None}
        self._widths = {name: part.shape[1] for name, part in parts.items()}
        message = counts.assigned if len(parts) == 1 else counts.message
        if message is None or not self.dropless:
            message = torch.cat([*parts.values()], dim=1)
        return to_host(message)

    def of_rank(self, rank: int) -> int:
        """Assignments that a rank keeps; waits if some can be dropped."""
        if self.dropless:
            return self._order.num_local_tokens(rank) * self._top_k
        return sum(self.wait()[rank])

    @property
    def most(self) -> int:
        """The most that any one rank can keep; the same number on every rank, without waiting."""
        return self._order.max_local_tokens * self._top_k

    def of_all(self) -> int:
        """Assignments that all ranks keep; waits if some can be dropped."""
        if self.dropless:
            return self._order.num_tokens * self._top_k
        return sum(map(sum, self.wait()))

    def wait(self) -> list[list[int]]:
        """For each rank and expert.

        Raises:
            ValueError: if the ranks assigned other numbers of tokens than the order has, or some
                train and others do not.
        """
        if not self._parts:
            rows, parts, first = (self._copied or self._start())().tolist(), {}, 0
            for name, width in self._widths.items():
                parts[name] = [row[first : first + width] for row in rows]
                first += width
            if "training" in parts:
                check_training([mode for (mode,) in parts["training"]])
            check_counts(parts["assigned"], self._top_k, self._order)
            self._parts = parts
        return self._parts["assigned" if self.dropless else "kept"]

    def tokens(self) -> list[list[int]]:
        """For each rank its tokens with experts on each EP rank; waits and raises likewise."""
        self.wait()
        return self._parts["tokens"]


def check_training(training_R: Sequence[int]) -> None:
    """Raise ValueError unless all ranks train, or none: with a capacity only those drop."""
    ranks = {mode: [r for r, other in enumerate(training_R) if other == mode] for mode in (0, 1)}
    if ranks[0] and ranks[1]:
        raise ValueError(
            "a layer with a capacity_factor must be in one mode on every rank of groups.token, got"
            f" train() on ranks {ranks[1]} and eval() on ranks {ranks[0]}: call the same on all"
        )


def check_counts(assigned_RE: Sequence[Sequence[int]], top_k: int, order: TokenOrder) -> None:
    """Raise ValueError, on every rank alike, if a rank routed other tokens than ``order`` says.

    For orders that every rank assumed by itself and :func:`check_order` did not see.
    """
    for rank, assigned_E in enumerate(assigned_RE):
        expected, routed = order.num_local_tokens(rank), sum(assigned_E) // top_k
        if routed != expected:
            raise ValueError(
                f"token_order must be equal on every rank, got {expected} tokens for rank {rank},"
                f" which routed {routed}: pass it if ranks hold different numbers of tokens"
            )
