"""Rows through symmetric memory: the bits of an all-to-all."""

from __future__ import annotations

from importlib.util import find_spec
from unittest import mock

import pytest
import torch
import torch.distributed as dist
import torch.utils.checkpoint

from lasp._core.impl import chosen_impl
from moe_parallel import (
    ExpertTopology,
    MoEConfig,
    Timeline,
)
from moe_parallel.dispatch.symmetric_memory import OutgoingRows
from tests.moe_parallel.batch import ORDERS, groups_of
from tests.moe_parallel.host_memory import memory_of
from tests.moe_parallel.layers import NUM_TOKENS, LayerResult, build, layer_on_rank, on_ranks
from tests.ranks import run_on_ranks

TOPOLOGIES = [
    ExpertTopology(2, ep=2),
    ExpertTopology(4, ep=4),
    ExpertTopology(4, ep=2, etp=2),
    ExpertTopology(4, ep=2),
    ExpertTopology(2, etp=2),
    ExpertTopology(4, etp=4),
]


def config(num_groups: int | None = 3, **changes: object) -> MoEConfig:
    sizes = {"hidden_size": 16, "ffn_size": 32, "num_experts": 16, "top_k": 2}
    return MoEConfig(**{**sizes, "overlap_groups": num_groups, **changes})


def assert_same_bits(
    topology: ExpertTopology, order: str, *args: object, num_tokens: int = NUM_TOKENS, **kwargs
) -> None:
    tokens = ORDERS[order](num_tokens, topology.world_size)
    sent = on_ranks(topology, tokens, *args, **kwargs)
    copied = on_ranks(topology, tokens, *args, copied=True, **kwargs)
    for name, a, b in zip(LayerResult._fields, sent, copied):
        assert torch.equal(a, b), name


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
@pytest.mark.parametrize("topology", TOPOLOGIES)
def test_the_bits_of_an_all_to_all(topology: ExpertTopology, dtype: torch.dtype) -> None:
    for num_groups in (1, 3, None):
        assert_same_bits(topology, "shuffled", config(num_groups), dtype)


@pytest.mark.parametrize("capacity", [None, 0.75])
@pytest.mark.parametrize("topology", TOPOLOGIES)
def test_likewise_with_a_hot_expert_and_a_rank_without_tokens(
    topology: ExpertTopology, capacity: float | None
) -> None:
    assert_same_bits(topology, "ragged", config(capacity_factor=capacity), torch.float32, True)


@pytest.mark.parametrize("topology", TOPOLOGIES[:3])
def test_likewise_padded_to_capacity(topology: ExpertTopology) -> None:
    padded = config(capacity_factor=1.0, pad_to_capacity=True)
    assert_same_bits(topology, "ragged", padded, torch.float32, True)


def all_to_alls(topology: ExpertTopology) -> int:
    """Rank function: how many a step starts over EP."""
    order = ORDERS["ragged"](NUM_TOKENS, topology.world_size)
    with mock.patch.object(dist, "all_to_all_single") as calls:
        layer_on_rank(topology, order, config(), copied=True)
    return calls.call_count


@pytest.mark.parametrize("topology", [TOPOLOGIES[0], TOPOLOGIES[4]])
def test_no_all_to_all_is_left(topology: ExpertTopology) -> None:
    assert run_on_ranks(all_to_alls, 2, topology) == [0, 0]


def shared_on_rank(
    topology: ExpertTopology,
    copied: bool,
    device: str = "cpu",
    dtype: torch.dtype = torch.float64,
    num_tokens: int = 12,
    impl: str = "auto",
) -> list[torch.Tensor]:
    """Rank function: gradients of layers that share memory, forward through all, then backward."""
    groups = groups_of(topology).experts
    alone = dist.new_group([dist.get_rank()], use_local_synchronization=True)
    if copied:
        groups = groups._replace(ep_etp=groups.ep_etp or groups.ep or groups.etp or alone)
    how = {"groups": groups, "symmetric_memory": memory_of(groups) if copied else None}
    layers = [build(config(n, impl=impl), dtype, False, device=device, **how) for n in (1, 2, 3)]
    x = torch.linspace(-1, 1, 16 * num_tokens, device=device).to(dtype).view(-1, 16)
    x.requires_grad_()
    timeline = Timeline()
    again = torch.utils.checkpoint.checkpoint(
        lambda x: layers[2](x, timeline=timeline).output, x + 1, use_reentrant=False
    )
    hold, in_place = OutgoingRows.hold, []
    with mock.patch.object(
        OutgoingRows, "hold", lambda *args: in_place.append(hold(*args)) or in_place[-1]
    ):
        (layers[0](x).output + layers[1](2 * x).output + again).square().sum().backward()
    if copied and chosen_impl(impl, x.device, dtype) == "triton":
        assert in_place  # nor is a gradient of rows copied
        assert all(in_place)
    several = topology.ep * topology.etp > 1
    lanes = {"compute", *["ep"] * ((copied and several) or topology.ep > 1)}
    lanes |= {*["etp"] * (not copied and topology.etp > 1)}
    assert {span.lane for span in timeline.spans} == lanes
    grads = [x.grad, *(p.grad for layer in layers for p in layer.experts.parameters())]
    return [grad.cpu() for grad in grads]


