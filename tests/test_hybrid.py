"""The hybrid decoder is one function, whatever the parallel layout."""

from __future__ import annotations

from dataclasses import replace
from functools import partial
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor
from torch.nn import functional as F

from lasp.hybrid import (
    AttentionConfig,
    HybridConfig,
    HybridModel,
    Residuals,
    ResidualScale,
    next_in_document,
    next_token_loss,
    pack_batch,
    reduce_gradients,
)
from lasp.sequence.layout import SequenceLayout
from moe_parallel import ExpertTopology, MoEConfig, ParallelGroups, SymmetricMemory
from moe_parallel.experts.experts import Experts
from tests.closeness import assert_equal_to_rounding, relative_error
from tests.hybrid_reference import reference_logits
from tests.ranks import run_on_ranks

VOCAB = 17
# Two replicas' worth of documents: borders everywhere, lengths 0 and 1, cut by every rank border.
PACKED = ((13, 1, 0, 16, 8), (5, 33, 4))
UNPACKED = ((40,), (40,))
Packs = tuple[tuple[int, ...], ...]


def config(capacity_factor: float | None = 1.0, num_layers: int = 3) -> HybridConfig:
    return HybridConfig(
        num_layers=num_layers,
        vocab_size=VOCAB,
        attention=AttentionConfig(num_heads=4, num_kv_heads=2, head_dim=6, rotary_dim=4),
        moe=MoEConfig(
            hidden_size=10,
            ffn_size=8,
            num_experts=4,
            top_k=2,
            capacity_factor=capacity_factor,
            aux_loss_coefficient=0.1,
        ),
        pattern="2:1",
    )


MEDIUM = replace(
    config(),
    attention=AttentionConfig(num_heads=4, num_kv_heads=2, head_dim=32, rotary_dim=16),
    moe=MoEConfig(hidden_size=96, ffn_size=128, num_experts=4, top_k=2),
)


def packs_of_replicas(packs: Packs, dp: int) -> Packs:
    """The same documents over dp replicas: two packs laid end to end, or one each."""
    return (packs[0] + packs[1],) if dp == 1 else packs


def data(packs: Packs, dp: int) -> list[tuple[Tensor, Tensor]]:
    generator = torch.Generator().manual_seed(1)
    total = sum(map(sum, packs))
    tokens = torch.randint(VOCAB, (total,), generator=generator)
    labels = torch.randint(VOCAB, (total,), generator=generator)
    sizes = [sum(lengths) for lengths in packs_of_replicas(packs, dp)]
    return list(zip(tokens.split(sizes), labels.split(sizes)))


_groups: dict[ExpertTopology, ParallelGroups] = {}


def groups_of(topology: ExpertTopology) -> ParallelGroups:
    """Process groups are made once a process: a pool runs many tests."""
    if topology not in _groups:
        _groups[topology] = topology.build_groups()
    return _groups[topology]


def loss_and_gradients(
    sizes: dict[str, int],
    order: str,
    dtype: torch.dtype = torch.float64,
    device: str = "cpu",
    packs: Packs = PACKED,
    copies: bool = False,
    **fields: Any,
) -> dict[str, Any]:
    """On one rank: this step's loss and the reduced gradients of the parameters it holds.

    With ``copies`` rows travel to experts by copy engines.
    """
    topology = ExpertTopology(dist.get_world_size(), **sizes)
    if device == "cuda":
        device = f"cuda:{dist.get_rank()}"
    at = topology.dense_coordinates(dist.get_rank())
    chosen = replace(config(), **fields)
    groups = groups_of(topology)
    block = groups.experts.ep_etp or groups.experts.ep or groups.experts.etp
    memory = SymmetricMemory(block) if copies and block is not None else None
    how: dict[str, Any] = {"symmetric_memory": memory, "dtype": dtype, "device": device}
    model = HybridModel(chosen, groups=groups, **how)
    model.reset_parameters(0)
    batch = pack_batch(
        packs_of_replicas(packs, topology.dp), dp_rank=at.dp, num_ranks=topology.cp, order=order
    )
    tokens, labels = data(packs, topology.dp)[at.dp]
    tokens = batch.layout.shard(tokens, at.cp).to(device)
    labels = batch.layout.shard(labels, at.cp, pad_value=-100).to(device)
    targets, more = sum(map(sum, packs)), {}
    if chosen.mtp_loss_weight is not None:
        following = partial(next_in_document, layout=batch.layout, cp_group=model.groups.cp)
        more = {"next_tokens": following(tokens, pad_value=0)}
    output = model(tokens, batch, **more)
    loss = next_token_loss(output.logits, labels, targets) + output.aux_loss
    if chosen.mtp_loss_weight is not None:
        after = following(labels, pad_value=-100)
        loss += chosen.mtp_loss_weight * next_token_loss(output.mtp_logits, after, targets)
    loss.backward()
    reduce_gradients(model)
    total = loss.detach().double()
    dist.all_reduce(total)
    return {
        "loss": total.cpu(),
        "dense": {name: p.grad.cpu() for name, p in model.dense_parameters()},
        "experts": {name: p.grad.cpu() for name, p in model.expert_parameters()},
        "sharding": Experts.sharding(),
        "coordinates": topology.expert_coordinates(dist.get_rank()),
        "dropped": sum((stats.dropped.sum().cpu() for stats in output.stats), torch.zeros(())),
    }


