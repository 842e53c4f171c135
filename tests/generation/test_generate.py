"""Texts: greedy ones are the best tokens of whole forwards, drawn ones depend on the seed alone."""

from __future__ import annotations

from dataclasses import replace
from typing import Any
from unittest.mock import patch

import pytest
import torch
import torch.distributed as dist

from lasp.hybrid import Generation, HybridModel, Sampling
from moe_parallel import ExpertTopology
from tests.generation.test_steps import SMALL, build, forward, texts
from tests.ranks import refusal, run_on_ranks
from tests.test_hybrid import VOCAB, groups_of

PROMPTS = texts((43, 1, 9))
HOT = Sampling(temperature=3.0, top_k=12, top_p=0.9, suppressed=(2,), seed=4)


def whole_again(model: HybridModel, prompt: list[int], count: int) -> list[int]:
    """Greedy tokens, the whole text once more for each."""
    text = [*prompt]
    for _ in range(count):
        text.append(int(forward(model, text)[-1].argmax()))
    return text[len(prompt) :]


def generated(name: str, sizes: dict[str, int], calls: list[dict[str, Any]]) -> list[Generation]:
    """Rank function: generations of one model."""
    model = build(name, groups=groups_of(ExpertTopology(dist.get_world_size(), **sizes)))
    return [model.train().generate(PROMPTS, **call) for call in calls]


@pytest.mark.parametrize(
    ("name", "num_ranks", "sizes"),
    [
        *((name, 1, {}) for name in SMALL),
        ("minimax", 2, {"cp": 2, "ep": 2}),
        ("ling", 2, {"ep": 2}),
    ],
)
def test_greedy_and_drawn_texts(name: str, num_ranks: int, sizes: dict[str, int]) -> None:
    """Greedy texts are those of whole forwards; drawn ones are the same by every chunk and rank."""
    model = build(name)
    expected = [whole_again(model, prompt, 4) for prompt in PROMPTS]
    stop = expected[0][2]
    ends = [text.index(stop) + 1 if stop in text else 4 for text in expected]
    calls: list[dict[str, Any]] = [
        {"max_new_tokens": 4},
        {"max_new_tokens": 4, "chunk_tokens": 11, "stop_tokens": [stop]},
        {"max_new_tokens": 8, "sampling": HOT},
        {"max_new_tokens": 8, "sampling": HOT, "chunk_tokens": 20},
        {"max_new_tokens": 0},
        {"max_new_tokens": 4, "graph": not sizes},
    ]
    drawn = model.generate(PROMPTS[:2], max_new_tokens=8, sampling=HOT).tokens
    for whole, stopped, hot, again, nothing, static in run_on_ranks(
        generated, num_ranks, name, sizes, calls
    ):
        assert whole.tokens == expected
        assert stopped.tokens == [text[:end] for text, end in zip(expected, ends)]
        assert hot.tokens == again.tokens
        assert hot.tokens[:2] == drawn  # whatever else is in the batch
        assert not any(2 in text for text in hot.tokens)
        assert nothing.tokens == [[], [], []]
        assert static.tokens == expected
        assert whole.prompt_tokens == 53
        assert whole.tokens_per_s > 0


def disagreeing() -> list[list[int]]:
    """Rank function: the second rank chooses other tokens."""
    model = build("minimax", groups=groups_of(ExpertTopology(2, cp=2, ep=2)))
    choose = Sampling.choose

    def other(rule: Sampling, *given: Any) -> torch.Tensor:
        return (choose(rule, *given) + 1) % VOCAB

    with patch.object(Sampling, "choose", other if dist.get_rank() else choose):
        return model.generate(PROMPTS, max_new_tokens=3).tokens


def test_ranks_write_one_text_whatever_they_compute() -> None:
    expected = [whole_again(build("minimax"), prompt, 3) for prompt in PROMPTS]
    assert run_on_ranks(disagreeing, 2) == [expected] * 2


def test_a_prefix_is_read_once_and_goes_on_in_forks() -> None:
    model = build("minimax")
    cache = model.new_cache(num_slots=3, max_tokens=60)
    (prefix,) = cache.add()
    model.step(cache, [prefix], [PROMPTS[0]])
    slots = [cache.fork(prefix), cache.fork(prefix)]
    told: list[dict[int, int]] = []
    found = model.generate(
        [[1], [2, 3]], max_new_tokens=4, cache=cache, slots=slots, on_step=told.append
    )
    assert found.tokens == [whole_again(model, PROMPTS[0] + end, 4) for end in ([1], [2, 3])]
    assert [[step[i] for step in told] for i in (0, 1)] == found.tokens
    assert [cache.length(slot) for slot in (prefix, *slots)] == [43, 47, 48]
    cache.free(*slots)
    assert model.generate([PROMPTS[0][:3]], max_new_tokens=2, cache=cache).tokens == [
        whole_again(model, PROMPTS[0][:3], 2)
    ]
    assert cache.slots.used() == [prefix]


