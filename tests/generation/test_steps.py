"""Steps over a cache give the logits of one forward pass, however a text is split into them."""

from __future__ import annotations

import random
from dataclasses import replace
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor

from lasp.generation import GenerationCache
from lasp.hybrid import HybridModel, pack_batch
from moe_parallel import ExpertTopology
from tests.closeness import assert_equal_to_rounding, assert_within_budget
from tests.ranks import run_on_ranks
from tests.test_hybrid import MEDIUM, VOCAB, config, groups_of
from tests.test_hybrid_models import LING, RING, SALA

SMALL: dict[str, dict[str, Any]] = {
    "minimax": {},
    "ling": LING | {"mtp_loss_weight": None},
    "ring": RING,
    "sala": SALA | {"mtp_loss_weight": None},
}
LENGTHS = (61, 1, 24, 40)


def build(name: str, **more: Any) -> HybridModel:
    model = HybridModel(replace(config(), **SMALL[name]), dtype=torch.float64, **more)
    model.reset_parameters(0)
    return model.eval()


def texts(lengths: tuple[int, ...] = LENGTHS) -> list[list[int]]:
    generator = torch.Generator().manual_seed(2)
    return [torch.randint(VOCAB, (n,), generator=generator).tolist() for n in lengths]


@torch.no_grad()
def forward(model: HybridModel, text: list[int]) -> Tensor:
    """Logits of every token of one text, alone."""
    batch = pack_batch([[len(text)]], dp_rank=0, num_ranks=1, order="contiguous")
    return model(torch.tensor(text, device=model.embedding.weight.device), batch).logits


def splits(seed: int, lengths: tuple[int, ...]) -> list[list[int]]:
    """For each text the number of its tokens in each step: chunks, few tokens, one, or none."""
    draw, steps, left = random.Random(seed), [], [*lengths]
    while any(left):
        sizes = [0, 1, 1, 3, 17, 30] if draw.random() < 0.5 else [0, 1, 1, 2, 2]
        counts = [min(n, draw.choice(sizes)) for n in left]
        if any(counts):
            steps.append(counts)
            left = [n - count for n, count in zip(left, counts)]
    return [list(of_text) for of_text in zip(*steps)]


def by_steps(
    model: HybridModel, cache: GenerationCache, some: list[list[int]], counts: list[list[int]]
) -> list[Tensor]:
    """Logits of every token of the texts, by steps in which they take turns."""
    slots = cache.add(len(some))
    found: list[list[Tensor]] = [[] for _ in some]
    at = [0] * len(some)
    for sizes in zip(*counts):
        turn = [i for i, size in enumerate(sizes) if size]
        tokens = [some[i][at[i] : at[i] + sizes[i]] for i in turn]
        logits = model.step(cache, [slots[i] for i in turn], tokens, every_token=True)
        for i, part in zip(turn, logits.split([sizes[i] for i in turn])):
            found[i].append(part)
            at[i] += sizes[i]
    return [torch.cat(parts) for parts in found]


@pytest.mark.parametrize("name", SMALL)
@pytest.mark.parametrize("seed", range(3))
def test_any_split_into_steps_gives_the_logits_of_one_forward(name: str, seed: int) -> None:
    model, some = build(name), texts()
    cache = model.new_cache(num_slots=5, max_tokens=64)
    found = by_steps(model, cache, some, splits(seed, LENGTHS))
    for text, logits in zip(some, found):
        assert_equal_to_rounding(logits, forward(model, text), what=f"{len(text)} tokens")


GPU_LENGTHS = (300, 1, 40)


def gpu_logits(model: HybridModel) -> list[Tensor]:
    """Logits of every token of some texts, by steps."""
    cache = model.new_cache(num_slots=3, max_tokens=300)
    found = by_steps(model, cache, texts(GPU_LENGTHS), splits(0, GPU_LENGTHS))
    return [logits.cpu() for logits in found]


def compare_on_gpu(of_ranks: list[list[Tensor]]) -> None:
    """Steps in bfloat16 err no more than a forward on one GPU."""
    model = HybridModel(MEDIUM, dtype=torch.bfloat16)
    model.reset_parameters(0)
    exact = HybridModel(MEDIUM, dtype=torch.float64)
    exact.load_state_dict(model.state_dict())
    for text, *found in zip(texts(GPU_LENGTHS), *of_ranks):
        oracle, honest = forward(exact.eval(), text), forward(model.cuda().eval(), text).cpu()
        for logits in found:
            assert_within_budget(logits, oracle, honest, what=f"{len(text)} tokens")


@pytest.mark.gpu
def test_steps_on_a_gpu_err_no_more_than_a_forward_there() -> None:
    model = HybridModel(MEDIUM, device="cuda", dtype=torch.bfloat16)
    model.reset_parameters(0)
    compare_on_gpu([gpu_logits(model.eval())])


def gpu_split_on_rank() -> list[Tensor]:
    """Rank function: the same over two GPUs."""
    groups = groups_of(ExpertTopology(2, cp=2, ep=2))
    device = f"cuda:{dist.get_rank()}"
    model = HybridModel(MEDIUM, groups=groups, device=device, dtype=torch.bfloat16)
    model.reset_parameters(0)
    return gpu_logits(model.eval())


@pytest.mark.multi_gpu
def test_steps_on_two_gpus_err_no_more_than_a_forward_on_one() -> None:
    compare_on_gpu(run_on_ranks(gpu_split_on_rank, 2, backend="nccl"))


def split_on_rank(name: str, sizes: dict[str, int], seeds: list[int]) -> list[list[Tensor]]:
    """Rank function: logits of the texts for each random split."""
    model = build(name, groups=groups_of(ExpertTopology(dist.get_world_size(), **sizes)))
    cache = model.new_cache(num_slots=5, max_tokens=64)
    found = []
    for seed in seeds:
        found.append(by_steps(model, cache, texts(), splits(seed, LENGTHS)))
        cache.free(*cache.slots.used())
    return found


@pytest.mark.parametrize(
    ("name", "num_ranks", "sizes"),
    [
        ("minimax", 2, {"cp": 2, "ep": 2}),
        ("minimax", 4, {"cp": 4, "ep": 2, "etp": 2}),
        ("ring", 2, {"cp": 2}),
        ("ling", 4, {"cp": 2, "ep": 4}),
        ("sala", 4, {"cp": 4}),
    ],
    ids=str,
)
def test_ranks_give_the_logits_of_one_forward(
    name: str, num_ranks: int, sizes: dict[str, int]
) -> None:
    model = build(name)
    expected = [forward(model, text) for text in texts()]
    for of_rank in run_on_ranks(split_on_rank, num_ranks, name, sizes, [5, 6]):
        for found in of_rank:
            for logits, true in zip(found, expected):
                assert_equal_to_rounding(logits, true, what=f"{len(true)} tokens")
