"""Oracle: the expert layer over the whole batch, token by token, in any float dtype."""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from lasp._core.dtypes import wide_dtype
from moe_parallel.config import DropPolicy
from moe_parallel.router.route import expert_capacity


class ReferenceOutput(NamedTuple):
    """Result of :func:`reference_moe`.

    Attributes:
        output: ``[N, hidden]``, the layer's output.
        aux_loss: the whole auxiliary loss.
        kept: the kept assignments as (token, expert).
    """

    output: Tensor
    aux_loss: Tensor
    kept: frozenset[tuple[int, int]]


def reference_moe(
    x_NM: Tensor,
    gate_EM: Tensor,
    w13_E2FM: Tensor,
    w2_EMF: Tensor,
    *,
    top_k: int,
    capacity_factor: float | None = None,
    drop_policy: DropPolicy = "position",
    aux_loss_coefficient: float = 0.0,
) -> ReferenceOutput:
    """h_n = sum over the kept of n's top k experts of softmax(top-k logits) FFN_e(x_n).

    FFN_e(x) = w2_e (silu(w1_e x) * w3_e x), (w1_e, w3_e) = w13_e. Capacity, drop policies and the
    auxiliary loss as in :func:`moe_parallel.router.route.route`. All N tokens in global order on
    one device; gradients by autograd. Nothing here is fast.
    """
    tokens, num_experts = x_NM.shape[0], gate_EM.shape[0]
    dtype = wide_dtype(x_NM.dtype)
    logits_NE = x_NM.to(dtype) @ gate_EM.to(dtype).T
    probabilities_NE = logits_NE.softmax(1)

    chosen: list[list[int]] = []
    queues: list[list[int]] = [[] for _ in range(num_experts)]
    for token, logits in enumerate(logits_NE.tolist()):
        best = sorted(range(num_experts), key=lambda expert: (-logits[expert], expert))[:top_k]
        chosen.append(best)
        for expert in best:
            queues[expert].append(token)
    assigned = [len(queue) for queue in queues]
    if capacity_factor is not None:
        capacity = expert_capacity(capacity_factor, tokens, top_k, num_experts)
        for expert, queue in enumerate(queues):
            if drop_policy == "probability":
                column = probabilities_NE[:, expert].tolist()
                queue.sort(key=lambda token: -column[token])
            del queue[capacity:]
    kept = frozenset((token, expert) for expert in range(num_experts) for token in queues[expert])

    rows = []
    for token, experts in enumerate(chosen):
        weights = logits_NE[token, experts].softmax(0).to(x_NM.dtype)
        row = torch.zeros_like(x_NM[token])
        for weight, expert in zip(weights, experts):
            if (token, expert) in kept:
                gate, up = w13_E2FM[expert] @ x_NM[token]
                row = row + weight * (w2_EMF[expert] @ (F.silu(gate) * up))
        rows.append(row)
    output_NM = torch.stack(rows) if rows else x_NM * 1

    fraction_E = logits_NE.new_tensor(assigned) / max(tokens * top_k, 1)
    mean_E = probabilities_NE.sum(0) / max(tokens, 1)
    aux_loss = aux_loss_coefficient * num_experts * (fraction_E * mean_E).sum()
    return ReferenceOutput(output_NM, aux_loss, kept)
