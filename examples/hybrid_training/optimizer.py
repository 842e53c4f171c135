"""AdamW over the model's parameters, with warm-up, cosine decay and clipping."""

from __future__ import annotations

import math

import torch

# torch's optimizers load it when they are made. Process groups alive at that moment are never
# freed, and their threads may abort a rank that has finished: so it comes before the groups.
import torch._dynamo
from torch import Tensor

from lasp.hybrid import HybridModel
from moe_parallel import clip_grad_norm_


class Trainer:
    """Owns AdamW's moments; one :meth:`step` a batch."""

    def __init__(
        self, model: HybridModel, *, learning_rate: float, warmup: int, steps: int
    ) -> None:
        self.model = model
        self.learning_rate, self.warmup, self.steps = learning_rate, warmup, steps
        dense = [parameter for _, parameter in model.dense_parameters()]
        experts = [parameter for _, parameter in model.expert_parameters()]
        self.adamw = torch.optim.AdamW(
            [
                {"params": [p for p in dense if p.ndim > 1], "weight_decay": 0.1},
                {"params": [p for p in dense if p.ndim == 1], "weight_decay": 0.0},
                # Apart: they are DTensors, which optimizers do not update together with others.
                {"params": experts, "weight_decay": 0.1},
            ],
            betas=(0.9, 0.95),
        )

    def rate(self, step: int) -> float:
        """Linear warm-up, then a cosine down to a tenth."""
        if step < self.warmup:
            return self.learning_rate * (step + 1) / self.warmup
        progress = min(1.0, (step - self.warmup) / max(1, self.steps - self.warmup))
        return self.learning_rate * (0.55 + 0.45 * math.cos(math.pi * progress))

    def step(self, step: int, *, max_norm: float = 1.0) -> Tensor:
        """Clip the reduced gradients by their global norm, step, clear; returns that norm.

        Raises:
            FloatingPointError: on every rank, if the norm is not finite; nothing was updated.
        """
        norm = clip_grad_norm_(self.model, max_norm, self.model.groups)
        if not norm.isfinite():
            raise FloatingPointError(
                f"the norm of gradients of step {step} must be finite, got {norm.item():g};"
                " nothing was updated: docs/when-it-goes-wrong.md says what to look at"
            )
        for group in self.adamw.param_groups:
            group["lr"] = self.rate(step)
        self.adamw.step()
        self.adamw.zero_grad()
        return norm
