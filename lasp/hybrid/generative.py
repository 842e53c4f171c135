"""Text out of a model: its cache, steps, and whole generations, by ``lasp.generation``."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, cast

import torch
from torch import Tensor, nn

from lasp._core.checks import check_flags
from lasp.generation import GREEDY, GenerationCache, Sampling
from lasp.generation.attention import shape_of
from lasp.generation.files import CacheShape
from lasp.generation.step import plan_step
from lasp.hybrid.generate import CHUNK_TOKENS, Generation, checked_request, stream
from lasp.hybrid.steps import Tokens, batch_of, check_ready, packed

if TYPE_CHECKING:
    from lasp.hybrid.model import HybridModel


class GenerativeModel(nn.Module):
    """What :class:`lasp.hybrid.HybridModel` does beyond training; ranks call each method alike."""

    def new_cache(self, *, num_slots: int, max_tokens: int) -> GenerationCache:
        """Memory for ``num_slots`` sequences of up to ``max_tokens`` tokens, over the cp group."""
        model = cast("HybridModel", self)
        cp_group, weight = model.groups.cp, model.embedding.weight
        layers = tuple(shape_of(layer.attention) for layer in model.decoder_layers())
        shape = CacheShape(layers, weight.dtype, 1 if cp_group is None else cp_group.size())
        return GenerationCache(
            shape,
            model,
            num_slots=num_slots,
            max_tokens=max_tokens,
            cp_group=cp_group,
            device=weight.device,
        )

    @torch.no_grad()
    def step(
        self,
        cache: GenerationCache,
        slots: Sequence[int],
        tokens: Sequence[Tokens] | Tensor,
        *,
        draft: bool = False,
        every_token: bool = False,
    ) -> Tensor:
        """Logits after the next tokens of some sequences, which ``cache`` then holds.

        Prompts, parts of prompts and single tokens are one thing: each slot gets any number.

        Args:
            cache: by :meth:`new_cache` of this model, which is in eval mode.
            slots: of ``cache.add()``, each once; ``lasp.generation.PADDING`` for tokens that fill
                up a batch: they leave no trace, and their logits mean nothing.
            tokens: for each slot its next ids, or int64 ``[slots, n]``. The same on every rank.
            draft: the tokens are a proposal, at most ``lasp.generation.step.FEW`` a slot:
                ``cache.accept`` then says how many of each slot stay.
            every_token: logits of every new token, ``[sum of n, vocab]``; else of the last one of
                each slot, ``[slots, vocab]``.

        Returns:
            Logits, the same on every rank.

        Communication: that of the layers. Data-parallel replicas take part, with the same tokens.

        Raises:
            ValueError: naming the argument, on every rank and before any communication; the cache
                is as it was. Ids on a GPU are not looked at.
        """
        model = cast("HybridModel", self)
        check_ready(model, cache)
        check_flags(draft=draft, every_token=every_token)
        pack, counts = packed(tokens, model.config.vocab_size, cache.device)
        plan = plan_step(cache, slots, counts, draft=draft, every_token=every_token)
        model.config.attention.check_documents([a + b for a, b in zip(plan.starts, counts)])
        if plan.group is not None:
            pack = plan.layout.shard(pack, plan.rank, pad_value=0)
        plan.begin()
        logits: Tensor = model(pack, batch_of(model, plan), cached=plan).logits
        plan.commit()
        return logits

    def generate(
        self,
        prompts: Sequence[Tokens],
        *,
        max_new_tokens: int = 128,
        sampling: Sampling = GREEDY,
        stop_tokens: Sequence[int] = (),
        cache: GenerationCache | None = None,
        slots: Sequence[int] | None = None,
        chunk_tokens: int = CHUNK_TOKENS,
        graph: bool = False,
        on_step: Callable[[dict[int, int]], object] | None = None,
    ) -> Generation:
        """Continue prompts of any lengths, without padding; in eval mode, whatever mode it is in.

        Args:
            prompts: ids of each, on the host. The same on every rank.
            max_new_tokens: of each.
            sampling: the rule that chooses; greedy by default.
            stop_tokens: a text ends after one of these.
            cache: whose free slots are used, and given back. None: one that is made for the call.
            slots: of ``cache``, sequences that the prompts continue; they stay in use.
            chunk_tokens: that a step reads at most, for each rank of the cp group.
            graph: once all prompts are read, steps are one CUDA graph, on one rank; see
                :class:`lasp.hybrid.graphs.DecodeGraph`.
            on_step: called with the new id of each prompt that has one, as soon as they are there.

        Returns:
            :class:`Generation`, the same on every rank.

        Communication: that of :meth:`step`, and the new ids from the first rank of the token group.

        Raises:
            ValueError: naming the argument, on every rank; the cache is as it was.
        """
        model = cast("HybridModel", self)
        request, cache, slots = checked_request(
            model,
            prompts,
            cache,
            max_new_tokens=max_new_tokens,
            sampling=sampling,
            stop_tokens=stop_tokens,
            slots=slots,
            chunk_tokens=chunk_tokens,
            graph=graph,
        )
        result = Generation([[] for _ in prompts], sum(map(len, request.prompts)))
        start = time.perf_counter()
        for found, reading in stream(model, request, cache, slots):
            result.count(found, start, reading=reading)
            if on_step is not None:
                on_step(found)
            start = time.perf_counter()
        return result
