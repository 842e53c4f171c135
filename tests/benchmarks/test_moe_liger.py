"""LigerCute's experts as a peer, with a stand-in for its kernels: they need a GPU and NVSHMEM."""

from __future__ import annotations

import sys
from types import ModuleType
from typing import Any
from unittest.mock import patch

import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks import moe_cases, moe_liger, moe_overlap
from benchmarks.harness import Machine
from tests.ranks import run_on_ranks

CASE = moe_overlap.Case(64, hidden=64, ffn=32, experts=8)


def fused(
    x: Tensor, experts: Tensor, weights: Tensor, gate: Tensor, up: Tensor, down: Tensor,
    num_experts: int, top_k: int,
) -> Tensor:  # fmt: skip
    """What its kernels compute, of the types and shapes that they take."""
    assert experts.dtype == torch.int32
    assert weights.dtype == x.dtype == torch.bfloat16
    assert gate.shape == up.shape == (num_experts, down.shape[2], x.shape[1])
    assert gate.is_contiguous()
    assert up.is_contiguous()
    assert experts.shape[1] == top_k
    act = F.silu(torch.einsum("tm,efm->tef", x, gate)) * torch.einsum("tm,efm->tef", x, up)
    every = torch.einsum("tef,emf->tem", act, down)
    chosen = every.gather(1, experts.long()[..., None].expand(-1, -1, x.shape[1]))
    return (chosen * weights[..., None]).sum(1)


def stand_ins(log: list[str]) -> dict[str, Any]:
    """Modules of its names, which write down what is asked of the kernels' memory."""
    names = ["liger_cute_kernels", "liger_cute_kernels.tvm_ffi", "liger_cute_kernels.nvshmem"]
    names += ["liger_kernel.ops.cute.ops.moe"]
    made: dict[str, Any] = {name: ModuleType(name) for name in names}
    package, ffi, nvshmem, ops = made.values()
    package.MoEConfig, package.tvm_ffi, package.nvshmem = dict, ffi, nvshmem
    package.configure = lambda moe: log.append(f"configure {moe['max_tokens']}")
    ffi.nvshmem_is_initialized, ffi.team_world = lambda: bool(log), lambda: 0
    ffi.moe_pop_fwd = lambda team: log.append("pop")
    nvshmem.pool_clear_all = lambda: log.append("clear")
    ops.moe_fused = fused
    return made


def on_rank() -> list[str]:
    log: list[str] = []
    machine = Machine("cpu", torch.bfloat16, 1)
    with (
        moe_overlap.groups_of(CASE) as groups,
        patch.dict(sys.modules, stand_ins(log)),
        patch.object(moe_liger, "obstacle", lambda: None),
        patch.object(moe_liger, "version", lambda _: "0.0"),
        patch.object(torch.cuda, "synchronize"),
    ):
        layer = moe_cases.build(CASE, groups, machine)
        x, grad = moe_overlap.inputs(CASE, machine)
        for _ in range(2):
            way = moe_liger.peers(CASE, layer, machine, x, grad)["LigerCute 0.0 fused experts"]
        way.forward(x)  # no backward follows
        torch.autograd.grad(way.forward(x), [x, *way.parameters], grad)
        way.forward(x)
        no_kernel = patch.object(moe_liger._Experts, "forward", side_effect=RuntimeError("untuned"))
        with no_kernel:
            assert moe_liger.peers(CASE, layer, machine, x, grad) == {}
    return log


def test_the_peer_is_right_and_its_memory_is_given_back() -> None:
    (log,) = run_on_ranks(on_rank, 1)
    assert log == ["configure 64", "clear", "configure 64", "pop", "clear", "configure 64"]
