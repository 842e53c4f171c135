"""Multi-token prediction in Megatron's GPTModel is lasp.hybrid.HybridModel's."""

from __future__ import annotations

import inspect
from dataclasses import replace
from functools import partial
from typing import Any

import pytest
import torch
from megatron.core.models.gpt import GPTModel
from megatron.core.transformer import multi_token_prediction
from megatron.core.transformer.moe.moe_utils import MoEAuxLossAutoScaler
from megatron.core.transformer.multi_token_prediction import MTPLossAutoScaler
from megatron.core.transformer.spec_utils import build_module
from torch import Tensor
from torch.nn import functional as F

from lasp.hybrid import HybridConfig, HybridModel, next_in_document, next_token_loss, pack_batch
from lasp.megatron import (
    PackedSequence,
    hybrid_block_spec,
    hybrid_mtp_spec,
    load_plain_weights,
    plain_weights,
)
from lasp.megatron.multi_token import INNER
from lasp.sequence.layout import SequenceLayout
from tests.closeness import assert_equal_to_rounding
from tests.megatron.attention import HIDDEN, parallel_config
from tests.megatron.block import MODELS, OPTIONS
from tests.megatron.cpu import initialize, summed, train_on_cpu
from tests.ranks import refusal, run_on_ranks

pytestmark = pytest.mark.megatron

VOCAB, WEIGHT = 24, 0.3
LENGTHS = (16, 4, 20)  # Megatron rolls documents that divide by twice the ranks
MTP = {
    "mtp_num_layers": 1,
    "mtp_loss_scaling_factor": WEIGHT,
    "calculate_per_token_loss": True,  # else a rank divides by its own tokens
}


def described(model: str) -> tuple[HybridConfig, dict[str, Any]]:
    options = OPTIONS | MODELS[model] | MTP
    hybrid = replace(options.pop("hybrid"), vocab_size=VOCAB, mtp_loss_weight=WEIGHT)
    return hybrid, options


def data() -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(8)
    tokens, labels = torch.randint(VOCAB, (2, sum(LENGTHS)), generator=generator)
    return tokens, labels


def plain_model(hybrid: HybridConfig) -> HybridModel:
    model = HybridModel(hybrid, dtype=torch.float64)
    model.reset_parameters(0)
    return model


# Newer versions weigh the tokens of a rank so that those without one after the next do not count.
WEIGHED = "original_num_tokens" in inspect.getsource(multi_token_prediction)


def plain_results(hybrid: HybridConfig, cp: int) -> dict[str, Tensor]:
    """The sum of the losses of next tokens, and gradients of all losses."""
    model, (tokens, labels) = plain_model(hybrid), data()
    batch = pack_batch([LENGTHS], dp_rank=0, num_ranks=1, order="contiguous")
    following = partial(next_in_document, layout=batch.layout)
    output = model(tokens, batch, next_tokens=following(tokens, pad_value=0))
    loss = next_token_loss(output.logits, labels, 1)
    after = following(labels, pad_value=-100)
    of_tokens = F.cross_entropy(output.mtp_logits, after, reduction="none")
    if WEIGHED:
        layout = SequenceLayout(LENGTHS, cp, "document_zigzag")
        counted = [layout.shard(after != -100, rank) for rank in range(cp)]
        of_tokens = of_tokens * layout.unshard(
            [x * (torch.tensor(len(x)) / x.sum()) for x in counted]
        )
    (loss + WEIGHT * of_tokens.sum() + len(tokens) * output.aux_loss).backward()
    return {"loss": loss.detach(), **{name: p.grad for name, p in model.named_parameters()}}


def results_on_rank(model: str, sizes: dict[str, int]) -> dict[str, Tensor]:
    """The same in Megatron; gradients summed over replicas as DDP sums them."""
    hybrid, options = described(model)
    groups = initialize(**sizes)
    config = parallel_config(sizes, **options)
    cp = groups.cp.size()
    with train_on_cpu():
        gpt = GPTModel(
            config,
            hybrid_block_spec(config, hybrid),
            vocab_size=VOCAB,
            max_sequence_length=sum(LENGTHS),
            position_embedding_type="none",
            share_embeddings_and_output_weights=False,
            pg_collection=groups,
            mtp_block_spec=hybrid_mtp_spec(config, hybrid),
        ).double()
        load_plain_weights(gpt, dict(plain_model(hybrid).state_dict()))
        order = "document_zigzag" if cp > 1 else "contiguous"
        batch = pack_batch(
            [LENGTHS], dp_rank=0, num_ranks=cp, tp_size=groups.tp.size(), order=order
        )
        packed = PackedSequence.of(batch)
        tokens, labels = (packed.layout.shard(x, groups.cp.rank())[None] for x in data())
        positions = packed.layout.position_ids(groups.cp.rank())[None]
        for scaler in (MoEAuxLossAutoScaler, MTPLossAutoScaler):
            scaler.set_loss_scale(torch.ones(1, dtype=torch.float64))
        losses = gpt(tokens, positions, None, labels=labels, packed_seq_params=packed)
        loss = losses.sum()
        loss.backward()
        for name, parameter in gpt.named_parameters():
            of_expert = ".experts.w" in name
            grad = summed(parameter.grad, groups.expt_dp if of_expert else groups.dp_cp)
            if getattr(parameter, "sequence_parallel", False):
                grad = summed(grad, groups.tp)
            parameter.data.copy_(grad)
        return {"loss": summed(loss.detach(), groups.cp), **plain_weights([gpt])}


@pytest.mark.parametrize(
    ("model", "num_ranks", "sizes"),
    [
        ("ling", 1, {}),
        ("ling", 2, {"tp": 2, "ep": 2}),
        ("sala", 2, {"cp": 2}),
        pytest.param("ring", 4, {"tp": 2, "cp": 2, "ep": 2, "etp": 2}, marks=pytest.mark.slow),
    ],
)
def test_losses_and_gradients_are_the_plain_models(model: str, num_ranks: int, sizes) -> None:
    expected = plain_results(described(model)[0], sizes.get("cp", 1))
    for result in run_on_ranks(results_on_rank, num_ranks, model, sizes):
        left = {name for name in result if name.endswith("expert_bias")}
        assert result.keys() - left == expected.keys()
        for name, tensor in expected.items():
            assert_equal_to_rounding(result[name], tensor, what=name)


def call(order: str, lengths: tuple[int, ...], padded: tuple[int, ...] | None) -> None:
    groups = initialize(cp=2)
    hybrid, options = described("sala")
    config = parallel_config({"cp": 2}, **options)
    (prediction,) = hybrid_mtp_spec(config, hybrid).layer_specs
    attention = getattr(prediction.submodules, INNER).submodules.self_attention
    module = build_module(attention, config=config, layer_number=1, pg_collection=groups)
    packed = PackedSequence(layout=SequenceLayout(lengths, 2, order, padded))
    hidden = torch.zeros(packed.layout.num_local_tokens, 1, HIDDEN, dtype=torch.float64)
    module(hidden, packed_seq_params=packed)


@pytest.mark.parametrize(
    ("order", "lengths", "padded"),
    [
        ("zigzag", LENGTHS, None),
        ("contiguous", LENGTHS, None),
        ("document_zigzag", (15, 4, 20), (16, 4, 20)),
    ],
)
def test_other_cuts_than_megatrons_are_refused(order: str, lengths, padded) -> None:
    for message in run_on_ranks(refusal, 2, call, order, lengths, padded):
        assert message.startswith("layout must be document_zigzag over context-parallel ranks")