def test_only_tokens_that_the_rule_leaves_are_drawn_with_their_probabilities() -> None:
    logits = torch.tensor([[1.0, 3.0, 2.0, 0.0, 2.5]]).log()
    uniforms = [(i + 0.5) / 1000 for i in range(1000)]

    def shares(**rule: Any) -> list[float]:
        chosen = Sampling(**({"temperature": 1.0} | rule)).choose(logits.expand(1000, -1), uniforms)
        return (chosen.bincount(minlength=5) / 1000).tolist()

    def of(*weights: float) -> Any:
        return pytest.approx([w / sum(weights) for w in weights], abs=1.1e-3)

    assert shares() == of(1, 3, 2, 0, 2.5)
    assert shares(temperature=0.5) == of(1, 9, 4, 0, 6.25)
    assert shares(top_k=2) == of(0, 3, 0, 0, 2.5)
    assert shares(top_p=0.6) == of(0, 3, 0, 0, 2.5)  # 0.35, then 0.65 reaches it
    assert shares(top_p=0.3) == of(0, 1, 0, 0, 0)
    assert shares(suppressed=(1,), top_k=2) == of(0, 0, 2, 0, 2.5)
    assert shares(temperature=0) == of(0, 1, 0, 0, 0)
    assert Sampling(temperature=1.0).choose(logits, [1 - 2**-53]).item() == 0  # not the zero


WRONG: list[tuple[str, dict[str, Any]]] = [
    ("an empty prompt", {"prompts": [[1], []]}),
    ("ids in .* got 17", {"prompts": [[VOCAB]]}),
    ("max_new_tokens must be an integer >= 0, got -1", {"max_new_tokens": -1}),
    ("chunk_tokens must be an integer >= 1, got 0", {"chunk_tokens": 0}),
    ("suppressed must be ids in", {"sampling": Sampling(suppressed=(VOCAB,))}),
    ("suppressed must be ids .* got all", {"sampling": Sampling(suppressed=tuple(range(VOCAB)))}),
    ("cache must have 3 free slots", {"prompts": [[1]] * 3}),
    ("max_tokens 40 of the cache must hold prompt and new tokens, got 35", {"prompts": [[1] * 35]}),
    ("slots must be one for each of 2 prompts, got 1", {"slots": [0]}),
    ("slots must be in use", {"slots": [0, 1]}),
    ("slots must be of a cache", {"slots": [0, 1], "cache": None}),
]


def refused_generations() -> list[str]:
    """Rank function: refusals, of calls that are wrong on every rank, on one, or differ."""
    model = build("minimax", groups=groups_of(ExpertTopology(2, cp=2, ep=2)))
    cache = model.new_cache(num_slots=2, max_tokens=40)
    usual: dict[str, Any] = {"prompts": [[1], [2]], "max_new_tokens": 6, "cache": cache}
    told = [refusal(model.generate, **(usual | wrong)) for _, wrong in WRONG]
    rank = dist.get_rank()
    told.append(refusal(model.generate, **(usual | {"prompts": [[1], [2 + rank]]})))
    told.append(refusal(model.generate, **(usual | {"prompts": [[1], [2][rank:]]})))
    assert cache.slots.used() == []
    return told


def test_bad_requests_are_refused_on_every_rank() -> None:
    differ = "prompts and options must be equal on every rank"
    expected = [told for told, _ in WRONG] + [differ, f"{differ}|an empty prompt"]
    for of_rank in run_on_ranks(refused_generations, 2):
        for error, told in zip(of_rank, expected, strict=True):
            with pytest.raises(ValueError, match=told):
                raise ValueError(error)


@pytest.mark.parametrize(
    ("field", "value"), [("temperature", -1.0), ("top_k", 0), ("top_p", 0.0), ("top_p", 1.5)]
)
def test_bad_rules_are_refused(field: str, value: float) -> None:
    with pytest.raises(ValueError, match=f"{field} must be"):
        replace(Sampling(), **{field: value})
