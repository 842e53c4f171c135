"""Hybrid layers in Megatron are lasp.hybrid.HybridModel's, over any ranks and stages."""

from __future__ import annotations

import subprocess
import sys
from typing import Any

import pytest
import torch
import torch.distributed as dist
from megatron.core.transformer.moe.moe_utils import MoEAuxLossAutoScaler
from megatron.core.transformer.transformer_block import TransformerBlock
from torch import Tensor

from lasp.decay import decay_rates
from lasp.hybrid import AttentionConfig, HybridModel, pack_batch
from lasp.hybrid import HybridConfig as PlainConfig
from lasp.megatron_hybrid import (
    MINIMAX_TEXT_01,
    HybridConfig,
    ResidualScale,
    hybrid_block_spec,
    is_softmax,
    minimax_layer_spec,
    pack_sequences,
    to_megatron,
)
from moe_parallel import MoEConfig
from ring.megatron import RingSelfAttention
from tests.closeness import assert_equal_to_rounding
from tests.megatron.attention import CUT, HEAD_DIM, HEADS, HIDDEN, KV_HEADS, parallel_config
from tests.megatron.cpu import gathered, initialize, summed
from tests.ranks import run_on_ranks

pytestmark = pytest.mark.megatron

PACKS = ((13, 1, 0, 20, 6), (2, 37, 1))
TOKENS = sum(map(sum, PACKS))
LAYERS, PATTERN = 4, "1:1"
HYBRID = HybridConfig.deepnorm(LAYERS, rotary_dim=4, rope_base=100.0)
OPTIONS = {
    "num_layers": LAYERS,
    "linear_attention_freq": 2,
    "num_moe_experts": 4,
    "moe_router_topk": 2,
    "moe_ffn_hidden_size": 8,
    "moe_aux_loss_coeff": 0.1,
    "moe_router_load_balancing_type": "global_aux_loss",
    "moe_token_dispatcher_type": "alltoall",
    "moe_expert_capacity_factor": 1.0,
    "moe_token_drop_policy": "position",
    "pipeline_dtype": torch.float64,
}


def plain_model() -> HybridModel:
    config = PlainConfig(
        num_layers=LAYERS,
        vocab_size=7,
        attention=AttentionConfig(HEADS, KV_HEADS, HEAD_DIM, rotary_dim=4, rope_base=100.0),
        moe=MoEConfig(HIDDEN, 8, 4, 2, capacity_factor=1.0, aux_loss_coefficient=0.1),
        softmax_period=2,
    )
    model = HybridModel(config, dtype=torch.float64)
    model.reset_parameters(0)
    return model


def megatron_names(values: dict[str, Tensor]) -> dict[str, Tensor]:
    """Values of the plain model's decoder layers under the names of Megatron's block."""
    named = to_megatron(values, num_heads=HEADS, num_kv_heads=KV_HEADS)
    return {n.removeprefix("decoder."): v for n, v in named.items() if n.startswith("decoder.")}


def plain_results() -> dict[str, Tensor]:
    model = plain_model()
    batch = pack_batch([PACKS[0] + PACKS[1]], dp_rank=0, num_ranks=1, order="contiguous")
    hidden = random_input().requires_grad_()
    x, aux = hidden, 0.0
    for layer in model.decoder_layers():
        x, aux_loss, _ = layer(x, batch)
        aux = aux + aux_loss
    output = model.final_norm(x)
    torch.autograd.backward([output, aux], [output.detach().cos(), None])
    grads = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    return {"output": output.detach(), "input": hidden.grad, **megatron_names(grads)}


def random_input() -> Tensor:
    return torch.randn(
        TOKENS, HIDDEN, dtype=torch.float64, generator=torch.Generator().manual_seed(5)
    )


def cuts(name: str, groups: Any) -> list[tuple[Any, int]]:
    """How a parameter is cut: pairs of a process group and a dim."""
    if ".experts.w" in name:
        return [(groups.ep, 0), (groups.expt_tp, 2)]
    for part, dim in CUT.items():
        if f".{part}." in name:
            return [(groups.tp, dim)]
    return []


def build_block(sizes: dict[str, int], groups: Any, **options: Any) -> TransformerBlock:
    config = parallel_config(sizes, **(OPTIONS | options))
    stage, stages = groups.pp.rank(), groups.pp.size()
    block = TransformerBlock(
        config,
        hybrid_block_spec(config, PATTERN, hybrid=HYBRID),
        pre_process=stage == 0,
        post_process=stage == stages - 1,
        pg_collection=groups,
    )
    weights = megatron_names(dict(plain_model().named_parameters()))
    for name, parameter in block.named_parameters():
        part = weights[global_name(name, block)]
        for group, dim in cuts(name, groups):
            part = part.chunk(group.size(), dim)[group.rank()]
        assert part.shape == parameter.shape, name
        parameter.data.copy_(part)
    return block


