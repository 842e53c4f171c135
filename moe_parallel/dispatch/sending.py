"""Whether tokens cross to a rank once or assignments one by one, and calls of the former.

:func:`tokens_pay` chooses by the rows that travel where no product hides them.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cache, partial
from math import comb
from typing import NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

from lasp._core.cache import tensor_cache
from lasp._core.impl import ChosenImpl, chosen_impl
from moe_parallel.config import MoEConfig
from moe_parallel.dispatch.dispatcher import Dispatch, Dispatcher
from moe_parallel.dispatch.padding import drop_by_rank
from moe_parallel.dispatch.permute import RowOrder
from moe_parallel.dispatch.plan import RowCounts, checked_rows
from moe_parallel.dispatch.planned import device_numbers
from moe_parallel.dispatch.static_rows import check_static_mesh, fitting_rows, memory_rows
from moe_parallel.dispatch.token_rows import RowFormat, TokenSlots
from moe_parallel.dispatch.tokens import ExpertRows, TokenDispatch
from moe_parallel.mesh import ExpertMesh
from moe_parallel.router.counts import (
    HostTokenCounts,
    Routing,
    at_assignments,
    rows_before,
    tokens_of_ranks,
)
from moe_parallel.router.route import expert_capacity
from moe_parallel.router.token_order import TokenOrder

# Tokens must leave so much less to be seen: where both would be equal, groups of experts also hide
# what differs between ranks.
MOST_OF_ASSIGNMENTS = 0.75
# Where a token goes to more of the ranks on average, all tokens go to all of them. More rows than
# that take longer than the host, from the counts it waits for to the rows it sends.
NEARLY_ALL = 0.95


@cache
def mean_ranks(num_experts: int, top_k: int, ep_size: int) -> float:
    """EP ranks that a token goes to, on average, if it chooses any experts alike."""
    elsewhere = comb(num_experts - num_experts // ep_size, top_k) / comb(num_experts, top_k)
    return ep_size * (1 - elsewhere)


def may_send_tokens(config: MoEConfig, mesh: ExpertMesh) -> bool:
    """Whether some call of a layer may send tokens once: then its router counts tokens.

    Raises:
        ValueError: if the config asks for it and the mesh does not allow it.
    """
    if config.static_shapes:
        check_static_mesh(mesh)
    if config.send == "tokens" and mesh.etp_size > 1:
        raise ValueError(
            "send must be 'assignments' or 'auto' with ETP, got 'tokens': partial sums over ETP"
            " would round the gradients of router weights; use EP alone"
        )
    return any(tokens_pay(config, mesh, 1, padded=p) for p in {False, config.pad_to_capacity})


def tokens_pay(config: MoEConfig, mesh: ExpertMesh, num_groups: int, *, padded: bool) -> bool:
    """Whether a call sends tokens once: it does where that sends fewer rows in the open.

    Assignments travel in groups, and products hide all but the first group on its way there and
    the last one on its way back: k / groups rows of a token are seen. Sent once, a token goes to D
    ranks (:func:`mean_ranks`) in one group. Tokens are sent if D is at most
    ``MOST_OF_ASSIGNMENTS`` of k / groups. A padded call sends every token to every rank, or
    ``capacity_factor`` k assignments. With ETP, and where ``overlap_groups`` is given, assignments
    are sent; with ``static_shapes`` tokens.

    Args:
        config: of the layer.
        mesh: the EP x ETP block of this rank.
        num_groups: in which assignments would go.
        padded: as many rows go to every rank.
    """
    if mesh.ep_size == 1 or mesh.etp_size > 1 or config.send != "auto" or config.static_shapes:
        return mesh.ep_size > 1 and (config.send == "tokens" or config.static_shapes)
    if config.overlap_groups is not None:
        return False
    tokens = mean_ranks(config.num_experts, config.top_k, mesh.ep_size)
    assignments = float(config.top_k)
    if padded:
        tokens, assignments = mesh.ep_size, assignments * (config.capacity_factor or 1.0)
    return tokens * num_groups <= MOST_OF_ASSIGNMENTS * assignments


class TokenCall(NamedTuple):
    """A call whose tokens cross once.

    Attributes:
        routing: with the drops of padded calls and of static shapes.
        dispatch: moves the rows.
        wait: rows each rank of the token group keeps for each expert.
        total: rows that all experts take.
        wanted: ``[R]`` int64, rows that each rank's experts would take, where some may not fit.
    """

    routing: Routing
    dispatch: Dispatch
    wait: Callable[[], RowCounts]
    total: int
    wanted: Tensor | None = None


def start_tokens(
    x_TM: Tensor,
    routing: Routing,
    config: MoEConfig,
    mesh: ExpertMesh,
    dispatcher: Dispatcher,
    token_order: TokenOrder,
    token_group: dist.ProcessGroup | None,
    *,
    padded: bool,
) -> TokenCall:
    """Prepare a call that sends tokens; the device counts rows while the host waits for counts.

    Args:
        x_TM: this rank's routed tokens.
        routing: the decision for them; with counts of tokens, unless the call is padded.
        config: of the layer.
        mesh: the EP x ETP block of this rank.
        dispatcher: of the layer.
        token_order: where the tokens of every rank stand.
        token_group: the ranks of that order. Where they have compared it, and nearly all tokens go
            to all ranks, all do, and the first rows leave before counts reach the host.
        padded: rows are padded to capacity: :mod:`moe_parallel.dispatch.padding`.
    """
    impl = chosen_impl(config.impl, x_TM.device, x_TM.dtype)
    known = token_order.is_agreed(token_group) and _go_everywhere(config, mesh)
    everywhere, wanted = padded or known or config.static_shapes, None
    ranks = mesh.ep_size if everywhere else min(mesh.ep_size, config.top_k)
    form = RowFormat(x_TM.shape[1], config.top_k, x_TM.dtype, routing.weights.dtype)
    like, most_rows = x_TM.new_empty(0, form.width), token_order.max_local_tokens * ranks
    start = partial(dispatcher.start_call, experts=(range(1),), most_rows=most_rows, like=like)
    rows = gathered = None
    if everywhere:  # how many are known: they leave before the rows of their assignments are
        rows = start(partial(_all_tokens, token_order, mesh, padded=padded))
        gathered = rows.gather(x_TM.detach()) if token_order.is_even else None
    if padded:
        routing, slots, kept_RE = _padded_slots(routing, config, mesh, token_order)
        expert_rows, total = ExpertRows(None), sum(map(sum, kept_RE))

        def wait() -> RowCounts:
            return kept_RE

    elif config.static_shapes:
        total = token_order.num_tokens * config.top_k
        given = (routing, config, mesh, token_order, impl)
        routing, slots, expert_rows, wanted = _static_slots(*given)
        wait = partial(_counts_of, routing, token_order)
    else:
        counts = HostTokenCounts(routing, token_order)
        wait, total = counts.wait, counts.of_all()
        if config.max_rows is not None:
            wait = partial(checked_rows, wait, config.max_rows, mesh)
        slots, ends = _slots(routing, mesh, config, impl, everywhere=everywhere)
        expert_rows = ExpertRows(ends)
        rows = rows or start(partial(_tokens_of, counts, wait))
    assert rows is not None
    where = (slots, form, expert_rows, impl, gathered)
    dispatch = TokenDispatch(rows, wait, mesh, routing.weights, *where)
    return TokenCall(routing, dispatch, wait, total, wanted)


def _tokens_of(counts: HostTokenCounts, wait: Callable[[], RowCounts]) -> RowCounts:
    """Tokens of each rank for each EP rank, once ``wait`` has found nothing wrong."""
    wait()
    return counts.tokens()


def _all_tokens(order: TokenOrder, mesh: ExpertMesh, *, padded: bool) -> RowCounts:
    """Tokens of each rank, with ``padded`` the most of any, for each EP rank: all."""
    most, ranks = order.max_local_tokens, range(mesh.num_token_ranks)
    return [[most if padded else order.num_local_tokens(r)] * mesh.ep_size for r in ranks]


def _counts_of(routing: Routing, order: TokenOrder) -> RowCounts:
    return HostTokenCounts(routing, order, start=False).wait()


def _go_everywhere(config: MoEConfig, mesh: ExpertMesh) -> bool:
    """Whether all tokens go to all ranks: then nobody waits for counts before they leave.

    Not where counts may still say that a call is wrong: of too many rows, or of ranks that differ
    in whether they drop.
    """
    ranks = mean_ranks(config.num_experts, config.top_k, mesh.ep_size)
    unchecked = config.max_rows is None and config.capacity_factor is None
    return unchecked and ranks >= NEARLY_ALL * mesh.ep_size


@tensor_cache(maxsize=16)
def _everywhere(num_tokens: int, distance: int, ep_size: int, device: torch.device) -> Tensor:
    """``[T, P]``: each token's row for each EP rank, whose first rows have a distance; kept."""
    with torch.inference_mode(False):  # remembered, and used in training too
        first_P = torch.arange(ep_size, device=device) * distance
        return torch.arange(num_tokens, device=device).unsqueeze(1) + first_P


