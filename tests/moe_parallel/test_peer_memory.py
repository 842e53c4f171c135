"""Rows through the memory of peers: the bits of an all-to-all."""

from __future__ import annotations

from unittest import mock

import pytest
import torch
import torch.distributed as dist
import torch.utils.checkpoint

from moe_parallel import (
    ExpertGroups,
    ExpertParallelMoE,
    ExpertTopology,
    MoEConfig,
    PeerMemory,
    Timeline,
)
from moe_parallel.peer_memory import PAGE_BYTES, PeerRows
from tests.moe_parallel.batch import ORDERS, groups_of
from tests.moe_parallel.layers import NUM_TOKENS, LayerResult, build, layer_on_rank, on_ranks
from tests.moe_parallel.peers import peer_memory, with_peers
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


def test_no_all_to_all_is_left() -> None:
    assert run_on_ranks(all_to_alls, 2, TOPOLOGIES[0]) == [0, 0]


def grown_on_rank(topology: ExpertTopology) -> list[int]:
    """Rank function: bytes of the buffers after calls of more and fewer rows; and backwards."""
    groups = groups_of(topology).experts
    memory = type(peer_memory(groups.ep))(groups.ep)
    layer = build(config(), torch.float64, False, groups=groups._replace(peers=memory))
    sizes, outputs = [memory.num_bytes], []
    for tokens in (8, 2 * PAGE_BYTES // (2 * 16 * 8), 16):
        with torch.inference_mode(tokens > 16):
            outputs.append(layer(torch.ones(tokens, 16, dtype=torch.float64)).output)
        sizes.append(memory.num_bytes)
    (outputs[0].sum() + outputs[2].sum()).backward()  # in buffers that are others by now
    assert layer.experts.w13.grad.isfinite().all()
    return sizes


def test_buffers_grow_to_the_rows_of_a_rank_and_stay() -> None:
    sizes = run_on_ranks(grown_on_rank, 2, TOPOLOGIES[0])
    assert sizes == [[PAGE_BYTES, PAGE_BYTES, 2 * PAGE_BYTES, 2 * PAGE_BYTES]] * 2


def differing_on_rank(topology: ExpertTopology) -> str:
    """Rank function: the error where ranks hold other numbers of tokens, and nothing said so."""
    groups = groups_of(topology).experts
    memory = type(peer_memory(groups.ep))(groups.ep)
    layer = build(config(), torch.float64, False, groups=groups._replace(peers=memory))
    tokens = 8 if dist.get_rank() else PAGE_BYTES
    with pytest.raises(ValueError, match="token") as error:
        layer(torch.ones(tokens, 16, dtype=torch.float64))
    return str(error.value)


def test_no_rank_grows_alone() -> None:
    assert all(run_on_ranks(differing_on_rank, 2, TOPOLOGIES[0]))


def shared_on_rank(
    topology: ExpertTopology,
    copied: bool,
    device: str = "cpu",
    dtype: torch.dtype = torch.float64,
    num_tokens: int = 12,
) -> list[torch.Tensor]:
    """Rank function: gradients of layers that share memory, forward through all, then backward."""
    groups = groups_of(topology).experts
    alone = dist.new_group([dist.get_rank()], use_local_synchronization=True)
    if copied:
        block = groups.ep_etp or groups.ep or groups.etp or alone
        groups = with_peers(groups._replace(ep_etp=block))
    layers = [build(config(n), dtype, False, groups=groups, device=device) for n in (1, 2, 3)]
    x = torch.linspace(-1, 1, 16 * num_tokens, device=device).to(dtype).view(-1, 16)
    x.requires_grad_()
    timeline = Timeline()
    again = torch.utils.checkpoint.checkpoint(
        lambda x: layers[2](x, timeline=timeline).output, x + 1, use_reentrant=False
    )
    (layers[0](x).output + layers[1](2 * x).output + again).square().sum().backward()
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


def tried_again_on_rank(topology: ExpertTopology) -> list[torch.Tensor]:
    """Rank function: results of a layer before and after calls that take too many rows."""
    groups = with_peers(groups_of(topology).experts)
    good, bad = (
        build(config(2, max_rows=most), torch.float64, False, groups=groups) for most in (None, 1)
    )
    x = torch.linspace(-1, 1, 16 * 12, dtype=torch.float64).view(12, 16)
    outputs = [good(x).output]
    for _ in range(3):
        with pytest.raises(ValueError, match="max_rows must be at least"):
            bad(x)
        outputs.append(good(x).output)
    return outputs


@pytest.mark.parametrize("topology", TOPOLOGIES[:3])
def test_a_call_that_raises_on_all_ranks_leaves_it_in_order(topology: ExpertTopology) -> None:
    for first, *others in run_on_ranks(tried_again_on_rank, topology.world_size, topology):
        assert all(torch.equal(first, other) for other in others)


def failures_on_rank(topology: ExpertTopology) -> None:
    """Rank function: what does not fit, cannot grow, or is in a graph."""
    groups = groups_of(topology).experts
    memory = type(peer_memory(groups.ep))(groups.ep)
    rows = torch.ones(PAGE_BYTES // 64 + 1, 16)
    with pytest.raises(ValueError, match="rows must fit into the 2097152 bytes that are reserved"):
        memory.place(len(rows), rows)
    with mock.patch.object(memory, "_share", side_effect=MemoryError), pytest.raises(MemoryError):
        memory.reserve(rows.nbytes)
    assert memory.num_bytes == 0
    memory.reserve(rows.nbytes)
    first, second = PeerRows(memory), PeerRows(memory)
    placed = first.place(len(rows), rows)
    assert first.hold(placed)
    assert not first.hold(rows)
    second.place(len(rows), rows)
    with pytest.raises(RuntimeError, match="rows in PeerMemory were overwritten by another call"):
        first.hold(placed)
    memory.captured = True
    memory.reserve(2 * PAGE_BYTES)
    for needed in ((2 * PAGE_BYTES + 1,), (1, 2)):
        with pytest.raises(ValueError, match="that a captured CUDA graph uses, got") as error:
            memory.reserve(*needed)
        assert f"reserve({needed[0]}, {needed[-1] if needed[1:] else 1})" in str(error.value)


def test_says_what_does_not_fit_and_can_be_tried_again() -> None:
    run_on_ranks(failures_on_rank, 2, TOPOLOGIES[0])


def refusals_on_rank() -> list[str]:
    """Rank function: errors for memory of other ranks, and for ranks without GPUs."""
    world, alone = (
        dist.group.WORLD,
        dist.new_group([dist.get_rank()], use_local_synchronization=True),
    )
    groups, found = ExpertGroups(world, world, peers=peer_memory(alone)), []
    with pytest.raises(ValueError, match="must be the memory of the EP x ETP block") as error:
        ExpertParallelMoE(config(), groups=groups)
    found.append(str(error.value))
    with pytest.raises(ValueError, match="group must be of CUDA ranks for PeerMemory") as error:
        PeerMemory(world)
    return [*found, str(error.value)]


def test_refuses_other_ranks_and_ranks_without_gpus() -> None:
    run_on_ranks(refusals_on_rank, 2)


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


def replayed_on_rank(topology: ExpertTopology) -> None:
    """Rank function: a captured call gives the bits of an eager one, again and again."""
    groups = groups_of(topology).experts
    order = ORDERS["shuffled"](64, 2)
    layer = build(
        config(4, capacity_factor=1.0, pad_to_capacity=True), torch.bfloat16, False,
        groups=with_peers(groups), device="cuda",
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
@pytest.mark.parametrize("topology", [TOPOLOGIES[0], TOPOLOGIES[4]])
def test_two_gpus_replay_a_padded_call(topology: ExpertTopology) -> None:
    run_on_ranks(replayed_on_rank, 2, topology, backend="nccl")
