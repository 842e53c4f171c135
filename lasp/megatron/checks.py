"""What every Megatron part asks of its config and its process groups."""

from __future__ import annotations

import sys
from typing import Any

import torch
from megatron.core import parallel_state
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.transformer.transformer_config import TransformerConfig

from lasp._core.checks import check_part

# What none of our parts has, by the value that leaves it out.
_NOWHERE: dict[str, object] = {
    "batch_invariant_mode": False,
    "cpu_offloading": False,
    "cuda_graph_impl": "none",
    "expert_gtp_weight_remat_size": 1,  # cuts weights over ranks that hold other tokens
    "fp4": None,
    "fp8": None,
    "gtp_weight_remat_size": 1,
    "hierarchical_context_parallel_sizes": None,
    "hybrid_context_parallel": False,  # every pack would bring a group of its own
    "init_model_with_meta_device": False,
    "quant_recipe": None,
    "tp_comm_overlap": False,
    "use_kitchen": False,
    "use_mup": False,
    "use_transformer_engine_op_fuser": False,
}


def require(config: TransformerConfig, part: str, **wanted: object) -> None:
    """Raise ValueError for the first option of ``config`` that is set and differs from ``wanted``.

    Options that no part of ours has are checked too; those that this Megatron version does not
    have are not.
    """
    check_part("config", config, TransformerConfig)
    for name, value in (_NOWHERE | wanted).items():
        actual = getattr(config, name, value)
        if actual != value and (actual or value):
            raise ValueError(
                f"config.{name} must be {value!r} for {part}, got {actual!r}: set {value!r}, or use"
                " a module of Megatron's that has it"
            )


def training_argument(name: str) -> Any:
    """An argument of Megatron's training loop, if that runs and has it; else None.

    Some options never reach a config: layers of a model that upstream's entry points build can see
    them nowhere else.
    """
    training = sys.modules.get("megatron.training.global_vars")
    return getattr(getattr(training, "_GLOBAL_ARGS", None), name, None)


_WHY_NONE = {
    "attention_bias": "there is no additive bias",
    "context": "there is no cross attention",
    "inference_context": "it only trains; build the model of inference from Megatron's own modules",
    "inference_params": "it only trains; build the model of inference from Megatron's own modules",
    "intermediate_tensors": "CUDA graphs are not supported",
    "key_value_states": "there is no cross attention",
    "padding_mask": "padding is what the token_order of a PackedSequence leaves out",
    "rotary_pos_emb": "it rotates by itself; build the model with position_embedding_type='none'"
    " and give rotary_dim to the spec",
}


def refuse_arguments(part: str, **arguments: object) -> None:
    """Raise ValueError for an argument of ``part``'s forward that has no meaning here, unless None.

    Args:
        part: as errors name it.
        arguments: what Megatron passes beside what the part reads.
    """
    for name, value in arguments.items():
        if value is not None and name in _WHY_NONE:
            raise ValueError(
                f"{name} must be None for {part}, got {type(value).__name__}: {_WHY_NONE[name]}"
            )


def groups_of(pg_collection: ProcessGroupCollection | None, part: str, *names: str) -> list[Any]:
    """Process groups by name; from Megatron's parallel state if no collection is given.

    Raises:
        ValueError: if a group is missing.
    """
    if pg_collection is None:
        if not parallel_state.model_parallel_is_initialized():
            raise ValueError(
                f"pg_collection must be given for {part}, got None: pass a ProcessGroupCollection"
                " or call parallel_state.initialize_model_parallel first"
            )
        pg_collection = ProcessGroupCollection.use_mpu_process_groups(required_pgs=list(names))
    groups = [getattr(pg_collection, name, None) for name in names]
    missing = [name for name, group in zip(names, groups) if group is None]
    if missing:
        raise ValueError(
            f"pg_collection must have {list(names)} for {part}, got none for {missing}: set these"
            " groups"
        )
    return groups


def parameter_device(config: TransformerConfig) -> torch.device:
    """Where Megatron puts a module's parameters."""
    if config.use_cpu_initialization:
        return torch.device("cpu")
    return torch.device("cuda", torch.cuda.current_device())


def check_heads(heads: int, tp_size: int) -> None:
    """Raise ValueError unless the heads of a layer divide over the tensor-parallel ranks."""
    if heads % tp_size:
        raise ValueError(
            f"num_attention_heads must divide over {tp_size} tensor-parallel ranks, got {heads}:"
            " choose another tensor_model_parallel_size"
        )
