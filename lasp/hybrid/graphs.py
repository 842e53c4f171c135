"""One token for each of a few sequences as one CUDA graph: the host launches once a step."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from lasp.generation import PADDING, GenerationCache
from lasp.generation.cache import KeyMemory
from lasp.generation.partials import MAX_HEAD_DIM, MAX_LATENT, has_kernel
from lasp.generation.step import CacheStep, plan_step
from lasp.hybrid.steps import batch_of, check_ready, packed
from lasp.layers.lightning_attention import LightningAttention

if TYPE_CHECKING:
    from lasp.hybrid.model import HybridModel


class DecodeGraph:
    """Steps of one new token a slot, for up to ``batch_size`` slots, on one rank.

    Ids, positions, slots and lengths are copied into memory that the graph reads, all else is
    replayed. What is missing to ``batch_size`` is padding. On a CPU the same memory is used without
    a graph. The graph holds the memory of the cache, and the logits of a step until the next one.

    Args:
        model: in eval mode, on one rank. On a GPU everything must run without the host: parameters
            in bfloat16, whose experts then are one grouped product, or no experts.
        cache: of the model.
        batch_size: most slots of a step.

    Raises:
        ValueError: for a model over several ranks, or one whose softmax layers no kernel runs
            (wide heads, float64), or a cache that is not the model's.
    """

    def __init__(self, model: HybridModel, cache: GenerationCache, batch_size: int) -> None:
        check_ready(model, cache)
        if model.groups.cp is not None or model.groups.token is not None:
            raise ValueError(
                "a DecodeGraph must be of a model on one rank, got one over groups: use model.step"
            )
        if type(batch_size) is not int or batch_size < 1:
            raise ValueError(f"batch_size must be a whole number >= 1, got {batch_size!r}")
        self._model, self._cache, self.batch_size = model, cache, batch_size
        idle = plan_step(cache, [PADDING] * batch_size, [1] * batch_size)
        self._rows = torch.empty_like(idle.rows).copy_(idle.rows)
        self._ids = idle.rows.new_zeros(batch_size)
        self._batch = batch_of(model, idle)
        self._replay: Callable[[], Tensor] | None = None
        if cache.device.type == "cuda":
            _check_kernels(model, cache)
            with torch.cuda.device(cache.device):
                self._replay = _captured(lambda: self._run(idle))

    @torch.no_grad()
    def _run(self, plan: CacheStep) -> Tensor:
        static = replace(plan, rows=self._rows)
        logits: Tensor = self._model(self._ids, self._batch, cached=static).logits
        return logits

    def step(self, slots: Sequence[int], tokens: Tensor) -> Tensor:
        """As :meth:`lasp.hybrid.HybridModel.step` with one token a slot.

        Args:
            slots: at most ``batch_size``.
            tokens: int64 ``[slots]`` or ``[slots, 1]``.

        Returns:
            Logits ``[slots, vocab]``, which the next step overwrites.

        Raises:
            ValueError: naming the argument; the cache is as it was.
        """
        check_ready(self._model, self._cache)
        ids, counts = packed(tokens.view(-1, 1), self._model.config.vocab_size, self._cache.device)
        missing = self.batch_size - len(slots)
        if missing < 0 or len(counts) != len(slots):
            raise ValueError(
                f"tokens must be one for each of at most {self.batch_size} slots, got"
                f" {len(counts)} for {len(slots)} slots"
            )
        padded = [*slots, *[PADDING] * missing]
        plan = plan_step(self._cache, padded, [1] * self.batch_size)
        lengths = [start + 1 for start in plan.starts]
        self._model.config.attention.check_documents(lengths)
        self._rows.copy_(plan.rows)
        self._ids[: len(slots)].copy_(ids)
        logits = self._run(plan) if self._replay is None else self._replay()
        plan.commit()
        return logits[: len(slots)]


def _check_kernels(model: HybridModel, cache: GenerationCache) -> None:
    """Raise ValueError if a softmax layer would read lengths on the host, which a graph cannot."""
    for layer, memory in zip(model.decoder_layers(), cache.layers):
        if isinstance(layer.attention, LightningAttention):
            continue
        assert isinstance(memory, KeyMemory)
        if not has_kernel(memory, layer.attention.block):
            raise ValueError(
                "a DecodeGraph must be of softmax layers that a kernel runs, 16 or 32 bits, heads"
                f" up to {MAX_HEAD_DIM} or latents up to {MAX_LATENT}, got {memory.keys.shape[-1]}"
                f" in {memory.keys.dtype}: use model.step"
            )


def _captured(run: Callable[[], Tensor]) -> Callable[[], Tensor]:
    """A replay of ``run``, which has run before on padding and left no trace."""
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(3):
            run()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        logits = run()

    def replay() -> Tensor:
        graph.replay()
        return logits

    return replay