def _sent_everywhere(experts_Tk: Tensor, mesh: ExpertMesh) -> RowOrder:
    """All tokens in rows for all ranks."""
    num_tokens = len(experts_Tk)
    row_TP = _everywhere(num_tokens, num_tokens, mesh.ep_size, experts_Tk.device)
    return RowOrder(row_TP, num_tokens * mesh.ep_size)


def _slots(
    routing: Routing, mesh: ExpertMesh, config: MoEConfig, impl: ChosenImpl, *, everywhere: bool
) -> tuple[TokenSlots, Tensor]:
    """The rows of assignments and tokens, and ``[E_local]`` int32 ends of the experts' rows."""
    experts_Tk, num_experts, histogram = routing.experts, config.num_experts, routing.histogram
    sources = device_numbers(mesh.sources, experts_Tk.device)
    me = mesh.sources.index(mesh.token_rank)
    num_rows = experts_Tk.shape[0] * min(mesh.ep_size, config.top_k)
    if histogram is not None and impl == "triton":
        from moe_parallel.kernels import router

        where = (sources, me, mesh.ep_rank, mesh.ep_size)
        starts_E, ends = router.starts(routing.counts.kept, *where)
        row_Tk, row_TP, _ = router.rows(experts_Tk, histogram, starts_E=starts_E)
        sent = _sent_everywhere(experts_Tk, mesh) if everywhere else RowOrder(row_TP, num_rows)
        return TokenSlots(experts_Tk, row_Tk, sent, num_experts), ends
    kept_SE = routing.counts.kept.index_select(0, sources)
    total_PE = kept_SE.sum(0).unflatten(0, (mesh.ep_size, -1))
    end_PE = total_PE.cumsum(1)
    starts_E = (end_PE - total_PE).flatten() + kept_SE[:me].sum(0)
    number_Tk = _numbers_of_kept(experts_Tk, routing.mask, num_experts)
    row_Tk = (starts_E[experts_Tk] + number_Tk).masked_fill(number_Tk < 0, -1)
    ends = end_PE[mesh.ep_rank].to(torch.int32)
    if everywhere:
        sent = _sent_everywhere(experts_Tk, mesh)
        return TokenSlots(experts_Tk, row_Tk, sent, num_experts), ends
    goes_TP = tokens_of_ranks(experts_Tk, num_experts, mesh.ep_size)
    tokens_P = goes_TP.sum(0)
    row_TP = tokens_P.cumsum(0) - tokens_P + goes_TP.cumsum(0) - 1
    # Rows beyond those that leave hold nothing: plain torch, which writes all, writes zeros.
    sent = RowOrder(row_TP.masked_fill(~goes_TP, -1), num_rows, padded=impl == "eager")
    return TokenSlots(experts_Tk, row_Tk, sent, num_experts), ends


