"""AdamW over the model's parameters, with float32 master weights under a 16-bit model."""

from __future__ import annotations

import math

import torch

# torch's optimizers load it when they are made. Process groups alive at that moment are never
# freed, and their threads may abort a rank that has finished: so it comes before the groups.
import torch._dynamo
import torch.distributed as dist
from torch import Tensor

from lasp.hybrid import HybridModel


class Trainer:
    """Owns master weights and AdamW's moments; one :meth:`step` a batch.

    Master weights are the parameters themselves unless the model is bfloat16 or float16, where
    float32 copies are stepped and copied back.
    """

    def __init__(
        self, model: HybridModel, *, learning_rate: float, warmup: int, steps: int
    ) -> None:
        self.model = model
        self.learning_rate, self.warmup, self.steps = learning_rate, warmup, steps
        self.masters = {
            name: parameter
            if parameter.dtype in (torch.float32, torch.float64)
            else parameter.detach().float().requires_grad_()
            for name, parameter in model.named_parameters()
        }
        matrices = [master for master in self.masters.values() if master.ndim > 1]
        vectors = [master for master in self.masters.values() if master.ndim == 1]
        self.adamw = torch.optim.AdamW(
            [{"params": matrices, "weight_decay": 0.1}, {"params": vectors, "weight_decay": 0.0}],
            betas=(0.9, 0.95),
        )
        for master in self.masters.values():  # made now, so that a checkpoint can be read into it
            self.adamw.state[master] = {
                "step": torch.tensor(0.0),
                "exp_avg": torch.zeros_like(master),
                "exp_avg_sq": torch.zeros_like(master),
            }

    def rate(self, step: int) -> float:
        """Linear warm-up, then a cosine down to a tenth."""
        if step < self.warmup:
            return self.learning_rate * (step + 1) / self.warmup
        progress = min(1.0, (step - self.warmup) / max(1, self.steps - self.warmup))
        return self.learning_rate * (0.55 + 0.45 * math.cos(math.pi * progress))

    @torch.no_grad()
    def step(self, step: int, *, max_norm: float = 1.0) -> Tensor:
        """Clip the reduced gradients by their global norm, step, clear; returns that norm."""
        norm = self._global_norm()
        scale = (max_norm / norm).clamp(max=1.0)
        for name, parameter in self.model.named_parameters():
            master = self.masters[name]
            if parameter.grad is not None:
                master.grad = parameter.grad.to(master.dtype) * scale
        for group in self.adamw.param_groups:
            group["lr"] = self.rate(step)
        self.adamw.step()
        for name, parameter in self.model.named_parameters():
            if self.masters[name] is not parameter:
                parameter.copy_(self.masters[name])
                self.masters[name].grad = None
            parameter.grad = None
        return norm

    def _global_norm(self) -> Tensor:
        """Norm of all gradients: dense ones once, experts summed over their ep x etp parts."""

        def square(parameters: object) -> Tensor:
            grads = [p.grad for _, p in parameters if p.grad is not None]  # type: ignore[attr-defined]
            dtype = torch.promote_types(grads[0].dtype, torch.float32)
            return torch.stack([grad.to(dtype).square().sum() for grad in grads]).sum()

        experts = square(self.model.expert_parameters())
        if self.model.groups.ep_etp is not None:
            dist.all_reduce(experts, group=self.model.groups.ep_etp)
        return (square(self.model.dense_parameters()) + experts).sqrt()
