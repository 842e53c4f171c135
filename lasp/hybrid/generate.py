"""Texts of a hybrid model: prompts in, tokens out as they come."""

from __future__ import annotations

import random
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist
from torch import Tensor

from lasp._core.checks import check_flags, check_part, check_sizes, integers
from lasp._core.consistency import check_same_on_ranks
from lasp.generation import GenerationCache, Sampling
from lasp.hybrid.graphs import DecodeGraph, check_one_rank
from lasp.hybrid.steps import Tokens, check_model, packed

if TYPE_CHECKING:
    from lasp.hybrid.model import HybridModel

CHUNK_TOKENS = 32_768  # of a step, for each rank: of prompts that are read


@dataclass
class Generation:
    """What :meth:`lasp.hybrid.HybridModel.generate` returns.

    Attributes:
        tokens: new ids of each prompt; the stop token is the last, where there was one.
        prompt_tokens: read, of all prompts.
        prefill_s: seconds until every prompt was read.
        decode_s: seconds after that.
    """

    tokens: list[list[int]]
    prompt_tokens: int
    prefill_s: float = 0.0
    decode_s: float = 0.0
    _decoded: int = field(default=0, repr=False)

    @property
    def tokens_per_s(self) -> float:
        """New tokens a second, of all sequences, after the prompts were read."""
        return self._decoded / self.decode_s if self.decode_s else 0.0

    def count(self, step: dict[int, int], start: float, *, reading: bool) -> None:
        """Add the tokens of a step that began at ``start``."""
        for index, token in step.items():
            self.tokens[index].append(token)
        took = time.perf_counter() - start
        if reading:
            self.prefill_s += took
        else:
            self.decode_s += took
            self._decoded += len(step)


@dataclass
class _Text:
    """One sequence on its way."""

    index: int
    slot: int
    pending: Tensor  # ids that the model has not seen, on the host
    left: int  # tokens still to come
    draws: random.Random


@dataclass(frozen=True)
class Request:
    """What to generate; checked.

    Attributes:
        prompts: ids of each.
        max_new_tokens: of each.
        sampling: the rule that chooses.
        stop_tokens: a text ends after one of these.
        slots: of the cache, to go on from; None: new ones.
        chunk_tokens: see :meth:`lasp.hybrid.HybridModel.generate`.
        graph: likewise.
    """

    prompts: list[Tensor]
    max_new_tokens: int
    sampling: Sampling
    stop_tokens: tuple[int, ...]
    slots: tuple[int, ...] | None
    chunk_tokens: int
    graph: bool

    @classmethod
    def of(cls, model: HybridModel, prompts: Sequence[Tokens], **options: Any) -> Request:
        """Check the arguments; ValueError naming the one that is wrong."""
        vocab_size = model.config.vocab_size
        options["stop_tokens"] = integers("stop_tokens", options["stop_tokens"])
        if options["slots"] is not None:
            options["slots"] = integers("slots", options["slots"])
        pack, counts = packed(prompts, vocab_size, torch.device("cpu"))
        request = cls(list(pack.split(counts)), **options)
        check_part("sampling", request.sampling, Sampling)
        request.sampling.check_vocabulary(vocab_size)
        check_sizes(0, max_new_tokens=request.max_new_tokens)
        check_sizes(chunk_tokens=request.chunk_tokens)
        check_flags(graph=request.graph)
        if request.graph:
            check_one_rank(model)
        if request.slots is not None and len(request.slots) != len(counts):
            raise ValueError(
                f"slots must be one for each of {len(counts)} prompts, got {len(request.slots)}"
            )
        return request

    @property
    def numbers(self) -> list[int]:
        """What ranks compare."""
        rest = (self.max_new_tokens, self.sampling, self.stop_tokens, self.slots, self.chunk_tokens)
        tokens = [number for prompt in self.prompts for number in (len(prompt), *prompt.tolist())]
        return [*tokens, *repr(rest).encode()]


