"""A hybrid model made ready for many ranks: FSDP2, mixed precision, what the backward keeps."""

from __future__ import annotations

from typing import Any

import torch

from lasp._core.checks import check_part
from lasp.hybrid.activations import keep_activations
from lasp.hybrid.model import HybridModel
from moe_parallel import ExpertTopology, apply_fsdp


def parallelize(
    model: HybridModel,
    topology: ExpertTopology,
    *,
    activations: str = "none",
    param_dtype: torch.dtype | None = torch.bfloat16,
    reduce_dtype: torch.dtype | None = torch.float32,
    **options: Any,
) -> HybridModel:
    """Shard ``model`` over the ranks, in place: dense parameters over all ranks, experts over EDP.

    Each rank keeps a shard of every parameter in its own dtype, float32 as a rule: the masters.
    Layers compute in ``param_dtype``, routers and a float32 head in theirs. A backward sums
    gradients into shards layer by layer, in ``reduce_dtype``, while it goes on below. Make the
    optimizer after this, of :func:`moe_parallel.parameter_groups`: it updates the masters, and its
    states are shards too. Call ``backward`` on this rank's share of the loss, clip with
    :func:`moe_parallel.clip_grad_norm_`.

    Args:
        model: with its values, on the device that it is trained on, built with
            ``topology.build_groups()``.
        topology: the sizes.
        activations: what layers keep for the backward, see
            :func:`lasp.hybrid.activations.keep_activations`.
        param_dtype: of gathered parameters and of what the layers compute; None: that of the model.
        reduce_dtype: of the sums of gradients; None: ``param_dtype``.
        options: of ``fully_shard``, as ``reshard_after_forward``; but its meshes and ``mp_policy``.

    Returns:
        ``model``.

    Communication: makes process groups; every rank must call it. Then that of FSDP: an all-gather
    of each layer's parameters, forward and backward, and a reduce-scatter of its gradients.

    Raises:
        ValueError: for arguments of another type; if parameters have ``param_dtype`` already, so
            that there would be no masters; as :func:`lasp.hybrid.activations.keep_activations`, and
            as :func:`moe_parallel.apply_fsdp`.
    """
    from torch.distributed.fsdp import MixedPrecisionPolicy

    check_part("model", model, HybridModel)
    check_part("topology", topology, ExpertTopology)
    check_part("param_dtype", param_dtype, torch.dtype, optional=True)
    check_part("reduce_dtype", reduce_dtype, torch.dtype, optional=True)
    dtype = model.embedding.weight.dtype
    if param_dtype not in (None, torch.float32, torch.float64) and dtype == param_dtype:
        raise ValueError(
            f"model must have parameters of another dtype than param_dtype {param_dtype}, which the"
            " optimizer would round at every step: build it with dtype=torch.float32"
        )
    keep_activations(model, activations, dtype=param_dtype)
    policy = MixedPrecisionPolicy(param_dtype=param_dtype, reduce_dtype=reduce_dtype)
    blocks = [*model.layers, *(() if model.mtp is None else (model.mtp,))]
    apply_fsdp(model, topology, blocks=blocks, mp_policy=policy, **options)
    return model
