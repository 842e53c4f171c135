"""MiniMax-01's context extension (arXiv:2501.08313, table 6), at any scale.

Four stages: short contexts, then 16, 64 and 128 times as long, 8K to 1M in the paper. Each has its
RoPE base and its mixture of short, medium and long documents; over the first fifth of a stage the
mixture moves linearly from that of the stage before. Tokens of a step stay the same, so a step has
fewer packs as they grow: ``--cp`` must grow with them, from one resumed run to the next.
"""

from __future__ import annotations

import random
from bisect import bisect_left
from dataclasses import dataclass
from itertools import accumulate
from typing import NamedTuple

import torch

from hybrid_training.corpus import NO_LABEL, Corpus, Pack
from lasp.hybrid import HybridModel
from ring import RingAttention

TRANSITION = 0.2  # of a stage's steps


class Stage(NamedTuple):
    """A stage of the recipe.

    Attributes:
        context: tokens of a pack, in contexts of the first stage.
        rope_base: of softmax layers.
        mixture: shares of tokens in short, medium and long documents: shorter than 4 contexts of
            the first stage (32K in the paper), than 16 (128K), and longer.
        weight: tokens of the extension's stages, in billions in the paper.
    """

    context: int
    rope_base: float
    mixture: tuple[float, float, float]
    weight: float


MINIMAX = (
    Stage(1, 10_000.0, (1.0, 0.0, 0.0), 0.0),
    Stage(16, 5_000_000.0, (0.30, 0.70, 0.00), 300.0),
    Stage(64, 10_000_000.0, (0.35, 0.35, 0.30), 32.0),
    Stage(128, 10_000_000.0, (0.30, 0.30, 0.40), 26.0),
)
MEDIUM, LONG = 4, 16  # the shortest documents of these kinds, in contexts of the first stage


@dataclass(frozen=True)
class Recipe:
    """The stages of a run.

    Attributes:
        base_context: tokens of a pack in the first stage.
        steps: optimizer steps of all stages: half of them for the first, the rest by weight.
        tokens: of a step, a multiple of the longest context.
        seed: of what is drawn.

    Raises:
        ValueError: if ``tokens`` are no such multiple, or a stage has no steps.
    """

    base_context: int
    steps: int
    tokens: int
    seed: int

    def __post_init__(self) -> None:
        longest = MINIMAX[-1].context * self.base_context
        if self.tokens % longest:
            raise ValueError(
                f"packs x pack_tokens must be a multiple of the longest context {longest}, got"
                f" {self.tokens}: give more packs, or a smaller base_context"
            )
        if self.steps < 2 * len(MINIMAX):
            raise ValueError(
                f"steps must be at least {2 * len(MINIMAX)} for {len(MINIMAX)} stages, got"
                f" {self.steps}"
            )

    @property
    def ends(self) -> tuple[int, ...]:
        """The step after the last one of each stage: where to stop, and resume with another cp."""
        first, rest = self.steps // 2, self.steps - self.steps // 2 - (len(MINIMAX) - 1)
        total = sum(stage.weight for stage in MINIMAX)
        done = accumulate(stage.weight / total for stage in MINIMAX)
        return tuple(first + index + round(rest * share) for index, share in enumerate(done))

    def stage_at(self, step: int) -> tuple[Stage, tuple[float, float, float]]:
        """The stage of a step, and the mixture there."""
        ends = self.ends
        index = next(i for i, end in enumerate(ends) if step < end)
        stage, begun = MINIMAX[index], (0, *ends)[index]
        moving = TRANSITION * (ends[index] - begun)
        if index == 0 or step - begun >= moving:
            return stage, stage.mixture
        part = (step - begun) / moving
        before = MINIMAX[index - 1].mixture
        short, medium, long = (a + part * (b - a) for a, b in zip(before, stage.mixture))
        return stage, (short, medium, long)

    def packs(self, corpus: Corpus, step: int) -> list[Pack]:
        """The packs of a step, pieces of the corpus's files; the same on any ranks."""
        stage, mixture = self.stage_at(step)
        context = stage.context * self.base_context
        generator = random.Random(f"{self.seed} {step}")
        return [
            self.pack(corpus, context, mixture, generator) for _ in range(self.tokens // context)
        ]

    def long_pack(self, corpus: Corpus) -> Pack:
        """A pack of the longest context that no step trains on, to compare stages by."""
        context = MINIMAX[-1].context * self.base_context
        generator = random.Random(f"{self.seed} held out")
        return self.pack(corpus, context, MINIMAX[-1].mixture, generator)

    def pack(
        self,
        corpus: Corpus,
        context: int,
        mixture: tuple[float, float, float],
        generator: random.Random,
    ) -> Pack:
        """One pack, its tokens by the mixture."""
        bounds = [max(1, self.base_context // 4)]
        bounds += [kind * self.base_context for kind in (MEDIUM, LONG)] + [context]
        ends = [round(context * share) for share in accumulate(mixture)]
        lengths = []
        for kind, (start, stop) in enumerate(zip((0, *ends), (*ends[:-1], context))):
            left = stop - start
            while left > 0:
                low, high = bounds[kind], max(bounds[kind], min(bounds[kind + 1], context))
                lengths.append(min(left, generator.randint(low, high)))
                left -= lengths[-1]
        generator.shuffle(lengths)
        return corpus_pieces(corpus, lengths, generator)


def corpus_pieces(corpus: Corpus, lengths: list[int], generator: random.Random) -> Pack:
    """A pack of pieces of files, each of a file that is long enough."""
    sizes = [(b - a, a) for a, b in zip(corpus.borders, corpus.borders[1:])]
    sizes.sort()
    tokens, labels = [], []
    for length in lengths:
        size, start = sizes[generator.randrange(bisect_left(sizes, (length, 0)), len(sizes))]
        first = start + generator.randint(0, size - length)
        piece = corpus.stream[first : first + length].long()
        tokens.append(piece)
        labels += [piece[1:], piece.new_tensor([NO_LABEL])]
    return Pack(torch.cat(tokens), torch.cat(labels), tuple(lengths))


def set_rope_base(model: HybridModel, base: float) -> None:
    """Rotate softmax layers by another base from now on."""
    for module in model.modules():
        if isinstance(module, RingAttention):
            module.rope_base = base
