from __future__ import annotations

from dataclasses import replace
from unittest.mock import patch

import pytest
import torch
from torch import Tensor

from moe_parallel import ExpertParallelMoE, ExpertTopology, MoEConfig, TokenOrder
from moe_parallel.config import Send
from tests.closeness import assert_equal_to_rounding
from tests.moe_parallel.batch import ORDERS, Replicated, Summed, groups_of, positions, random_batch
from tests.moe_parallel.layers import COLD, HOT, NUM_TOKENS, LayerResult, build, on_ranks, oracle
from tests.ranks import run_on_ranks

CONFIG = MoEConfig(10, 12, 8, 2, aux_loss_coefficient=0.3)


def check(topology: ExpertTopology, order_name: str, config: MoEConfig, skew: bool) -> None:
    order = ORDERS[order_name](NUM_TOKENS, topology.world_size)
    actual = on_ranks(topology, order, config, torch.float64, skew)
    for name, got, expected in zip(LayerResult._fields, actual, oracle(config, skew=skew)):
        assert_equal_to_rounding(got, expected, what=name)
    if skew:
        assert not actual.w13[COLD].any()
        assert not actual.w2[COLD].any()


TOPOLOGIES = [
    ExpertTopology(1),
    ExpertTopology(2),
    ExpertTopology(2, ep=2),
    ExpertTopology(2, etp=2),
    ExpertTopology(4),
    ExpertTopology(4, ep=2),
    ExpertTopology(4, etp=2),
    ExpertTopology(4, ep=4),
    ExpertTopology(4, ep=2, etp=2),
    ExpertTopology(4, etp=4),
]


@pytest.mark.parametrize("skew", [False, True])
@pytest.mark.parametrize("order_name", ["ragged", "shuffled"])  # ragged: rank 0 has no token
@pytest.mark.parametrize("topology", TOPOLOGIES)
def test_output_loss_and_gradients_are_the_oracles(
    topology: ExpertTopology, order_name: str, skew: bool
) -> None:
    check(topology, order_name, CONFIG, skew)


def with_capacity(drop_policy: str, top_k: int) -> MoEConfig:
    return MoEConfig(
        10, 12, 8, top_k, capacity_factor=0.75, drop_policy=drop_policy, aux_loss_coefficient=0.3
    )


@pytest.mark.parametrize("top_k", [2, 3])
@pytest.mark.parametrize("drop_policy", ["position", "probability"])
@pytest.mark.parametrize("topology", [TOPOLOGIES[0], TOPOLOGIES[2], TOPOLOGIES[8]])
def test_capacity_is_the_oracles(topology: ExpertTopology, drop_policy: str, top_k: int) -> None:
    for order_name in ORDERS:
        check(topology, order_name, with_capacity(drop_policy, top_k), skew=False)
    check(topology, "zigzag", with_capacity(drop_policy, top_k), skew=True)


@pytest.mark.slow
@pytest.mark.parametrize("config", [CONFIG, with_capacity("position", 2)])
@pytest.mark.parametrize("ep", [1, 2, 4, 8])
@pytest.mark.parametrize("etp", [1, 2, 4])
def test_eight_ranks(ep: int, etp: int, config: MoEConfig) -> None:
    if ep * etp <= 8:
        for order_name in ORDERS:
            check(
                ExpertTopology(8, ep=ep, etp=etp), order_name, config, skew=order_name == "zigzag"
            )


@pytest.mark.multi_gpu
@pytest.mark.parametrize("topology", TOPOLOGIES[1:4])
@pytest.mark.parametrize("config", [CONFIG, with_capacity("position", 2)])
def test_two_gpus(topology: ExpertTopology, config: MoEConfig) -> None:
    for order_name in ORDERS:
        order = ORDERS[order_name](NUM_TOKENS, 2)
        actual = on_ranks(topology, order, config, backend="nccl")
        for name, got, expected in zip(LayerResult._fields, actual, oracle(config)):
            assert_equal_to_rounding(got, expected, what=name)


LOW_PRECISION = MoEConfig(32, 64, 8, 2, gemm="auto")
GROUPED = MoEConfig(32, 64, 8, 2, gemm="grouped")


