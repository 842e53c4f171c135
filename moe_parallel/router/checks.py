"""What a call of the layer checks before it routes: hidden states, and the order of the tokens.

The order gives the shapes of the router's all-gathers. Ranks that disagree about it would call one
collective with different sizes, which aborts gloo and hangs NCCL. So the first time they compare
three numbers each, whose shape nobody can get wrong.
"""

from __future__ import annotations

from functools import lru_cache
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from lasp._core.autocast import autocast_dtype
from lasp._core.checks import check_part
from lasp._core.collectives import all_gather
from moe_parallel.config import MoEConfig
from moe_parallel.mesh import ExpertMesh
from moe_parallel.router.counts import check_training
from moe_parallel.router.losses import TokenSequences
from moe_parallel.router.scores import RoutingReplay
from moe_parallel.router.token_order import TokenOrder


def check_order(
    order: TokenOrder,
    num_rows: int,
    token_group: dist.ProcessGroup | None,
    device: torch.device,
    training: bool | None = None,
) -> None:
    """Raise ValueError, on every rank alike, unless all hold this order and the rows it names.

    The ranks compare once; ``order`` remembers the groups that agreed on it. From then on only
    ``num_rows`` of this rank is checked, on the host.

    Args:
        order: where the tokens of every rank stand.
        num_rows: rows this rank passes to the layer, padding included.
        token_group: the ranks of ``order``; None for this rank alone.
        device: of the message.
        training: what the shapes of messages depend on, compared too; None where they do not. All
            ranks must switch together: only the first call in a mode compares. A rank that switches
            alone after it gets the backend's error, or waits for its timeout.

    Communication: the first time for an order object, a group and ``training``, an all-gather of 24
    bytes a rank over ``token_group``, one copy to the device and one back.

    Raises:
        ValueError: naming ``token_order``, or what to call where only some ranks train.
    """
    rank, size = 0, 1
    if token_group is not None:
        rank, size = dist.get_rank(token_group), token_group.size()
    rows_of = {rank: num_rows}
    if token_group is not None and (token_group, training) not in order.agreed_groups:
        mine = torch.tensor([num_rows, order.fingerprint, bool(training)], device=device)
        answers = all_gather(mine, token_group).tolist()
        rows_of = {other: rows for other, (rows, *_) in enumerate(answers)}
        differing = [other for other, answer in enumerate(answers) if answer[1] != answers[0][1]]
        if differing:
            raise ValueError(
                f"token_order must be equal on every rank of groups.token, got another on ranks"
                f" {differing} than on rank 0; the ranks hold {list(rows_of.values())} rows:"
                " build it from the same numbers on all, and pass it if they hold different ones"
            )
        check_training([answer[2] for answer in answers])
    if order.num_ranks != size:
        raise ValueError(
            f"token_order must have one entry for each of the {size} ranks of groups.token,"
            f" got {order.num_ranks}"
        )
    for other, rows in rows_of.items():
        if order.rows_per_rank[other] != rows:
            raise ValueError(
                f"token_order must name the {rows} rows of hidden on rank {other},"
                f" got {order.rows_per_rank[other]}"
            )
    if token_group is not None:
        order.agreed_groups.add((token_group, training))


def agreed_order(
    rows: Tensor,
    token_order: TokenOrder | None,
    config: MoEConfig,
    mesh: ExpertMesh,
    token_group: dist.ProcessGroup | None,
    *,
    training: bool,
) -> TokenOrder:
    """Where the tokens of every rank stand, in an order that the ranks have compared.

    Args:
        rows: ``[tokens, hidden]``, padding included.
        token_order: see :meth:`moe_parallel.ExpertParallelMoE.forward`.
        config: the layer's.
        mesh: the EP x ETP block of this rank.
        token_group: ranks that share the decision.
        training: the layer is in training mode, where a capacity drops.

    Communication: that of :func:`moe_parallel.router.checks.check_order`.

    Raises:
        ValueError: for orders that differ or are missing where they must not, on every rank alike.
    """
    static = config.static_shapes or (config.pad_to_capacity and training)
    by_probability = config.capacity_factor is not None and config.drop_policy == "probability"
    given = token_order is not None
    if static and not given and mesh.num_token_ranks > 1:
        option = "static_shapes" if config.static_shapes else "pad_to_capacity"
        raise ValueError(
            f"token_order must be given with {option} on several ranks, got None: without"
            " it the ranks compare their numbers of tokens on the host; keep one for all calls"
        )
    if token_order is None:
        # An order that the ranks compare remembers it: one of its own for each call.
        made = TokenOrder.contiguous if by_probability else _remembered_order
        token_order = made((rows.shape[0],) * mesh.num_token_ranks)
    # Otherwise what the router gathers is E counts, whatever a rank believes of the others.
    if given or by_probability:
        # By position the router's own message tells who trains.
        asked = training if by_probability or config.pad_to_capacity else None
        check_order(token_order, rows.shape[0], token_group, rows.device, asked)
    return token_order


