"""Loss and gradient reduction for a model whose ranks each hold a share of the batch."""

from __future__ import annotations

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn

from lasp._core.checks import check_part
from lasp._core.dtensors import local
from lasp._core.dtypes import wide_dtype
from lasp._core.summed_gradients import any_summed
from lasp.hybrid.model import HybridModel


def next_token_loss(logits: Tensor, labels: Tensor, num_targets: int) -> Tensor:
    """This rank's share of the mean cross entropy, in nats; its sum over the token group is it.

    Args:
        logits: ``[T, vocab]``, any float dtype; computed in float32 or better.
        labels: int64 ``[T]``, -100 where there is no target.
        num_targets: targets on all ranks of the token group.
    """
    logits = logits.to(wide_dtype(logits.dtype))
    return F.cross_entropy(logits, labels, reduction="sum") / num_targets


@torch.no_grad()
def reduce_gradients(model: HybridModel) -> None:
    """Sum the gradients of losses that are shares of one global loss.

    Dense parameters over the token group; an expert has seen the tokens of its whole EP x ETP
    block, so its gradient is summed over its EDP replicas only. One all-reduce of the flat
    gradients each, once before each step.

    Raises:
        ValueError: for what is no such model, and if :func:`moe_parallel.apply_ddp` or
            ``apply_fsdp`` sums in the backward.
    """
    check_part("model", model, nn.Module)
    if any_summed(model):
        raise ValueError(
            "model must not be under apply_ddp or apply_fsdp, which have summed its gradients in"
            " the backward: leave reduce_gradients out"
        )
    check_part("model", model, HybridModel)
    for parameters, group in (
        (model.dense_parameters(), model.groups.token),
        (model.expert_parameters(), model.groups.edp),
    ):
        grads = [local(parameter.grad) for _, parameter in parameters if parameter.grad is not None]
        if group is None or not grads:
            continue
        for dtype in {grad.dtype: None for grad in grads}:
            bucket = [grad for grad in grads if grad.dtype == dtype]
            flat = torch.cat([grad.flatten() for grad in bucket])
            dist.all_reduce(flat, group=group)
            for grad, total in zip(bucket, flat.split([grad.numel() for grad in bucket])):
                grad.copy_(total.view_as(grad))
