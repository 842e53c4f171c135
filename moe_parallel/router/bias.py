"""Balance without a loss: a bias on each expert's score, moved against its load after each step.

Source: Wang et al., arXiv:2408.15664; DeepSeek-V3, section 2.1.2.
"""

from __future__ import annotations

import torch
import torch.distributed as dist
from torch import nn

from lasp._core.checks import check_part, check_positive
from moe_parallel.router.losses import summed_over
from moe_parallel.router.route import Router


@torch.no_grad()
def update_expert_bias(model: nn.Module, rate: float = 1e-3) -> None:
    """Move the bias of every expert by ``rate``, up if its load is below the mean, else down.

    Call it on every rank after the last micro-batch of a step, before or after the optimizer. The
    load is that of the assignments before drop in all backwards since the last call: evaluation
    does not count, and a layer that is recomputed counts once.

    Args:
        model: holds any number of routers, at least one with ``RouterConfig(expert_bias=True)``.
        rate: by how much.

    Communication: one all-reduce of layers x E int64 over each token group.

    Raises:
        ValueError: for what is no module, a ``rate`` that is not above 0, or no router with a bias.
    """
    check_part("model", model, nn.Module)
    check_positive(rate=rate)
    of_group: dict[dist.ProcessGroup | None, list[Router]] = {}
    for module in model.modules():
        if isinstance(module, Router) and module.expert_bias is not None:
            of_group.setdefault(module.groups.token, []).append(module)
    if not of_group:
        raise ValueError(
            "model must have a router with a bias, got none: build it with"
            " MoEConfig(router=RouterConfig(expert_bias=True))"
        )
    for group, routers in of_group.items():
        sizes = [router.config.num_experts for router in routers]
        loads = torch.cat([router.local_tokens_per_expert for router in routers])
        for router, load_E in zip(routers, summed_over(group, loads).split(sizes)):
            # Integers: E times the difference to the mean, exactly.
            above_E = load_E * len(load_E) - load_E.sum()
            assert router.expert_bias is not None
            router.expert_bias.sub_(rate * above_E.sign())
            router.local_tokens_per_expert.zero_()