def assemble(results: list[dict[str, Any]]) -> dict[str, Tensor]:
    """Whole gradients out of every rank's, after checking that replicas agree bit for bit."""
    whole: dict[str, Tensor] = {"loss": results[0]["loss"]}
    for name, grad in results[0]["dense"].items():
        assert all(torch.equal(grad, result["dense"][name]) for result in results), name
        whole[name] = grad
    for name in results[0]["experts"]:
        ep_dim, etp_dim = results[0]["sharding"][name.rpartition(".")[2]]
        parts: dict[tuple[int, int], Tensor] = {}
        for result in results:
            at, grad = result["coordinates"], result["experts"][name]
            assert torch.equal(parts.setdefault((at.ep, at.etp), grad), grad), name
        rows = [
            torch.cat([part for (ep, _), part in sorted(parts.items()) if ep == row], etp_dim)
            for row in sorted({ep for ep, _ in parts})
        ]
        whole[name] = torch.cat(rows, ep_dim)
    return whole


def one_rank(**kwargs: Any) -> dict[str, Tensor]:
    return assemble(run_on_ranks(loss_and_gradients, 1, {}, "contiguous", **kwargs))


OTHER = {
    "pattern": "*GG",
    "decay": torch.tensor([[0.0, 0.1, 0.2, 3.0]] * 2 + [[0.5, 0.0, 0.25, 1.0]]),
    "residuals": Residuals(
        "pre", ResidualScale(0.5, 2.0), ResidualScale(0.7, 1.5), ResidualScale(0.9, 3.0), 0.25
    ),
}


@pytest.mark.parametrize(
    ("packs", "fields"),
    [
        (PACKED, {}),
        (UNPACKED, {}),
        (PACKED, OTHER),
        (PACKED, OTHER | {"residuals": replace(OTHER["residuals"], norm="post")}),
    ],
    ids=["packed", "unpacked", "pre-norm", "post-norm"],
)
def test_one_rank_is_the_oracle(packs: Packs, fields: dict[str, Any]) -> None:
    check_oracle(packs, fields)


def check_oracle(packs: Packs, fields: dict[str, Any]) -> None:
    chosen = replace(config(), **fields)
    model = HybridModel(chosen, dtype=torch.float64)
    model.reset_parameters(0)
    parameters = dict(model.named_parameters())
    (tokens, labels), lengths = data(packs, dp=1)[0], packs_of_replicas(packs, dp=1)[0]
    expected = reference_logits(chosen, parameters, tokens, lengths)
    loss = next_token_loss(expected.logits, labels, len(tokens)) + expected.aux_loss
    if chosen.mtp_loss_weight is not None:
        after = torch.cat(
            [F.pad(x[1:], (0, 1), value=-100)[: len(x)] for x in labels.split(lengths)]
        )
        of_mtp = next_token_loss(expected.mtp_logits, after, len(tokens))
        loss = loss + chosen.mtp_loss_weight * of_mtp
    gradients = torch.autograd.grad(loss, list(parameters.values()))
    actual = one_rank(packs=packs, **fields)
    assert_equal_to_rounding(actual.pop("loss"), loss, what="loss")
    assert actual.keys() == parameters.keys()
    for name, gradient in zip(parameters, gradients):
        assert_equal_to_rounding(actual[name], gradient, what=name)


SPLITS = [
    (2, {"cp": 2, "ep": 2}, "contiguous"),
    (2, {"ep": 2}, "zigzag"),
    (2, {"cp": 2, "etp": 2}, "fold"),
    (4, {"cp": 4, "ep": 2, "etp": 2}, "zigzag"),
    (4, {"cp": 2, "ep": 4}, "fold"),
    (4, {"cp": 2, "ep": 2}, "contiguous"),
    (4, {"cp": 4}, "fold"),
    (2, {"cp": 2, "ep": 2}, "document_zigzag"),
    pytest.param(8, {"cp": 4, "ep": 4, "etp": 2}, "zigzag", marks=pytest.mark.slow),
    pytest.param(8, {"cp": 8, "ep": 2, "etp": 2}, "fold", marks=pytest.mark.slow),
]