def gradcheck_on_rank(topology: ExpertTopology, order: TokenOrder, config: MoEConfig) -> bool:
    """gradcheck of the whole computation as a function of tensors that every rank holds."""
    layer = ExpertParallelMoE(config, groups=groups_of(topology).experts, dtype=torch.float64)
    whole = ExpertParallelMoE(config, dtype=torch.float64)
    at, rank = layer.mesh, layer.mesh.token_rank
    places, rows = positions(order, rank)
    experts = slice(
        at.ep_rank * layer.experts.num_local, (at.ep_rank + 1) * layer.experts.num_local
    )
    part = slice(at.etp_rank * layer.experts.ffn_local, (at.etp_rank + 1) * layer.experts.ffn_local)

    def function(x: Tensor, gate: Tensor, w13: Tensor, w2: Tensor) -> tuple[Tensor, Tensor]:
        x, gate, w13, w2 = (Replicated.apply(tensor) for tensor in (x, gate, w13, w2))
        parameters = {
            "gate.weight": gate,
            "experts.w13": w13[experts, :, part],
            "experts.w2": w2[experts, :, part],
        }
        local = x.new_zeros(order.rows_per_rank[rank], x.shape[1])
        local = local.index_copy(0, torch.tensor(rows, dtype=torch.int64), x[places])
        result = torch.func.functional_call(layer, parameters, (local,), {"token_order": order})
        output = torch.zeros_like(x).index_copy(
            0, torch.tensor(places, dtype=torch.int64), result.output[rows]
        )
        return Summed.apply(output), Summed.apply(result.aux_loss)

    x = random_batch(order.num_tokens, config.hidden_size).x.requires_grad_()
    parameters = [parameter.detach().requires_grad_() for parameter in whole.parameters()]
    return torch.autograd.gradcheck(function, (x, *parameters))


@pytest.mark.parametrize(
    "topology", [ExpertTopology(1), ExpertTopology(2, ep=2), ExpertTopology(2, etp=2)]
)
def test_gradcheck_in_lockstep(topology: ExpertTopology) -> None:
    order = ORDERS["zigzag"](5, topology.world_size)
    config = MoEConfig(3, 2, 4, 2, capacity_factor=1.0, aux_loss_coefficient=0.3)
    assert all(run_on_ranks(gradcheck_on_rank, topology.world_size, topology, order, config))


