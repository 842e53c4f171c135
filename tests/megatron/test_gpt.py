"""Megatron's GPTModel trains with each of the parts alone, each pair, and all three.

The rest is Megatron's: layers, projections, RoPE, MLP, DistributedDataParallel, schedule and Adam;
hybrid layers are ours in the last case alone.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
from megatron.core.distributed import (
    DistributedDataParallel,
    DistributedDataParallelConfig,
    finalize_model_grads,
)
from megatron.core.fusions.fused_bias_dropout import get_bias_dropout_add
from megatron.core.models.gpt import GPTModel
from megatron.core.optimizer import OptimizerConfig, get_megatron_optimizer
from megatron.core.pipeline_parallel import get_forward_backward_func
from megatron.core.tensor_parallel import ColumnParallelLinear, RowParallelLinear
from megatron.core.transformer.attention import SelfAttention, SelfAttentionSubmodules
from megatron.core.transformer.dot_product_attention import DotProductAttention
from megatron.core.transformer.enums import AttnMaskType
from megatron.core.transformer.mlp import MLP, MLPSubmodules
from megatron.core.transformer.spec_utils import ModuleSpec
from megatron.core.transformer.transformer_block import TransformerBlockSubmodules
from megatron.core.transformer.transformer_layer import TransformerLayer, TransformerLayerSubmodules
from torch import Tensor

from lasp.megatron import ResidualNorm, hybrid_block_spec, hybrid_of, lightning_attention_spec
from lasp.sequence.layout import SequenceLayout
from moe_parallel.megatron import expert_parallel_moe_spec
from ring.megatron import RingCoreAttention
from tests.megatron.attention import parallel_config
from tests.megatron.block import HYBRID
from tests.megatron.cpu import initialize, summed, train_on_cpu
from tests.megatron.test_moe_parallel import OPTIONS
from tests.ranks import run_on_ranks

pytestmark = pytest.mark.megatron

VOCAB, ROWS, SEQUENCE, STEPS = 24, 2, 16, 4
# Drops would depend on the order of the tokens, which the ranks change.
EXPERTS = OPTIONS | {"moe_expert_capacity_factor": None}


def layer_spec(mixer: str, *, experts: bool = False) -> ModuleSpec:
    """Megatron's TransformerLayer with "lightning", "ring" or "megatron" attention."""
    attention: Any = lightning_attention_spec()
    if mixer != "lightning":
        core = RingCoreAttention if mixer == "ring" else DotProductAttention
        attention = ModuleSpec(
            module=SelfAttention,
            submodules=SelfAttentionSubmodules(
                linear_qkv=ColumnParallelLinear, core_attention=core, linear_proj=RowParallelLinear
            ),
            params={"attn_mask_type": AttnMaskType.causal},
        )
    linears = MLPSubmodules(linear_fc1=ColumnParallelLinear, linear_fc2=RowParallelLinear)
    mlp = ModuleSpec(module=MLP, submodules=linears)
    return ModuleSpec(
        module=TransformerLayer,
        submodules=TransformerLayerSubmodules(
            input_layernorm=ResidualNorm,
            self_attention=attention,
            self_attn_bda=get_bias_dropout_add,
            pre_mlp_layernorm=ResidualNorm,
            mlp=expert_parallel_moe_spec() if experts else mlp,
            mlp_bda=get_bias_dropout_add,
        ),
    )


