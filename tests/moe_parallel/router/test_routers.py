"""Every router is the oracle's: choice, weights, losses, drops, and their gradients."""

from __future__ import annotations

from dataclasses import replace
from typing import Any, NamedTuple

import pytest
import torch
import torch.distributed as dist
from torch import Tensor

from moe_parallel import (
    ExpertParallelMoE,
    ExpertTopology,
    MoEConfig,
    RouterConfig,
    RoutingReplay,
    TokenOrder,
    TokenSequences,
)
from moe_parallel.reference import reference_moe
from moe_parallel.router.scores import Scoring
from moe_parallel.router.top_k import kernel_rule
from tests.closeness import assert_equal_to_rounding, assert_within_budget
from tests.moe_parallel.batch import (
    ORDERS,
    assemble,
    assemble_expert,
    groups_of,
    local_rows,
    random_batch,
)
from tests.ranks import run_on_ranks

NUM_TOKENS, HIDDEN, EXPERTS, SEQUENCES = 23, 10, 8, 3
BIAS = [0.3, -0.2, 0.0, 0.05, -0.4, 0.2, 0.1, -0.1]
NUMBERS = [0] * 9 + [2] * 4 + [1] * 10  # of the sequences, by global position
GROUPS = {"num_groups": 4, "top_groups": 2}
ROUTERS = {
    "scaled": RouterConfig(scaling=2.5),
    "bias on logits": RouterConfig(expert_bias=True),
    "softmax": RouterConfig("softmax", normalize=False, z_loss_coefficient=0.2),
    "softmax, normalised, groups": RouterConfig("softmax", **GROUPS),
    "sigmoid": RouterConfig("sigmoid", sequence_loss_coefficient=0.3),
    "sigmoid, not normalised, groups": RouterConfig("sigmoid", normalize=False, **GROUPS),
    "DeepSeek-V3": RouterConfig(
        "sigmoid",
        scaling=2.5,
        expert_bias=True,
        sequence_loss_coefficient=0.3,
        z_loss_coefficient=0.1,
        **GROUPS,
    ),
}
DROPS = [
    {},
    {"capacity_factor": 0.7},
    {"capacity_factor": 0.7, "drop_policy": "probability"},
]


def config_of(router: RouterConfig, **options: Any) -> MoEConfig:
    return MoEConfig(
        HIDDEN, 12, EXPERTS, 4, aux_loss_coefficient=0.4, router=router, impl="eager", **options
    )


class Results(NamedTuple):
    output: Tensor
    aux_loss: Tensor
    x: Tensor
    gate_weight: Tensor
    w13: Tensor
    w2: Tensor


def layer_of(config: MoEConfig, **kwargs: Any) -> ExpertParallelMoE:
    layer = ExpertParallelMoE(config, seed=1, dtype=kwargs.pop("dtype", torch.float64), **kwargs)
    if layer.gate.expert_bias is not None:
        layer.gate.expert_bias.copy_(torch.tensor(BIAS))
    return layer


def of_layer(layer: ExpertParallelMoE, order: TokenOrder, rank: int, **given: Any) -> Results:
    whole, weight = random_batch(NUM_TOKENS, HIDDEN), layer.experts.w13
    dtype, device = weight.dtype, weight.device
    if layer.config.router.sequence_loss_coefficient:
        numbers = local_rows(torch.tensor(NUMBERS), order, rank, padding=0)
        given["sequences"] = TokenSequences(numbers.to(device), SEQUENCES)
    x = local_rows(whole.x.to(dtype), order, rank, padding=torch.nan).to(device).requires_grad_()
    grad = local_rows(whole.grad.to(dtype), order, rank, padding=torch.nan).to(device)
    result = layer(x, token_order=order, **given)
    torch.autograd.backward([result.output, result.aux_loss], [grad, None])
    weights = (layer.gate.weight, layer.experts.w13, layer.experts.w2)
    tensors = (result.output, result.aux_loss, x.grad, *(w.grad for w in weights))
    return Results(*(tensor.detach().cpu() for tensor in tensors))