def stage_outputs(num_tokens: int) -> bool:
    """Two pipeline stages of two ranks: each routes its own batch."""
    topology = ExpertTopology(4, pp=2, ep=2)
    layer = build(CONFIG, torch.float64, False, groups=groups_of(topology).experts)
    alone = build(CONFIG, torch.float64, False)
    stage = topology.expert_coordinates(torch.distributed.get_rank()).pp
    x = random_batch(num_tokens, CONFIG.hidden_size, seed=stage).x
    half = slice(0, num_tokens // 2) if layer.mesh.token_rank == 0 else slice(num_tokens // 2, None)
    actual, expected = layer(x[half]), alone(x)
    assert_equal_to_rounding(actual.output, expected.output[half])
    return torch.equal(actual.stats.assigned, expected.stats.assigned)


def test_pipeline_stages_route_apart() -> None:
    assert all(run_on_ranks(stage_outputs, 4, 12))


def test_batch_of_sequences_is_the_flat_batch() -> None:
    layer = build(CONFIG, torch.float64, False)
    x = random_batch(12, CONFIG.hidden_size).x
    flat, batched = layer(x), layer(x.view(3, 4, -1))
    assert batched.output.shape == (3, 4, CONFIG.hidden_size)
    assert torch.equal(batched.output.flatten(0, 1), flat.output)


def test_stats_count_every_assignment() -> None:
    layer = build(with_capacity("position", 2), torch.float64, True)
    stats = layer(random_batch(NUM_TOKENS, CONFIG.hidden_size).x).stats
    capacity = 6  # ceil(0.75 * 29 * 2 / 8)
    assert stats.assigned.sum() == 2 * NUM_TOKENS
    assert stats.assigned[HOT] == NUM_TOKENS
    assert stats.dropped[HOT] == NUM_TOKENS - capacity
    assert torch.equal(stats.dropped, (stats.assigned - capacity).clamp(min=0))


@pytest.mark.parametrize("drop_policy", ["position", "probability"])
def test_capacity_is_for_training_alone(drop_policy: str) -> None:
    layer = build(with_capacity(drop_policy, 2), torch.float64, True)
    dropless = build(CONFIG, torch.float64, True)
    x = random_batch(NUM_TOKENS, CONFIG.hidden_size).x
    assert layer(x).stats.dropped.any()
    evaluated = layer.eval()(x)
    assert not evaluated.stats.dropped.any()
    assert torch.equal(evaluated.output, dropless(x).output)
    assert layer.train()(x).stats.dropped.any()


def test_initial_values_of_gate_and_experts_come_from_streams_of_their_own() -> None:
    layer = ExpertParallelMoE(CONFIG, seed=5)
    gate = layer.gate.weight.detach().flatten()
    drawn = {
        "randn": torch.randn(len(gate), generator=torch.Generator().manual_seed(5)),
        "uniform": torch.rand(len(gate), generator=torch.Generator().manual_seed(5)) - 0.5,
        **{f"w13[{e}]": w.flatten()[: len(gate)] for e, w in enumerate(layer.experts.w13.detach())},
        **{f"w2[{e}]": w.flatten()[: len(gate)] for e, w in enumerate(layer.experts.w2.detach())},
    }
    for name, other in drawn.items():
        # 1 if one is a multiple of the other; of n independent values about 1 / sqrt(n).
        assert torch.cosine_similarity(gate, other, dim=0).abs() < 6 / len(gate) ** 0.5, name
    again = ExpertParallelMoE(CONFIG, seed=5)
    assert torch.equal(again.gate.weight, layer.gate.weight)
    assert not torch.equal(ExpertParallelMoE(CONFIG, seed=6).gate.weight, layer.gate.weight)


@pytest.mark.gpu
@pytest.mark.parametrize(("gemm", "expected"), [("loop", 1), ("grouped", 0), ("auto", 0)])
def test_host_waits_for_a_gpu_at_most_once_a_call(gemm: str, expected: int) -> None:
    """On one rank grouped products take the counts from the device, forward and backward."""
    config = MoEConfig(32, 64, 8, 2, gemm=gemm)
    layer = ExpertParallelMoE(config, device="cuda", dtype=torch.bfloat16)
    x = torch.randn(NUM_TOKENS, config.hidden_size, device="cuda", dtype=torch.bfloat16)
    order = TokenOrder.contiguous([NUM_TOKENS])
    layer(x, token_order=order).output.sum().backward()  # tensors of the order, and kernels
    wait, waits = torch.cuda.Event.synchronize, []
    torch.cuda.set_sync_debug_mode("error")
    try:
        with patch.object(
            torch.cuda.Event, "synchronize", lambda event: waits.append(event) or wait(event)
        ):
            layer(x, token_order=order).output.sum().backward()
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert len(waits) == expected


def test_no_token_anywhere() -> None:
    for config in (CONFIG, with_capacity("position", 2), with_capacity("probability", 2)):
        layer = build(config, torch.float64, False)
        x = torch.zeros(0, CONFIG.hidden_size, dtype=torch.float64, requires_grad=True)
        result = layer(x)
        (result.output.sum() + result.aux_loss).backward()
        assert result.aux_loss == 0
        assert all(not parameter.grad.any() for parameter in layer.parameters())


def test_gate_stays_float32_in_a_bfloat16_layer() -> None:
    layer = ExpertParallelMoE(LOW_PRECISION, dtype=torch.bfloat16)
    assert layer.gate.weight.dtype == torch.float32
    assert {parameter.dtype for parameter in layer.experts.parameters()} == {torch.bfloat16}
    assert ExpertParallelMoE(LOW_PRECISION, dtype=torch.float64).gate.weight.dtype == torch.float64


def test_meta_device_makes_no_values() -> None:
    config = MoEConfig(6144, 9216, 32, 2)  # MiniMax-01
    layer = ExpertParallelMoE(config, device="meta", dtype=torch.bfloat16)
    numel = sum(parameter.numel() for parameter in layer.parameters())
    assert numel == 32 * 3 * 6144 * 9216 + 32 * 6144


def penalties_on_rank(topology: ExpertTopology, send: Send) -> list[str]:
    """Which second derivatives, of gradients to which of gradients to what, do not raise."""
    config, groups = replace(CONFIG, send=send), groups_of(topology).experts
    layer = ExpertParallelMoE(config, groups=groups, dtype=torch.float64)
    x = random_batch(8, 10).x.requires_grad_()
    leaves = {"x": x, **dict(layer.named_parameters())}
    silent = []
    for first in leaves:
        for second in leaves:
            output = layer(x).output
            (gradient,) = torch.autograd.grad(output.sum(), leaves[first], create_graph=True)
            try:
                torch.autograd.grad(gradient.square().sum(), leaves[second])
            except RuntimeError as error:
                if "cannot be differentiated again" in str(error):
                    continue
            silent.append(f"{second} of the gradient to {first}")
    return silent


@pytest.mark.parametrize(
    ("topology", "send"),
    [
        (ExpertTopology(1), "auto"),
        (ExpertTopology(2, ep=2), "assignments"),
        (ExpertTopology(2, ep=2), "tokens"),
    ],
)
def test_a_penalty_on_gradients_raises(topology: ExpertTopology, send: Send) -> None:
    """It would be a part of itself if the graph just ended somewhere."""
    assert run_on_ranks(penalties_on_rank, topology.world_size, topology, send) == (
        [[]] * topology.world_size
    )