def global_name(name: str, block: TransformerBlock) -> str:
    head, _, rest = name.partition(".")
    if head != "layers":
        return name
    local, _, rest = rest.partition(".")
    return f"layers.{block.layers[int(local)].layer_number - 1}.{rest}"


def whole_gradient(name: str, parameter: torch.nn.Parameter, groups: Any) -> Tensor:
    """Summed over replicas and joined, as Megatron's DDP and finalize_model_grads sum it."""
    expert = ".experts.w" in name
    assert getattr(parameter, "allreduce", True) != expert
    grad = summed(parameter.grad, groups.expt_dp if expert else groups.dp_cp)
    if getattr(parameter, "sequence_parallel", False):
        grad = summed(grad, groups.tp)
    for group, dim in reversed(cuts(name, groups)):
        grad = torch.cat(gathered(grad, group), dim)
    return grad


def block_on_rank(sizes: dict[str, int], order: str, options: dict[str, Any]) -> dict[str, Tensor]:
    groups = initialize(**sizes)
    block = build_block(sizes, groups, **options)
    dp_rank, dp = groups.dp.rank(), groups.dp.size()
    tp, cp = groups.tp.size(), groups.cp.size()
    lengths = [PACKS[0] + PACKS[1]] if dp == 1 else list(PACKS)
    packed = pack_sequences(lengths, dp_rank=dp_rank, cp_size=cp, tp_size=tp, order=order)
    layout = packed.layout
    pack = random_input().split([sum(of_replica) for of_replica in lengths])[dp_rank]
    # A loss of every rank's own; dp cp times it, for DDP's mean, and the schedule's factor of cp.
    MoEAuxLossAutoScaler.set_loss_scale(torch.tensor([float(cp)]))

    padded = torch.nn.functional.pad(pack, (0, 0, 0, layout.num_tokens - len(pack)))
    local = layout.shard(padded, groups.cp.rank()).chunk(tp)[groups.tp.rank()]
    hidden = local.unsqueeze(1).clone()
    stage, stages = groups.pp.rank(), groups.pp.size()
    neighbours = dist.get_process_group_ranks(groups.pp)
    if stage > 0:
        dist.recv(hidden, neighbours[stage - 1])
    hidden.requires_grad_()
    block.set_input_tensor(hidden)
    output = block(hidden, attention_mask=None, packed_seq_params=packed)
    if stage < stages - 1:
        dist.send(output.detach().contiguous(), neighbours[stage + 1])
        grad = torch.empty_like(output)
        dist.recv(grad, neighbours[stage + 1])
    else:
        mask = torch.zeros(layout.num_tokens, dtype=torch.float64)
        mask[: len(pack)] = 1.0
        mask = layout.shard(mask, groups.cp.rank()).chunk(tp)[groups.tp.rank()].view(-1, 1, 1)
        grad = output.detach().cos() * mask * (dp * cp)
    output.backward(grad)
    if stage > 0:
        dist.send(hidden.grad.contiguous(), neighbours[stage - 1])

    def join(x: Tensor) -> Tensor:
        whole = layout.unshard(gathered(torch.cat(gathered(x.squeeze(1), groups.tp)), groups.cp))
        return whole[: len(pack)]

    result = {
        global_name(name, block): whole_gradient(name, p, groups) / (dp * cp)
        for name, p in block.named_parameters()
    }
    if stage == stages - 1:
        result["output"] = join(output.detach())
    if stage == 0:
        result["input"] = join(hidden.grad) / (dp * cp)
    return {**result, "dp_rank": dp_rank}


def check(num_ranks: int, sizes: dict[str, int], order: str, **options: Any) -> None:
    expected = plain_results()
    results = run_on_ranks(block_on_rank, num_ranks, sizes, order, options)
    seen = set()
    for result in results:
        dp_rank = result.pop("dp_rank")
        for name, tensor in result.items():
            whole = expected[name]
            if name in ("output", "input") and len(tensor) < TOKENS:
                whole = whole.split([sum(pack) for pack in PACKS])[dp_rank]
            assert_equal_to_rounding(tensor, whole, what=name)
            seen.add(name)
    assert seen == expected.keys()


