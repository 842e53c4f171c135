"""The MoE layer in Megatron is moe_parallel.ExpertParallelMoE, over any ranks."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.transformer.module import Float16Module
from megatron.core.transformer.moe.moe_layer import MoELayer
from megatron.core.transformer.moe.moe_utils import MoEAuxLossAutoScaler, track_moe_metrics
from megatron.core.transformer.spec_utils import build_module
from torch import Tensor

from moe_parallel import ExpertParallelMoE, ExpertTopology, MoEConfig, TokenOrder, check_max_rows
from moe_parallel.megatron import (
    ExpertOptions,
    ExpertParallelMoELayer,
    expert_parallel_moe_spec,
)
from tests.closeness import assert_equal_to_rounding
from tests.megatron.attention import config, parallel_config
from tests.megatron.cpu import initialize, summed
from tests.moe_parallel.batch import ORDERS, assemble, assemble_expert, local_rows, random_batch
from tests.moe_parallel.host_memory import host_memory
from tests.ranks import refusal, run_on_ranks

pytestmark = pytest.mark.megatron

NUM_TOKENS = 29
OPTIONS = {
    "num_moe_experts": 4,
    "moe_router_topk": 2,
    "moe_ffn_hidden_size": 12,
    "moe_aux_loss_coeff": 0.3,
    "moe_router_load_balancing_type": "global_aux_loss",
    "moe_token_dispatcher_type": "alltoall",
    "moe_expert_capacity_factor": 1.0,
    "moe_token_drop_policy": "position",
}
MOE_RECOMPUTE = {"recompute_granularity": "selective", "recompute_modules": ["moe"]}
NAMES = ("output", "input", "gate_weight", "w13", "w2")


def plain() -> ExpertParallelMoE:
    moe = MoEConfig(10, 12, 4, 2, capacity_factor=1.0, aux_loss_coefficient=0.3)
    return ExpertParallelMoE(moe, seed=1, dtype=torch.float64)


def load_plain(layer: ExpertParallelMoELayer, groups: ProcessGroupCollection) -> None:
    whole, experts = plain(), layer.moe.experts
    layer.moe.gate.weight.data.copy_(whole.gate.weight)
    for name, (ep_dim, etp_dim) in experts.sharding().items():
        weight = getattr(whole.experts, name)
        weight = weight.chunk(groups.ep.size(), ep_dim)[groups.ep.rank()]
        weight = weight.chunk(groups.expt_tp.size(), etp_dim)[groups.expt_tp.rank()]
        getattr(experts, name).data.copy_(weight)


def layer_on_rank(
    sizes: dict[str, int],
    order_name: str,
    options: dict[str, Any],
    copied: bool = False,
) -> list[Tensor]:
    """Output, input gradient, and what Megatron's scaling makes of the parameter gradients."""
    groups = initialize(**sizes)
    spec = expert_parallel_moe_spec(
        options=ExpertOptions(symmetric_memory=host_memory(groups.tp_ep) if copied else None)
    )
    layer = build_module(
        spec, config=parallel_config(sizes, **OPTIONS, **options), pg_collection=groups
    )
    load_plain(layer, groups)
    tokens, rank = groups.tp_dp_cp.size(), groups.tp_dp_cp.rank()
    cp, dp = groups.cp.size(), tokens // groups.tp.size() // groups.cp.size()
    order = ORDERS[order_name](NUM_TOKENS, tokens)
    batch = random_batch(NUM_TOKENS, 10)
    hidden = local_rows(batch.x, order, rank, padding=torch.nan).unsqueeze(1).requires_grad_()
    grad = local_rows(batch.grad, order, rank, padding=torch.nan).unsqueeze(1)
    # The schedule scales the auxiliary loss by cp, DDP divides every gradient by dp cp; with
    # calculate_per_token_loss Megatron divides by the tokens instead.
    divisor = NUM_TOKENS if options.get("calculate_per_token_loss") else dp * cp
    scale = 1.0 if options.get("calculate_per_token_loss") else float(cp)
    MoEAuxLossAutoScaler.set_loss_scale(torch.tensor([scale]))
    output, bias = layer(hidden, token_order=order)
    assert bias is None
    output.backward(grad * divisor)
    gate = summed(layer.moe.gate.weight.grad, groups.tp_dp_cp) / divisor
    experts = [summed(p.grad, groups.expt_dp) / divisor for p in layer.moe.experts.parameters()]
    return [output.detach().squeeze(1), hidden.grad.squeeze(1) / divisor, gate, *experts]


