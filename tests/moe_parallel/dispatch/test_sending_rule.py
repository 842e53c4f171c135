"""When tokens cross to a rank once, and when assignments are sent one by one."""

from __future__ import annotations

from dataclasses import replace

import pytest

from moe_parallel import ExpertParallelMoE, ExpertTopology, MoEConfig
from moe_parallel.dispatch.sending import mean_ranks, tokens_pay
from moe_parallel.mesh import ExpertMesh
from tests.moe_parallel.batch import groups_of
from tests.ranks import run_on_ranks

TOKENS = MoEConfig(10, 12, 16, 4, send="tokens")


def mesh_of(ep: int, etp: int = 1) -> ExpertMesh:
    ranks = tuple(tuple(range(i * ep, i * ep + ep)) for i in range(etp))
    return ExpertMesh(0, ep * etp, 0, 0, ranks)


def test_mean_ranks_counts_ranks_of_different_experts() -> None:
    assert mean_ranks(4, 2, 4) == 2  # always two ranks
    assert mean_ranks(4, 2, 2) == pytest.approx(2 - 1 / 3)  # one of three partners is beside it
    assert mean_ranks(128, 8, 2) == pytest.approx(2, abs=0.01)
    assert mean_ranks(16, 16, 2) == 2


@pytest.mark.parametrize(
    ("sizes", "ep", "num_groups", "pays"),
    [
        ((2048, 768, 128, 8), 2, 1, True),  # Qwen3-30B
        ((2048, 768, 128, 8), 8, 1, True),
        ((2048, 768, 128, 8), 64, 1, False),  # nearly every expert on another rank
        ((4096, 1024, 256, 8), 2, 1, True),  # Ling
        ((4096, 1024, 256, 8), 2, 4, False),  # groups hide more
        ((4096, 14336, 8, 2), 2, 1, False),  # Mixtral
        ((6144, 9216, 32, 2), 2, 2, False),  # MiniMax-01
    ],
)
def test_tokens_are_sent_where_less_is_left_to_be_seen(
    sizes: tuple[int, ...], ep: int, num_groups: int, pays: bool
) -> None:
    config = MoEConfig(*sizes)
    assert tokens_pay(config, mesh_of(ep), num_groups, padded=False) == pays
    assert not tokens_pay(config, mesh_of(ep, 2), num_groups, padded=False)  # ETP
    assert not tokens_pay(config, mesh_of(1), num_groups, padded=False)
    for send in ("tokens", "assignments"):
        forced = replace(config, send=send)
        assert tokens_pay(forced, mesh_of(ep), 1, padded=False) == (send == "tokens")
    grouped = replace(config, overlap_groups=1)
    assert not tokens_pay(grouped, mesh_of(ep), 1, padded=False)


def test_padded_tokens_go_to_every_rank() -> None:
    config = MoEConfig(64, 32, 128, 8, capacity_factor=1.0, pad_to_capacity=True)
    assert tokens_pay(config, mesh_of(4), 1, padded=True)
    assert not tokens_pay(config, mesh_of(8), 1, padded=True)
    assert tokens_pay(replace(config, capacity_factor=2.0), mesh_of(8), 1, padded=True)


def test_refuses_what_cannot_be() -> None:
    with pytest.raises(ValueError, match=r"send must be one of .*, got 'rows'"):
        replace(TOKENS, send="rows")
    with pytest.raises(ValueError, match="overlap_groups must be None or 1 with send 'tokens'"):
        replace(TOKENS, overlap_groups=2)
    for said in run_on_ranks(with_etp, 2):
        assert said.startswith("send must be 'assignments' or 'auto' with ETP, got 'tokens'")


def with_etp() -> str:
    groups = groups_of(ExpertTopology(2, etp=2)).experts
    with pytest.raises(ValueError) as raised:
        ExpertParallelMoE(TOKENS, groups=groups)
    return str(raised.value)
