"""Weights of the plain hybrid model as those of Megatron's GPTModel, and back.

    load_plain_weights(gpt_model, dict(plain.named_parameters()))   # each rank takes its part
    plain.load_state_dict(plain_weights([gpt_model]), strict=False) # whole, on every rank

Between them a checkpoint of Megatron's ``dist_checkpointing`` may change every parallel size.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from itertools import chain
from typing import Any

import torch
import torch.distributed as dist
from megatron.core.models.gpt import GPTModel
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.transformer.module import MegatronModule
from torch import Tensor

from lasp._core.checks import check_part
from lasp._core.collectives import all_gather
from lasp.megatron.checks import groups_of
from lasp.megatron.names import DENSE_MERGED, to_megatron, to_plain
from moe_parallel.experts.experts import Experts


@torch.no_grad()
def load_plain_weights(
    model: GPTModel,
    weights: Mapping[str, Tensor],
    *,
    pg_collection: ProcessGroupCollection | None = None,
) -> None:
    """Copy this rank's part of whole plain weights into its stage of a GPTModel.

    Args:
        model: GPTModel of :func:`hybrid_block_spec` with untied embeddings, not wrapped; with
            virtual stages call it for each.
        weights: by the names of :class:`lasp.hybrid.HybridModel`, at least those of this stage, on
            any device, of any dtype.
        pg_collection: its tp, ep and expt_tp groups; of the parallel state if None.

    Raises:
        ValueError: for another model, and if a weight is missing or of another shape.
    """
    check_part("model", model, MegatronModule)
    groups = _groups(pg_collection)
    whole = to_megatron(weights, **_heads(model))
    for name, parameter in _named_parameters(model):
        if name not in whole:
            raise ValueError(f"weights must have {name} of this stage, got {sorted(whole)[:3]}...")
        part = _by_halves(name, whole[name])
        for group, dim in _cuts(name, parameter, groups):
            part = part.chunk(group.size(), dim)[group.rank()]
        part = _joined(name, part)
        if part.shape != parameter.shape:
            raise ValueError(
                f"{name} must have shape {tuple(parameter.shape)} on this rank, got"
                f" {tuple(part.shape)} of {tuple(whole[name].shape)}: the models must be alike"
            )
        parameter.copy_(part)


@torch.no_grad()
def plain_weights(
    models: Sequence[GPTModel], *, pg_collection: ProcessGroupCollection | None = None
) -> dict[str, Tensor]:
    """Whole weights of a GPTModel on every rank, for a plain model that fits on one.

    Args:
        models: the virtual stages of this rank, not wrapped.
        pg_collection: its tp, ep, expt_tp and pp groups; of the parallel state if None.

    Returns:
        Tensors on the CPU by the names of :class:`lasp.hybrid.HybridModel`.

    Communication: an all-gather of every split parameter over its groups, then of all of them over
    the pipeline stages. Every rank must call it.

    Raises:
        ValueError: for what are no models.
    """
    check_part("models", models, Sequence)
    for model in models:
        check_part("model", model, MegatronModule)
    groups = _groups(pg_collection)
    of_stage = {}
    for model in models:
        for name, parameter in _named_parameters(model):
            whole = _by_halves(name, parameter.detach())
            for group, dim in reversed(_cuts(name, parameter, groups)):
                whole = torch.cat(all_gather(whole, group).unbind(), dim)
            of_stage[name] = _joined(name, whole).cpu()
    stages: list[Any] = [None] * groups["pp"].size()
    dist.all_gather_object(stages, of_stage, group=groups["pp"])
    weights = {name: weight for stage in stages for name, weight in stage.items()}
    gated = models[0].config.attention_output_gate
    return to_plain(weights, **_heads(models[0]), gated=gated)


def _heads(model: GPTModel) -> dict[str, int]:
    config = model.config
    return {"num_heads": config.num_attention_heads, "num_kv_heads": config.num_query_groups}


def _groups(pg_collection: ProcessGroupCollection | None) -> dict[str, Any]:
    names = ("tp", "ep", "expt_tp", "pp")
    return dict(zip(names, groups_of(pg_collection, "conversion of weights", *names)))


def _cuts(name: str, parameter: Tensor, groups: dict[str, Any]) -> list[tuple[Any, int]]:
    """How a parameter is cut: process groups, outermost first, and the dim of each."""
    if ".experts." in name:
        dims = Experts.sharding()[name.rpartition(".")[2]]
        return [(groups["ep"], dims.ep_dim), (groups["expt_tp"], dims.etp_dim)]
    if name.endswith(DENSE_MERGED):
        return [(groups["tp"], 1)]
    if getattr(parameter, "tensor_model_parallel", False):
        return [(groups["tp"], parameter.partition_dim)]  # type: ignore[attr-defined]
    return []


def _by_halves(name: str, weight: Tensor) -> Tensor:
    """Gate and up of a dense MLP side by side: a tensor-parallel rank has a part of each."""
    return weight.unflatten(0, (2, -1)) if name.endswith(DENSE_MERGED) else weight


def _joined(name: str, weight: Tensor) -> Tensor:
    """Inverse of :func:`_by_halves`."""
    return weight.flatten(0, 1) if name.endswith(DENSE_MERGED) else weight


def _named_parameters(model: GPTModel) -> Iterator[tuple[str, Tensor]]:
    """Parameters and biases of experts by their names in a model with all layers in one stage."""
    start = "decoder.layers."
    biases = (pair for pair in model.named_buffers() if pair[0].endswith("gate.expert_bias"))
    for name, parameter in chain(model.named_parameters(), biases):
        if name.startswith(start):
            index, _, rest = name.removeprefix(start).partition(".")
            number = model.decoder.layers[int(index)].layer_number
            name = f"{start}{number - 1}.{rest}"
        yield name, parameter