def plain_results() -> list[Tensor]:
    layer, batch = plain(), random_batch(NUM_TOKENS, 10)
    hidden = batch.x.requires_grad_()
    result = layer(hidden)
    assert int(result.stats.dropped.sum()) > 0  # capacity is at work
    torch.autograd.backward([result.output, result.aux_loss], [batch.grad, None])
    experts = [p.grad for p in layer.experts.parameters()]
    return [result.output.detach(), hidden.grad, layer.gate.weight.grad, *experts]


SPLITS = [
    (1, {}, "ragged"),
    (2, {"ep": 2}, "ragged"),
    pytest.param(2, {"tp": 2, "ep": 2}, "zigzag", marks=pytest.mark.slow),
    (2, {"tp": 2, "etp": 2}, "zigzag"),
    (4, {"cp": 2, "ep": 2, "etp": 2}, "shuffled"),
    pytest.param(4, {"tp": 2, "cp": 2, "ep": 4}, "shuffled", marks=pytest.mark.slow),
    pytest.param(4, {"tp": 2, "ep": 2}, "zigzag", marks=pytest.mark.slow),
    pytest.param(4, {"etp": 4}, "ragged", marks=pytest.mark.slow),
]


def check(num_ranks: int, sizes: dict[str, int], order_name: str, **options: Any) -> None:
    results = run_on_ranks(layer_on_rank, num_ranks, sizes, order_name, options)
    order = ORDERS[order_name](NUM_TOKENS, num_ranks)
    ep, etp = sizes.get("ep", 1), sizes.get("etp", 1)
    topology = ExpertTopology(num_ranks, ep=ep, etp=etp)
    replicas = topology.edp
    actual = [assemble([r[i] for r in results], order) for i in (0, 1)]
    actual.append(results[0][2])
    for i, name in ((3, "w13"), (4, "w2")):
        parts = [result[i] / replicas for result in results]  # summed over them on each already
        actual.append(assemble_expert(parts, name, topology))
    for name, tensor, expected in zip(NAMES, actual, plain_results(), strict=True):
        assert_equal_to_rounding(tensor, expected, what=name)


@pytest.mark.parametrize(("num_ranks", "sizes", "order_name"), SPLITS)
def test_equals_the_plain_layer(num_ranks, sizes, order_name) -> None:
    check(num_ranks, sizes, order_name)


def test_loss_per_token() -> None:
    check(4, {"cp": 2, "ep": 2}, "zigzag", calculate_per_token_loss=True)


def test_recomputed() -> None:
    check(2, {"ep": 2}, "zigzag", **MOE_RECOMPUTE)


def other_balancers() -> None:
    """Losses of coefficient 0 are none; TransformerLayer asks for a MoELayer."""
    for kind in ("aux_loss", "none"):
        options = OPTIONS | {"moe_router_load_balancing_type": kind, "moe_aux_loss_coeff": 0.0}
        spec, groups = expert_parallel_moe_spec(), initialize()
        layer = build_module(spec, config=config(**options), pg_collection=groups)
        assert isinstance(layer, MoELayer)
        assert layer.moe.config.aux_loss_coefficient == 0.0


def test_other_balancers_without_a_loss() -> None:
    run_on_ranks(other_balancers, 1)


def layer_before_and_in_float16_module(dtype: torch.dtype) -> list[list[Tensor]]:
    half = {"bf16": dtype == torch.bfloat16, "fp16": dtype == torch.float16}
    options = config(**OPTIONS, **half, params_dtype=dtype)
    layer = build_module(expert_parallel_moe_spec(), config=options, pg_collection=initialize())
    assert {parameter.dtype for parameter in layer.parameters()} == {dtype}
    results, batch = [], random_batch(NUM_TOKENS, 10)
    for module in (layer, Float16Module(options, layer)):
        hidden = batch.x.to(dtype).unsqueeze(1).requires_grad_()
        output, _ = module(hidden)
        output.backward(batch.grad.unsqueeze(1).to(output.dtype))
        grads = [parameter.grad for parameter in layer.parameters()]
        results.append([output.detach().to(dtype), hidden.grad, *grads])
        layer.zero_grad()
    return results


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_float16_module_changes_nothing(dtype: torch.dtype) -> None:
    """All parameters have config.params_dtype already, the gate too, as Megatron's router."""
    ((before, wrapped),) = run_on_ranks(layer_before_and_in_float16_module, 1, dtype)
    for name, actual, expected in zip(NAMES, wrapped, before, strict=True):
        assert torch.equal(actual, expected), name


