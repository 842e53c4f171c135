"""Two levels: as the other exchanges to rounding, for any way to spread ranks over hosts."""

from __future__ import annotations

import pytest
import torch
import torch.distributed as dist
from torch import Tensor

from benchmarks.wire import counted
from lasp.lightning.attention import lightning_attention
from lasp.sequence.layout import SequenceLayout
from lasp.sequence.state_flow import flow_of
from lasp.state_exchange import Choice, HostGroups, host_groups, start_exchange
from tests.closeness import assert_equal_to_rounding
from tests.lasp.cases import ORDERS, PACKS, Case, check_against_oracle, make_inputs
from tests.lasp.test_exchange import ALL, STATE, expected_of, inputs_of
from tests.ranks import run_on_ranks, subgroup

LAYOUTS = [SequenceLayout(lengths, 4, order) for lengths in PACKS.values() for order in ORDERS]


def groups_of(per_host: int) -> HostGroups:
    """Made once per pool: every rank makes all."""
    inner = [subgroup(*range(start, start + per_host)) for start in range(0, 4, per_host)]
    outer = [subgroup(*range(place, 4, per_host)) for place in range(per_host)]
    host, place = divmod(dist.get_rank(), per_host)
    groups = inner[host], outer[place]
    assert all(isinstance(group, dist.ProcessGroup) for group in groups)
    return HostGroups(*groups)


def exchange_on_rank(per_host: int) -> tuple[list[Tensor], list[int], bool]:
    hosts, rank = groups_of(per_host), dist.get_rank()
    results, volumes, same = [], [], True
    for layout in LAYOUTS:
        for reverse in (False, True):
            flow = flow_of(layout, rank, reverse=reverse)
            states, transitions = inputs_of(flow, 4)
            work = ((Choice("all_gather", ALL),), states[rank], flow, [transitions])
            with counted() as received:
                results.append(start_exchange(*work, dist.group.WORLD, hosts)())
            volumes.append(received.bytes)
            same &= torch.equal(results[-1], start_exchange(*work, dist.group.WORLD, hosts)())
    return results, volumes, same


@pytest.mark.parametrize("per_host", [1, 2, 4])
def test_two_levels_give_the_prefix(per_host: int) -> None:
    for rank, (results, volumes, same) in enumerate(run_on_ranks(exchange_on_rank, 4, per_host)):
        assert same
        for index, (incoming, volume) in enumerate(zip(results, volumes)):
            layout, reverse = LAYOUTS[index // 2], bool(index % 2)
            expected = expected_of(flow_of(layout, rank, reverse=reverse), 4, rank)
            assert_equal_to_rounding(incoming, expected, what=f"{layout} {reverse}")
            if layout is LAYOUTS[0] and per_host == 2:  # contiguous, a document over all ranks
                # The neighbour's state, half of one from the other host, half of one back.
                from_host = rank < 2 if reverse else rank >= 2
                assert volume == STATE.bytes * (3 + from_host) // 2


def attend(per_host: int, cases: list[Case]) -> list[list[Tensor]]:
    rank, hosts = dist.get_rank(), host_groups(dist.group.WORLD, per_host)
    results = []
    for case in cases:
        layout, inputs = case.layout, make_inputs(case)
        leaves = [layout.shard(x, rank).clone().requires_grad_() for x in inputs[:3]]
        state = inputs.initial_state.requires_grad_()
        result = lightning_attention(
            *leaves, inputs.rates, layout=layout, cp_group=dist.group.WORLD, scale=case.scale,
            initial_state=state, exchange=hosts,
        )  # fmt: skip
        grads = torch.autograd.grad(
            result, (*leaves, state), (layout.shard(inputs.grad_output, rank), inputs.grad_final)
        )
        results.append([x.detach() for x in (*result, *grads)])
    return results


def test_the_operator_over_two_levels_equals_the_oracle() -> None:
    cases = [Case((5, 198), 4, order) for order in ORDERS]
    check_against_oracle(cases, run_on_ranks(attend, 4, 2, cases))


def refused() -> list[str]:
    x, rates = torch.ones(10, 1, 2), torch.ones(1)
    messages = []
    with pytest.raises(ValueError, match=r"ranks_per_host must divide.*: pass the") as caught:
        host_groups(dist.group.WORLD, 3)
    messages.append(str(caught.value))
    hosts = groups_of(2)
    with pytest.raises(ValueError, match="exchange must be the host groups of cp_group") as caught:
        lightning_attention(
            x, x, x, rates, layout=SequenceLayout((40,), 4), cp_group=dist.group.WORLD,
            exchange=HostGroups(hosts.outer, hosts.outer),
        )  # fmt: skip
    messages.append(str(caught.value))
    return messages


def test_wrong_groups_are_refused_on_every_rank() -> None:
    assert all(len(messages) == 2 for messages in run_on_ranks(refused, 4))
