"""Megatron's GPTModel with hybrid layers, its optimizer and its checkpoints."""

from __future__ import annotations

import inspect
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from hybrid_training.model import small_hybrid
from megatron.core import dist_checkpointing, parallel_state
from megatron.core.distributed import (
    DistributedDataParallel,
    DistributedDataParallelConfig,
    finalize_model_grads,
)
from megatron.core.models.gpt import GPTModel
from megatron.core.optimizer import OptimizerConfig, get_megatron_optimizer
from megatron.core.optimizer_param_scheduler import OptimizerParamScheduler
from megatron.core.transformer.transformer_config import TransformerConfig

from lasp.hybrid import HybridConfig, HybridModel
from lasp.megatron import hybrid_block_spec, load_plain_weights

if TYPE_CHECKING:
    from pretrain_hybrid import Options

# One state of the optimizer for every parallel layout.
METADATA = {
    "distrib_optim_sharding_type": "fully_reshardable",
    "chained_optim_avoid_prefix": True,
}


def megatron_config(options: Options, model: HybridConfig) -> TransformerConfig:
    """The model in Megatron's words, and how it is split."""
    dtype = getattr(torch, options.dtype)
    selective = options.recompute == "selective"
    return TransformerConfig(
        num_layers=model.num_layers,
        hidden_size=model.moe.hidden_size,
        num_attention_heads=model.attention.num_heads,
        num_query_groups=model.attention.num_kv_heads,
        kv_channels=model.attention.head_dim,
        linear_attention_freq=[int(kind == "G") for kind in model.kinds],
        normalization="RMSNorm",
        layernorm_epsilon=model.norm_eps,
        gated_linear_unit=True,
        activation_func=F.silu,
        add_bias_linear=False,
        hidden_dropout=0.0,
        attention_dropout=0.0,
        ffn_hidden_size=model.moe.ffn_size,
        moe_ffn_hidden_size=model.moe.ffn_size,
        num_moe_experts=model.moe.num_experts,
        moe_router_topk=model.moe.top_k,
        moe_expert_capacity_factor=model.moe.capacity_factor,
        moe_token_drop_policy="position",
        moe_token_dispatcher_type="alltoall",
        moe_router_load_balancing_type="global_aux_loss",
        moe_aux_loss_coeff=model.moe.aux_loss_coefficient,
        tensor_model_parallel_size=options.tp,
        sequence_parallel=options.tp > 1,
        context_parallel_size=options.cp,
        pipeline_model_parallel_size=options.pp,
        virtual_pipeline_model_parallel_size=options.vpp,
        expert_model_parallel_size=options.ep,
        expert_tensor_parallel_size=options.etp,
        recompute_granularity=None if options.recompute == "none" else options.recompute,
        recompute_modules=["core_attn", "moe"] if selective else None,
        recompute_method="uniform" if options.recompute == "full" else None,
        recompute_num_layers=1 if options.recompute == "full" else None,
        params_dtype=dtype,
        pipeline_dtype=dtype,
        bf16=dtype == torch.bfloat16,
        # Drawn on the host and replaced by build_model, which is the same for every split.
        use_cpu_initialization=True,
        # These need Apex or TransformerEngine.
        gradient_accumulation_fusion=False,
        masked_softmax_fusion=False,
        # Packs have unlike numbers of targets: sum the loss, divide by all targets at the end.
        calculate_per_token_loss=True,
        finalize_model_grads_func=finalize_model_grads,
    )


def build_model(options: Options, device: torch.device) -> list[DistributedDataParallel]:
    """The (virtual) stages of this rank.

    Every rank draws the whole plain model on its host and takes its part: small models only.
    """
    model = small_hybrid(options.capacity_factor)
    config = megatron_config(options, model)
    plain = HybridModel(model)
    plain.reset_parameters(options.seed)
    weights = dict(plain.named_parameters())
    ddp_config = DistributedDataParallelConfig(
        use_distributed_optimizer=options.distributed_optimizer, grad_reduce_in_fp32=config.bf16
    )
    chunks = []
    for number in range(options.vpp or 1):
        vp_stage = number if options.vpp else None
        stage = GPTModel(
            config,
            hybrid_block_spec(config, model, vp_stage),
            vocab_size=model.vocab_size,
            max_sequence_length=0,  # of learned positions, which there are none of
            pre_process=parallel_state.is_pipeline_first_stage(
                ignore_virtual=False, vp_stage=vp_stage
            ),
            post_process=parallel_state.is_pipeline_last_stage(
                ignore_virtual=False, vp_stage=vp_stage
            ),
            position_embedding_type="none",
            share_embeddings_and_output_weights=False,
            vp_stage=vp_stage,
        )
        load_plain_weights(stage, weights)
        stage.to(device)
        chunks.append(DistributedDataParallel(config, ddp_config, stage))
    return chunks


