"""Every plain module that owns parameters is called wherever they are used, so that hooks fire."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from lasp import LightningAttention
from lasp.hybrid import HybridModel, pack_batch
from lasp.hybrid.config import AttentionConfig, HybridConfig
from moe_parallel import ExpertParallelMoE, MoEConfig, TokenOrder
from moe_parallel.experts.experts import Experts
from moe_parallel.pipeline.pipeline import local_pipeline
from ring import RingAttention
from tests.hooks import calls_of_owners

HIDDEN, TOKENS = 8, 12
X = torch.ones(TOKENS, HIDDEN)
MOE = MoEConfig(HIDDEN, 6, 4, 2, capacity_factor=1.0)
PADDED = MoEConfig(HIDDEN, 6, 4, 2, capacity_factor=1.0, pad_to_capacity=True)


def lightning_step(layer: LightningAttention) -> Tensor:
    return layer.step(X.view(1, TOKENS, HIDDEN), torch.zeros(1, 2, 4, 4)).output


CASES: dict[str, tuple[Callable[[], nn.Module], Callable[[nn.Module], Tensor]]] = {
    "lightning": (lambda: LightningAttention(HIDDEN, 2, 4, 0, 2), lambda layer: layer(X)),
    "lightning prefill": (
        lambda: LightningAttention(HIDDEN, 2, 4, 0, 2),
        lambda layer: layer.prefill(X).output,
    ),
    "lightning step": (lambda: LightningAttention(HIDDEN, 2, 4, 0, 2), lightning_step),
    "ring": (
        lambda: RingAttention(HIDDEN, 2, 1, 4, rotary_dim=2),
        lambda layer: layer(X),
    ),
    "experts alone": (
        lambda: Experts(HIDDEN, 6, 2),
        lambda experts: experts(X, local_pipeline((TOKENS, 0)), num_rows=TOKENS),
    ),
    "moe": (lambda: ExpertParallelMoE(MOE), lambda layer: layer(X).output),
    "moe padded": (
        lambda: ExpertParallelMoE(PADDED),
        lambda layer: layer(X, token_order=TokenOrder.contiguous([TOKENS])).output,
    ),
    "moe in evaluation": (
        lambda: ExpertParallelMoE(MOE).eval(),
        lambda layer: layer(X).output,
    ),
}


@pytest.mark.parametrize("name", CASES)
def test_owners_of_parameters_are_called(name: str) -> None:
    build, run = CASES[name]
    module = build()
    with calls_of_owners(module) as calls:
        output = run(module)
    assert set(calls.values()) == {1}, calls
    assert output.shape[-1] == HIDDEN


def test_owners_in_the_hybrid_model_are_called_again_when_recomputed() -> None:
    attention = AttentionConfig(2, 1, 4, 2)
    model = HybridModel(HybridConfig(2, 16, attention, MOE, pattern="1:1"))
    tokens = torch.arange(TOKENS)
    batch = pack_batch([(5, 7)], dp_rank=0, num_ranks=1, order="contiguous")
    with calls_of_owners(model) as calls:
        model(tokens, batch).logits.sum().backward()
    assert set(calls.values()) == {1}, calls

    hidden = model.embedding(tokens)
    with calls_of_owners(model.layers) as calls:
        for layer in model.decoder_layers():
            hidden = checkpoint(layer, hidden, batch, use_reentrant=False).hidden
        hidden.sum().backward()
    assert set(calls.values()) == {2}, calls
