"""What the layer settles before rows travel: the order of the tokens, and the counts of rows."""

from __future__ import annotations

import torch
import torch.distributed as dist
from torch import Tensor

from lasp._core.autocast import autocast_dtype
from moe_parallel.config import MoEConfig
from moe_parallel.mesh import ExpertMesh
from moe_parallel.router.checks import check_counts, check_order, check_training
from moe_parallel.router.route import Routing
from moe_parallel.router.token_order import TokenOrder, to_host


def agreed_order(
    rows: Tensor,
    token_order: TokenOrder | None,
    *,
    config: MoEConfig,
    mesh: ExpertMesh,
    token_group: dist.ProcessGroup | None,
    training: bool,
) -> TokenOrder:
    """Where the tokens of every rank stand, in an order that the ranks have compared.

    Args:
        rows: ``[tokens, hidden]``, padding included.
        token_order: see :meth:`moe_parallel.ExpertParallelMoE.forward`.
        config: of the layer.
        mesh: likewise.
        token_group: likewise.
        training: whether there is a capacity.

    Communication: that of :func:`moe_parallel.router.checks.check_order`.

    Raises:
        ValueError: for orders that differ or are missing where they must not, on every rank alike.
    """
    padded = config.pad_to_capacity and training
    by_probability = config.capacity_factor is not None and config.drop_policy == "probability"
    given = token_order is not None
    if padded and not given and mesh.num_token_ranks > 1:
        raise ValueError(
            "token_order must be given with pad_to_capacity on several ranks, got None: without"
            " it the ranks compare their numbers of tokens on the host; keep one for all calls"
        )
    if token_order is None:
        token_order = TokenOrder.contiguous([rows.shape[0]] * mesh.num_token_ranks)
    # Otherwise what the router gathers is E counts, whatever a rank believes of the others.
    if given or by_probability:
        # By position the router's own message tells who trains.
        asked = training if by_probability or config.pad_to_capacity else None
        check_order(token_order, rows.shape[0], token_group, rows.device, asked)
    return token_order


def check_hidden(hidden: Tensor, weight: Tensor) -> None:
    """Raise ValueError unless hidden states fit experts with this weight, ``[..., hidden]``.

    Under autocast ``hidden`` is cast already. The dtype of a DTensor is left to the experts: FSDP
    may gather them in another.
    """
    width = weight.shape[-1]
    if hidden.dim() not in (2, 3) or hidden.shape[-1] != width:
        raise ValueError(
            f"hidden must be [T, {width}] or [B, T, {width}], got shape {tuple(hidden.shape)}"
        )
    dtype = hidden.dtype if hasattr(weight, "device_mesh") else autocast_dtype(weight)
    if hidden.dtype != dtype or hidden.device != weight.device:
        raise ValueError(
            f"hidden must be {dtype} on {weight.device} like the experts, got"
            f" {hidden.dtype} on {hidden.device}: convert it, or build the layer with its dtype"
        )


class HostTokenCounts:
    """How many assignments each rank keeps for each expert, on their way to the host.

    The one device-to-host copy: collectives and buffers after it need sizes on the host. It starts
    here. Sums over the experts are known before it arrives if nothing can be dropped: what needs no
    more is queued meanwhile, so that the device has work while the host reads.

    Args:
        routing: whose counts.
        order: where the tokens of every rank stand.

    Attributes:
        dropless: no assignment can be dropped.
    """

    def __init__(self, routing: Routing, order: TokenOrder) -> None:
        self.dropless, self._order = routing.dropless, order
        self._top_k = routing.experts.shape[1]
        assigned_RE, kept_RE, training_R = routing.counts
        self._num_experts, self._tells_training = assigned_RE.shape[1], training_R is not None
        told = [assigned_RE] if self.dropless else [assigned_RE, kept_RE]
        if training_R is not None:
            told.append(training_R.unsqueeze(1))
        self._copied = to_host(assigned_RE if len(told) == 1 else torch.cat(told, dim=1))
        self._kept_RE: list[list[int]] | None = None

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
        """Assignments that all ranks keep; likewise."""
        if self.dropless:
            return self._order.num_tokens * self._top_k
        return sum(map(sum, self.wait()))

    def wait(self) -> list[list[int]]:
        """For each rank and expert.

        Raises:
            ValueError: if the ranks assigned other numbers of tokens than the order has, or some
                train and others do not.
        """
        if self._kept_RE is None:
            rows, num_experts = self._copied().tolist(), self._num_experts
            if self._tells_training:
                check_training([row[-1] for row in rows])
            assigned_RE = [row[:num_experts] for row in rows]
            check_counts(assigned_RE, self._top_k, self._order)
            kept_RE = [row[num_experts : 2 * num_experts] for row in rows]
            self._kept_RE = assigned_RE if self.dropless else kept_RE
        return self._kept_RE
