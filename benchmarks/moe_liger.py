"""LigerCute's fused experts, of the package liger-cute-kernels: a peer of ``moe_overlap``.

Its kernels do everything after the choice of experts: they sort rows, fetch them from other ranks
by NVSHMEM, compute and combine. The router is ours, of the layer that is compared. It serves
bfloat16 on Hopper and Blackwell, experts that no ranks cut (ETP 1), one device a process, and wants
gate and up weights apart: copies of the layer's. Its kernels serve shapes that they were tuned for,
small ones not among them, so it is compared with the layer at the sizes that are measured.
"""

from __future__ import annotations

import importlib
from functools import cache
from importlib.metadata import version

import torch
import torch.distributed as dist
from torch import Tensor

from benchmarks import harness
from benchmarks.harness import Machine
from benchmarks.moe_cases import Case, Way
from moe_parallel import ExpertParallelMoE, TokenOrder


@cache
def obstacle() -> str | None:
    """Why it is left out; None if it can run."""
    try:
        importlib.import_module("liger_kernel.ops.cute.ops.moe")
    except ImportError as error:  # it, its native part, or no GPU that it serves
        return str(error)
    return None


def peers(
    case: Case, layer: ExpertParallelMoE, machine: Machine, x: Tensor, grad: Tensor
) -> dict[str, Way]:
    """Its experts by name, with weights and router of ``layer``; none if they cannot run.

    Output and input gradient are compared with those of ``layer`` for ``x`` and ``grad``.
    """
    served = case.etp == 1 and case.router == "softmax" and machine.dtype == torch.bfloat16
    if obstacle() is not None or not served:
        return {}
    name = f"LigerCute {version('liger-cute-kernels')} fused experts"
    experts = _Experts(case, layer)
    ours = harness.results(lambda x: layer(x, token_order=experts.order).output, [x], grad)
    try:
        theirs = harness.results(experts.forward, [x], grad)
    except RuntimeError as error:  # no kernel for this shape: on all ranks
        harness.say(f"left out: {name}: {error}")
        return {}
    harness.check(name, theirs, ours)
    return {name: Way(experts.forward, experts.parameters)}


class _Experts:
    """Fused experts, set up for one case; what an earlier case has reserved is given back."""

    def __init__(self, case: Case, layer: ExpertParallelMoE) -> None:
        from liger_cute_kernels import MoEConfig, configure, nvshmem, tvm_ffi

        if tvm_ffi.nvshmem_is_initialized():
            torch.cuda.synchronize()
            nvshmem.pool_clear_all()
        # moe_overlap has meshes of EP over all ranks alone.
        configure(
            moe=MoEConfig(
                max_tokens=case.tokens, hidden_size=case.hidden, num_experts=case.experts,
                top_k=case.top_k, num_hosts=1, gpus_per_host=case.ep,
            )
        )  # fmt: skip
        self.case, self.layer = case, layer
        self.order = TokenOrder.contiguous([case.tokens] * dist.get_world_size())
        w13 = layer.experts.w13.detach()
        gate, up = (w13[:, half].clone().requires_grad_() for half in range(2))
        self.parameters = (layer.gate.weight, gate, up, layer.experts.w2)
        self.kept = False

    def forward(self, x: Tensor) -> Tensor:
        """Output of the layer for its tokens ``[T, M]``."""
        from liger_cute_kernels import tvm_ffi
        from liger_kernel.ops.cute.ops.moe import moe_fused

        if self.kept:  # a forward without backward leaves its rows on the stack
            tvm_ffi.moe_pop_fwd(tvm_ffi.team_world())
        routing = self.layer.gate(x, self.order)
        _, gate, up, down = self.parameters
        output = moe_fused(
            x, routing.experts.int(), routing.weights.to(x.dtype), gate, up, down,
            self.case.experts, self.case.top_k,
        )  # fmt: skip
        self.kept = True
        output.register_hook(self._taken)
        return output

    def _taken(self, _: Tensor) -> None:
        self.kept = False
