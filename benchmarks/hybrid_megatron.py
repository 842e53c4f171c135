"""The layer group of ``hybrid_train`` as Megatron's GPTModel: its layers are ours, the rest is not.

Embedding, projections, block, checkpoints and output layer are Megatron's, with our operators in
the layers that ``lasp.megatron.hybrid_block_spec`` makes. Groups are those of the plain model:
context and expert parallel over all ranks. The loss is ``lasp.megatron.fused_loss``
(``megatron``, from 0.18 on), or Megatron's own, which holds all logits (``megatron_logits``).
"""

from __future__ import annotations

import importlib
from collections.abc import Sequence
from functools import cache
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn

from benchmarks.harness import Machine
from lasp.hybrid import HybridConfig, HybridModel, HybridOutput, PackedBatch
from moe_parallel import SymmetricMemory

ACTIVATIONS = ("none", "full", "softmax_outputs", "attention_outputs")
FULL = {
    "recompute_granularity": "full",
    "recompute_method": "uniform",
    "recompute_num_layers": 1,
}


@cache
def obstacle(impl: str) -> str | None:
    """Why the model cannot be measured; None if it can."""
    try:
        from lasp.megatron import version
    except ImportError as error:  # Megatron, or what it needs
        return str(error)
    if impl == "megatron" and version.VERSION < (0, 18):
        had = ".".join(map(str, version.VERSION))
        return f"megatron needs megatron-core >= 0.18, got {had}: take megatron_logits"
    return None


def check(
    impls: Sequence[str], parts: Sequence[str], activations: Sequence[str], *, graph: bool
) -> None:
    """Raise ValueError for what Megatron's model cannot do, before anything is measured."""
    for impl in impls:
        if impl == "lasp":
            continue
        if (why := obstacle(impl)) is not None:
            raise ValueError(f"impls must be lasp here, got {impl!r}: {why}")
        if graph or set(parts) != {"forward_backward"} or not set(activations) <= set(ACTIVATIONS):
            raise ValueError(
                f"parts must be forward_backward, activations among {ACTIVATIONS} and graph False"
                f" with {impl}, got {tuple(parts)}, {tuple(activations)} and {graph}: measure lasp"
                " alone for these"
            )


def name_of(impl: str) -> str:
    """How rows call it."""
    core = importlib.import_module("megatron.core")
    loss = "fused loss" if impl == "megatron" else "all logits"
    return f"Megatron-Core {core.__version__}, {loss}"


class MegatronHybrid(nn.Module):
    """A GPTModel that is called as a :class:`lasp.hybrid.HybridModel` is.

    Args:
        plain: the model, of whose memory that of the experts is shared.
        machine: where, and in what.
        impl: ``megatron`` or ``megatron_logits``.
        activations: one of ``ACTIVATIONS``.
        memory: through which rows are copied to experts; None: they travel by all-to-all.
    """

    def __init__(
        self,
        plain: HybridModel,
        machine: Machine,
        impl: str,
        activations: str,
        memory: SymmetricMemory | None,
    ) -> None:
        super().__init__()
        from megatron.core.models.gpt import GPTModel

        from lasp.megatron import hybrid_block_spec, to_megatron

        config = plain.config
        full = activations == "full"
        megatrons = _config(config, machine, FULL if full else {})
        kept = "none" if full else activations
        spec = hybrid_block_spec(
            megatrons, config, pp_rank=0, symmetric_memory=memory, activations=kept
        )
        self.fused = impl == "megatron"
        self.gpt = GPTModel(
            megatrons,
            spec,
            vocab_size=config.vocab_size,
            max_sequence_length=0,  # of learned positions, which there are none of
            position_embedding_type="none",
            pg_collection=groups(),
        )
        heads = {name: getattr(config.attention, name) for name in ("num_heads", "num_kv_heads")}
        values = to_megatron(dict(plain.named_parameters()), **heads)
        for name, parameter in self.gpt.named_parameters():
            parameter.data = values.pop(name).detach().to(parameter.dtype)
        named = "reset_global_aux_loss_tracker"
        self.balances = [m for m in self.gpt.modules() if hasattr(m, named)]

    def forward(self, tokens: Tensor, batch: PackedBatch, *, labels: Tensor) -> HybridOutput:
        """The summed loss; that of the routers comes with the gradients alone."""
        from lasp.megatron import PackedSequence, fused_loss

        for balance in self.balances:  # as finalize_model_grads, once a step
            balance.reset_global_aux_loss_tracker()
        how: dict[str, Any] = {"packed_seq_params": PackedSequence.of(batch)}
        if self.fused:
            how["output_processor"] = fused_loss
        loss = self.gpt(tokens.unsqueeze(0), None, None, labels=labels.unsqueeze(0), **how)
        nothing = loss.new_zeros(())
        return HybridOutput(nothing, nothing, (), loss=loss.sum())


def _config(config: HybridConfig, machine: Machine, more: dict[str, Any]) -> Any:
    """The model in Megatron's words."""
    from megatron.core.transformer.transformer_config import TransformerConfig

    heads, moe, ranks = config.attention, config.moe, dist.get_world_size()
    assert moe is not None
    return TransformerConfig(
        num_layers=config.num_layers, hidden_size=config.hidden_size,
        num_attention_heads=heads.num_heads, num_query_groups=heads.num_kv_heads,
        kv_channels=heads.head_dim, layernorm_epsilon=config.norm_eps, normalization="RMSNorm",
        linear_attention_freq=[int(kind == "G") for kind in config.kinds],
        hidden_dropout=0.0, attention_dropout=0.0, add_bias_linear=False,
        gated_linear_unit=True, activation_func=F.silu,
        ffn_hidden_size=moe.ffn_size, moe_ffn_hidden_size=moe.ffn_size,
        num_moe_experts=moe.num_experts, moe_router_topk=moe.top_k,
        moe_router_load_balancing_type="global_aux_loss", moe_token_dispatcher_type="alltoall",
        moe_token_drop_policy="position",
        moe_aux_loss_coeff=moe.aux_loss_coefficient,
        context_parallel_size=ranks, expert_model_parallel_size=ranks,
        params_dtype=machine.dtype, bf16=machine.dtype == torch.bfloat16,
        perform_initialization=False, use_cpu_initialization=machine.device == "cpu",
        # These need Apex or TransformerEngine.
        gradient_accumulation_fusion=False, masked_softmax_fusion=False, **more,
    )  # fmt: skip


@cache
def groups() -> Any:
    """All ranks share tokens and experts, and nothing else is split."""
    from megatron.core import parallel_state
    from megatron.core.process_groups_config import ProcessGroupCollection

    from lasp.megatron.version import VERSION

    if VERSION < (0, 19) and not parallel_state.model_parallel_is_initialized():
        parallel_state.initialize_model_parallel()  # where its cross entropy looks for tp

    alone = [dist.new_group([rank]) for rank in range(dist.get_world_size())][dist.get_rank()]
    everyone = dict.fromkeys(("cp", "ep", "tp_cp", "tp_ep", "dp_cp", "tp_dp_cp"), dist.group.WORLD)
    nobody = dict.fromkeys(("tp", "pp", "dp", "expt_tp", "expt_dp"), alone)
    return ProcessGroupCollection(embd=None, **everyone, **nobody)
