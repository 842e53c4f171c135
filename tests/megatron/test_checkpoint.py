"""A checkpoint written under one parallel layout is the same model under another."""

from __future__ import annotations

import inspect
from pathlib import Path
from typing import Any

import pytest
import torch
from megatron.core import dist_checkpointing
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.tensor_parallel import ColumnParallelLinear, RowParallelLinear
from megatron.core.transformer.mlp import MLPSubmodules
from megatron.core.transformer.moe.experts import SequentialMLP
from megatron.core.transformer.moe.moe_layer import MoELayer, MoESubmodules
from megatron.core.transformer.moe.shared_experts import SharedExpertMLP
from megatron.core.transformer.spec_utils import ModuleSpec, build_module

from moe_parallel.megatron import expert_parallel_moe_spec
from tests.megatron.attention import parallel_config
from tests.megatron.block import HYBRID, MODELS, build_block, own_parts
from tests.megatron.cpu import checkpoints_from_ranks, initialize
from tests.megatron.test_moe_parallel import OPTIONS, load_plain, plain
from tests.ranks import run_on_ranks

pytestmark = pytest.mark.megatron


def save(sharded: dict[str, Any], directory: Path) -> None:
    options = {}
    if "async_strategy" in inspect.signature(dist_checkpointing.save).parameters:
        options["async_strategy"] = "mcore"  # from 0.17 another package by default
    with checkpoints_from_ranks():
        dist_checkpointing.save(sharded, str(directory), **options)


def save_block(sizes: dict[str, int], directory: Path, options: dict[str, Any]) -> None:
    block = build_block(sizes, initialize(**sizes), **options)
    save(block.sharded_state_dict("decoder."), directory)


def load_block(sizes: dict[str, int], directory: Path, options: dict[str, Any]) -> None:
    """Every parameter is its part of the plain model's, bit for bit."""
    groups = initialize(**sizes)
    block = build_block(sizes, groups, **options)
    for parameter in block.parameters():
        parameter.data.fill_(torch.nan)
    sharded = block.sharded_state_dict("decoder.")
    loaded = dist_checkpointing.load(sharded, str(directory))
    loaded = {name.removeprefix("decoder."): value for name, value in loaded.items()}
    missing, unexpected = block.load_state_dict(loaded, strict=False)
    assert not unexpected
    assert all(name.endswith("_extra_state") for name in missing), missing
    for name, parameter, part in own_parts(block, groups, options.get("hybrid", HYBRID)):
        assert torch.equal(parameter, part), name


LAYOUTS = [
    (1, {}),
    (4, {"tp": 2, "cp": 2, "ep": 2, "etp": 2}),
    (4, {"pp": 2, "cp": 2, "etp": 2}),
]


def test_loads_under_every_other_layout(tmp_path: Path) -> None:
    for number, (num_ranks, sizes) in enumerate(LAYOUTS):
        directory = tmp_path / str(number)
        directory.mkdir()
        run_on_ranks(save_block, num_ranks, sizes, directory, {})
        others, other_sizes = LAYOUTS[number - 1]
        run_on_ranks(load_block, others, other_sizes, directory, {})


@pytest.mark.parametrize("model", [pytest.param("ring", marks=pytest.mark.slow), "ling", "sala"])
def test_other_models_load_under_another_layout(tmp_path: Path, model: str) -> None:
    saved, loaded = {"tp": 2, "cp": 2, "ep": 2, "etp": 2}, {"pp": 2, "ep": 2}
    if model == "sala":
        saved, loaded = {"tp": 2, "cp": 2}, {"pp": 2}
    run_on_ranks(save_block, 4, saved, tmp_path, MODELS[model])
    run_on_ranks(load_block, 4 if "ep" in loaded else 2, loaded, tmp_path, MODELS[model])


SHARED = {
    "moe_router_enable_expert_bias": True,
    "moe_router_score_function": "sigmoid",
    "moe_shared_expert_gate": True,
    "moe_shared_expert_intermediate_size": 12,
}


def shared_parts(layer: Any, theirs: bool, groups: ProcessGroupCollection) -> list[tuple[Any, Any]]:
    """The layer's shared expert and bias, each with the values that it is to have."""
    w13 = torch.arange(240, dtype=torch.float64).view(2, 12, 10)
    w2, gate, bias = -w13[0].T, w13[1, :1] / 7, torch.arange(4) / 8
    if not theirs:
        moe = layer.moe
        holders = (moe.shared.w13, moe.shared.w2, moe.shared.gate, moe.gate.expert_bias)
        return list(zip(holders, (w13, w2, gate, bias)))
    w13, w2 = (w.chunk(groups.tp.size(), 1)[groups.tp.rank()] for w in (w13, w2))
    shared = layer.shared_experts
    holders = (shared.linear_fc1.weight, shared.linear_fc2.weight, shared.gate_weight)
    return list(zip((*holders, layer.router.expert_bias), (w13.flatten(0, 1), w2, gate, bias)))


