"""Steps by a graph are those of the model; without a GPU the same memory without a graph."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch

from lasp.generation import PADDING
from lasp.hybrid import AttentionConfig, DenseConfig, HybridModel, LatentConfig
from lasp.hybrid.graphs import DecodeGraph
from moe_parallel import ExpertTopology
from tests.generation.test_steps import SMALL, build, texts
from tests.ranks import run_on_ranks
from tests.test_hybrid import MEDIUM, groups_of

PROMPTS = texts((33, 1, 9))


def compare(model: HybridModel, batch_size: int) -> None:
    """Two caches go on alike, slots in another order and number at every step."""
    caches = [model.new_cache(num_slots=3, max_tokens=64) for _ in range(2)]
    for cache in caches:
        model.step(cache, cache.add(3), PROMPTS)
    graph = DecodeGraph(model, caches[0], batch_size)
    for slots in ([0, 1, 2], [2, 0], [1], [2, 1, 0], [0]):
        ids = torch.tensor([3 + slot for slot in slots], device=caches[0].device)
        found, missing = graph.step(slots, ids).clone(), batch_size - len(slots)
        padded = torch.cat((ids, ids.new_zeros(missing))).unsqueeze(1)  # the same shapes
        expected = model.step(caches[1], [*slots, *[PADDING] * missing], padded)[: len(slots)]
        exact = 1e-12 if expected.dtype == torch.float64 else 1e-2
        assert (found - expected).abs().max() <= exact * expected.abs().max()
    assert [caches[0].length(i) for i in range(3)] == [37, 4, 12]
    with pytest.raises(ValueError, match="at most"):
        graph.step([0] * (batch_size + 1), torch.zeros(batch_size + 1, dtype=torch.int64))
    with pytest.raises(ValueError, match="in use, of"):
        graph.step([5], torch.tensor([1]))


@pytest.mark.parametrize("name", SMALL)
def test_static_memory_gives_the_steps_of_the_model(name: str) -> None:
    compare(build(name), 4)


VARIANTS: dict[str, dict[str, Any]] = {
    "experts": {},
    "dense": {"moe": None, "dense": DenseConfig(96, 128)},
    "latents": {"attention": AttentionConfig(4, 4, 32, 16, latent=LatentConfig(64, 32, 16, 32))},
}


@pytest.mark.gpu
@pytest.mark.parametrize("variant", VARIANTS)
def test_a_captured_step_is_a_launched_one(variant: str) -> None:
    shape = replace(MEDIUM, **VARIANTS[variant])
    model = HybridModel(shape, device="cuda", dtype=torch.bfloat16)
    model.reset_parameters(0)
    compare(model.eval(), 3)


def refused_on_rank() -> None:
    model = build("minimax", groups=groups_of(ExpertTopology(2, cp=2, ep=2)))
    cache = model.new_cache(num_slots=1, max_tokens=8)
    for call in (
        lambda: DecodeGraph(model, cache, 1),
        lambda: model.generate([[1]], cache=cache, graph=True),
    ):
        with pytest.raises(ValueError, match="must be of a model on one rank"):
            call()
    assert not cache.slots.used()


def test_models_over_ranks_are_refused() -> None:
    run_on_ranks(refused_on_rank, 2)


def test_bad_calls_are_refused() -> None:
    model = build("minimax")
    cache = model.new_cache(num_slots=1, max_tokens=8)
    with pytest.raises(ValueError, match="batch_size must be"):
        DecodeGraph(model, cache, 0)
    model.train()
    with pytest.raises(ValueError, match="eval mode"):
        DecodeGraph(model, cache, 1)
