"""Wrong arguments: a ValueError naming the argument, on every rank, before any rank can hang."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.distributed as dist

from moe_parallel import ExpertGroups, ExpertParallelMoE, ExpertTopology, MoEConfig, TokenOrder
from moe_parallel.experts.experts import Experts
from tests.moe_parallel.batch import groups_of
from tests.ranks import run_on_ranks, subgroup

SIZES: dict[str, Any] = {"hidden_size": 8, "ffn_size": 6, "num_experts": 4, "top_k": 2}


def config(**changes: Any) -> MoEConfig:
    return MoEConfig(**{**SIZES, **changes})


def layer(topology: ExpertTopology | None = None, **changes: Any) -> ExpertParallelMoE:
    topology = topology or ExpertTopology(2, ep=2)
    return ExpertParallelMoE(config(**changes), groups=groups_of(topology).experts)


def run(
    *shape: int, dtype: torch.dtype = torch.float32, tokens: tuple = (), **changes: Any
) -> None:
    order = TokenOrder.contiguous(tokens) if tokens else None
    layer(**changes)(torch.zeros(shape, dtype=dtype), token_order=order)


def different_tokens_without_order(**changes: Any) -> None:
    run(3 + dist.get_rank(), 8, **changes)


def rank_1_holds(other: TokenOrder, rows: int = 4, **changes: Any) -> None:
    """Both ranks have 4 tokens; rank 1 got another order or another number of rows."""
    orders, rows_of = (TokenOrder.contiguous([4, 4]), other), (4, rows)
    at = dist.get_rank()
    layer(**changes)(torch.zeros(rows_of[at], 8), token_order=orders[at])


ZIGZAG = TokenOrder((((0, 0, 2), (6, 2, 2)), ((2, 0, 4),)), (4, 4))  # two segments a rank
SWAPPED = TokenOrder((((4, 0, 4),), ((0, 0, 4),)), (4, 4))  # the same shapes, other positions
BY_PROBABILITY: dict[str, Any] = {"capacity_factor": 1.0, "drop_policy": "probability"}


def pair_of_wrong_groups() -> None:
    world = dist.group.WORLD
    ExpertParallelMoE(config(), groups=ExpertGroups(token=world, ep=world, etp=world))


def token_group_too_small() -> None:
    alone = [subgroup(0), subgroup(1)][dist.get_rank()]
    ExpertParallelMoE(config(), groups=ExpertGroups(token=alone, ep=dist.group.WORLD))


# what is wrong -> (call, start of the message)
TABLE: dict[str, tuple[Callable[[], Any], str]] = {
    "hidden_size 0": (lambda: config(hidden_size=0), "hidden_size must be an integer >= 1"),
    "top_k 0": (lambda: config(top_k=0), "top_k must be an integer >= 1"),
    "top_k tensor": (lambda: config(top_k=torch.tensor(2.0)), "top_k must be an integer"),
    "top_k 1 has no gradient": (lambda: config(top_k=1), "top_k must be at least 2"),
    "top_k > experts": (lambda: config(top_k=5), "top_k must be at most num_experts 4"),
    "negative capacity": (
        lambda: config(capacity_factor=-1.0),
        "capacity_factor must be",
    ),
    "zero capacity": (
        lambda: config(capacity_factor=0.0),
        "capacity_factor must be",
    ),
    "NaN capacity": (
        lambda: config(capacity_factor=float("nan")),
        "capacity_factor must be",
    ),
    "negative loss": (lambda: config(aux_loss_coefficient=-0.1), "aux_loss_coefficient must be"),
    "gemm of experts": (lambda: Experts(8, 6, 4, gemm="fast"), "gemm must be one of"),
    "experts over ep": (lambda: layer(num_experts=5), "num_experts must divide over the ep group"),
    "ffn over etp": (
        lambda: layer(ExpertTopology(2, etp=2), ffn_size=7),
        "ffn_size must divide over the etp group",
    ),
    "world and topology": (lambda: ExpertTopology(4).build_groups(), "world_size must be the size"),
    "world not divisible": (lambda: ExpertTopology(2, ep=3), "pp x ep x etp must divide"),
    "ep and etp overlap": (pair_of_wrong_groups, "groups.ep_etp must have"),
    "token group too small": (token_group_too_small, "groups.token must hold"),
    "no dimension": (lambda: run(), "hidden must be [T, 8]"),
    "one dimension": (lambda: run(8), "hidden must be [T, 8]"),
    "other width": (lambda: run(3, 9), "hidden must be [T, 8]"),
    "other dtype": (lambda: run(3, 8, dtype=torch.float64), "hidden must be torch.float32"),
    "grouped rows unaligned": (lambda: layer(gemm="grouped"), "gemm='grouped' needs"),
    "order of another size": (lambda: run(3, 8, tokens=(3, 3, 3)), "token_order must have one"),
    "order of other tokens": (lambda: run(3, 8, tokens=(4, 4)), "token_order must name the 3 rows"),
    "ranks differ, no order": (different_tokens_without_order, "token_order must be equal"),
    "ranks differ, no order, position": (
        lambda: different_tokens_without_order(capacity_factor=1.0),
        "token_order must be equal",
    ),
    "ranks differ, no order, probability": (
        lambda: different_tokens_without_order(**BY_PROBABILITY),
        "token_order must be equal on every rank",
    ),
    "other segments": (lambda: rank_1_holds(ZIGZAG), "token_order must be equal on every rank"),
    "other segments, position": (
        lambda: rank_1_holds(ZIGZAG, capacity_factor=1.0),
        "token_order must be equal on every rank",
    ),
    "other positions, position": (
        lambda: rank_1_holds(SWAPPED, capacity_factor=1.0),
        "token_order must be equal on every rank",
    ),
    "other tokens, probability": (
        lambda: rank_1_holds(TokenOrder.contiguous([5, 4]), **BY_PROBABILITY),
        "token_order must be equal on every rank",
    ),
    "order for more ranks on one": (
        lambda: rank_1_holds(TokenOrder.contiguous([4, 4, 0])),
        "token_order must be equal on every rank",
    ),
    "other rows on one rank": (
        lambda: rank_1_holds(TokenOrder.contiguous([4, 4]), rows=5),
        "token_order must name the 5 rows of hidden on rank 1",
    ),
}


def message_of(name: str) -> str:
    with pytest.raises(ValueError) as error:
        TABLE[name][0]()
    dist.barrier()  # no rank is left waiting in another collective
    return str(error.value)


@pytest.mark.parametrize("name", TABLE)
def test_every_rank_raises_and_names_the_argument(name: str) -> None:
    for message in run_on_ranks(message_of, 2, name):
        assert message.startswith(TABLE[name][1])