def checked_request(
    model: HybridModel, prompts: Sequence[Tokens], cache: GenerationCache | None, **options: object
) -> tuple[Request, GenerationCache, list[int]]:
    """The request, a cache that has room for it, and its slots.

    Communication: one all-gather of 128 bytes a rank of the token group.

    Raises:
        ValueError: on every rank, if the request is wrong on one, or differs between them.
    """
    request: Request | None = None
    error: ValueError | TypeError | None = None
    try:
        request = Request.of(model, prompts, **options)
        _check_room(model, cache, request)
    except (ValueError, TypeError) as refused:  # compared too: the others would wait for this rank
        error = refused
    if model.groups.token is not None:
        check_same_on_ranks(
            "prompts and options",
            [0] if request is None or error else request.numbers,
            f"nothing: {error}" if error else f"{len(prompts)} prompts",
            model.groups.token,
            "give every rank the same prompts, options and seed",
        )
    if error is not None:
        raise error
    assert request is not None
    if cache is None:
        longest = max(map(len, request.prompts)) + request.max_new_tokens
        cache = model.new_cache(num_slots=len(request.prompts), max_tokens=longest)
    slots = cache.add(len(prompts)) if request.slots is None else [*request.slots]
    return request, cache, slots


def _check_room(model: HybridModel, cache: GenerationCache | None, request: Request) -> None:
    """Raise ValueError unless the cache is the model's and can take all that is to come."""
    if cache is None:
        if request.slots is not None:
            raise ValueError(f"slots must be of a cache, got {request.slots} and cache None")
        return
    check_model(model, cache)
    table = cache.slots
    if request.slots is None and len(request.prompts) > len(table) - len(table.used()):
        raise ValueError(
            f"cache must have {len(request.prompts)} free slots, one a prompt, got"
            f" {len(table) - len(table.used())} of {len(table)}: free some, or make a larger one"
        )
    cache.check_settled(request.slots or ())
    if len(set(request.slots or ())) != len(request.slots or ()):
        raise ValueError(f"slots must differ, got {request.slots}: one sequence for each prompt")
    for index, prompt in enumerate(request.prompts):
        before = cache.length(request.slots[index]) if request.slots else 0
        if before + len(prompt) + request.max_new_tokens > table.max_tokens:
            raise ValueError(
                f"max_tokens {table.max_tokens} of the cache must hold prompt and new tokens, got"
                f" {before + len(prompt)} and {request.max_new_tokens}: make a longer one"
            )


def stream(
    model: HybridModel, request: Request, cache: GenerationCache, slots: Sequence[int]
) -> Iterator[tuple[dict[int, int], bool]]:
    """Each step's new tokens, id by index of the prompt, and whether prompts were still read."""
    texts = [
        _Text(index, slot, prompt, request.max_new_tokens, request.sampling.draws(index))
        for index, (slot, prompt) in enumerate(zip(slots, request.prompts))
    ]
    graph: DecodeGraph | None = None
    try:
        while texts := [text for text in texts if text.left]:
            reading = any(len(text.pending) > 1 for text in texts)
            with _eval_mode(model):
                if request.graph and graph is None and not reading:
                    graph = DecodeGraph(model, cache, len(slots))
                found = _step(model, cache, request, texts, None if reading else graph)
            for text in texts:
                if (token := found.get(text.index)) is not None:
                    text.pending = torch.tensor([token])
                    text.left = 0 if token in request.stop_tokens else text.left - 1
            yield found, reading
    finally:
        if request.slots is None:
            cache.free(*slots)


def _step(
    model: HybridModel,
    cache: GenerationCache,
    request: Request,
    texts: Sequence[_Text],
    graph: DecodeGraph | None,
) -> dict[int, int]:
    """One step over what is pending, up to a chunk; the tokens of those who have seen all."""
    budget = request.chunk_tokens * cache.shape.num_ranks
    turn: list[_Text] = []
    tokens: list[Tensor] = []
    for text in texts:
        if budget > 0:
            turn.append(text)
            tokens.append(text.pending[:budget])
            text.pending = text.pending[budget:]
            budget -= len(tokens[-1])
    done = [row for row, text in enumerate(turn) if not len(text.pending)]
    slots = [text.slot for text in turn]
    if graph is None:
        logits = model.step(cache, slots, tokens)
    else:
        logits = graph.step(slots, torch.cat(tokens))
    if not done:
        return {}
    if len(done) < len(turn):
        logits = logits[done]
    greedy = request.sampling.temperature == 0
    uniforms = [0.0 if greedy else turn[row].draws.random() for row in done]
    chosen = request.sampling.choose(logits, uniforms)
    if model.groups.token is not None:  # whatever the devices compute, one text is written
        dist.broadcast(chosen, group=model.groups.token, group_src=0)
    return {turn[row].index: token for row, token in zip(done, chosen.tolist())}


@contextmanager
def _eval_mode(model: HybridModel) -> Iterator[None]:
    training = model.training
    if training:
        model.eval()
    try:
        yield
    finally:
        if training:
            model.train()