@pytest.mark.parametrize(
    "topology", [*TOPOLOGIES[:3], ExpertTopology(1), ExpertTopology(2), TOPOLOGIES[4]]
)
def test_layers_share_it_and_one_rank_needs_none(topology: ExpertTopology) -> None:
    sent, copied = (
        run_on_ranks(shared_on_rank, topology.world_size, topology, copied)
        for copied in (False, True)
    )
    for a, b in zip(sent, copied):
        assert all(torch.equal(x, y) for x, y in zip(a, b))


@pytest.mark.skipif(find_spec("triton") is None, reason="needs triton, which has no wheel here")
@pytest.mark.parametrize("topology", [TOPOLOGIES[0], TOPOLOGIES[4]])
def test_kernels_write_gradients_of_rows_where_they_travel_from(topology: ExpertTopology) -> None:
    sent, copied = (
        run_on_ranks(
            shared_on_rank, 2, topology, copied, dtype=torch.float32, num_tokens=12, impl="triton"
        )
        for copied in (False, True)
    )
    for a, b in zip(sent, copied):
        assert all(torch.equal(x, y) for x, y in zip(a, b))


@pytest.mark.multi_gpu
@pytest.mark.parametrize("topology", [TOPOLOGIES[0], TOPOLOGIES[4]])
def test_layers_share_it_on_two_gpus(topology: ExpertTopology) -> None:
    how = ("cuda", torch.bfloat16, 3000)
    sent, copied = (
        run_on_ranks(shared_on_rank, 2, topology, copied, *how, backend="nccl")
        for copied in (False, True)
    )
    for a, b in zip(sent, copied):
        assert all(torch.equal(x, y) for x, y in zip(a, b))


@pytest.mark.multi_gpu
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("topology", [TOPOLOGIES[0], TOPOLOGIES[4]])
def test_two_gpus_give_the_bits_of_an_all_to_all(
    topology: ExpertTopology, dtype: torch.dtype
) -> None:
    for changes in ({}, {"capacity_factor": 1.0, "pad_to_capacity": True}):
        for num_groups in (1, 3, 8):
            made = config(num_groups, **changes)
            assert_same_bits(topology, "shuffled", made, dtype, num_tokens=300, backend="nccl")
            assert_same_bits(topology, "ragged", made, dtype, True, backend="nccl")


def replayed_on_rank(topology: ExpertTopology, send: str) -> None:
    """Rank function: a captured call gives the bits of an eager one, again and again."""
    groups = groups_of(topology).experts
    order = ORDERS["shuffled"](64, 2)
    how = {"send": send, "capacity_factor": 1.0, "pad_to_capacity": True}
    layer = build(
        config(None if send == "tokens" else 4, **how), torch.bfloat16, False,
        groups=groups, symmetric_memory=memory_of(groups, own=True), device="cuda",
    )  # fmt: skip
    x = torch.randn(order.rows_per_rank[dist.get_rank()], 16, device="cuda", dtype=torch.bfloat16)
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream), torch.no_grad():
        for _ in range(3):
            eager = layer(x, token_order=order).output
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, stream=stream), torch.no_grad():
        captured = layer(x, token_order=order).output
    for _ in range(3):
        captured.zero_()
        graph.replay()
        torch.cuda.synchronize()
        assert torch.equal(captured, eager)


@pytest.mark.multi_gpu
@pytest.mark.parametrize(
    ("topology", "send"),
    [(TOPOLOGIES[0], "assignments"), (TOPOLOGIES[0], "tokens"), (TOPOLOGIES[4], "assignments")],
)
def test_two_gpus_replay_a_padded_call(topology: ExpertTopology, send: str) -> None:
    run_on_ranks(replayed_on_rank, 2, topology, send, backend="nccl")