def build_optimizer(
    options: Options, chunks: list[DistributedDataParallel]
) -> tuple[Any, OptimizerParamScheduler]:
    """Megatron's Adam, and its schedule: linear warm-up, then a cosine down to a tenth."""
    config = chunks[0].config
    optimizer = get_megatron_optimizer(
        OptimizerConfig(
            optimizer="adam",
            lr=options.learning_rate,
            min_lr=options.learning_rate / 10,
            weight_decay=0.1,
            adam_beta1=0.9,
            adam_beta2=0.95,
            clip_grad=1.0,
            bf16=config.bf16,
            params_dtype=config.params_dtype,
            use_distributed_optimizer=options.distributed_optimizer,
        ),
        chunks,
    )
    scheduler = OptimizerParamScheduler(
        optimizer,
        init_lr=0.0,
        max_lr=options.learning_rate,
        min_lr=options.learning_rate / 10,
        lr_warmup_steps=min(20, options.steps // 2),
        lr_decay_steps=options.steps,
        lr_decay_style="cosine",
        start_wd=0.1,
        end_wd=0.1,
        wd_incr_steps=options.steps,
        wd_incr_style="constant",
    )
    config.grad_scale_func = optimizer.scale_loss
    return optimizer, scheduler


def newest_step(folder: Path) -> int | None:
    """Step of the newest complete checkpoint."""
    done = [int(path.parent.name[5:]) for path in folder.glob("step-*/metadata.json")]
    return max(done, default=None)


def save(folder: Path, step: int, chunks: list[DistributedDataParallel], optimizer: Any) -> None:
    """Write ``<folder>/step-<step>``; a collective call of all ranks."""
    path = folder / f"step-{step}"
    if dist.get_rank() == 0:
        path.mkdir(parents=True, exist_ok=True)
    dist.barrier()
    options = {}
    if "async_strategy" in inspect.signature(dist_checkpointing.save).parameters:
        options["async_strategy"] = "mcore"  # from 0.17 another package by default
    dist_checkpointing.save(_state(chunks, optimizer, is_loading=False), str(path), **options)


def load(
    folder: Path,
    step: int,
    chunks: list[DistributedDataParallel],
    optimizer: Any,
    scheduler: OptimizerParamScheduler,
) -> None:
    """Read ``<folder>/step-<step>``, whatever parallel layout wrote it."""
    _set_adam_step(optimizer, step)
    state = dist_checkpointing.load(
        _state(chunks, optimizer, is_loading=True), str(folder / f"step-{step}")
    )
    for number, chunk in enumerate(chunks):
        chunk.module.load_state_dict(state[f"model{number}"])
    for number, part in enumerate(optimizer.chained_optimizers):  # of the dense, of the experts
        of_part = state["optimizer"][number]
        of_parameters = of_part.pop("param_state", None)
        part.load_state_dict(of_part)
        if of_parameters is not None:  # of the distributed optimizer; no step among them
            for of_parameter in part.optimizer.state.values():
                of_parameter.pop("step", None)
            part.load_parameter_state_from_fully_reshardable(of_parameters)
    _set_adam_step(optimizer, step)
    scheduler.step(increment=step)


def _set_adam_step(optimizer: Any, step: int) -> None:
    """Give torch's Adam, used without Apex and TransformerEngine, what Megatron expects of theirs.

    Its distributed optimizer asks for moments before there are any, reads no step counters, and
    shares one among all parameters, each of which would then advance it.
    """
    for part in optimizer.chained_optimizers:
        if isinstance(part.optimizer, torch.optim.AdamW):
            for parameter in (p for group in part.param_groups for p in group["params"]):
                state = part.optimizer.state[parameter]
                for moment in ("exp_avg", "exp_avg_sq"):
                    state.setdefault(moment, torch.zeros_like(parameter))
                state["step"] = torch.tensor(float(step))


def _state(
    chunks: list[DistributedDataParallel], optimizer: Any, *, is_loading: bool
) -> dict[str, Any]:
    model = {
        f"model{number}": chunk.module.sharded_state_dict(metadata=dict(METADATA))
        for number, chunk in enumerate(chunks)
    }
    of_optimizer = optimizer.sharded_state_dict(model, is_loading, metadata=dict(METADATA))
    return {**model, "optimizer": of_optimizer}