SPLITS = [
    (1, {}, "contiguous"),
    pytest.param(2, {"tp": 2, "etp": 2}, "contiguous", marks=pytest.mark.slow),
    pytest.param(2, {"cp": 2, "ep": 2}, "zigzag", marks=pytest.mark.slow),
    (2, {"pp": 2}, "contiguous"),
    (4, {"tp": 2, "cp": 2, "ep": 2, "etp": 2}, "fold"),
    (4, {"pp": 2, "cp": 2, "ep": 2}, "zigzag"),
    pytest.param(4, {"cp": 2, "ep": 4}, "fold", marks=pytest.mark.slow),
    pytest.param(4, {"cp": 4, "ep": 2}, "zigzag", marks=pytest.mark.slow),
    pytest.param(4, {"tp": 2, "ep": 4}, "zigzag", marks=pytest.mark.slow),
    pytest.param(4, {"tp": 2, "pp": 2, "ep": 2}, "contiguous", marks=pytest.mark.slow),
]


@pytest.mark.parametrize(("num_ranks", "sizes", "order"), SPLITS)
def test_equals_the_plain_hybrid(num_ranks, sizes, order) -> None:
    check(num_ranks, sizes, order)


@pytest.mark.parametrize(
    "recompute",
    [
        {"recompute_granularity": "selective", "recompute_modules": ["core_attn", "moe"]},
        {
            "recompute_granularity": "full",
            "recompute_method": "uniform",
            "recompute_num_layers": 1,
        },
    ],
)
def test_recomputed(recompute: dict[str, Any]) -> None:
    check(2, {"cp": 2, "ep": 2}, "zigzag", **recompute)


def dense_on_rank(sizes: dict[str, int], sequence_parallel: bool = True) -> dict[str, Tensor]:
    """Pre-norm layers with a dense MLP: output and gradients; the output by hand on one rank."""
    groups = initialize(**sizes)
    sequence_parallel = sequence_parallel and groups.tp.size() > 1
    options = {"num_layers": 3, "linear_attention_freq": 2, "sequence_parallel": sequence_parallel}
    config = parallel_config(sizes, **options)
    scale = ResidualScale(alpha=0.5, beta=2.0)
    hybrid = HybridConfig(rotary_dim=4, softmax=scale, mlp=scale._replace(beta=3.0))
    torch.manual_seed(6)  # weights are drawn whole on the CPU and cut
    block = TransformerBlock(
        config, hybrid_block_spec(config, PATTERN, hybrid=hybrid), pg_collection=groups
    )
    packed = pack_sequences(
        [(12, 20)], dp_rank=0, cp_size=groups.cp.size(), tp_size=groups.tp.size(), order="zigzag"
    )
    pack = random_input()[:32]
    local = packed.layout.shard(pack, groups.cp.rank())
    if sequence_parallel:
        local = local.chunk(groups.tp.size())[groups.tp.rank()]
    hidden = local.unsqueeze(1).clone().requires_grad_()
    output = block(hidden, attention_mask=None, packed_seq_params=packed)
    output.backward(output.detach().cos())
    if groups.tp.size() * groups.cp.size() == 1:
        by_hand = hidden
        for layer, (alpha, beta) in zip(block.layers, ((1.0, 1.0), scale, (1.0, 1.0))):
            normed = rms(by_hand, layer.input_layernorm.weight)
            mixed, _ = layer.self_attention(normed, packed_seq_params=packed)
            by_hand = alpha * by_hand + beta * mixed
            normed = rms(by_hand, layer.pre_mlp_layernorm.weight)
            gate, up = (normed @ layer.mlp.linear_fc1.weight.T).chunk(2, dim=-1)
            mixed = (torch.nn.functional.silu(gate) * up) @ layer.mlp.linear_fc2.weight.T
            by_hand = 0.5 * by_hand + 3.0 * mixed
        assert_equal_to_rounding(output, rms(by_hand, block.final_layernorm.weight))

    def join(x: Tensor) -> Tensor:
        x = torch.cat(gathered(x, groups.tp)) if sequence_parallel else x
        return packed.layout.unshard(gathered(x.squeeze(1), groups.cp))

    # Of the MLP each rank has rows of gates and of ups: joined they are in another order.
    gradients = {
        name: whole_gradient(name, parameter, groups)
        for name, parameter in block.named_parameters()
        if ".mlp." not in name
    }
    return {"output": join(output.detach()), "input": join(hidden.grad), **gradients}


def rms(x: Tensor, weight: Tensor) -> Tensor:
    return x * torch.rsqrt(x.square().mean(-1, keepdim=True) + 1e-5) * weight


@pytest.mark.parametrize(
    ("num_ranks", "sizes", "sequence_parallel"),
    [(2, {"tp": 2}, True), (2, {"tp": 2}, False), (4, {"tp": 2, "cp": 2}, True)],
)
def test_dense_layers_with_pre_norm(
    num_ranks: int, sizes: dict[str, int], sequence_parallel: bool
) -> None:
    (expected,) = run_on_ranks(dense_on_rank, 1, {})
    for result in run_on_ranks(dense_on_rank, num_ranks, sizes, sequence_parallel):
        assert result.keys() == expected.keys()
        for name, tensor in expected.items():
            assert_equal_to_rounding(result[name], tensor, what=name)


