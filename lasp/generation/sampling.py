"""How the next token is chosen from logits."""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from lasp._core.checks import (
    check_not_negative,
    check_positive,
    check_sizes,
    check_sizes_or_none,
    integers,
)
from lasp._core.dtypes import wide_dtype


@dataclass(frozen=True)
class Sampling:
    """The rule that chooses tokens; greedy by default.

    Attributes:
        temperature: logits are divided by it; 0: the best token, without drawing.
        top_k: only so many best tokens can be drawn. None: all.
        top_p: only the best tokens that together reach this probability, after ``top_k``. 1: all.
        suppressed: ids that are never chosen: ids of padding, say, whose rows of the head are zero.
        seed: of the draws. Each sequence has draws of its own, by its index: they do not depend on
            what else is in the batch, nor on the ranks.

    Raises:
        ValueError: naming the field.
    """

    temperature: float = 0.0
    top_k: int | None = None
    top_p: float = 1.0
    suppressed: tuple[int, ...] = ()
    seed: int = 0

    def __post_init__(self) -> None:
        check_not_negative(temperature=self.temperature)
        check_sizes_or_none(top_k=self.top_k)
        check_positive(top_p=self.top_p)
        check_sizes(-(2**63), seed=self.seed)
        integers("suppressed", self.suppressed)
        if self.top_p > 1:
            raise ValueError(f"top_p must be in (0, 1], got {self.top_p}: 1 leaves all tokens")

    def check_vocabulary(self, vocab_size: int) -> None:
        """Raise ValueError unless the suppressed ids leave some of ``vocab_size``."""
        wrong = [token for token in self.suppressed if not 0 <= token < vocab_size]
        if wrong or len(set(self.suppressed)) >= vocab_size:
            raise ValueError(
                f"suppressed must be ids in [0, {vocab_size}), not all of them, got"
                f" {wrong or 'all'}"
            )

    def draws(self, index: int) -> random.Random:
        """The source of the draws of a sequence."""
        return random.Random(f"{self.seed} {index}")

    def choose(self, logits: Tensor, uniforms: Sequence[float]) -> Tensor:
        """The next token of each sequence, int64 ``[N]``.

        Args:
            logits: ``[N, vocab]``.
            uniforms: a draw from [0, 1) for each, not read if greedy.
        """
        scores = logits.to(wide_dtype(logits.dtype))
        if self.suppressed:
            ids = torch.tensor(self.suppressed, dtype=torch.int64, device=scores.device)
            scores = scores.index_fill(1, ids, float("-inf"))
        if self.temperature == 0:
            return scores.argmax(-1)
        most = min(self.top_k or scores.shape[1], scores.shape[1])
        best, ids = (scores / self.temperature).topk(most, dim=-1)
        p = best.softmax(-1)
        if self.top_p < 1:  # a token stays if those before it do not reach top_p
            p = p.masked_fill(p.cumsum(-1) - p >= self.top_p, 0.0)
        ends = p.cumsum(-1)
        targets = torch.tensor(uniforms, dtype=p.dtype, device=p.device).unsqueeze(1)
        chosen = (ends <= targets * ends[:, -1:]).sum(-1, keepdim=True)
        last = (p > 0).sum(-1, keepdim=True) - 1  # where a sum is rounded up to the draw
        return ids.gather(1, torch.minimum(chosen, last)).squeeze(1)


GREEDY = Sampling()
