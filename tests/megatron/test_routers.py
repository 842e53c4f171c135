"""Megatron's options of routers and shared experts: the layer is Megatron's own on one rank."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from megatron.core.distributed.finalize_model_grads import (
    _update_router_expert_bias,
    reset_model_temporary_tensors,
)
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.tensor_parallel import ColumnParallelLinear, RowParallelLinear
from megatron.core.transformer.mlp import MLPSubmodules
from megatron.core.transformer.moe import moe_utils
from megatron.core.transformer.moe.experts import SequentialMLP
from megatron.core.transformer.moe.moe_layer import MoELayer, MoESubmodules
from megatron.core.transformer.moe.moe_utils import MoEAuxLossAutoScaler
from megatron.core.transformer.moe.shared_experts import SharedExpertMLP
from megatron.core.transformer.spec_utils import ModuleSpec, build_module
from torch import Tensor

from moe_parallel.megatron import expert_parallel_moe_spec
from tests.closeness import assert_equal_to_rounding
from tests.megatron.attention import config, parallel_config
from tests.megatron.cpu import initialize, summed
from tests.ranks import run_on_ranks

pytestmark = pytest.mark.megatron

LENGTH, BATCH, HIDDEN = 6, 3, 10
OPTIONS = {
    "num_moe_experts": 8,
    "moe_router_topk": 4,
    "moe_ffn_hidden_size": 12,
    "moe_router_dtype": "fp64",
    "moe_router_load_balancing_type": "none",
    "moe_token_dispatcher_type": "allgather",  # that which makes no CUDA stream
}
GROUPS = {"moe_router_num_groups": 4, "moe_router_group_topk": 2}
SIGMOID = {"moe_router_score_function": "sigmoid"}
BIASED = SIGMOID | {"moe_router_enable_expert_bias": True}
SHARED = {"moe_shared_expert_intermediate_size": 16}


def loss(kind: Any, coefficient: Any = 0.4) -> dict[str, Any]:
    return {"moe_router_load_balancing_type": kind, "moe_aux_loss_coeff": coefficient}


CASES = {
    "softmax before": {"moe_router_pre_softmax": True} | loss("aux_loss"),
    "softmax before, groups": {"moe_router_pre_softmax": True} | GROUPS,
    "sigmoid": SIGMOID | {"moe_router_topk_scaling_factor": 2.5} | loss("seq_aux_loss"),
    "sigmoid, one expert": SIGMOID | {"moe_router_topk": 1},
    "bias and groups": BIASED | GROUPS | loss("global_aux_loss"),
    "bias, groups, rows": BIASED | GROUPS | loss("seq_aux_loss"),
    "two losses": loss(["aux_loss", "global_aux_loss"], [0.4, 0.3]),
    "z-loss": {"moe_z_loss_coeff": 0.1},
    "shared expert": SHARED,
    "gated shared expert": SHARED | {"moe_shared_expert_gate": True},
}


def megatrons(options: dict[str, Any], groups: ProcessGroupCollection) -> Any:
    moe_utils.te_general_gemm = None  # 0.16 has no such name without TransformerEngine
    linears = MLPSubmodules(linear_fc1=ColumnParallelLinear, linear_fc2=RowParallelLinear)
    parts = {"experts": SequentialMLP, "shared_experts": SharedExpertMLP}
    specs = {name: ModuleSpec(part, submodules=linears) for name, part in parts.items()}
    spec = ModuleSpec(MoELayer, submodules=MoESubmodules(**specs))
    return build_module(spec, config=config(**(OPTIONS | options)), pg_collection=groups)


def copy_weights(ours: Any, theirs: Any) -> list[tuple[Tensor, list[Tensor]]]:
    """Theirs become ours; each of our parameters with theirs, in parts."""
    moe, experts = ours.moe, theirs.experts.local_experts
    pairs = [(moe.gate.weight, [theirs.router.weight])]
    pairs += [(moe.experts.w13, [expert.linear_fc1.weight for expert in experts])]
    pairs += [(moe.experts.w2, [expert.linear_fc2.weight for expert in experts])]
    if moe.shared is not None:
        pairs += [(moe.shared.w13, [theirs.shared_experts.linear_fc1.weight])]
        pairs += [(moe.shared.w2, [theirs.shared_experts.linear_fc2.weight])]
        if moe.shared.gate is not None:
            pairs += [(moe.shared.gate, [theirs.shared_experts.gate_weight])]
    for weight, parts in pairs:
        torch.nn.init.normal_(weight)
        for part, values in zip(parts, weight.detach().chunk(len(parts))):
            part.data.copy_(values.reshape(part.shape))
    if moe.gate.expert_bias is not None:
        torch.nn.init.normal_(moe.gate.expert_bias, std=0.3)
        theirs.router.expert_bias.copy_(moe.gate.expert_bias)
    return pairs


def inputs() -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(5)
    shape = (LENGTH, BATCH, HIDDEN)
    return tuple(torch.randn(shape, generator=generator, dtype=torch.float64) for _ in range(2))


def results(layer: Any, padding: Tensor | None) -> tuple[Tensor, Tensor]:
    """Output and input gradient; padding has no loss, and nothing is asked of its rows."""
    x, grad = inputs()
    is_token = torch.ones(LENGTH, BATCH, 1) if padding is None else ~padding.T.unsqueeze(2)
    MoEAuxLossAutoScaler.set_loss_scale(torch.ones(1))
    layer.set_layer_number(1)
    output, _ = layer(x.requires_grad_(), padding_mask=padding)
    output.backward(grad * is_token)
    return output.detach() * is_token, x.grad * is_token


def compare(options: dict[str, Any], padded: bool) -> None:
    groups = initialize()
    theirs = megatrons(options, groups)
    settings = config(**(OPTIONS | options))
    ours = build_module(expert_parallel_moe_spec(), config=settings, pg_collection=groups)
    pairs = copy_weights(ours, theirs)
    padding = None
    if padded:
        padding = torch.zeros(BATCH, LENGTH, dtype=torch.bool)
        padding[:, 4:] = True  # of every row: Megatron divides by their mean length
    # Its scores are float32.
    tolerance = {"tolerance": 16 * torch.finfo(torch.float32).eps}
    for actual, expected in zip(results(ours, padding), results(theirs, padding)):
        assert_equal_to_rounding(actual, expected, **tolerance)
    for weight, parts in pairs:
        grads = torch.stack([part.grad for part in parts]).view_as(weight)
        assert_equal_to_rounding(weight.grad, grads, **tolerance)
    if options.get("moe_router_enable_expert_bias"):
        for layer in (ours, theirs):
            _update_router_expert_bias([layer], settings)
            reset_model_temporary_tensors(settings, [layer])
        assert torch.equal(ours.moe.gate.expert_bias, theirs.router.expert_bias)
        assert not ours.moe.gate.local_tokens_per_expert.any()


@pytest.mark.parametrize("name", CASES)
def test_is_megatrons_layer(name: str) -> None:
    run_on_ranks(compare, 1, CASES[name], False)


@pytest.mark.parametrize("name", ["sigmoid", "two losses", "z-loss", "softmax before"])
def test_padding_is_neither_routed_nor_counted(name: str) -> None:
    run_on_ranks(compare, 1, CASES[name], True)


EVERYTHING = (
    BIASED | GROUPS | SHARED | {"moe_z_loss_coeff": 0.1, "moe_router_topk_scaling_factor": 2.0}
)


def parts_on_rank(sizes: dict[str, int], options: dict[str, Any], padded: bool) -> list[Tensor]:
    """Output and gradient of this rank's rows; gradients of what all ranks hold; the load."""
    groups = initialize(**sizes)
    settings = parallel_config(sizes, **(OPTIONS | EVERYTHING | options))
    torch.manual_seed(7)
    layer = build_module(expert_parallel_moe_spec(), config=settings, pg_collection=groups)
    generator = torch.Generator().manual_seed(3)
    bias = torch.randn(8, generator=generator) / 4
    layer.moe.gate.expert_bias.copy_(bias)
    layer.set_layer_number(1)
    tp, dp = groups.tp, groups.tp_dp_cp.size() // groups.tp.size()
    replica = groups.tp_dp_cp.rank() // tp.size()
    padding = torch.arange(LENGTH) >= torch.tensor([[LENGTH - 2], [LENGTH]])  # of each row others
    padding = padding.chunk(dp)[replica].chunk(tp.size(), 1)[tp.rank()]
    x, grad = (rows[:, :2].chunk(dp, 1)[replica].chunk(tp.size())[tp.rank()] for rows in inputs())
    mask = padding.clone() if padded else None
    x = x.clone().requires_grad_()
    MoEAuxLossAutoScaler.set_loss_scale(torch.ones(1))
    for _ in range(2):  # the second call finds the order at the mask
        layer.zero_grad()
        x.grad = None
        output, _ = layer(x, padding_mask=mask)
        output.backward(grad * dp)
    assert (mask is not None) == hasattr(mask, "_token_order")
    weights = (layer.moe.gate.weight, *layer.moe.shared.parameters())
    grads = [summed(weight.grad, groups.tp_dp_cp) / dp for weight in weights]
    load = summed(layer.moe.gate.local_tokens_per_expert, groups.tp_dp_cp)
    return [output.detach(), x.grad / dp, *grads, load.double()]


@pytest.mark.parametrize("padded", [False, True])
@pytest.mark.parametrize(
    ("sizes", "dim", "kind"),
    [
        ({"ep": 2}, 1, "seq_aux_loss"),
        ({"tp": 2, "etp": 2}, 0, "seq_aux_loss"),
        ({"tp": 2, "ep": 2}, 0, "aux_loss"),
    ],
    ids=str,
)
def test_ranks_are_one_rank(sizes: dict[str, int], dim: int, kind: str, padded: bool) -> None:
    (expected,) = run_on_ranks(parts_on_rank, 1, {}, loss(kind), padded)
    parts = run_on_ranks(parts_on_rank, 2, sizes, loss(kind), padded)
    for i, wanted in enumerate(expected):
        actual = torch.cat([part[i] for part in parts], dim) if i < 2 else parts[0][i]
        assert_equal_to_rounding(actual, wanted, what=str(i))
