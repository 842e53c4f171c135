from __future__ import annotations

from datetime import timedelta
from itertools import chain
from typing import get_args

import pytest
import torch
import torch.distributed as dist
from hypothesis import given
from hypothesis import strategies as st

from moe_parallel import ExpertGroups, ExpertTopology
from moe_parallel.mesh import expert_mesh
from moe_parallel.topology import Axis
from tests.moe_parallel.batch import groups_of
from tests.ranks import run_on_ranks, subgroup

SIZES = st.integers(1, 4)


@st.composite
def topologies(draw: st.DrawFn) -> ExpertTopology:
    tp, cp, dp, pp = (draw(SIZES) for _ in range(4))
    stage = tp * cp * dp
    ep = draw(st.sampled_from([n for n in range(1, stage + 1) if stage % n == 0]))
    etp = draw(st.sampled_from([n for n in range(1, stage // ep + 1) if stage // ep % n == 0]))
    return ExpertTopology(pp * stage, pp=pp, tp=tp, cp=cp, ep=ep, etp=etp)


@given(topologies(), st.sampled_from(get_args(Axis)))
def test_groups_of_every_axis_partition_the_world(topology: ExpertTopology, axis: Axis) -> None:
    groups = topology.groups(axis)
    assert sorted(chain.from_iterable(groups)) == list(range(topology.world_size))
    sizes = {
        "dp_cp": topology.dp * topology.cp,
        "token": topology.dp * topology.cp * topology.tp,
        "ep_etp": topology.ep * topology.etp,
    }
    size = sizes[axis] if axis in sizes else getattr(topology, axis)
    assert {len(group) for group in groups} == {size}
    assert all(group == tuple(sorted(group)) for group in groups)


@given(topologies())
def test_coordinates_name_each_rank_once(topology: ExpertTopology) -> None:
    ranks = range(topology.world_size)
    assert len({topology.dense_coordinates(rank) for rank in ranks}) == len(ranks)
    assert len({topology.expert_coordinates(rank) for rank in ranks}) == len(ranks)
    stage = topology.world_size // topology.pp
    for rank in ranks:  # equations 15 and 16, fastest axis first
        d, e = topology.dense_coordinates(rank), topology.expert_coordinates(rank)
        assert rank == d.tp + topology.tp * (d.cp + topology.cp * d.dp) + stage * d.pp
        assert rank == e.etp + topology.etp * (e.ep + topology.ep * e.edp) + stage * e.pp
        assert d.pp == e.pp


def test_example_of_the_module() -> None:
    topology = ExpertTopology(8, cp=4, ep=2, etp=2)
    assert (topology.dp, topology.edp) == (2, 2)
    assert topology.groups("cp") == [(0, 1, 2, 3), (4, 5, 6, 7)]
    assert topology.groups("dp") == [(0, 4), (1, 5), (2, 6), (3, 7)]
    assert topology.groups("ep") == [(0, 2), (1, 3), (4, 6), (5, 7)]
    assert topology.groups("etp") == [(0, 1), (2, 3), (4, 5), (6, 7)]
    assert topology.groups("edp") == [(0, 4), (1, 5), (2, 6), (3, 7)]
    assert topology.groups("ep_etp") == [(0, 1, 2, 3), (4, 5, 6, 7)]
    assert topology.groups("token") == [tuple(range(8))]


def built_groups(topology: ExpertTopology) -> dict[str, object]:
    groups = groups_of(topology)
    members = {
        axis: None if group is None else tuple(dist.get_process_group_ranks(group))
        for axis, group in groups._asdict().items()
    }
    for group in {id(g): g for g in groups if g is not None}.values():  # each one communicates
        one = torch.ones(())
        dist.all_reduce(one, group=group)
        assert one == group.size()
    return {
        "members": members,
        "token_is_world": groups.token is dist.group.WORLD,
        "mesh": expert_mesh(groups.experts),
    }


@pytest.mark.parametrize(
    "topology",
    [
        ExpertTopology(4),
        ExpertTopology(4, cp=2, ep=2),
        ExpertTopology(4, cp=4, ep=2, etp=2),
        ExpertTopology(4, pp=2, tp=2, etp=2),
    ],
)
def test_built_groups_are_the_planned_ones(topology: ExpertTopology) -> None:
    for rank, built in enumerate(run_on_ranks(built_groups, 4, topology)):
        for axis in get_args(Axis):
            mine = next(group for group in topology.groups(axis) if rank in group)
            assert built["members"][axis] == (mine if len(mine) > 1 else None)
        assert built["token_is_world"] == (topology.pp == 1)
        at, mesh = topology.expert_coordinates(rank), built["mesh"]
        assert (mesh.ep_rank, mesh.etp_rank) == (at.ep, at.etp)
        assert (mesh.ep_size, mesh.etp_size) == (topology.ep, topology.etp)
        assert mesh.token_ranks[mesh.etp_rank][mesh.ep_rank] == mesh.token_rank


def timeout_s_of_cp() -> float:
    groups = ExpertTopology(4, cp=2).build_groups(timedelta(seconds=7))
    options = groups.cp._get_backend(torch.device("cpu")).options
    return options._timeout.total_seconds()


def test_groups_have_the_timeout_that_they_are_built_with() -> None:
    """torch gives them its default, whatever the default group has."""
    assert run_on_ranks(timeout_s_of_cp, 4) == [7.0] * 4


def mesh_without_block() -> bool:
    world = dist.group.WORLD
    given = expert_mesh(ExpertGroups(token=world, ep=world))
    return given == expert_mesh(ExpertGroups(token=world, ep=world, ep_etp=world))


def test_block_may_be_left_out_when_it_is_the_ep_group() -> None:
    assert run_on_ranks(mesh_without_block, 2) == [True, True]


def mesh_error(groups: str) -> str:
    world = dist.group.WORLD
    alone = [subgroup(0), subgroup(1)][dist.get_rank()]
    cases = {
        "block missing": ExpertGroups(token=world, ep=world, etp=world),
        "block too large": ExpertGroups(token=world, ep_etp=world),
        "token too small": ExpertGroups(token=alone, ep=world),
        "token missing": ExpertGroups(etp=world),
    }
    with pytest.raises(ValueError) as error:
        expert_mesh(cases[groups])
    return str(error.value)


@pytest.mark.parametrize(
    ("groups", "named"),
    [
        ("block missing", "groups.ep_etp"),
        ("block too large", "groups.ep_etp"),
        ("token too small", "groups.token"),
        ("token missing", "groups.token"),
    ],
)
def test_groups_that_do_not_fit_are_named_on_every_rank(groups: str, named: str) -> None:
    for message in run_on_ranks(mesh_error, 2, groups):
        assert message.startswith(named)


def swapped_mesh_error() -> str:
    groups = groups_of(ExpertTopology(4, ep=2, etp=2)).experts
    with pytest.raises(ValueError) as error:
        expert_mesh(groups._replace(ep=groups.etp, etp=groups.ep))
    return str(error.value)


def test_ep_and_etp_swapped_are_named_on_every_rank() -> None:
    for message in run_on_ranks(swapped_mesh_error, 4):
        assert message.startswith("groups.ep_etp must be ordered with etp fastest")


@pytest.mark.parametrize(
    ("sizes", "message"),
    [
        ({"world_size": 0}, "world_size must be an integer >= 1"),
        ({"world_size": 4, "ep": -1}, "ep must be an integer >= 1"),
        ({"world_size": 4, "etp": 2.0}, "etp must be an integer >= 1"),
        ({"world_size": 8, "cp": 3}, "pp x tp x cp must divide world_size 8, got .* cp 3"),
        ({"world_size": 8, "ep": 2, "etp": 3}, "pp x ep x etp must divide world_size 8.* etp 3"),
        ({"world_size": 4, "pp": 2, "ep": 4}, "pp x ep x etp must divide world_size 4"),
    ],
)
def test_sizes_that_do_not_divide(sizes: dict[str, int], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        ExpertTopology(**sizes)


def test_bad_axis_and_rank() -> None:
    with pytest.raises(ValueError, match="axis must be one of"):
        ExpertTopology(2).groups("rows")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="rank must be a global rank"):
        ExpertTopology(2).dense_coordinates(2)
