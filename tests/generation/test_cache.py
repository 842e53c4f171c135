"""Slots are forked, saved, rolled back and padded, exactly; bad calls leave the cache as it was."""

from __future__ import annotations

from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any
from unittest.mock import patch

import pytest
import torch
import torch.distributed as dist
from torch import Tensor

from lasp.generation import PADDING, GenerationCache
from lasp.generation import cache as cache_module
from lasp.hybrid import HybridModel
from lasp.hybrid.graphs import DecodeGraph
from moe_parallel import ExpertTopology
from tests.closeness import assert_equal_to_rounding
from tests.generation.test_steps import SMALL, build, forward, texts
from tests.ranks import refusal, run_on_ranks
from tests.test_hybrid import VOCAB, groups_of

TEXT = texts((60,))[0]
OTHER = texts((1, 37))[1]
RANKS = [(1, {}), (2, {"cp": 2, "ep": 2})]


def on_rank(name: str, sizes: dict[str, int], **more: int) -> tuple[HybridModel, GenerationCache]:
    model = build(name, groups=groups_of(ExpertTopology(dist.get_world_size(), **sizes)))
    return model, model.new_cache(**({"num_slots": 4, "max_tokens": 160} | more))


def histories(name: str, sizes: dict[str, int], folder: Path) -> list[tuple[list[int], Tensor]]:
    """Rank function: texts that came about in roundabout ways, and logits after their last token.

    A prefix is forked at 43 tokens; then drafts of five tokens are kept to 0, 2 and 5 in one step,
    with other tokens behind; all is saved, and read by another cache that goes on.
    """
    model, cache = on_rank(name, sizes)
    (first,) = cache.add()
    model.step(cache, [first], [TEXT[:43]])
    slots = [first, cache.fork(first), cache.fork(first)]
    drafts = [OTHER[:5], TEXT[43:48], OTHER[5:10]]
    padded = [*slots[:1], PADDING, *slots[1:]]
    logits = model.step(
        cache, padded, [drafts[0], OTHER[3:8], *drafts[1:]], draft=True, every_token=True
    )
    known = [TEXT[:43] + draft for draft in drafts]
    found = [(text, logits[row]) for text, row in zip(known, (4, 14, 19))]
    kept = (0, 2, 5)
    cache.accept(dict(zip(slots, kept)))
    assert [cache.length(slot) for slot in slots] == [43 + n for n in kept]
    known = [TEXT[:43] + draft[:n] for draft, n in zip(drafts, kept)]
    for step in ([[7], [8], [9]], [[3, 4], [5], OTHER], [OTHER, [1], [2]]):
        known = [text + new for text, new in zip(known, step)]
        order = [2, 0, 1]
        logits = model.step(
            cache, [slots[i] for i in order] + [PADDING], [*(step[i] for i in order), [0]]
        )
        found += [(known[i], row) for i, row in zip(order, logits)]
        if len(found) < 9:
            cache.save(folder)
            cache = model.new_cache(num_slots=4, max_tokens=160)
            cache.load(folder)
    return found


@pytest.mark.parametrize(
    ("name", "num_ranks", "sizes"),
    [*((name, 1, {}) for name in SMALL), ("ring", *RANKS[1]), ("ling", *RANKS[1])],
)
def test_forks_drafts_files_and_padding_are_exact(
    name: str, num_ranks: int, sizes: dict[str, int], tmp_path: Path
) -> None:
    model = build(name)
    for of_rank in run_on_ranks(histories, num_ranks, name, sizes, tmp_path):
        for text, logits in of_rank:
            what = f"{len(text)} tokens"
            assert_equal_to_rounding(logits, forward(model, text)[-1], what=what)


def everything(cache: GenerationCache) -> list[Tensor]:
    """All that a cache holds, to be compared."""
    slots = [cache.slots[slot] for slot in cache.slots.used()]
    numbers = [torch.tensor([*slot.held, *slot.stops, *slot.ranks]) for slot in slots]
    layers = (layer[:2] if isinstance(layer, tuple) else [layer] for layer in cache.layers)
    return [*numbers, *(memory.clone() for layer in layers for memory in layer)]