def of_oracle(
    config: MoEConfig, replayed: list[list[int]] | None = None, dtype: torch.dtype = torch.float64
) -> Results:
    layer, whole = layer_of(config, dtype=dtype), random_batch(NUM_TOKENS, HIDDEN)
    weights = [layer.gate.weight, layer.experts.w13, layer.experts.w2]
    weights = [weight.detach().double().requires_grad_() for weight in weights]
    x = whole.x.to(dtype).double().requires_grad_()
    # Biases are float32 numbers.
    bias = torch.tensor(BIAS).tolist() if config.router.expert_bias else None
    result = reference_moe(
        x,
        *weights,
        top_k=config.top_k,
        capacity_factor=config.capacity_factor,
        drop_policy=config.drop_policy,
        aux_loss_coefficient=config.aux_loss_coefficient,
        router=config.router,
        expert_bias=bias,
        replayed=replayed,
        sequences=NUMBERS,
    )
    grad = whole.grad.to(dtype).double()
    torch.autograd.backward([result.output, result.aux_loss], [grad, None])
    grads = (tensor.grad for tensor in (x, *weights))
    return Results(result.output.detach(), result.aux_loss.detach(), *grads)


def assert_equal(actual: Results, expected: Results) -> None:
    for name, got, wanted in zip(Results._fields, actual, expected):
        assert_equal_to_rounding(got, wanted, what=name)


@pytest.mark.parametrize("name", ROUTERS)
@pytest.mark.parametrize("drops", DROPS, ids=str)
def test_one_rank(name: str, drops: dict[str, Any]) -> None:
    config = config_of(ROUTERS[name], **drops)
    actual = of_layer(layer_of(config), TokenOrder.contiguous([NUM_TOKENS]), 0)
    assert_equal(actual, of_oracle(config))


def on_rank(
    topology: ExpertTopology, order: TokenOrder, configs: list[MoEConfig], device: str
) -> list[Results]:
    groups = groups_of(topology).experts
    layers = [layer_of(config, groups=groups, device=device) for config in configs]
    return [of_layer(layer, order, dist.get_rank()) for layer in layers]


def check_ranks(topology: ExpertTopology, configs: list[MoEConfig], backend: str) -> None:
    order = ORDERS["shuffled"](NUM_TOKENS, topology.world_size)
    device = "cuda" if backend == "nccl" else "cpu"
    parts = run_on_ranks(
        on_rank, topology.world_size, topology, order, configs, device, backend=backend
    )
    for config, results in zip(configs, zip(*parts)):
        actual = Results(
            output=assemble([r.output for r in results], order),
            aux_loss=sum(r.aux_loss for r in results),
            x=assemble([r.x for r in results], order),
            gate_weight=sum(r.gate_weight for r in results),
            w13=assemble_expert([r.w13 for r in results], "w13", topology),
            w2=assemble_expert([r.w2 for r in results], "w2", topology),
        )
        assert_equal(actual, of_oracle(config))


@pytest.mark.parametrize("topology", [ExpertTopology(2, ep=2), ExpertTopology(4, ep=2, etp=2)])
def test_ranks(topology: ExpertTopology) -> None:
    configs = [config_of(ROUTERS[name]) for name in ("softmax", "sigmoid", "DeepSeek-V3")]
    configs += [config_of(ROUTERS["DeepSeek-V3"], **drops) for drops in DROPS[1:]]
    check_ranks(topology, configs, "gloo")


@pytest.mark.multi_gpu
def test_two_gpus() -> None:
    check_ranks(ExpertTopology(2, ep=2), [config_of(ROUTERS["DeepSeek-V3"])], "nccl")


def check_kernels(name: str, device: str, replay: RoutingReplay | None = None) -> None:
    """float32 and plain torch on the CPU is the honest error."""
    config, order = config_of(ROUTERS[name]), TokenOrder.contiguous([NUM_TOKENS])
    oracle = of_oracle(config, dtype=torch.float32)
    honest = of_layer(layer_of(config, dtype=torch.float32), order, 0, replay=replay)
    if replay is not None and replay.experts is not None:
        replay.experts = replay.experts.to(device)
    layer = layer_of(replace(config, impl="triton"), dtype=torch.float32, device=device)
    actual = of_layer(layer, order, 0, replay=replay)
    for what, got, wanted, plain in zip(Results._fields, actual, oracle, honest):
        assert_within_budget(got, wanted, plain, factor=4, what=what)


@pytest.mark.gpu
@pytest.mark.parametrize("name", ROUTERS)
def test_kernels_choose_on_a_gpu(name: str) -> None:
    check_kernels(name, "cuda")
    check_kernels(name, "cuda", RoutingReplay())


@pytest.mark.parametrize("name", ROUTERS)
def test_interpreted_kernels_choose(name: str) -> None:
    pytest.importorskip("triton", reason="the kernels need triton, which has no wheel here")
    check_kernels(name, "cpu")


def test_kernels_make_the_logits_of_given_choices() -> None:
    pytest.importorskip("triton", reason="the kernels need triton, which has no wheel here")
    check_kernels("DeepSeek-V3", "cpu", RoutingReplay())


