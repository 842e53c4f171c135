"""Megatron's GPTModel with one of the parts in its own layers, or all of them in hybrid ones."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from megatron.core.fusions.fused_bias_dropout import get_bias_dropout_add
from megatron.core.models.gpt import GPTModel
from megatron.core.tensor_parallel import ColumnParallelLinear, RowParallelLinear
from megatron.core.transformer.attention import SelfAttention, SelfAttentionSubmodules
from megatron.core.transformer.enums import AttnMaskType
from megatron.core.transformer.mlp import MLP, MLPSubmodules
from megatron.core.transformer.spec_utils import ModuleSpec
from megatron.core.transformer.transformer_block import TransformerBlockSubmodules
from megatron.core.transformer.transformer_layer import TransformerLayer, TransformerLayerSubmodules
from torch import Tensor

from lasp.layout import SequenceLayout
from lasp.megatron import ResidualNorm, lightning_attention_spec
from lasp.megatron_hybrid import HybridConfig, hybrid_block_spec
from moe_parallel.megatron import expert_parallel_moe_spec
from ring.megatron import RingCoreAttention
from tests.closeness import assert_equal_to_rounding
from tests.megatron.attention import parallel_config
from tests.megatron.cpu import initialize, summed
from tests.megatron.test_moe_parallel import OPTIONS
from tests.ranks import run_on_ranks

pytestmark = pytest.mark.megatron

VOCAB, ROWS, SEQUENCE = 24, 2, 16


def layer_spec(parts: tuple[str, ...]) -> ModuleSpec:
    """Megatron's TransformerLayer with our attention, our experts or both."""
    attention: Any = lightning_attention_spec()
    if "ring" in parts:
        attention = ModuleSpec(
            module=SelfAttention,
            submodules=SelfAttentionSubmodules(
                linear_qkv=ColumnParallelLinear,
                core_attention=RingCoreAttention,
                linear_proj=RowParallelLinear,
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
            mlp=expert_parallel_moe_spec() if "moe" in parts else mlp,
            mlp_bda=get_bias_dropout_add,
        ),
    )


def loss_and_gradients(sizes: dict[str, int], parts: tuple[str, ...]) -> list[Tensor]:
    groups = initialize(**sizes)
    # Drops would depend on the order of the tokens, which the ranks change.
    dropless = {"moe_expert_capacity_factor": None, "moe_aux_loss_coeff": 0.0}
    moe = OPTIONS | dropless if "moe" in parts else {}
    config = parallel_config(sizes, num_layers=2, linear_attention_freq=2, **moe)
    hybrid = "hybrid" in parts
    if hybrid:
        spec = hybrid_block_spec(config, "1:1", hybrid=HybridConfig.deepnorm(2, rotary_dim=4))
    else:
        spec = TransformerBlockSubmodules([layer_spec(parts)] * 2, layer_norm=ResidualNorm)
    torch.manual_seed(7)  # weights are drawn whole on the CPU and cut
    model = GPTModel(
        config,
        spec,
        vocab_size=VOCAB,
        max_sequence_length=SEQUENCE,
        position_embedding_type="rope" if "ring" in parts and not hybrid else "none",
        rotary_percent=0.5,
        share_embeddings_and_output_weights=False,
        pg_collection=groups,
    ).double()
    generator = torch.Generator().manual_seed(8)
    batch = torch.randint(VOCAB, (2, ROWS, SEQUENCE), generator=generator)
    layout = SequenceLayout((SEQUENCE,), groups.cp.size(), "zigzag")
    tokens, labels = layout.shard(batch, groups.cp.rank(), dim=2)
    positions = layout.position_ids(groups.cp.rank()).expand_as(tokens)
    losses = model(tokens, positions, None, labels=labels)
    losses.sum().backward()
    results = [summed(losses.detach().sum(), groups.cp)]
    for norm in (model.decoder.final_layernorm, model.decoder.layers[0].input_layernorm):
        grad = summed(norm.weight.grad, groups.cp)
        results.append(summed(grad, groups.tp))
    return results


@pytest.mark.parametrize(
    "parts", [("lightning",), ("ring",), ("moe", "lightning"), ("moe", "ring"), ("moe", "hybrid")]
)
def test_parts_alone_and_together(parts: tuple[str, ...]) -> None:
    sizes = {"tp": 2, "cp": 2} | ({"ep": 2, "etp": 2} if "moe" in parts else {})
    (expected,) = run_on_ranks(loss_and_gradients, 1, {}, parts)
    for result in run_on_ranks(loss_and_gradients, 4, sizes, parts):
        for actual, tensor in zip(result, expected, strict=True):
            # Megatron's embedding and cross entropy are float32 in places.
            assert_equal_to_rounding(actual, tensor, tolerance=64 * torch.finfo(torch.float32).eps)
