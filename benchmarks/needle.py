"""What do hybrids recall: needles and key-value pairs, by the share of softmax layers?

Models of one size, of 16 layers without experts: all lightning, three, seven and fifteen lightning
layers to a softmax layer, all softmax. Softmax layers have as many keys as queries and a gate, so
that every layer has as many weights. A document is filler in which key-value pairs stand, two
tokens each, and questions at its end: a key, after which the model must name its value.

    f f k3 v3 f f f k1 v1 f k2 v2 f f ... k1 v1 k3 v3        the labels: the last v1 and v3

Filler is of tokens of its own and of values, never of keys. ``recall`` documents hold ``--pairs``
pairs and a question for each, ``needle`` documents one pair anywhere and one question; every step
trains on as many tokens of both. Over the first half of the steps documents grow from an eighth of
their length and pairs, and so many more of them make a step: models learn to look up in short ones.
All models of a seed see the same documents, and are asked documents that they did not see. Rows:
for each seed the accuracy by task and the loss of the last tenth of the steps; for all seeds
together their accuracies.

Run: python -m benchmarks.needle --commit $(git rev-parse HEAD)
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor

from benchmarks.harness import Machine, Options, Question, Row, answer, row
from lasp.hybrid import (
    AttentionConfig,
    DenseConfig,
    HybridConfig,
    HybridModel,
    PackedBatch,
    Residuals,
    next_token_loss,
    pack_batch,
)

KINDS = 64  # of keys, of values and of filler tokens
HALVINGS = 3  # of the documents that training begins with
PATTERNS = {"lightning": "1:0", "3:1": "3:1", "7:1": "7:1", "15:1": "15:1", "softmax": "0:1"}
NO_LABEL = -100


@dataclass(kw_only=True)
class Sizes(Options):
    """Options: the task, the model and the training."""

    length: int = 1024
    pairs: int = 32
    documents: int = 32
    patterns: tuple[str, ...] = tuple(PATTERNS)
    seeds: tuple[int, ...] = (0, 1, 2)
    layers: int = 16
    hidden_size: int = 256
    steps: int = 1000
    learning_rate: float = 2e-3
    tests: int = 16


class Documents(NamedTuple):
    """Documents of one length.

    Attributes:
        tokens: int64 ``[N, length]``.
        labels: likewise: the value after a question, else NO_LABEL.
    """

    tokens: Tensor
    labels: Tensor


def documents(
    generator: torch.Generator, count: int, length: int, pairs: int, questions: int
) -> Documents:
    """Documents with pairs anywhere before the questions, which ask for different keys."""
    slots = (length - 2 * questions) // 2
    if pairs > min(slots, KINDS) or questions > pairs:
        raise ValueError(
            f"pairs must be at least {questions} questions and at most {min(slots, KINDS)}, keys"
            f" and places of a document, got {pairs}: make documents longer, or pairs fewer"
        )

    def chosen(of: int, many: int) -> Tensor:
        return torch.rand(count, of, generator=generator).argsort(1)[:, :many]

    keys = chosen(KINDS, pairs)
    values = torch.randint(KINDS, (count, pairs), generator=generator) + KINDS
    # Values stand everywhere: only what follows a key is its own.
    tokens = torch.randint(2 * KINDS, (count, length), generator=generator) + KINDS
    at = 2 * chosen(slots, pairs)
    tokens.scatter_(1, at, keys).scatter_(1, at + 1, values)
    asked = chosen(pairs, questions)
    tokens[:, length - 2 * questions :: 2] = keys.gather(1, asked)
    tokens[:, length - 2 * questions + 1 :: 2] = values.gather(1, asked)
    labels = torch.full_like(tokens, NO_LABEL)
    labels[:, length - 2 * questions :: 2] = values.gather(1, asked)
    return Documents(tokens, labels)


def model_of(pattern: str, options: Sizes, machine: Machine) -> HybridModel:
    """A model without experts; float32, which autocast rounds."""
    size = options.hidden_size
    heads = max(4, size // 32)  # lightning heads differ in their decay
    config = HybridConfig(
        num_layers=options.layers,
        vocab_size=3 * KINDS,
        attention=AttentionConfig(heads, heads, size // heads, size // heads // 2, gated=True),
        moe=None,
        dense=DenseConfig(size, 2 * size),
        pattern=PATTERNS[pattern],
        residuals=Residuals(),
        lightning_impl=machine.impl,
    )
    model = HybridModel(config, device=machine.device)
    model.reset_parameters(0)
    with torch.no_grad():
        model.embedding.weight.mul_(0.02 * math.sqrt(size))
    return model


class Run:
    """A model that is trained and asked."""

    def __init__(self, pattern: str, seed: int, options: Sizes, machine: Machine) -> None:
        self.options, self.machine = options, machine
        self.generator = torch.Generator().manual_seed(seed)
        self.model = model_of(pattern, options, machine)
        self.optimizer = torch.optim.AdamW(
            self.model.parameters(), lr=options.learning_rate, betas=(0.9, 0.95), weight_decay=0.1
        )

    def task(self, name: str, count: int, halvings: int = 0) -> Documents:
        """New documents of a task: ``count`` whole ones, or more that are shorter."""
        pairs = max(1, self.options.pairs >> halvings) if name == "recall" else 1
        length = self.options.length >> halvings
        return documents(self.generator, count << halvings, length, pairs, pairs)

    def forward(self, some: Documents) -> tuple[Tensor, Tensor]:
        """Logits and labels of the tokens that have one."""
        batch = batch_of(*some.tokens.shape)
        tokens, labels = (x.flatten().to(self.machine.device) for x in some)
        with torch.autocast(self.machine.device, torch.bfloat16, self.machine.device == "cuda"):
            logits = self.model(tokens, batch).logits
        asked = labels != NO_LABEL
        return logits[asked], labels[asked]

    def train(self) -> float:
        """The loss of the last tenth of the steps, in nats a question."""
        options, losses = self.options, []
        for step in range(options.steps):
            half = options.documents // 2
            halvings = max(0, HALVINGS - 2 * HALVINGS * step // options.steps)
            parts = (self.task("recall", half, halvings), self.task("needle", half, halvings))
            logits, labels = self.forward(Documents(*map(torch.cat, zip(*parts))))
            loss = next_token_loss(logits, labels, len(labels))
            loss.backward()
            torch.nn.utils.clip_grad_norm_(self.model.parameters(), 1.0)
            for group in self.optimizer.param_groups:
                group["lr"] = options.learning_rate * schedule(step, options.steps)
            self.optimizer.step()
            self.optimizer.zero_grad()
            losses.append(loss.detach())
        return torch.stack(losses[-max(1, options.steps // 10) :]).mean().item()

    @torch.no_grad()
    def accuracy(self, name: str) -> float:
        """The share of questions that the model answers, over ``tests`` batches of a task."""
        right, asked = 0, 0
        for _ in range(self.options.tests):
            logits, labels = self.forward(self.task(name, self.options.documents))
            right += int((logits.argmax(1) == labels).sum())
            asked += len(labels)
        return right / asked


def schedule(step: int, steps: int) -> float:
    """Warm-up over the first tenth, then half a cosine."""
    warm_up = max(1, steps // 10)
    if step < warm_up:
        return (step + 1) / warm_up
    return 0.5 + 0.5 * math.cos(math.pi * (step - warm_up) / max(1, steps - warm_up))


def batch_of(count: int, length: int) -> PackedBatch:
    """Documents of one length."""
    return pack_batch([[length] * count], dp_rank=0, num_ranks=1, order="contiguous")


def rows(options: Sizes, machine: Machine) -> Iterator[Row]:
    """Rows by pattern and seed."""
    facts: dict[str, Any] = {"length": options.length, "pairs": options.pairs}
    facts |= {"layers": options.layers, "hidden_size": options.hidden_size}
    facts |= {"tokens": options.steps * options.documents * options.length}
    for pattern in options.patterns:
        found: dict[str, list[float]] = {"recall": [], "needle": []}
        for seed in options.seeds:
            run = Run(pattern, seed, options, machine)
            case = facts | {"pattern": pattern, "seed": seed}
            case["parameters"] = sum(p.numel() for p in run.model.parameters())
            yield row("needle", case, "lasp", "loss", run.train(), "nats a question")
            for task, accuracies in found.items():
                accuracies.append(run.accuracy(task))
                yield row("needle", case, "lasp", f"{task}_accuracy", accuracies[-1], "share")
        if len(options.seeds) > 1:
            case = facts | {"pattern": pattern, "seed": "all"}
            for task, accuracies in found.items():
                metric = f"{task}_accuracy"
                yield row("needle", case, "lasp", metric, sorted(accuracies), "share")


QUESTION = Question("needle", Sizes, rows)

if __name__ == "__main__":
    answer(QUESTION, __doc__)
