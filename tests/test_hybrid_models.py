"""Other models than MiniMax's in small, and embeddings in place of tokens."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor

from lasp.hybrid import (
    AttentionConfig,
    DenseConfig,
    HybridModel,
    LatentConfig,
    Residuals,
    ResidualScale,
    RopeScaling,
    VocabularyConfig,
    pack_batch,
)
from lasp.layers.options import LightningOptions
from lasp.sequence.layout import SequenceLayout
from moe_parallel import ExpertTopology, MoEConfig, RouterConfig
from tests.closeness import assert_equal_to_rounding
from tests.hybrid_reference import reference_logits
from tests.ranks import run_on_ranks
from tests.test_hybrid import (
    PACKED,
    SPLITS,
    assemble,
    check_oracle,
    config,
    groups_of,
    loss_and_gradients,
    one_rank,
    packs_of_replicas,
)
from tests.test_training import (
    ETP,
    ONE,
    Run,
    assert_same,
    check_checkpoint,
    trained_on_rank,
)

# In small: Ling-2.5 and Ring-linear-2.0 (the first layer is dense), and MiniCPM-SALA (all are).
_YARN = RopeScaling("yarn", 4.0, 40, beta_fast=8.0, mscale=1.0, mscale_all_dim=0.7)
LING = {
    "pattern": "1:1",
    "num_layers": 3,
    "attention": AttentionConfig(
        4,
        4,
        6,
        4,
        600.0,
        latent=LatentConfig(5, 3, 4, 7, q_lora_rank=8, rope_interleaved=True),
        rope_scaling=_YARN,
    ),
    "dense": DenseConfig(10, 12, 1),
    "moe": MoEConfig(
        10,
        8,
        num_experts=8,
        top_k=4,
        capacity_factor=1.0,
        aux_loss_coefficient=0.1,
        router=RouterConfig("sigmoid", scaling=2.5, expert_bias=True, num_groups=4, top_groups=2),
        shared_ffn_size=6,
    ),
    "lightning": LightningOptions("none", True, 4, 600.0, None, 2, rope_scaling=_YARN),
    "residuals": Residuals(),
    "decay": "bailing",
    "num_decay_layers": 9,
    "mtp_loss_weight": 0.3,
}
RING = LING | {
    "mtp_loss_weight": None,
    "attention": AttentionConfig(4, 2, 6, rotary_dim=4, qk_norm=True),
}
_DEPTH = ResidualScale(beta=1.4 / 4**0.5)
SALA = {
    "pattern": "*GG*",
    "num_layers": 4,
    "moe": None,
    "dense": DenseConfig(10, 12),
    "attention": AttentionConfig(4, 2, 6, rotary_dim=0, gated=True),
    "lightning": LightningOptions(
        "none", True, 6, scale=None, rope_scaling=RopeScaling("linear", 8.0)
    ),
    "vocabulary": VocabularyConfig(True, True, embedding_scale=12.0, logit_scale=0.25),
    "residuals": Residuals("pre", _DEPTH, _DEPTH, _DEPTH),
    "decay": "sala",
    "mtp_loss_weight": 0.1,
}


@pytest.mark.parametrize("model", [LING, RING, SALA], ids=["ling", "ring", "sala"])
def test_one_rank_is_the_oracle(model: dict[str, Any]) -> None:
    check_oracle(PACKED, model)


@pytest.mark.parametrize(
    ("model", "num_ranks", "sizes", "order"),
    [
        (LING, 4, {"cp": 2, "ep": 2, "etp": 2}, "zigzag"),
        (SALA, 2, {"cp": 2}, "fold"),
        (RING, 2, {"ep": 2}, "contiguous"),
        *(
            pytest.param(model, num_ranks, sizes, order, marks=pytest.mark.slow)
            for model in (LING, RING, SALA)
            for num_ranks, sizes, order in SPLITS[:8]
        ),
    ],
)
def test_other_models_are_one_function_too(model, num_ranks, sizes, order) -> None:
    expected = one_rank(**model)
    actual = assemble(run_on_ranks(loss_and_gradients, num_ranks, sizes, order, **model))
    assert actual.keys() == expected.keys()
    for name, tensor in expected.items():
        assert_equal_to_rounding(actual[name], tensor, what=name)


@pytest.mark.gpu
@pytest.mark.parametrize("model", [LING, RING, SALA], ids=["ling", "ring", "sala"])
def test_a_gpu_agrees_with_a_cpu(model: dict[str, Any]) -> None:
    expected, where = one_rank(**model), {"device": "cuda", "backend": "nccl"}
    actual = assemble(run_on_ranks(loss_and_gradients, 1, {}, "contiguous", **where, **model))
    for name, tensor in expected.items():
        assert_equal_to_rounding(actual[name], tensor, what=name)


@pytest.mark.parametrize("model", [RING, SALA], ids=["ring", "sala"])
def test_wrapped_models_train_as_one_rank_does(model: dict[str, Any]) -> None:
    """Shared experts and dense layers are replicated; a tied head has one weight."""
    chosen = replace(config(), **model)
    (expected,) = run_on_ranks(trained_on_rank, 1, {}, ["plain"], "cpu", chosen)[0]
    hows = ["ddp+recompute", "fsdp"]
    for of_rank in run_on_ranks(trained_on_rank, 2, {"ep": 2}, hows, "cpu", chosen):
        for how, actual in zip(hows, of_rank, strict=True):
            assert_same(actual, expected, how)


@pytest.mark.parametrize(
    ("model", "save", "loads"),
    [
        (LING, (4, {"ep": 2, "etp": 2}, "plain+dtensors"), [ONE, (2, {"ep": 2}, "fsdp")]),
        (SALA, (2, {}, "fsdp"), [ONE]),
        pytest.param(
            RING,
            (4, {"ep": 4}, "fsdp"),
            [ONE, ETP, (2, {"ep": 2}, "ddp+dtensors")],
            marks=pytest.mark.slow,
        ),
    ],
    ids=["ling", "sala", "ring"],
)
def test_a_checkpoint_is_read_under_other_sizes(
    model: dict[str, Any], save: Run, loads: list[Run], tmp_path: Path
) -> None:
    """Biases of experts, a layer more for the token after the next, and a tied head too."""
    check_checkpoint(tmp_path / "saved", save, loads, replace(config(), **model))


def embeds_on_rank(order: str) -> tuple[Tensor, ...]:
    """Logits and the gradient into the inputs of embeddings that no token has."""
    topology = ExpertTopology(dist.get_world_size(), cp=dist.get_world_size())
    model = HybridModel(config(), groups=groups_of(topology), dtype=torch.float64)
    model.reset_parameters(0)
    lengths = packs_of_replicas(PACKED, 1)
    batch = pack_batch(lengths, dp_rank=0, num_ranks=topology.cp, order=order)
    whole = torch.randn(sum(lengths[0]), 10, generator=torch.Generator().manual_seed(3)).double()
    inputs = batch.layout.shard(whole, dist.get_rank()).requires_grad_()
    output = model(None, batch, inputs_embeds=inputs)
    weights = batch.layout.shard(whole[:, :1].sin(), dist.get_rank())
    ((output.logits * weights).sum() + output.aux_loss).backward()
    return whole, inputs.detach(), output.logits.detach(), inputs.grad


@pytest.mark.parametrize(("num_ranks", "order"), [(1, "contiguous"), (2, "zigzag")])
def test_embeddings_in_place_of_tokens(num_ranks: int, order: str) -> None:
    results = run_on_ranks(embeds_on_rank, num_ranks, order)
    (lengths,), whole = packs_of_replicas(PACKED, 1), results[0][0].requires_grad_()
    layout = SequenceLayout(lengths, num_ranks, order)
    model = HybridModel(config(), dtype=torch.float64)
    model.reset_parameters(0)
    none = torch.zeros(len(whole), dtype=torch.int64)
    parameters = dict(model.named_parameters())
    logits, aux_loss, _ = reference_logits(config(), parameters, none, lengths, whole)
    loss = (logits * whole.detach()[:, :1].sin()).sum() + aux_loss
    (gradient,) = torch.autograd.grad(loss, whole)
    for index, expected in ((1, whole), (2, logits), (3, gradient)):
        actual = layout.unshard([result[index] for result in results])
        assert_equal_to_rounding(actual, expected.detach())