def megatrons_layer(sizes: dict[str, int], groups: ProcessGroupCollection) -> Any:
    linears = MLPSubmodules(linear_fc1=ColumnParallelLinear, linear_fc2=RowParallelLinear)
    experts = ModuleSpec(SequentialMLP, submodules=linears)
    shared = ModuleSpec(SharedExpertMLP, submodules=linears)
    spec = ModuleSpec(MoELayer, submodules=MoESubmodules(experts=experts, shared_experts=shared))
    # The dispatcher that makes no CUDA stream; it has no capacity.
    dispatcher = {"moe_token_dispatcher_type": "allgather", "moe_expert_capacity_factor": None}
    options = parallel_config(sizes, **(OPTIONS | SHARED | dispatcher))
    return build_module(spec, config=options, pg_collection=groups)


def our_layer(sizes: dict[str, int], groups: ProcessGroupCollection) -> Any:
    options = parallel_config(sizes, **(OPTIONS | SHARED))
    return build_module(expert_parallel_moe_spec(), config=options, pg_collection=groups)


def save_layer(theirs: bool, sizes: dict[str, int], directory: Path) -> None:
    groups = initialize(**sizes)
    if theirs:
        layer = megatrons_layer(sizes, groups)
        copy_to_megatrons(layer, groups)
    else:
        layer = our_layer(sizes, groups)
        load_plain(layer, groups)
    for holder, values in shared_parts(layer, theirs, groups):
        holder.data.copy_(values)
    save(layer.sharded_state_dict("mlp."), directory)


def parts_of(groups: ProcessGroupCollection) -> tuple[Any, Any]:
    """This rank's w13 and w2 of the plain layer."""
    whole = plain().experts
    return tuple(
        getattr(whole, name)
        .chunk(groups.ep.size(), ep_dim)[groups.ep.rank()]
        .chunk(groups.expt_tp.size(), etp_dim)[groups.expt_tp.rank()]
        for name, (ep_dim, etp_dim) in whole.sharding().items()
    )


def copy_to_megatrons(layer: Any, groups: ProcessGroupCollection) -> None:
    layer.router.weight.data.copy_(plain().gate.weight)
    for w13, w2, expert in zip(*parts_of(groups), layer.experts.local_experts, strict=True):
        expert.linear_fc1.weight.data.copy_(w13.flatten(0, 1))
        expert.linear_fc2.weight.data.copy_(w2)


def load_layer(theirs: bool, sizes: dict[str, int], directory: Path) -> None:
    groups = initialize(**sizes)
    layer = (megatrons_layer if theirs else our_layer)(sizes, groups)
    for tensor in layer.state_dict().values():
        if isinstance(tensor, torch.Tensor):
            tensor.fill_(torch.nan)
    loaded = dist_checkpointing.load(layer.sharded_state_dict("mlp."), str(directory))
    layer.load_state_dict({n.removeprefix("mlp."): v for n, v in loaded.items()}, strict=False)
    for holder, values in shared_parts(layer, theirs, groups):
        assert torch.equal(holder, values)
    gate = layer.router.weight if theirs else layer.moe.gate.weight
    assert torch.equal(gate, plain().gate.weight)
    w13, w2 = parts_of(groups)
    if theirs:
        for index, expert in enumerate(layer.experts.local_experts):
            assert torch.equal(expert.linear_fc1.weight, w13[index].flatten(0, 1))
            assert torch.equal(expert.linear_fc2.weight, w2[index])
    else:
        assert torch.equal(layer.moe.experts.w13, w13)
        assert torch.equal(layer.moe.experts.w2, w2)


@pytest.mark.parametrize("theirs_first", [True, False])
def test_experts_interchange_with_megatrons(tmp_path: Path, theirs_first: bool) -> None:
    first, second = (2, {"ep": 2}), (2, {"tp": 2, "etp": 2})
    run_on_ranks(save_layer, first[0], theirs_first, first[1], tmp_path)
    run_on_ranks(load_layer, second[0], not theirs_first, second[1], tmp_path)
