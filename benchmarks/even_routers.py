"""Routers that give every expert as many tokens, as trained ones do.

A router that was just drawn does not: the tokens' hidden states have a mean, and the experts whose
rows of the gate point along it get several times as many tokens as others, some ranks' experts 20 %
more than others'. Training ends that with an auxiliary loss or a bias; here each row of the gate
moves in the one direction that acts like a bias, until the loads of a batch are even.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from moe_parallel.router.route import Router

ROUNDS = 60


def make_even(model: nn.Module, call: Callable[[], Any]) -> float:
    """Change every router as its input arrives in one forward pass of ``call``.

    Returns:
        The tokens of the busiest expert of any layer, over the mean of an expert.

    Communication: all-reduces over all ranks, if there are process groups; call it on every rank.
    """
    busiest: list[float] = []

    def hook(router: Router, args: tuple[Tensor, ...]) -> None:
        busiest.append(even(router.weight, args[0], router.config.top_k))

    routers = [module for module in model.modules() if isinstance(module, Router)]
    hooks = [router.register_forward_pre_hook(hook) for router in routers]
    with torch.no_grad():
        call()
    for handle in hooks:
        handle.remove()
    return max(busiest)


def even(gate_EM: Tensor, x_TM: Tensor, top_k: int) -> float:
    """Change the gate so that each expert is among the ``top_k`` of as many of these tokens.

    Returns:
        The tokens of the busiest expert, over the mean.
    """
    x_TM = x_TM.to(gate_EM.dtype)
    mean_M = summed(x_TM.sum(0)) / summed(x_TM.new_tensor(len(x_TM)))
    # The direction whose product with every token is nearest to 1, with that of the mean 1.
    squares_MM = summed(x_TM.T @ x_TM)
    squares_MM.diagonal().add_(1e-3 * squares_MM.diagonal().mean())
    along_M = torch.linalg.solve(squares_MM, mean_M)
    along_M /= mean_M @ along_M
    logits_TE, along_T = x_TM @ gate_EM.T, x_TM @ along_M
    spread = logits_TE.std()
    shift_E = gate_EM.new_zeros(len(gate_EM))
    for _ in range(ROUNDS):
        load_E = loads(logits_TE + torch.outer(along_T, shift_E), top_k)
        shift_E -= 0.3 * spread * (load_E - 1).clamp(-1, 1)
    gate_EM += torch.outer(shift_E, along_M)
    return float(loads(x_TM @ gate_EM.T, top_k).max())


def loads(logits_TE: Tensor, top_k: int) -> Tensor:
    """Tokens of each expert over all ranks, over the mean of an expert."""
    chosen = logits_TE.topk(top_k).indices.flatten()
    counts_E = summed(torch.bincount(chosen, minlength=logits_TE.shape[1]).to(logits_TE.dtype))
    return counts_E / counts_E.mean()


def summed(x: Tensor) -> Tensor:
    """The sum over all ranks."""
    if dist.is_initialized():
        dist.all_reduce(x)
    return x
