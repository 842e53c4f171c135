"""Gradients of gradients: right where they exist, an error where not, never silently left out."""

from __future__ import annotations

from importlib.util import find_spec

import pytest
import torch
import torch.distributed as dist
from torch import Tensor

from lasp.layers.norm_gate import norm_gate
from lasp.lightning.attention import lightning_attention
from tests.closeness import assert_equal_to_rounding
from tests.ranks import run_on_ranks

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"  # where kernels are not interpreted
NEEDS_TRITON = pytest.mark.skipif(find_spec("triton") is None, reason="it has no wheel here")
IMPLS = ["eager", pytest.param("triton", marks=NEEDS_TRITON)]


def gradient_of(impl: str) -> tuple[Tensor, dict[str, Tensor]]:
    """dk, and what it depends on."""
    q, k, v, do = (torch.randn(5, 2, 4, device=DEVICE, requires_grad=True) for _ in range(4))
    state = torch.randn(1, 2, 4, 4, device=DEVICE, requires_grad=True)
    rates = torch.tensor([0.1, 0.2])
    output = lightning_attention(q, k, v, rates, initial_state=state, impl=impl).output
    (dk,) = torch.autograd.grad(output, k, do, create_graph=True)
    return dk, {"q": q, "k": k, "v": v, "do": do, "state": state}


@pytest.mark.parametrize("by", ["q", "k", "v", "do", "state"])
@pytest.mark.parametrize("impl", IMPLS)
def test_a_gradient_of_a_gradient_raises(impl: str, by: str) -> None:
    dk, leaves = gradient_of(impl)
    with pytest.raises(RuntimeError, match="recurrent_lightning_attention"):
        torch.autograd.grad(dk.square().sum(), leaves[by])


@pytest.mark.parametrize("impl", IMPLS)
def test_a_penalty_on_gradients_raises(impl: str) -> None:
    """It would do nothing if the graph just ended."""
    dk, _ = gradient_of(impl)
    with pytest.raises(RuntimeError, match="recurrent_lightning_attention"):
        dk.square().sum().backward()


def penalized(x: Tensor, gate: Tensor, group: dist.ProcessGroup | None) -> Tensor:
    """The gradient by x of a penalty on the gradients of norm and gate, of this rank's features."""
    x, gate = x.requires_grad_(), gate.requires_grad_()
    y = norm_gate(x, gate, torch.ones_like(x[0]), eps=1e-5, tp_group=group)
    (dx,) = torch.autograd.grad(y.sin().sum(), x, create_graph=True)
    (again,) = torch.autograd.grad(dx.square().sum(), x)
    return again


def penalized_on_rank(x: Tensor, gate: Tensor) -> Tensor:
    rank, size = dist.get_rank(), dist.get_world_size()
    mine = [t.chunk(size, dim=-1)[rank].clone() for t in (x, gate)]
    return penalized(mine[0], mine[1], dist.group.WORLD)


def test_norms_over_ranks_have_second_derivatives() -> None:
    x, gate = torch.randn(2, 7, 12, dtype=torch.float64)
    parts = run_on_ranks(penalized_on_rank, 2, x, gate)
    assert_equal_to_rounding(torch.cat(parts, dim=-1), penalized(x.clone(), gate.clone(), None))
