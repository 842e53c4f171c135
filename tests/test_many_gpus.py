"""Every operator and the hybrid model over four and eight GPUs, against float64 oracles."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from lasp.sequence.layout import SequenceLayout
from moe_parallel import ExpertTopology, MoEConfig
from tests.closeness import assert_equal_to_rounding
from tests.lasp.cases import PACKS, Case, attend_on_rank, check_against_oracle
from tests.moe_parallel import layers
from tests.moe_parallel.batch import ORDERS as TOKEN_ORDERS
from tests.ranks import run_on_ranks
from tests.ring.cases import ORDERS, assert_all_equal, on_ranks, oracle, random_tensors
from tests.test_hybrid import assemble, loss_and_gradients, one_rank

GPUS: dict[str, Any] = {"device": "cuda", "backend": "nccl"}
RANKS = [pytest.param(ranks, marks=pytest.mark.multi_gpu(ranks)) for ranks in (4, 8)]


@pytest.mark.parametrize("exchange", ["all_gather", "sliced", "scan", "one_hop", "auto"])
@pytest.mark.parametrize("ranks", RANKS)
def test_lightning_attention(ranks: int, exchange: str) -> None:
    cases = [
        Case(lengths, ranks, order, exchange) for lengths in PACKS.values() for order in ORDERS
    ]
    if exchange == "one_hop":  # exact where a state is forgotten within a rank
        cases = [Case((3, 0, 200, 49, 300), ranks, exchange=exchange, rates=(4.0, 9.0))]
    check_against_oracle(cases, run_on_ranks(attend_on_rank, ranks, cases, **GPUS))


@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize("ranks", RANKS)
def test_ring_attention(ranks: int, order: Any, causal: bool) -> None:
    lengths = (140, 1, 0, 270, 37)
    tensors = random_tensors(sum(lengths), 6, 2, 5, torch.float64)
    layout = SequenceLayout(lengths, ranks, order)
    actual = on_ranks(tensors, layout, backend=GPUS["backend"], causal=causal)
    assert_all_equal(actual, oracle(tensors, lengths, causal))


@pytest.mark.parametrize(("ep", "etp"), [(4, 1), (2, 2), (1, 4)])
@pytest.mark.parametrize("ranks", RANKS)
def test_experts(ranks: int, ep: int, etp: int) -> None:
    ep *= ranks // 4
    config = MoEConfig(10, 12, 8, 2, capacity_factor=0.75, aux_loss_coefficient=0.3)
    for order in TOKEN_ORDERS.values():
        topology, placed = ExpertTopology(ranks, ep=ep, etp=etp), order(layers.NUM_TOKENS, ranks)
        actual = layers.on_ranks(topology, placed, config, backend=GPUS["backend"])
        for name, got, expected in zip(actual._fields, actual, layers.oracle(config)):
            assert_equal_to_rounding(got, expected, what=name)


@pytest.mark.parametrize("copies", [False, True])
@pytest.mark.parametrize("sizes", [{"ep": 4}, {"ep": 2, "etp": 2}, {"etp": 4}])
@pytest.mark.parametrize("replicas", [1, 2])
@pytest.mark.parametrize("ranks", RANKS)
def test_hybrid_model(ranks: int, replicas: int, sizes: dict[str, int], copies: bool) -> None:
    expected = one_rank()
    sizes, how = sizes | {"cp": ranks // replicas}, GPUS | {"copies": copies}
    actual = assemble(run_on_ranks(loss_and_gradients, ranks, sizes, "zigzag", **how))
    for name, tensor in expected.items():
        assert_equal_to_rounding(actual[name], tensor, what=name)
