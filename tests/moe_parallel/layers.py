"""The layer on ranks and the oracle, both as the whole batch's output, loss and gradients."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from moe_parallel import ExpertParallelMoE, ExpertTopology, MoEConfig, TokenOrder
from moe_parallel.reference import reference_moe
from tests.moe_parallel.batch import (
    assemble,
    assemble_expert,
    groups_of,
    local_rows,
    random_batch,
)
from tests.moe_parallel.host_memory import memory_of
from tests.ranks import run_on_ranks

NUM_TOKENS = 29
HOT, COLD = 5, 2  # with skew: the expert every token picks and the one nobody picks


class LayerResult(NamedTuple):
    """Output, auxiliary loss and every gradient; of one rank or of the whole batch."""

    output: Tensor
    aux_loss: Tensor
    x: Tensor
    gate_weight: Tensor
    w13: Tensor
    w2: Tensor


def build(config: MoEConfig, dtype: torch.dtype, skew: bool, **kwargs: object) -> ExpertParallelMoE:
    layer = ExpertParallelMoE(config, seed=1, dtype=dtype, **kwargs)
    if skew:
        with torch.no_grad():
            layer.gate.weight[HOT, 0] += 20
            layer.gate.weight[COLD, 0] -= 1000
    return layer


def layer_on_rank(
    topology: ExpertTopology,
    order: TokenOrder,
    config: MoEConfig,
    dtype: torch.dtype = torch.float64,
    skew: bool = False,
    device: str = "cpu",
    copied: bool = False,
) -> LayerResult:
    groups = groups_of(topology).experts
    memory = memory_of(groups) if copied else None
    layer = build(config, dtype, skew, groups=groups, symmetric_memory=memory, device=device)
    rank = layer.mesh.token_rank
    whole = random_batch(order.num_tokens, config.hidden_size)
    # NaN in the padding: it must be neither routed nor multiplied by zero.
    x = local_rows(whole.x.to(dtype), order, rank, padding=torch.nan).to(device).requires_grad_()
    grad = local_rows(whole.grad.to(dtype), order, rank, padding=torch.nan).to(device)
    result = layer(x, token_order=order)
    torch.autograd.backward([result.output, result.aux_loss], [grad, None])
    tensors = [result.output, result.aux_loss, x.grad, layer.gate.weight.grad]
    tensors += [layer.experts.w13.grad, layer.experts.w2.grad]
    return LayerResult(*(tensor.detach().cpu() for tensor in tensors))


def on_ranks(
    topology: ExpertTopology,
    order: TokenOrder,
    *args: object,
    backend: str = "gloo",
    copied: bool = False,
) -> LayerResult:
    how = {"device": "cuda" if backend == "nccl" else "cpu", "copied": copied}
    parts = run_on_ranks(
        layer_on_rank, topology.world_size, topology, order, *args, backend=backend, **how
    )
    return LayerResult(
        output=assemble([part.output for part in parts], order),
        aux_loss=sum(part.aux_loss for part in parts),
        x=assemble([part.x for part in parts], order),
        gate_weight=sum(part.gate_weight for part in parts),
        w13=assemble_expert([part.w13 for part in parts], "w13", topology),
        w2=assemble_expert([part.w2 for part in parts], "w2", topology),
    )


def oracle(
    config: MoEConfig,
    dtype: torch.dtype = torch.float64,
    skew: bool = False,
    compute: torch.dtype = torch.float64,
    num_tokens: int = NUM_TOKENS,
) -> LayerResult:
    """The reference on values of ``dtype``, computed in ``compute``."""
    layer = build(config, dtype, skew)
    gate = layer.gate.weight.detach()
    if compute == torch.float64:
        gate = gate.double()
    weights = [gate, *(w.detach().to(compute) for w in layer.experts.parameters())]
    weights = [weight.requires_grad_() for weight in weights]
    whole = random_batch(num_tokens, config.hidden_size)
    x = whole.x.to(dtype).to(compute).requires_grad_()
    result = reference_moe(
        x,
        *weights,
        top_k=config.top_k,
        capacity_factor=config.capacity_factor,
        drop_policy=config.drop_policy,
        aux_loss_coefficient=config.aux_loss_coefficient,
    )
    torch.autograd.backward(
        [result.output, result.aux_loss], [whole.grad.to(dtype).to(compute), None]
    )
    grads = [tensor.grad for tensor in (x, *weights)]
    return LayerResult(result.output.detach(), result.aux_loss.detach(), *grads)
