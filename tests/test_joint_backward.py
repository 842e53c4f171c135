"""Ranks whose inputs need no gradient serve those whose inputs do, in every operator."""

from __future__ import annotations

from collections.abc import Callable
from importlib.util import find_spec
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.autograd import forward_ad

from lasp import LightningAttention, SequenceLayout, lightning_attention
from lasp.layers.norm_gate import norm_gate
from moe_parallel import ExpertParallelMoE, ExpertTopology, MoEConfig
from ring import RingAttention, ring_attention
from tests.closeness import assert_equal_to_rounding
from tests.moe_parallel.layers import groups_of
from tests.ranks import run_on_ranks
from tests.ring.cases import rank_device

NEEDS_TRITON = pytest.mark.skipif(find_spec("triton") is None, reason="it has no wheel here")
LAYOUT = SequenceLayout((9, 7), 2, "zigzag")
RATES = torch.tensor([0.1, 0.2])
TENSORS = tuple(torch.randn(3, 16, 2, 4, generator=torch.Generator().manual_seed(0)))


def attention(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return ring_attention(q, k, v, layout=LAYOUT, cp_group=dist.group.WORLD).output


def lightning(q: Tensor, k: Tensor, v: Tensor, impl: str = "eager") -> Tensor:
    where: dict[str, Any] = {"layout": LAYOUT, "cp_group": dist.group.WORLD, "impl": impl}
    return lightning_attention(q, k, v, RATES, **where).output


def triton_lightning(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return lightning(q, k, v, "triton")


def norm(q: Tensor, k: Tensor, v: Tensor, impl: str = "eager") -> Tensor:
    """The features of a token lie on both ranks; the gate of each is its own."""
    weight = q.new_ones(8)
    x, gate = q.flatten(1), k.detach().flatten(1)
    return norm_gate(x, gate, weight, eps=1e-5, tp_group=dist.group.WORLD, impl=impl)


def triton_norm(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return norm(q, k, v, "triton")


def through(module: nn.Module, *tensors: Tensor, **kwargs: Any) -> Tensor:
    """A frozen layer; what is on the way to it may train."""
    module = module.to(tensors[0].device).requires_grad_(False)
    result = module(sum(tensors).flatten(1), **kwargs)
    return result if isinstance(result, Tensor) else result.output


def softmax_layer(*tensors: Tensor) -> Tensor:
    torch.manual_seed(0)
    layer = RingAttention(8, 2, 1, 4, rotary_dim=2)
    return through(layer, *tensors, layout=LAYOUT, cp_group=dist.group.WORLD)


def lightning_layer(*tensors: Tensor) -> Tensor:
    torch.manual_seed(0)
    layer = LightningAttention(8, 2, 4, 0, 2)
    return through(layer, *tensors, layout=LAYOUT, cp_group=dist.group.WORLD)


def experts(*tensors: Tensor) -> Tensor:
    groups = groups_of(ExpertTopology(2, ep=2)).experts
    return through(ExpertParallelMoE(MoEConfig(8, 6, 4, 2), groups=groups), *tensors)


OPERATORS: dict[str, Callable[..., Tensor]] = {
    function.__name__: function
    for function in (
        attention, lightning, triton_lightning, norm, triton_norm, softmax_layer,
        lightning_layer, experts,
    )
}  # fmt: skip


def gradients(name: str, training: set[int], which: slice) -> list[Tensor | None]:
    """Gradients of this rank's tensors; some require them, on the ranks that train."""
    rank, device = dist.get_rank(), rank_device()
    tensors = [LAYOUT.shard(x, rank).to(device, copy=True) for x in TENSORS]
    if rank in training:
        for x in tensors[which]:
            x.requires_grad_()
    output = OPERATORS[name](*tensors)
    assert output.requires_grad
    output.square().sum().backward()
    return [x.grad for x in tensors]


def all_ways(name: str) -> list[list[Tensor | None]]:
    """All tensors of both ranks, those of one rank, some of one rank."""
    some = [({0}, slice(0, 3)), ({1}, slice(0, 3)), ({0}, slice(0, 1)), ({1}, slice(1, 2))]
    if name.endswith("norm"):
        some = some[:2]  # its gate and what is no input of it need no other rank
    return [gradients(name, {0, 1}, slice(0, 3)), *(gradients(name, *how) for how in some)]


@pytest.mark.parametrize(
    "name", [pytest.param(n, marks=NEEDS_TRITON if "triton" in n else ()) for n in OPERATORS]
)
def test_one_rank_trains(name: str) -> None:
    for expected, *partly in run_on_ranks(all_ways, 2, name):
        for actual in partly:
            for a, e in zip(actual, expected, strict=True):
                if a is not None:
                    assert_equal_to_rounding(a, e, tolerance=1e-6)
        assert any(a is not None for actual in partly for a in actual)


def refusals(names: list[str]) -> dict[str, str]:
    """What each operator says to a tangent that only the first of its inputs has."""
    said = {}
    q, *kv = (LAYOUT.shard(x, dist.get_rank()).to(rank_device()) for x in TENSORS)
    with forward_ad.dual_level():
        dual = forward_ad.make_dual(q, torch.ones_like(q))
        for name in names:
            try:
                OPERATORS[name](dual, *kv)
            except RuntimeError as error:
                said[name] = str(error)
    return said


def test_tangents_are_not_lost_on_the_way() -> None:
    names = [n for n in OPERATORS if find_spec("triton") is not None or "triton" not in n]
    for said in run_on_ranks(refusals, 2, names):
        for name in names:
            assert "has no forward-mode derivative" in said.get(name, "nothing"), name


def without_gradients() -> list[bool]:
    tensors = [LAYOUT.shard(x, dist.get_rank()) for x in TENSORS]
    with torch.no_grad():
        return [attention(*tensors).requires_grad, lightning(*tensors).requires_grad]


def test_nothing_is_kept_where_gradients_are_off() -> None:
    assert run_on_ranks(without_gradients, 2) == [[False, False]] * 2
    assert not ring_attention(*TENSORS).output.requires_grad  # one rank has nobody to serve
