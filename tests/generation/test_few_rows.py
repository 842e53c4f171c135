"""The kernel for a few rows against plain torch: slots, padding, drafts, splits, head counts."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from lasp.generation.cache import GenerationCache, KeyMemory
from lasp.generation.files import CacheShape
from lasp.generation.partials import by_kernel, over_few
from lasp.generation.slots import PADDING
from lasp.generation.step import CacheStep, plan_step
from ring.blocks.merge import Partial
from tests.closeness import assert_within_budget

pytest.importorskip("triton", reason="the kernels need triton, which has no wheel here")
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
DTYPE = torch.bfloat16 if DEVICE == "cuda" else torch.float32


class Model(torch.nn.Module):
    """What a cache belongs to."""


MODEL = Model()


def case(
    heads: tuple[int, int],
    dims: tuple[int, int],
    lengths: dict[int, int],
    counts: list[int],
    kind: str = "keys",
) -> tuple[Tensor, KeyMemory, CacheStep]:
    """Queries of new tokens, keys of slots of these lengths, and the step; padding is in it."""
    shape = CacheShape(((kind, heads[1], *dims),), DTYPE, 1)
    device = torch.device(DEVICE)
    longest = max(lengths.values()) + 16
    cache = GenerationCache(
        shape, MODEL, num_slots=5, max_tokens=longest, cp_group=None, device=device
    )
    cache.add(5)
    for slot, length in lengths.items():
        if length:
            cache.slots[slot].add(0, length)
    memory = cache.layers[0]
    assert isinstance(memory, KeyMemory)
    memory.keys.normal_()
    if kind == "keys":
        memory.values.normal_()
    step = plan_step(cache, [*lengths, PADDING], [*counts, counts[0]])
    q = torch.randn(sum(step.counts), heads[0], dims[0], device=device).to(DTYPE)
    return q, memory, step


CASES: dict[str, Callable[[], tuple[Tensor, KeyMemory, CacheStep]]] = {
    "one token each": lambda: case((8, 2), (32, 32), {3: 70, 0: 0, 1: 200}, [1, 1, 1]),
    "drafts of five": lambda: case((6, 2), (24, 16), {2: 3, 4: 130}, [5, 5]),
    "unequal counts": lambda: case((4, 4), (16, 40), {1: 65, 0: 9}, [3, 1]),
    "more rows than a tile": lambda: case((10, 2), (16, 16), {1: 30}, [16]),
    "latents": lambda: case((40, 1), (24, 16), {1: 65, 3: 9}, [1, 1], "latent"),
    "latents without a shared part": lambda: case((4, 1), (20, 20), {1: 65}, [3], "latent"),
    "many splits": lambda: case((4, 1), (16, 16), {0: 1700}, [1]),
}


def exact(q: Tensor, memory: KeyMemory, step: CacheStep, scale: float = 0.3) -> Partial:
    wide = KeyMemory(memory.keys.double(), memory.values.double(), memory.rank_tokens)
    return over_few(q.double(), wide, step, scale, "eager")


@pytest.mark.parametrize("name", CASES)
def test_the_kernel_is_attention_over_the_keys_that_each_row_sees(name: str) -> None:
    torch.manual_seed(0)
    q, memory, step = CASES[name]()
    true, honest = exact(q, memory, step), over_few(q, memory, step, 0.3, "eager")
    found = by_kernel(q, memory, step, 0.3)
    real = sum(step.counts[:-1])  # behind them is padding, which sees no key
    assert torch.equal(found.output[real:], torch.zeros_like(found.output[real:]))
    assert (found.lse[real:] == float("-inf")).all()
    for actual, oracle, fair in zip(found, true, honest):
        rounded = fair[:real].to(DTYPE).to(fair.dtype)  # p has the dtype of the values
        assert_within_budget(actual[:real], oracle[:real], rounded, what=name)


@pytest.mark.gpu
def test_keys_past_two_to_the_31_elements() -> None:
    q, memory, step = case((8, 8), (128, 128), {4: 2**19, 0: 5}, [1, 1])
    assert memory.keys.numel() > 2**31
    found = by_kernel(q, memory, step, 0.1)
    honest, true = over_few(q, memory, step, 0.1, "eager"), exact(q, memory, step, 0.1)
    for actual, fair, oracle in zip(found, honest, true):
        rounded = fair[:2].to(DTYPE).to(fair.dtype)
        assert_within_budget(actual[:2], oracle[:2], rounded, what="past 2^31 elements")