WRONG: dict[str, tuple[str, dict[str, Any]]] = {
    "an empty prompt": ("tokens must be .*empty prompt", {"tokens": [[1], []]}),
    "no slots": ("tokens must be given", {"slots": [], "tokens": []}),
    "fewer prompts than slots": ("tokens must be given", {"tokens": [[1]]}),
    "an id out of range": (f"ids in \\[0, {VOCAB}\\), got {VOCAB}", {"tokens": [[1], [VOCAB]]}),
    "a negative id": ("ids in .* got -1", {"tokens": [[1], [-1]]}),
    "no whole numbers": ("whole numbers, got torch.float32", {"tokens": [[1.0], [2.0]]}),
    "a slot that is not in use": ("in use, of \\[0, 1\\], got 2", {"slots": [0, 2]}),
    "a slot twice": ("slots must differ", {"slots": [0, 0]}),
    "too many tokens": ("at most max_tokens 40, got 20", {"tokens": [[1], [2] * 21]}),
    "a long draft": ("at most 16 tokens", {"tokens": [[1], [2] * 17], "draft": True}),
    "a drafted slot": ("accept", {"drafted": True}),
    "training mode": ("eval mode", {"training": True}),
    "a cache of another model": ("one of this model", {"cache_of": "another"}),
    "a cache of another dtype": ("dtype and device of the model", {"cast": torch.float32}),
    "a cache of another group": ("cp group of the model", {"regroup": True}),
}


def refused(name: str, sizes: dict[str, int], wrong: dict[str, Any]) -> tuple[str, bool]:
    """Rank function: the refusal of a step, and whether the cache is as it was."""
    model, cache = on_rank(name, sizes, max_tokens=40)
    slots = cache.add(2)
    model.step(cache, slots, [TEXT[:20], TEXT[:20]])
    if wrong.get("drafted"):
        model.step(cache, slots, [[1], [2]], draft=True)
    given, before = cache, everything(cache)
    if wrong.get("cache_of"):
        given = on_rank(name, sizes)[1]
        given.add(2)
    model.train(wrong.get("training", False))
    if "cast" in wrong:
        model.to(wrong["cast"])
    if wrong.get("regroup"):
        model.groups = model.groups._replace(cp=dist.group.WORLD if not sizes else None)
    told = refusal(
        model.step,
        given,
        wrong.get("slots", slots),
        wrong.get("tokens", [[1], [2]]),
        draft=wrong.get("draft", False),
    )
    after = everything(cache)
    same = all(torch.equal(a, b) for a, b in zip(before, after, strict=True))
    return told, same


@pytest.mark.parametrize(("num_ranks", "sizes"), RANKS)
def test_bad_steps_are_refused_and_change_nothing(num_ranks: int, sizes: dict[str, int]) -> None:
    for what, (told, wrong) in WRONG.items():
        for error, same in run_on_ranks(refused, num_ranks, "minimax", sizes, wrong):
            assert same, what
            with pytest.raises(ValueError, match=told):
                raise ValueError(error)


def test_texts_are_refused_from_where_softmax_layers_would_be_sparse() -> None:
    model = build("sala")
    attention = replace(model.config.attention, dense_len=9)
    model.config = replace(model.config, attention=attention)
    cache = model.new_cache(num_slots=1, max_tokens=40)
    slots = cache.add()
    model.step(cache, slots, [TEXT[:7]])
    model.step(cache, slots, [TEXT[7:8]])
    with pytest.raises(ValueError, match="dense_len must be None or above 9 tokens"):
        model.step(cache, slots, [TEXT[8:9]])
    assert cache.length(slots[0]) == 8


