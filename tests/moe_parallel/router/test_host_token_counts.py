"""When the host waits for the counts."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from unittest.mock import patch

import pytest
import torch

from moe_parallel import MoEConfig, TokenOrder
from moe_parallel import layer as layer_module
from moe_parallel.router import counts as decision
from moe_parallel.router.counts import HostTokenCounts
from moe_parallel.router.route import route
from moe_parallel.router.token_order import to_host
from tests.moe_parallel.batch import random_batch
from tests.moe_parallel.layers import NUM_TOKENS, build

CONFIG = MoEConfig(10, 12, 8, 2)


@pytest.mark.parametrize("capacity_factor", [None, 0.5])
@pytest.mark.parametrize("training", [False, True])
def test_rows_are_queued_before_the_host_waits_if_nothing_is_dropped(
    training: bool, capacity_factor: float | None
) -> None:
    config = replace(CONFIG, capacity_factor=capacity_factor)
    layer = build(config, torch.float64, True).train(training)
    steps = []

    def noted(name: str, function: Callable) -> Callable:
        return lambda *args: steps.append(name) or function(*args)

    with (
        patch.object(layer_module, "permute", noted("permute", layer_module.permute)),
        patch.object(decision, "to_host", lambda x: noted("wait", to_host(x))),
    ):
        stats = layer(random_batch(NUM_TOKENS, CONFIG.hidden_size).x).stats
    dropless = capacity_factor is None or not training
    assert bool(stats.dropped.any()) != dropless
    assert steps == (["permute", "wait"] if dropless else ["wait", "permute"])


@pytest.mark.parametrize("capacity_factor", [None, 0.5])
def test_sums_that_are_known_before_are_those_of_the_counts(capacity_factor: float | None) -> None:
    order = TokenOrder.contiguous([13])
    x, gate = torch.randn(13, 4), torch.randn(6, 4)
    routing = route(x, gate, top_k=3, order=order, capacity_factor=capacity_factor)
    counts = HostTokenCounts(routing, order)
    assert counts.of_rank(0) == counts.of_all() == sum(counts.wait()[0])
    assert counts.of_all() == int(routing.kept.sum())
    assert counts.dropless == (capacity_factor is None)
    assert (counts.of_all() == 39) == counts.dropless