def logged(sizes: dict[str, int], options: dict[str, Any]) -> float:
    """What Megatron logs of the auxiliary loss after two micro-batches of one layer of several."""
    groups = initialize(**sizes)
    spec, options = expert_parallel_moe_spec(), parallel_config(sizes, **OPTIONS, **options)
    layer = build_module(spec, config=options, layer_number=2, pg_collection=groups)
    load_plain(layer, groups)
    order = ORDERS["ragged"](NUM_TOKENS, groups.tp_dp_cp.size())
    batch, rank = random_batch(NUM_TOKENS, 10), groups.tp_dp_cp.rank()
    rows = local_rows(batch.x, order, rank, padding=torch.nan)
    track_moe_metrics(1.0, 0, num_layers=1)  # starts anew
    for _ in range(2):
        hidden = rows.unsqueeze(1).requires_grad_()
        layer(hidden, token_order=order)[0].sum().backward()
    losses: dict[str, Tensor] = {}
    track_moe_metrics(1 / 2, 0, total_loss_dict=losses, num_layers=options.num_layers)
    return losses["global_load_balancing_loss"].item() * options.num_layers


@pytest.mark.parametrize(
    ("num_ranks", "sizes", "options"),
    [(1, {}, {}), (2, {"ep": 2}, {}), (2, {"tp": 2, "etp": 2}, MOE_RECOMPUTE)],
    ids=["one", "ep-dp", "tp-recomputed"],
)
def test_megatron_logs_the_auxiliary_loss(num_ranks, sizes, options) -> None:
    result = plain()(random_batch(NUM_TOKENS, 10).x)
    expected = result.aux_loss.item() / OPTIONS["moe_aux_loss_coeff"]
    for actual in run_on_ranks(logged, num_ranks, sizes, options):
        assert actual == pytest.approx(expected, rel=1e-6)  # it logs float32


STATIC = ExpertOptions(static_shapes=True, max_rows=26)


def without_order(sizes: dict[str, int], options: dict[str, Any], ours: ExpertOptions) -> None:
    """Our layer in Megatron and the plain one on the same ranks, without an order of the tokens."""
    groups = initialize(**sizes)
    settings = parallel_config(sizes, **OPTIONS | options)
    spec = expert_parallel_moe_spec(options=ours)
    layer = build_module(spec, config=settings, pg_collection=groups)
    load_plain(layer, groups)
    alone = ExpertParallelMoE(layer.moe.config, groups=layer.moe.groups, dtype=torch.float64)
    for weight, values in zip(alone.parameters(), layer.moe.parameters()):
        weight.data.copy_(values)
    order = TokenOrder.contiguous([12] * groups.tp_dp_cp.size())
    for seed in range(2):
        x = random_batch(12, 10, seed=seed + 2 * groups.tp_dp_cp.rank()).x
        expected = alone(x, token_order=order)
        assert int(expected.stats.dropped.sum()) > 0
        assert_equal_to_rounding(layer(x.view(4, 3, 10))[0].view(12, 10), expected.output)

    if ours.static_shapes:
        for model in (layer, alone):
            assert "assignments were dropped in" in refusal(check_max_rows, model)


@pytest.mark.parametrize(
    ("options", "ours"),
    [
        ({"moe_pad_expert_input_to_capacity": True}, ExpertOptions()),
        ({"moe_expert_capacity_factor": None}, STATIC),
    ],
    ids=["padded to capacity", "static shapes"],
)
def test_static_shapes(options: dict[str, Any], ours: ExpertOptions) -> None:
    run_on_ranks(without_order, 2, {"ep": 2}, options, ours)