@lru_cache(maxsize=16)
def _remembered_order(tokens_per_rank: tuple[int, ...]) -> TokenOrder:
    return TokenOrder.contiguous(tokens_per_rank)


def shared_settings(
    config: MoEConfig,
    hidden: Tensor,
    token_order: TokenOrder | None,
    sequences: TokenSequences | None,
) -> dict[str, object]:
    """What the calls of all ranks must have in common, by name; not who computes.

    Raises:
        ValueError: for arguments of another type.
    """
    check_part("token_order", token_order, TokenOrder, optional=True)
    check_part("sequences", sequences, TokenSequences, optional=True)
    how = {
        "dtype": hidden.dtype,
        "width of hidden": list(hidden.shape[-1:]),
        "token_order": "None" if token_order is None else "given",
        "sequences": None if sequences is None else sequences.num,
    }
    return how | {k: v for k, v in vars(config).items() if k not in ("impl", "gemm")}


def routed_inputs(
    hidden: Tensor,
    replay: RoutingReplay | None,
    sequences: TokenSequences | None,
    config: MoEConfig,
    token_order: TokenOrder,
    mesh: ExpertMesh,
) -> dict[str, Any]:
    """What the router takes beside the routed tokens, checked: arguments by name.

    Raises:
        ValueError: naming ``replay`` or ``sequences``, see
            :meth:`moe_parallel.ExpertParallelMoE.forward`.
    """
    given: dict[str, Any] = {"replay": replay}
    shape = (token_order.num_local_tokens(mesh.token_rank), config.top_k)
    if replay is not None:
        check_part("replay", replay, RoutingReplay)
    if replay is not None and replay.experts is not None:
        told = replay.experts
        if told.shape != shape or told.dtype != torch.int64 or told.device != hidden.device:
            raise ValueError(
                f"replay.experts must be int64 {list(shape)} on {hidden.device}, one row for each"
                f" routed token, got {told.dtype} {list(told.shape)} on {told.device}: take a new"
                " RoutingReplay for other tokens"
            )
    wanted, rows = bool(config.router.sequence_loss_coefficient), hidden.shape[:-1]
    if sequences is not None and not wanted:
        raise ValueError(
            "sequences must be None without a sequence_loss_coefficient, got some: set it in"
            " RouterConfig, or leave them out"
        )
    if wanted and sequences is None:
        if len(rows) != 2 or mesh.num_token_ranks > 1:
            raise ValueError(
                "sequences must be given with a sequence_loss_coefficient, got None: only of"
                " [B, T, hidden] on one rank is every row a sequence. Pass TokenSequences"
            )
        numbers = torch.arange(rows[0], device=hidden.device).repeat_interleave(rows[1])
        sequences = TokenSequences(numbers, rows[0])
    if sequences is not None:
        check_part("sequences", sequences, TokenSequences)
        check_part("sequences.numbers", sequences.numbers, Tensor)
        numbers = sequences.numbers
        if numbers.shape != (rows.numel(),) or numbers.dtype != torch.int64:
            raise ValueError(
                f"sequences.numbers must be int64 [{rows.numel()}], one for each row of hidden, got"
                f" {numbers.dtype} {list(numbers.shape)}: number the sequences of all ranks"
            )
        numbers = token_order.take(numbers, mesh.token_rank)
        given["sequences"] = TokenSequences(numbers, sequences.num)
    return given


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