def build(
    sizes: dict[str, int],
    parts: tuple[str, ...],
    groups: Any,
    wrapper: DistributedDataParallelConfig | None = None,
    **options: Any,
) -> DistributedDataParallel:
    """Two layers; of lightning and ring one each."""
    experts, hybrid = "moe" in parts, "hybrid" in parts
    config = parallel_config(
        sizes,
        num_layers=2,
        linear_attention_freq=2,
        calculate_per_token_loss=True,
        finalize_model_grads_func=finalize_model_grads,
        **((EXPERTS if experts else {}) | options),
    )
    if hybrid:
        spec = hybrid_block_spec(config, hybrid_of(config, HYBRID))
    else:
        mixers = [part for part in parts if part != "moe"] or ["megatron"]
        layers = [layer_spec(mixers[number % len(mixers)], experts=experts) for number in (0, 1)]
        spec = TransformerBlockSubmodules(layers, layer_norm=ResidualNorm)
    torch.manual_seed(7)  # weights are drawn whole on the CPU and cut
    model = GPTModel(
        config,
        spec,
        vocab_size=VOCAB,
        max_sequence_length=SEQUENCE,
        position_embedding_type="none" if hybrid or parts == ("lightning",) else "rope",
        rotary_percent=0.5,
        share_embeddings_and_output_weights=False,
        pg_collection=groups,
    ).double()
    return DistributedDataParallel(config, wrapper or DistributedDataParallelConfig(), model)


def forward_step(batches: Any, model: Any) -> tuple[Tensor, Any]:
    tokens, positions, labels = next(batches)
    losses = model(tokens, positions, None, labels=labels)
    count = torch.tensor(losses.numel(), dtype=torch.int)
    return losses, lambda losses: (losses.sum(), count, losses.detach().sum())


def curve_on_rank(sizes: dict[str, int], parts: tuple[str, ...]) -> list[list[float]]:
    """Loss and gradient norm of every step, on the same rows: this replica's of them."""
    groups = initialize(**sizes)
    generator = torch.Generator().manual_seed(8)
    batch = torch.randint(VOCAB, (2, ROWS, SEQUENCE), generator=generator)
    batch = batch.chunk(groups.dp.size(), dim=1)[groups.dp.rank()]
    layout = SequenceLayout((SEQUENCE,), groups.cp.size(), "zigzag")
    tokens, labels = layout.shard(batch, groups.cp.rank(), dim=2)
    positions = layout.position_ids(groups.cp.rank()).expand_as(tokens)
    curve = []
    with train_on_cpu():
        model = build(sizes, parts, groups)
        config = OptimizerConfig(optimizer="adam", lr=0.02, params_dtype=torch.float64)
        optimizer = get_megatron_optimizer(config, [model])
        model.config.grad_scale_func = optimizer.scale_loss
        for _ in range(STEPS):
            model.zero_grad_buffer()
            optimizer.zero_grad()
            (loss,) = get_forward_backward_func()(
                forward_step_func=forward_step,
                data_iterator=iter([(tokens, positions, labels)]),
                model=[model],
                num_microbatches=1,
                seq_length=SEQUENCE,
                micro_batch_size=len(tokens),
                forward_only=False,
            )
            _, grad_norm, _ = optimizer.step()
            curve.append([summed(loss, groups.dp_cp).item(), grad_norm])
    return curve


MIXED = {"tp": 2, "cp": 2}
EXPERT = {"ep": 2, "etp": 2}


@pytest.mark.parametrize(
    ("parts", "sizes"),
    [
        (("lightning",), MIXED),
        (("ring",), MIXED),
        (("moe",), {"tp": 2, **EXPERT}),  # Megatron's attention has no cp here: dp is 2
        (("lightning", "ring"), MIXED),
        (("lightning", "moe"), MIXED | EXPERT),
        (("ring", "moe"), MIXED | EXPERT),
        (("hybrid", "moe"), MIXED | EXPERT),
    ],
    ids=lambda value: "-".join(value),
)
def test_parts_train_alone_and_together(parts: tuple[str, ...], sizes: dict[str, int]) -> None:
    (expected,) = run_on_ranks(curve_on_rank, 1, {}, parts)
    losses = [loss for loss, _ in expected]
    assert losses == sorted(losses, reverse=True)
    for curve in run_on_ranks(curve_on_rank, 4, sizes, parts):
        for actual, numbers in zip(curve, expected, strict=True):
            assert actual == pytest.approx(numbers, rel=1e-9)