def layers_of_stages() -> list[tuple[int, bool, Tensor | None]]:
    """Number, kind and decay rates of the layers on this rank: 2 stages of 2 virtual ones."""
    groups = initialize(pp=2, vpp=2)
    options = {"virtual_pipeline_model_parallel_size": 2, "num_layers": 8}
    config = parallel_config({"pp": 2}, **(OPTIONS | options | {"linear_attention_freq": 3}))
    found = []
    for vp_stage in range(2):
        block = TransformerBlock(
            config,
            hybrid_block_spec(config, "2:1", vp_stage),
            pg_collection=groups,
            vp_stage=vp_stage,
        )
        for layer in block.layers:
            softmax = isinstance(layer.self_attention, RingSelfAttention)
            rates = None if softmax else layer.self_attention.rates
            found.append((layer.layer_number - 1, softmax, rates))
    return found


def test_layers_of_virtual_stages_have_their_global_kind_and_rates() -> None:
    first, second = run_on_ranks(layers_of_stages, 2)
    assert [index for index, _, _ in first] == [0, 1, 4, 5]
    assert [index for index, _, _ in second] == [2, 3, 6, 7]
    for index, softmax, rates in first + second:
        assert softmax == (index in (2, 5))
        if not softmax:
            assert torch.equal(rates, decay_rates(HEADS, index, 8))


def static_spec_on_rank() -> list[bool]:
    groups = initialize()
    config = parallel_config({}, **(OPTIONS | {"num_layers": 9, "kv_channels": 64}))
    block = TransformerBlock(config, minimax_layer_spec, pg_collection=groups)
    return [isinstance(layer.self_attention, RingSelfAttention) for layer in block.layers]


def test_one_static_spec_serves_every_layer() -> None:
    """What ``--spec lasp.megatron_hybrid minimax_layer_spec`` imports."""
    (kinds,) = run_on_ranks(static_spec_on_rank, 1)
    assert kinds == [False] * 7 + [True, False]


def test_patterns_and_residuals_that_are_none() -> None:
    with pytest.raises(ValueError, match="residual must be"):
        HybridConfig(residual="middle")
    for pattern in ("7", "0:0", "a:b", "-1:2"):
        with pytest.raises(ValueError, match="pattern must be"):
            is_softmax(pattern, 0)


def test_a_stack_needs_hybrid_model() -> None:
    """In another interpreter: this one may have it."""
    code = (
        "import sys, lasp.megatron_hybrid\n"
        "sys.modules['megatron.core.models.hybrid.hybrid_block'] = None\n"
        "import lasp.megatron_hybrid.stack"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert "ImportError: megatron-core must be >= 0.18 for HybridModel, got" in done.stderr


def test_minimax_has_the_residuals_of_deepnorm() -> None:
    assert abs(MINIMAX_TEXT_01.mlp.alpha - 3.5565588200778455) < 1e-12
    assert MINIMAX_TEXT_01.lightning == MINIMAX_TEXT_01.softmax == MINIMAX_TEXT_01.mlp
    assert MINIMAX_TEXT_01.residual == "post"


def test_packs_divide_over_sequence_parallel_ranks() -> None:
    """Every real token has one place in the order, in pack order over the replicas."""
    for lengths in ([(5, 3, 1), (4, 9)], [(1,), (30, 0)], [(17, 2), (0, 19)]):
        for order in ("contiguous", "zigzag", "fold"):
            packs = [
                pack_sequences(lengths, dp_rank=dp, cp_size=2, tp_size=2, order=order)
                for dp in range(2)
            ]
            token_order = packs[0].token_order
            assert token_order == packs[1].token_order
            first = 0
            for dp_rank, packed in enumerate(packs):
                real = sum(lengths[dp_rank])
                places = torch.full((packed.layout.num_tokens,), -1)
                places[:real] = torch.arange(first, first + real)
                first += real
                for cp_rank in range(2):
                    chunks = packed.layout.shard(places, cp_rank).chunk(2)
                    for tp_rank, chunk in enumerate(chunks):
                        rank = dp_rank * 4 + cp_rank * 2 + tp_rank
                        expected = torch.full_like(chunk, -1)
                        for start, offset, length in token_order.segments[rank]:
                            expected[offset : offset + length] = torch.arange(start, start + length)
                        assert torch.equal(chunk, expected)
                        assert token_order.rows_per_rank[rank] == len(chunk)
