"""Symmetric memory that grows, that does not fit, and calls that raise."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from unittest import mock

import pytest
import torch
import torch.distributed as dist

from moe_parallel import ExpertGroups, ExpertParallelMoE, ExpertTopology, SymmetricMemory
from moe_parallel.dispatch.symmetric_memory import PAGE_BYTES, OutgoingRows
from moe_parallel.experts import experts
from moe_parallel.experts.swiglu import swiglu
from tests.moe_parallel.batch import groups_of
from tests.moe_parallel.dispatch.test_symmetric_memory import TOPOLOGIES, config
from tests.moe_parallel.host_memory import host_memory, memory_of
from tests.moe_parallel.layers import build
from tests.ranks import run_on_ranks


def grown_on_rank(topology: ExpertTopology) -> list[int]:
    """Rank function: bytes of the buffers after calls of more and fewer rows; and backwards."""
    groups = groups_of(topology).experts
    memory = type(host_memory(groups.ep))(groups.ep)
    layer = build(config(), torch.float64, False, groups=groups, symmetric_memory=memory)
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
    memory = type(host_memory(groups.ep))(groups.ep)
    layer = build(config(), torch.float64, False, groups=groups, symmetric_memory=memory)
    tokens = 8 if dist.get_rank() else PAGE_BYTES
    with pytest.raises(ValueError, match="token") as error:
        layer(torch.ones(tokens, 16, dtype=torch.float64))
    return str(error.value)


def test_no_rank_grows_alone() -> None:
    assert all(run_on_ranks(differing_on_rank, 2, TOPOLOGIES[0]))


def call_next(functions: Callable, *args: object) -> object:
    return functions()(*args)


def tried_again_on_rank(topology: ExpertTopology) -> list[torch.Tensor]:
    """Rank function: results of a layer before and after calls that take too many rows."""
    groups = groups_of(topology).experts
    how = {"groups": groups, "symmetric_memory": memory_of(groups)}
    good, bad = (build(config(2, max_rows=most), torch.float64, False, **how) for most in (None, 1))
    x = torch.linspace(-1, 1, 16 * 12, dtype=torch.float64).view(12, 16)
    outputs = [good(x).output]
    for _ in range(3):
        with pytest.raises(ValueError, match="max_rows must be at least"):
            bad(x)
        outputs.append(good(x).output)
        later = mock.Mock(side_effect=[swiglu, MemoryError])  # of the second of two groups
        fails = partial(call_next, later)
        with mock.patch.object(experts, "swiglu", fails), pytest.raises(MemoryError):
            good(x)
        outputs.append(good(x).output)
    return outputs


@pytest.mark.parametrize("topology", TOPOLOGIES[:3])
def test_a_call_that_raises_on_all_ranks_leaves_it_in_order(topology: ExpertTopology) -> None:
    for first, *others in run_on_ranks(tried_again_on_rank, topology.world_size, topology):
        assert all(torch.equal(first, other) for other in others)


def failures_on_rank(topology: ExpertTopology) -> None:
    """Rank function: what does not fit, cannot grow, or is in a graph."""
    groups = groups_of(topology).experts
    memory = type(host_memory(groups.ep))(groups.ep)
    rows = torch.ones(PAGE_BYTES // 64 + 1, 16)
    with pytest.raises(ValueError, match="rows must fit into the 2097152 bytes that are reserved"):
        memory.place(len(rows), rows)
    with mock.patch.object(memory, "_share", side_effect=MemoryError), pytest.raises(MemoryError):
        memory.reserve(rows.nbytes)
    assert memory.num_bytes == 0
    memory.reserve(rows.nbytes)
    first, second = OutgoingRows(memory), OutgoingRows(memory)
    placed = first.place(len(rows), rows)
    assert first.hold(placed)
    assert not first.hold(rows)
    second.place(len(rows), rows)
    with pytest.raises(RuntimeError, match="SymmetricMemory were overwritten by another call"):
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
    groups, found = ExpertGroups(world, world), []
    with pytest.raises(ValueError, match="must be the memory of the EP x ETP block") as error:
        ExpertParallelMoE(config(), groups=groups, symmetric_memory=host_memory(alone))
    found.append(str(error.value))
    with pytest.raises(ValueError, match="must be of CUDA ranks for SymmetricMemory") as error:
        SymmetricMemory(world)
    return [*found, str(error.value)]


def test_refuses_other_ranks_and_ranks_without_gpus() -> None:
    run_on_ranks(refusals_on_rank, 2)
