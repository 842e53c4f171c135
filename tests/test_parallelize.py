"""A parallelized model has the loss and the gradients of one rank that holds everything."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
import torch.distributed as dist
from torch import Tensor

from lasp.hybrid import HybridModel, next_token_loss, pack_batch, parallelize
from moe_parallel import ExpertTopology, parameter_groups
from tests.closeness import assert_equal_to_rounding
from tests.ranks import run_on_ranks
from tests.test_hybrid import groups_of
from tests.test_training import CONFIG, VOCAB

MODEL = replace(CONFIG, num_layers=3, pattern="G*G")
DOCUMENTS = ((5, 11), (9, 7))  # of two replicas


def trained_on_rank(
    sizes: dict[str, int], activations: str, device: str = "cpu"
) -> dict[str, Tensor]:
    """Loss and whole gradients of all documents."""
    device = f"cuda:{dist.get_rank()}" if device == "cuda" else device
    topology = ExpertTopology(dist.get_world_size(), **sizes)
    at = topology.dense_coordinates(dist.get_rank())
    model = HybridModel(MODEL, groups=groups_of(topology), device=device, dtype=torch.float64)
    model.reset_parameters(0)
    parallelize(model, topology, activations=activations, param_dtype=None, reduce_dtype=None)
    lengths = DOCUMENTS if topology.dp == 2 else (sum(DOCUMENTS, ()),)
    batch = pack_batch(lengths, dp_rank=at.dp, num_ranks=topology.cp, order="zigzag")
    packs = (torch.arange(sum(map(sum, lengths))) * 7 % VOCAB).split([*map(sum, lengths)])
    tokens = batch.layout.shard(packs[at.dp], at.cp).to(device)
    output = model(tokens, batch)
    num_targets = sum(map(len, packs))
    loss = next_token_loss(output.logits, (tokens + 3) % VOCAB, num_targets) + output.aux_loss
    loss.backward()
    loss = loss.detach().clone()
    dist.all_reduce(loss)
    grads = {name: p.grad.full_tensor().cpu() for name, p in model.named_parameters()}
    return {"loss": loss.cpu(), **grads}


@pytest.mark.parametrize(
    ("num_ranks", "sizes", "activations"),
    [
        (4, {"ep": 2, "cp": 2}, "softmax_outputs+expert_inputs"),  # each expert has two replicas
        (2, {"ep": 2}, "none"),
        (2, {"cp": 2}, "full+offload"),
    ],
)
def test_loss_and_gradients_are_those_of_one_rank(
    num_ranks: int, sizes: dict[str, int], activations: str
) -> None:
    check_against_one_rank(num_ranks, sizes, activations, "cpu")


@pytest.mark.multi_gpu
def test_loss_and_gradients_on_two_gpus_are_those_of_one() -> None:
    check_against_one_rank(2, {"cp": 2, "ep": 2}, "softmax_outputs+offload", "cuda", backend="nccl")


def check_against_one_rank(
    num_ranks: int, sizes: dict[str, int], activations: str, device: str, **where: str
) -> None:
    (expected,) = run_on_ranks(trained_on_rank, 1, {}, "none", device, **where)
    for actual in run_on_ranks(trained_on_rank, num_ranks, sizes, activations, device, **where):
        assert actual.keys() == expected.keys()
        for name, tensor in expected.items():
            assert_equal_to_rounding(actual[name], tensor, what=name)


def masters_on_rank() -> None:
    """Steps far smaller than bfloat16 can tell add up, in shards."""
    topology = ExpertTopology(2, ep=2)
    model = HybridModel(CONFIG, groups=groups_of(topology))
    model.reset_parameters(0)
    parallelize(model, topology, activations="full")
    before = {name: p.to_local().clone() for name, p in model.named_parameters()}
    optimizer = torch.optim.AdamW(parameter_groups(model), lr=1e-6, weight_decay=0.0)
    batch = pack_batch([[16], [16]], dp_rank=dist.get_rank(), num_ranks=1, order="contiguous")
    for _ in range(3):
        output = model(torch.arange(16), batch)
        assert output.logits.dtype == torch.bfloat16
        (next_token_loss(output.logits, torch.arange(16), 32) + output.aux_loss).backward()
        optimizer.step()
        optimizer.zero_grad()
    for name, parameter in model.named_parameters():
        shard, was = parameter.to_local(), before[name]
        assert shard.dtype == torch.float32
        moved = (shard - was).abs()
        if moved.numel():
            assert 0 < moved.max() < 4e-6, name
    held = sum(p.to_local().numel() for p in model.parameters())
    assert held < 0.6 * sum(p.numel() for p in model.parameters())


def test_masters_are_float32_and_sharded() -> None:
    run_on_ranks(masters_on_rank, 2)


def test_a_model_without_masters_raises() -> None:
    model = HybridModel(CONFIG, dtype=torch.bfloat16)
    with pytest.raises(ValueError, match="another dtype than param_dtype"):
        parallelize(model, ExpertTopology(1))
