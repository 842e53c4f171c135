"""What the experts' router must know of Megatron's own packs."""

from __future__ import annotations

from typing import Any

import torch.distributed as dist
from megatron.core.packed_seq_params import PackedSeqParams
from megatron.core.process_groups_config import ProcessGroupCollection

from lasp._core.checks import check_part
from lasp.hybrid.packing import router_order
from lasp.megatron.batch import PackedSequence, layout_of
from lasp.megatron.checks import groups_of
from lasp.megatron.packs import (
    PackedCut,
    check_packed_cut,
    layout_of_megatrons_pack,
    names_padding,
)
from lasp.sequence.layout import SequenceLayout
from moe_parallel.router.token_order import TokenOrder


def token_order_of(
    packed_seq_params: PackedSeqParams | None,
    num_rows: int,
    packed_cut: PackedCut | None,
    groups: ProcessGroupCollection,
) -> TokenOrder | None:
    """The router's order of a batch as Megatron hands it to a layer; None: that of the ranks' rows.

    Args:
        packed_seq_params: a :class:`lasp.megatron.PackedSequence` has it. That of Megatron's own
            PackedSeqParams is made of its lengths, once for all layers; over data parallel ranks it
            is None, all rows are tokens.
        num_rows: of this rank.
        packed_cut: how Megatron's own packs are cut.
        groups: tp, cp and tp_dp_cp.

    Raises:
        ValueError: for Megatron's own packs with padding over data parallel ranks, which do not
            know each other's.
    """
    if packed_seq_params is None or isinstance(packed_seq_params, PackedSequence):
        return getattr(packed_seq_params, "token_order", None)
    tp_size, cp_size = groups.tp.size(), groups.cp.size()
    replicas = groups.tp_dp_cp.size() > tp_size * cp_size
    if not names_padding(packed_seq_params) and (replicas or cp_size == 1):
        return None
    if replicas:
        raise ValueError(
            "packed_seq_params must be a PackedSequence for experts over data parallel ranks, got"
            f" {type(packed_seq_params).__name__} with padding: no rank knows the others' padding;"
            " give the model share_packs(packed_seq_params, packed_cut=...) of"
            " lasp.megatron"
        )
    layout = layout_of(packed_seq_params, num_rows * tp_size, cp_size, packed_cut=packed_cut)
    made: tuple[SequenceLayout, TokenOrder] | None = vars(packed_seq_params).get("_made_order")
    if made is None or made[0] is not layout:
        made = layout, router_order([layout], tp_size)
        vars(packed_seq_params)["_made_order"] = made
    return made[1]


def share_packs(
    packed_seq_params: PackedSeqParams,
    *,
    packed_cut: PackedCut | None = None,
    pg_collection: ProcessGroupCollection | None = None,
) -> PackedSequence:
    """Megatron's own pack with what the experts must know of the packs of all replicas.

    Call it once per micro-batch where the batch is made, on every rank.

    Args:
        packed_seq_params: of this replica.
        packed_cut: how its loader cut it over several context-parallel ranks, see
            :data:`lasp.megatron.PackedCut`.
        pg_collection: its tp, cp and dp groups; of the parallel state if None.

    Communication: one all-gather of the lengths over dp.

    Raises:
        ValueError: on every rank of dp, if the pack of one of them is refused.
    """
    tp, cp, dp = groups_of(pg_collection, "packs of all replicas", "tp", "cp", "dp")
    own: SequenceLayout | str
    try:
        check_part("packed_seq_params", packed_seq_params, PackedSeqParams)
        check_packed_cut(packed_cut)
        own = layout_of_megatrons_pack(packed_seq_params, cp.size(), packed_cut)
    except ValueError as error:  # the others would wait for this rank
        own = str(error)
    layouts: list[Any] = [None] * dp.size()
    dist.all_gather_object(layouts, own, group=dp)
    refused = {rank: why for rank, why in enumerate(layouts) if isinstance(why, str)}
    if isinstance(own, str) or refused:
        raise ValueError(f"the packs of all dp ranks must be valid, got by rank {refused}")
    return PackedSequence(layout=own, token_order=router_order(layouts, tp.size()))