def _static_slots(
    routing: Routing, config: MoEConfig, mesh: ExpertMesh, order: TokenOrder, impl: ChosenImpl
) -> tuple[Routing, TokenSlots, ExpertRows, Tensor | None]:
    """:func:`_slots` of static shapes: the routing with drops, slots, rows, and rows wanted."""
    memory, may_drop = memory_rows(config, mesh, order)
    if not may_drop:
        slots, ends = _slots(routing, mesh, config, impl, everywhere=True)
        return routing, slots, ExpertRows(ends, memory), None
    kept_RE, wanted_R = fitting_rows(routing.counts.assigned, mesh.ep_size, memory, impl)
    routing = routing._replace(counts=routing.counts._replace(kept=kept_RE))
    slots, ends = _slots(routing, mesh, config, impl, everywhere=True)
    fits_Tk = slots.row < memory
    slots = slots._replace(row=torch.where(fits_Tk, slots.row, -1))
    return routing._replace(mask=fits_Tk), slots, ExpertRows(ends, memory), wanted_R


def _numbers_of_kept(experts_Tk: Tensor, mask_Tk: Tensor | None, num_experts: int) -> Tensor:
    """``[T, k]``: the number of each kept assignment among the rank's to its expert, else -1."""
    if mask_Tk is None:
        before_ET = rows_before(experts_Tk, num_experts)
        return at_assignments(before_ET - before_ET[:, :1], experts_Tk)
    experts_Tk = experts_Tk.masked_fill(~mask_Tk, num_experts)
    before_ET = rows_before(experts_Tk, num_experts + 1)
    number_Tk = at_assignments(before_ET - before_ET[:, :1], experts_Tk)
    return number_Tk.masked_fill(~mask_Tk, -1)


def _padded_slots(
    routing: Routing, config: MoEConfig, mesh: ExpertMesh, order: TokenOrder
) -> tuple[Routing, TokenSlots, RowCounts]:
    """The same of calls that are padded: every token goes to every rank."""
    num_experts, most = config.num_experts, order.max_local_tokens
    capacity = expert_capacity(config.capacity_factor or 0.0, most, config.top_k, num_experts)
    routing, number_Tk = drop_by_rank(routing, capacity)
    experts_Tk, num_sources = routing.experts, len(mesh.sources)
    local_Tk = experts_Tk.remainder(num_experts // mesh.ep_size)
    row_Tk = (local_Tk * num_sources + mesh.sources.index(mesh.token_rank)) * capacity + number_Tk
    row_Tk = row_Tk.masked_fill(number_Tk >= capacity, -1)
    row_TP = _everywhere(len(experts_Tk), most, mesh.ep_size, experts_Tk.device)
    sent = RowOrder(row_TP, most * mesh.ep_size, padded=True)
    kept_RE = [[capacity] * num_experts] * mesh.num_token_ranks
    return routing, TokenSlots(experts_Tk, row_Tk, sent, num_experts), kept_RE
