"""Steps by a graph are those of the model; without a GPU the same memory without a graph."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch

from lasp.hybrid import HybridModel
from lasp.hybrid.graphs import DecodeGraph
from tests.generation.test_steps import SMALL, build, texts
from tests.test_hybrid import MEDIUM

PROMPTS = texts((33, 1, 9))


def compare(model: HybridModel, batch_size: int) -> None:
    """Two caches go on alike, slots in another order and number at every step."""
    caches = [model.new_cache(num_slots=3, max_tokens=64) for _ in range(2)]
    for cache in caches:
        model.step(cache, cache.add(3), PROMPTS)
    graph = DecodeGraph(model, caches[0], batch_size)
    for slots in ([0, 1, 2], [2, 0], [1], [2, 1, 0], [0]):
        ids = torch.tensor([3 + slot for slot in slots])
        found = graph.step(slots, ids).clone()
        expected = model.step(caches[1], slots, ids.unsqueeze(1))
        assert (found - expected).abs().max() <= 1e-12 * expected.abs().max()
    assert [caches[0].length(i) for i in range(3)] == [37, 4, 12]
    with pytest.raises(ValueError, match="at most"):
        graph.step([0] * (batch_size + 1), torch.zeros(batch_size + 1, dtype=torch.int64))
    with pytest.raises(ValueError, match="in use, of"):
        graph.step([5], torch.tensor([1]))


@pytest.mark.parametrize("name", SMALL)
def test_static_memory_gives_the_steps_of_the_model(name: str) -> None:
    compare(build(name), 4)


@pytest.mark.gpu
@pytest.mark.parametrize("experts", [True, False])
def test_a_captured_step_has_the_bits_of_a_launched_one(experts: bool) -> None:
    from lasp.hybrid import DenseConfig

    fields: dict[str, Any] = {} if experts else {"moe": None, "dense": DenseConfig(96, 128)}
    model = HybridModel(replace(MEDIUM, **fields), device="cuda", dtype=torch.bfloat16)
    model.reset_parameters(0)
    compare(model.eval(), 3)


def test_models_over_ranks_are_refused() -> None:
    model = build("minimax")
    cache = model.new_cache(num_slots=1, max_tokens=8)
    with pytest.raises(ValueError, match="batch_size must be"):
        DecodeGraph(model, cache, 0)
    model.train()
    with pytest.raises(ValueError, match="eval mode"):
        DecodeGraph(model, cache, 1)