def test_who_chooses() -> None:
    scoring = Scoring(ROUTERS["DeepSeek-V3"])
    assert kernel_rule(scoring, 8) == (1, True, 2.5, 4, 2)
    assert kernel_rule(scoring, 24) is None
    assert kernel_rule(scoring._replace(experts=torch.zeros(2, 4)), 8) is None
    assert kernel_rule(Scoring(RouterConfig("softmax", normalize=False)), 11) is not None


@pytest.mark.parametrize("name", ["default", "DeepSeek-V3"])
def test_a_choice_is_made_again(name: str) -> None:
    config = config_of(ROUTERS.get(name, RouterConfig()))
    order, replay = TokenOrder.contiguous([NUM_TOKENS]), RoutingReplay()
    first = of_layer(layer_of(config), order, 0, replay=replay)
    assert replay.experts is not None
    again = of_layer(layer_of(config), order, 0, replay=replay)
    for one, other in zip(first, again):
        assert_equal_to_rounding(one, other)
    others = [[(token + i) % EXPERTS for i in (0, 3, 1, 6)] for token in range(NUM_TOKENS)]
    replay = RoutingReplay(torch.tensor(others))
    assert_equal(of_layer(layer_of(config), order, 0, replay=replay), of_oracle(config, others))
    assert replay.experts.tolist() == others


def test_a_replay_of_other_tokens_is_refused() -> None:
    layer = layer_of(config_of(RouterConfig()))
    x = random_batch(NUM_TOKENS, HIDDEN).x
    replay = RoutingReplay(torch.zeros(NUM_TOKENS - 1, 4, dtype=torch.int64))
    with pytest.raises(ValueError, match=r"replay.experts must be int64 \[23, 4\] .* got .*22"):
        layer(x, replay=replay)


@pytest.mark.parametrize("wrong", [-1, EXPERTS])
def test_a_replay_of_no_experts_is_refused(wrong: int) -> None:
    layer, x = layer_of(config_of(RouterConfig())), random_batch(NUM_TOKENS, HIDDEN).x
    replay = RoutingReplay(torch.full((NUM_TOKENS, 4), wrong))
    with pytest.raises(
        ValueError, match=rf"replay.experts must be in \[0, {EXPERTS}\), got {wrong}"
    ):
        layer(x, replay=replay)


def test_rows_of_a_batch_are_sequences() -> None:
    layer = layer_of(config_of(RouterConfig(sequence_loss_coefficient=0.3)))
    x = random_batch(NUM_TOKENS, HIDDEN).x[:20]
    numbers = torch.arange(4).repeat_interleave(5)
    told = layer(x, sequences=TokenSequences(numbers, 4))
    assert torch.equal(layer(x.view(4, 5, HIDDEN)).aux_loss, told.aux_loss)
    with pytest.raises(ValueError, match="sequences must be given"):
        layer(x)
    with pytest.raises(ValueError, match=r"sequences.numbers must be int64 \[20\]"):
        layer(x, sequences=TokenSequences(numbers[:19], 4))
    with pytest.raises(ValueError, match="sequences must be None"):
        layer_of(config_of(RouterConfig()))(x, sequences=TokenSequences(numbers, 4))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"score_function": "tanh"}, "score_function must be one of"),
        ({"normalize": False}, "normalize must be True with score_function 'softmax_of_top_k'"),
        ({"scaling": 0.0}, "scaling must be a finite number > 0"),
        ({"z_loss_coefficient": -1.0}, "z_loss_coefficient must be a finite number >= 0"),
        ({"num_groups": 4}, "num_groups and top_groups must be given together"),
        ({"num_groups": 3, "top_groups": 1}, "num_experts must divide into num_groups 3, got 8"),
        ({"num_groups": 4, "top_groups": 1}, "top_groups must be at most"),
        ({"num_groups": 2, "top_groups": 3}, "top_groups must be at most"),
    ],
)
def test_routers_that_cannot_be_are_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        config_of(RouterConfig(**options))


def test_one_expert_a_token_learns_without_normalisation() -> None:
    with pytest.raises(ValueError, match="top_k must be at least 2"):
        MoEConfig(HIDDEN, 12, EXPERTS, 1, router=RouterConfig("sigmoid"))
    config = MoEConfig(HIDDEN, 12, EXPERTS, 1, router=RouterConfig("sigmoid", normalize=False))
    layer = ExpertParallelMoE(config, dtype=torch.float64)
    layer(random_batch(NUM_TOKENS, HIDDEN).x).output.sum().backward()
    assert layer.gate.weight.grad.any()
