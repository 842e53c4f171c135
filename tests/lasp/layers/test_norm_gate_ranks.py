"""The gated norm over features that tensor parallel ranks hold in slices."""

from __future__ import annotations

import pytest
import torch
import torch.distributed as dist
from torch import Tensor

from lasp.layers.norm_gate import norm_gate
from tests.closeness import assert_within_budget
from tests.lasp.layers.test_norm_gate import (
    DEVICE,
    EPS,
    NEEDS_TRITON,
    norm_inputs,
    written_out_norm,
)
from tests.ranks import run_on_ranks


def norm_on_rank(impl: str, device: str = "cpu") -> list[Tensor]:
    """Rank function: this rank's features, outputs and gradients."""
    inputs = norm_inputs(9, 24, on="cpu")
    rank, size = dist.get_rank(), dist.get_world_size()
    shares = [t.unflatten(-1, (size, -1))[..., rank, :].to(device) for t in inputs]
    group = dist.group.WORLD

    def function(*tensors: Tensor) -> tuple[Tensor]:
        return (norm_gate(*tensors, eps=EPS, tp_group=group, impl=impl),)

    leaves = [x.detach().requires_grad_() for x in shares]
    (y,) = function(*leaves)
    dy = inputs[0].cos().unflatten(-1, (size, -1))[..., rank, :].to(device)
    return [t.detach().cpu() for t in (y, *torch.autograd.grad(y, leaves, dy))]


def check_ranks(results: list[list[Tensor]]) -> None:
    torch.manual_seed(0)
    inputs = norm_inputs(9, 24, on="cpu")
    exact = [t.double().requires_grad_() for t in inputs]
    (y,) = written_out_norm(*exact)
    wide = [y.detach(), *torch.autograd.grad(y, exact, inputs[0].double().cos())]
    leaves = [t.requires_grad_() for t in inputs]
    y = norm_gate(*leaves, eps=EPS)
    fair = [y.detach(), *torch.autograd.grad(y, leaves, inputs[0].detach().cos())]
    for index, (w, f) in enumerate(zip(wide, fair)):
        together = torch.cat([result[index] for result in results], dim=-1)
        assert_within_budget(together, w, f, what=f"result {index}")


def seeded(impl: str, device: str = "cpu") -> list[Tensor]:
    torch.manual_seed(0)
    return norm_on_rank(impl, device)


# Gloo ranks interpret the kernels; where there is a GPU they run compiled, in the test below.
ON_GLOO = ["eager"] + [pytest.param("triton", marks=NEEDS_TRITON)] * (DEVICE == "cpu")


@pytest.mark.parametrize("impl", ON_GLOO)
def test_over_tensor_parallel_ranks(impl: str) -> None:
    check_ranks(run_on_ranks(seeded, 2, impl))


@pytest.mark.multi_gpu
def test_over_tensor_parallel_gpus() -> None:
    check_ranks(run_on_ranks(seeded, 2, "triton", "cuda", backend="nccl"))