def refused_cache_calls(folder: Path) -> list[str]:
    """Rank function: refusals of the calls of a cache; half of the ranks find no file to load."""
    model, cache = on_rank("minimax", {"cp": 2, "ep": 2})
    told = [refusal(model.new_cache, num_slots=0, max_tokens=3), refusal(cache.add, 5)]
    slots = cache.add(4)
    told += [refusal(cache.fork, slots[0]), refusal(cache.add), refusal(cache.free, 7)]
    model.step(cache, slots[:2], [[1, 2], [3]], draft=True)
    told += [refusal(cache.fork, slots[0]), refusal(cache.save, folder)]
    told += [refusal(cache.accept, {0: 1}), refusal(cache.accept, {0: 3, 1: 0})]
    cache.accept({0: 1, 1: 0})
    assert [cache.length(slot) for slot in slots] == [1, 0, 0, 0]
    if dist.get_rank() == 0:
        cache.save(folder)
    told.append(refusal(cache.load, folder))
    fresh = model.new_cache(num_slots=4, max_tokens=160)
    told.append(refusal(fresh.load, folder))
    cache.save(folder)
    other = on_rank("ring", {"cp": 2, "ep": 2})[1]
    told.append(refusal(other.load, folder))
    dist.barrier()
    small = model.new_cache(num_slots=2, max_tokens=160)
    return [*told, refusal(small.load, folder)]


def test_bad_calls_of_a_cache_are_refused_on_every_rank(tmp_path: Path) -> None:
    expected = [
        "num_slots must be an integer >= 1, got 0",
        "the cache must have 5 free slots, got 4 of 4",
        "the cache must have 1 free slots, got 0 of 4",
        "the cache must have 1 free slots, got 0 of 4",
        "slots must be in use, of [0, 1, 2, 3], got 7",
        "slots must have no drafted tokens, got [0]",
        "slots must have no drafted tokens, got [0, 1]",
        "kept must say for each slot how many of its drafted tokens {0: 2, 1: 1} stay, got {0: 1}",
        "kept must say for each slot how many of its drafted tokens {0: 2, 1: 1} stay, got {0: 3",
        "all slots must be free to load, got [0, 1, 2, 3] in use",
        "folder must hold cache-1-of-2.pt, saved by as many ranks, got none",
        "layers of a saved cache must be those of the model",
        "num_slots and max_tokens must be at least those that were saved, got 2 and 160",
    ]
    for told in run_on_ranks(refused_cache_calls, 2, tmp_path):
        for error, start in zip(told, expected, strict=True):
            assert error.startswith(start)


@pytest.mark.parametrize("graph", [False, True])
def test_slots_of_a_step_that_failed_are_refused(graph: bool) -> None:
    """Some layers hold states with the new tokens, others without."""
    model = build("minimax")
    prompts = texts((9, 5))
    cache, whole = (model.new_cache(num_slots=3, max_tokens=64) for _ in range(2))
    for each in (cache, whole):
        model.step(each, each.add(2), prompts)
    steps = DecodeGraph(model, cache, 2).step if graph else partial(model.step, cache)
    one = torch.tensor([[3]])
    with (
        patch.object(model.final_norm, "forward", side_effect=MemoryError),
        pytest.raises(MemoryError),
    ):
        steps([1], one)
    refused = r"slots must hold whole steps, got \[1\]"
    for call in (
        lambda: steps([1], one),
        lambda: steps([0, 1], one.expand(2, 1)),
        lambda: cache.fork(1),
        lambda: model.generate([[3]], cache=cache, slots=[1]),
    ):
        with pytest.raises(ValueError, match=refused):
            call()
    assert_equal_to_rounding(steps([0], one), model.step(whole, [0], one))
    cache.free(1)
    (again,) = cache.add()
    assert again == 1
    model.step(cache, [1], prompts[1:])
    assert_equal_to_rounding(steps([1], one), model.step(whole, [1], one))


def test_a_draft_that_failed_changes_nothing() -> None:
    model = build("minimax")
    cache = model.new_cache(num_slots=1, max_tokens=64)
    model.step(cache, cache.add(), texts((9,)))
    draft = torch.tensor([[3, 4]])
    with (
        patch.object(model.final_norm, "forward", side_effect=MemoryError),
        pytest.raises(MemoryError),
    ):
        model.step(cache, [0], draft, draft=True)
    model.step(cache, [0], draft, draft=True)
    with (
        patch.object(cache_module, "lightning_attention", side_effect=MemoryError),
        pytest.raises(MemoryError),
    ):
        cache.accept({0: 1})
    with pytest.raises(ValueError, match="slots must hold whole steps"):
        cache.accept({0: 1})