@pytest.mark.parametrize(("num_ranks", "sizes", "order"), SPLITS)
def test_loss_and_every_gradient_are_those_of_one_rank(num_ranks, sizes, order) -> None:
    expected = one_rank()
    results = run_on_ranks(loss_and_gradients, num_ranks, sizes, order)
    assert int(results[0]["dropped"].sum()) > 0  # capacity is at work
    lengths = packs_of_replicas(PACKED, ExpertTopology(num_ranks, **sizes).dp)[0]
    layout = SequenceLayout(lengths, sizes.get("cp", 1), order)
    assert any(link.continues for link in layout.run_links) == ("cp" in sizes)
    actual = assemble(results)
    assert actual.keys() == expected.keys()
    for name, tensor in expected.items():
        assert_equal_to_rounding(actual[name], tensor, what=name)


@pytest.mark.parametrize("sizes", [{"cp": 2, "ep": 2}, {"cp": 1, "etp": 2}])
def test_unpacked_is_one_function_too(sizes: dict[str, int]) -> None:
    expected = one_rank(packs=UNPACKED)
    results = run_on_ranks(loss_and_gradients, 2, sizes, "zigzag", packs=UNPACKED)
    for name, tensor in assemble(results).items():
        assert_equal_to_rounding(tensor, expected[name], what=name)


def test_float32_errs_no_more_over_ranks_than_on_one() -> None:
    oracle, honest = one_rank(), one_rank(dtype=torch.float32)
    results = run_on_ranks(
        loss_and_gradients, 4, {"cp": 4, "ep": 2, "etp": 2}, "zigzag", dtype=torch.float32
    )
    actual = assemble(results)
    errors = [relative_error(actual[name], oracle[name]) for name in oracle]
    budget = [relative_error(honest[name], oracle[name]) for name in oracle]
    rounding = torch.finfo(torch.float32).eps
    for name, error, allowed in zip(oracle, errors, budget):
        # A gradient of few elements can be lucky on one rank: the mean over tensors bounds it too.
        assert error <= 2 * max(allowed, sum(budget) / len(budget)) + rounding, name


def test_a_document_leaks_nothing_into_its_neighbours() -> None:
    model = HybridModel(config(capacity_factor=None), dtype=torch.float64)
    model.reset_parameters(0)
    tokens = torch.randint(VOCAB, (30,))
    packed = model(tokens, pack_batch([(9, 14, 7)], dp_rank=0, num_ranks=1, order="contiguous"))
    alone = model(tokens[9:23], pack_batch([(14,)], dp_rank=0, num_ranks=1, order="contiguous"))
    assert_equal_to_rounding(packed.logits[9:23], alone.logits)
    changed = tokens.clone()
    changed[:9] = (changed[:9] + 1) % VOCAB
    other = model(changed, pack_batch([(9, 14, 7)], dp_rank=0, num_ranks=1, order="contiguous"))
    # To rounding only: the experts' products have as many rows as tokens came their way.
    assert_equal_to_rounding(other.logits[9:], packed.logits[9:])


@pytest.mark.parametrize("order", ["contiguous", "zigzag", "fold"])
def test_padding_changes_nothing(order: str) -> None:
    """A pack of 80 tokens over 3 ranks is padded to 81 (84 in zigzag); the loss is not."""
    expected = one_rank()
    actual = assemble(run_on_ranks(loss_and_gradients, 3, {"cp": 3}, order))
    for name, tensor in expected.items():
        assert_equal_to_rounding(actual[name], tensor, what=name)


def test_the_router_sees_documents_without_their_padding() -> None:
    lengths, padded = [(3, 0, 5), (1,)], [(8, 4, 12), (8,)]
    batch = pack_batch(
        lengths, dp_rank=0, num_ranks=2, order="document_zigzag", padded_lengths=padded
    )
    assert batch.layout == SequenceLayout((3, 0, 5), 2, "document_zigzag", (8, 4, 12))
    assert batch.token_order.rows_per_rank == (12, 12, 4, 4)
    # Pieces of 2, 1 and 3 tokens; the second replica has pieces of 2.
    assert batch.token_order.segments == (
        ((0, 0, 2), (3, 6, 3)),
        ((2, 0, 1), (6, 6, 2)),
        ((8, 0, 1),),
        (),
    )
