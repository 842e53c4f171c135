"""What do hybrids recall, by the share of softmax layers and the number of pairs?

Models of one size, of 16 layers without experts: all lightning, three, seven and fifteen lightning
layers to a softmax layer, all softmax. Softmax layers have as many keys as queries and a gate, so
that every layer has as many weights. A document is filler in which key-value pairs stand, two
tokens each, and at its end every key once more, in another order: a question, to which the model
must name the value.

    f f k3 v3 f f f f k1 v1 f f k2 v2 f f ... k1 v1 k3 v3 k2 v2        the answers: v1 v3 v2

Filler is of tokens of its own and of values, never of keys. A document of one pair is a needle in a
haystack; ``--pairs`` names the numbers of pairs, and what is asked is counted for each.

Without lessons no model learned this in a thousand steps. So the first half of the steps has
short documents of pairs alone, drawn again and again: every key that was seen before is a question.
Every value has a label too, its key, for the circuit begins with a look at the token before. In the
second half documents are those of the test; over its first half they grow to ``--length``. All
models of a seed see the same documents, and are asked documents that they did not see. Rows: for
each seed the loss of the last tenth of the steps and the accuracy by pairs; for all seeds together
their accuracies.

Run: python -m benchmarks.needle --commit $(git rev-parse HEAD)
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from benchmarks.harness import Machine, Options, Question, Row, answer, row
from lasp.hybrid import (
    AttentionConfig,
    DenseConfig,
    HybridConfig,
    HybridModel,
    PackedBatch,
    Residuals,
    StepGraph,
    pack_batch,
)

PATTERNS = {"lightning": "1:0", "3:1": "3:1", "7:1": "7:1", "15:1": "15:1", "softmax": "0:1"}
FILLER = -1
NO_LABEL = -100


@dataclass(kw_only=True)
class Sizes(Options):
    """Options: the task, the lessons before it, the model and the training.

    ``kinds`` is the number of keys, of values and of filler tokens.
    """

    length: int = 1024
    kinds: int = 128
    pairs: tuple[int, ...] = (1, 8, 32, 128)
    documents: int = 16
    lesson_length: int = 32
    lesson_pairs: int = 8
    patterns: tuple[str, ...] = tuple(PATTERNS)
    seeds: tuple[int, ...] = (0, 1, 2)
    layers: int = 16
    hidden_size: int = 256
    steps: int = 1500
    learning_rate: float = 1e-3
    tests: int = 32

    def __post_init__(self) -> None:
        most = min(self.length // 4, self.kinds)
        if not 1 <= min(self.pairs) <= max(self.pairs) <= most:
            raise ValueError(
                f"pairs must be from 1 to {most}, a quarter of the tokens of a document and the"
                f" kinds of keys, got {self.pairs}: make documents longer, or pairs fewer"
            )
        if not 2 <= self.lesson_length <= self.length:
            raise ValueError(
                f"lesson_length must be from 2 to the {self.length} tokens of a document, got"
                f" {self.lesson_length}: lessons are shorter than the test"
            )
        if self.documents % len(self.pairs):
            raise ValueError(
                f"documents must be a multiple of {len(self.pairs)}, the numbers of pairs, got"
                f" {self.documents}: a step has as many documents of each"
            )


class Documents(NamedTuple):
    """Documents of one length.

    Attributes:
        tokens: int64 ``[N, length]``.
        labels: likewise: at a key that was seen before its value, at the value of a key that key,
            else NO_LABEL.
    """

    tokens: Tensor
    labels: Tensor


def lesson_slots(generator: torch.Generator, count: int, length: int, pairs: int) -> Tensor:
    """The pair in every two tokens of documents, ``[count, length / 2]``: any one, everywhere."""
    return numbers(generator, pairs, count, length // 2)


def asked_slots(generator: torch.Generator, count: int, length: int, pairs: int) -> Tensor:
    """Likewise: every pair once among FILLER, and once at the end."""
    told = length // 2 - pairs
    pair = torch.arange(pairs, device=generator.device).expand(count, -1)
    slots = pair.new_full((count, told), FILLER)
    slots.scatter_(1, shuffled(generator, count, told)[:, :pairs], pair)
    return torch.cat((slots, shuffled(generator, count, pairs)), 1)


def shuffled(generator: torch.Generator, count: int, many: int) -> Tensor:
    """``count`` orders of the numbers below ``many``."""
    return torch.rand(count, many, generator=generator, device=generator.device).argsort(1)


def numbers(generator: torch.Generator, below: int, *shape: int) -> Tensor:
    """Numbers below one, drawn where the generator is."""
    return torch.randint(below, shape, generator=generator, device=generator.device)


def written(generator: torch.Generator, slots: Tensor, kinds: int) -> Documents:
    """Documents with these pairs; keys of a document differ, values need not."""
    count, many = slots.shape
    is_pair, pair = slots != FILLER, slots.clamp(min=0)
    key = shuffled(generator, count, kinds).gather(1, pair)
    value = kinds + numbers(generator, kinds, count, kinds).gather(1, pair)
    # Values stand everywhere: only what follows a key is its own.
    filler = kinds + numbers(generator, 2 * kinds, count, many, 2)
    tokens = torch.where(is_pair[..., None], torch.stack((key, value), 2), filler)
    at = torch.arange(many, device=slots.device).expand(count, -1)
    first = at.new_full((count, kinds), many)
    first.scatter_reduce_(1, pair, at.where(is_pair, many), "amin")
    asked = is_pair & (at > first.gather(1, pair))
    labels = torch.stack((value.where(asked, NO_LABEL), key.where(is_pair, NO_LABEL)), 2)
    return Documents(tokens.flatten(1), labels.flatten(1))


def slots_of(step: int, generator: torch.Generator, options: Sizes) -> Tensor:
    """The pairs in the documents of a step of training."""
    length, pairs = options.lesson_length, options.lesson_pairs
    if 2 * step < options.steps:
        return lesson_slots(generator, options.documents * options.length // length, length, pairs)
    doublings = (options.length // length).bit_length() - 1
    doubled = 1 + doublings * (4 * step - 2 * options.steps) // options.steps
    shorter = max(0, doublings - doubled)
    length, count = options.length >> shorter, options.documents << shorter
    count //= len(options.pairs)
    of_pairs = [min(pairs, length // 4) for pairs in options.pairs]
    return torch.cat([asked_slots(generator, count, length, pairs) for pairs in of_pairs])


def model_of(pattern: str, seed: int, options: Sizes, machine: Machine) -> HybridModel:
    """A model without experts; float32, which autocast rounds."""
    size = options.hidden_size
    heads = max(4, size // 32)  # lightning heads differ in their decay
    config = HybridConfig(
        num_layers=options.layers,
        vocab_size=3 * options.kinds,
        attention=AttentionConfig(heads, heads, size // heads, size // heads // 2, gated=True),
        moe=None,
        dense=DenseConfig(size, 2 * size),
        pattern=PATTERNS[pattern],
        residuals=Residuals(init_gain=0.5),
        lightning_impl=machine.impl,
    )
    model = HybridModel(config, device=machine.device)
    model.reset_parameters(seed)
    return model


class Run:
    """A model that is trained and asked."""

    def __init__(self, pattern: str, seed: int, options: Sizes, machine: Machine) -> None:
        self.options, self.machine = options, machine
        self.generator = torch.Generator(machine.device).manual_seed(seed)
        self.model = model_of(pattern, seed, options, machine)
        self.graph: StepGraph | None = None
        self.graphed = torch.Size()  # the shape of its tokens
        self.optimizer = torch.optim.Adam(
            self.model.parameters(), lr=options.learning_rate, betas=(0.9, 0.95), fused=True
        )

    def forward(self, some: Documents) -> Tensor:
        """Logits ``[T, vocabulary]``."""
        batch = batch_of(*some.tokens.shape)
        with torch.autocast(self.machine.device, torch.bfloat16, self.machine.device == "cuda"):
            logits: Tensor = self.model(some.tokens.flatten(), batch).logits
        return logits.float()

    def loss_of(self, tokens: Tensor, labels: Tensor) -> Tensor:
        """The mean over the labels, in nats."""
        logits = self.forward(Documents(tokens, labels))
        return F.cross_entropy(logits, labels.flatten(), ignore_index=NO_LABEL)

    def loss(self, some: Documents) -> Tensor:
        """Loss and gradients, by one CUDA graph for the steps of a layout."""
        if some.tokens.shape != self.graphed:
            self.graph, self.graphed = None, some.tokens.shape  # its memory is the next one's
        if self.graph is None:
            self.graph = StepGraph(self.model, self.loss_of, *some)
        return self.graph.step(*some)

    def train(self) -> float:
        """The loss of the last tenth of the steps, in nats a label."""
        options, losses = self.options, []
        for step in range(options.steps):
            slots = slots_of(step, self.generator, options)
            some = written(self.generator, slots, options.kinds)
            losses.append(self.loss(some).clone())
            torch.nn.utils.clip_grad_norm_(self.model.parameters(), 1.0)
            for group in self.optimizer.param_groups:
                group["lr"] = options.learning_rate * schedule(step, options.steps)
            self.optimizer.step()
            self.optimizer.zero_grad()
        return torch.stack(losses[-max(1, options.steps // 10) :]).mean().item()

    @torch.no_grad()
    def accuracy(self, pairs: int) -> float:
        """The share of questions that the model answers, over ``tests`` batches."""
        options, found = self.options, []
        for _ in range(options.tests):
            slots = asked_slots(self.generator, options.documents, options.length, pairs)
            some = written(self.generator, slots, options.kinds)
            said, labels = self.forward(some).argmax(1), some.labels.flatten()
            asked = labels >= options.kinds  # values; labels that are keys are lessons
            found.append((said == labels)[asked])
        return torch.cat(found).double().mean().item()


def schedule(step: int, steps: int) -> float:
    """Warm-up over the first twentieth; from the middle on a straight line to 0."""
    return min(20 * (step + 1) / steps, 1, 2 - 2 * step / steps)


@cache
def batch_of(count: int, length: int) -> PackedBatch:
    """Documents of one length."""
    return pack_batch([[length] * count], dp_rank=0, num_ranks=1, order="contiguous")


def rows(options: Sizes, machine: Machine) -> Iterator[Row]:
    """Rows by pattern, seed and pairs."""
    facts: dict[str, Any] = {"length": options.length, "kinds": options.kinds}
    facts["layers"] = options.layers
    facts |= {"hidden_size": options.hidden_size}
    facts |= {"tokens": options.steps * options.documents * options.length}
    for pattern in options.patterns:
        found: dict[int, list[float]] = {pairs: [] for pairs in options.pairs}
        for seed in options.seeds:
            run = Run(pattern, seed, options, machine)
            case = facts | {"pattern": pattern, "seed": seed}
            case["parameters"] = sum(p.numel() for p in run.model.parameters())
            yield row("needle", case, "lasp", "loss", run.train(), "nats a label")
            for pairs, accuracies in found.items():
                accuracies.append(run.accuracy(pairs))
                case["pairs"] = pairs
                yield row("needle", dict(case), "lasp", "accuracy", accuracies[-1], "share")
        if len(options.seeds) > 1:
            for pairs, accuracies in found.items():
                case = facts | {"pattern": pattern, "seed": "all", "pairs": pairs}
                yield row("needle", case, "lasp", "accuracy", sorted(accuracies), "share")


QUESTION = Question("needle", Sizes, rows)

if __name__ == "__main__":
    answer(QUESTION, __doc__)
