"""Megatron-Core's MoELayer with its all-to-all dispatcher: a peer of ``moe_overlap``.

Without TransformerEngine Megatron-Core 0.17 to 0.19 has one kind of experts to train,
SequentialMLP: a loop over MLPs, whatever ``moe_grouped_gemm`` says (its ``grouped_mm`` is for
inference, and the GroupedMLP of 0.16 needs the package grouped_gemm). That is what is measured, on
GPUs with Megatron's fused SwiGLU, which torch.compile makes (TORCH_COMPILE_DISABLE=1 where it can
not). Router in float32 as ours is, no auxiliary loss, no drops, the same communicators; the experts
share the memory of our layer's.
"""

from __future__ import annotations

import importlib
import os
from contextlib import AbstractContextManager, ExitStack, nullcontext
from functools import cache, partial
from typing import Any
from unittest.mock import MagicMock, patch

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor

from benchmarks.harness import Machine
from benchmarks.moe_cases import Case, Way
from moe_parallel import ExpertGroups, ExpertParallelMoE


@cache
def obstacle() -> str | None:
    """Why Megatron-Core is left out; None if it can run."""
    try:
        importlib.import_module("megatron.core.transformer.moe.moe_layer")
    except ImportError as error:  # it, or what it needs
        return str(error)
    return None


def peers(
    case: Case, layer: ExpertParallelMoE, groups: ExpertGroups, machine: Machine
) -> dict[str, Way]:
    """Its layer by name, with the weights of ``layer``; none if it or its router cannot run."""
    if obstacle() is not None or case.router != "softmax":
        return {}
    import megatron.core

    in_force = nullcontext() if machine.device == "cuda" else _OnCpu()
    with in_force:
        module = _module(case, groups, machine)
    compiled = os.environ.get("TORCH_COMPILE_DISABLE") != "1"
    fused = "fused" if module.config.bias_activation_fusion and compiled else "unfused"
    name = f"Megatron-Core {megatron.core.__version__} alltoall, SequentialMLP, {fused} SwiGLU"
    with torch.no_grad():
        module.router.weight.data = layer.gate.weight.to(machine.dtype)
        for expert, w13, w2 in zip(
            module.experts.local_experts, layer.experts.w13, layer.experts.w2
        ):
            expert.linear_fc1.weight.data = w13.flatten(0, 1)
            expert.linear_fc2.weight.data = w2

    def forward(x: Tensor) -> Tensor:
        output, _ = module(x.unsqueeze(1))
        squeezed: Tensor = output.squeeze(1)
        return squeezed

    return {name: Way(forward, tuple(module.parameters()), in_force)}


def _module(case: Case, groups: ExpertGroups, machine: Machine) -> Any:
    """The MoELayer, its weights not filled."""
    from megatron.core.models.gpt.moe_module_specs import get_moe_module_spec
    from megatron.core.process_groups_config import ProcessGroupCollection
    from megatron.core.transformer.moe import moe_utils
    from megatron.core.transformer.spec_utils import ModuleSpec, build_module
    from megatron.core.transformer.transformer_config import TransformerConfig

    if not hasattr(moe_utils, "te_general_gemm"):
        moe_utils.te_general_gemm = None  # 0.16 has no such name without TransformerEngine
    on_gpu = machine.device == "cuda"
    config = TransformerConfig(
        num_layers=1, hidden_size=case.hidden, num_attention_heads=1, ffn_hidden_size=case.ffn,
        num_moe_experts=case.experts, moe_ffn_hidden_size=case.ffn, moe_router_topk=case.top_k,
        moe_router_dtype="fp32", moe_router_load_balancing_type="none", moe_aux_loss_coeff=0.0,
        moe_token_dispatcher_type="alltoall", gated_linear_unit=True, activation_func=F.silu,
        bias_activation_fusion=on_gpu, add_bias_linear=False, gradient_accumulation_fusion=False,
        expert_model_parallel_size=case.ep, expert_tensor_parallel_size=case.etp,
        params_dtype=machine.dtype, bf16=machine.dtype == torch.bfloat16,
        perform_initialization=False, use_cpu_initialization=not on_gpu,
    )  # fmt: skip
    one = _alone()
    collection = ProcessGroupCollection(
        tp=one, cp=one, tp_cp=one, tp_dp_cp=dist.group.WORLD, expt_dp=one, ep=groups.ep or one,
        expt_tp=groups.etp or one, tp_ep=groups.ep_etp or groups.ep or groups.etp or one,
    )  # fmt: skip
    spec = get_moe_module_spec(use_te=False, num_experts=case.experts, moe_grouped_gemm=False)
    make = partial(build_module, spec) if isinstance(spec, ModuleSpec) else spec
    return make(config=config, pg_collection=collection)


@cache
def _alone() -> dist.ProcessGroup:
    """The group of this rank alone; all ranks make theirs at once."""
    made = [dist.new_group([rank]) for rank in range(dist.get_world_size())]
    return made[dist.get_rank()]


class _OnCpu(AbstractContextManager[None]):
    """What it takes to run without a GPU, where only answers count: no streams, no waits."""

    def __init__(self) -> None:
        from megatron.core.transformer.moe import token_dispatcher

        stream, cpu = MagicMock(), torch.device("cpu")
        dispatcher = token_dispatcher.MoEAlltoAllTokenDispatcher
        # What is on the CPU already would stay a tensor, and collectives take lists of splits.
        move = patch.object(token_dispatcher, "maybe_move_tensor_to_cpu", _on_host)
        self.patches = (
            move,
            patch.object(dispatcher, "cuda_dtoh_stream", stream),
            patch.object(torch.cuda, "current_stream", lambda *_: stream),
            patch.object(torch.cuda, "stream", lambda _: nullcontext()),
            patch.object(torch.cuda, "current_device", lambda: cpu),
        )

    def __enter__(self) -> None:
        self.entered = ExitStack()
        for one in self.patches:
            self.entered.enter_context(one)

    def __exit__(self, *_: object) -> None:
        self.entered.close()


def _on_host(tensor: Any, as_numpy: bool = False, record_stream: bool = False) -> Any:
    return tensor.numpy() if as_numpy and isinstance(tensor, Tensor) else tensor
