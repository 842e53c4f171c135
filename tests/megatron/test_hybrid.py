"""Hybrid layers in Megatron are lasp.hybrid.HybridModel's, over any ranks and stages."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
import torch.distributed as dist
from megatron.core.transformer.moe.moe_utils import MoEAuxLossAutoScaler
from megatron.core.transformer.transformer_block import TransformerBlock
from torch import Tensor

from lasp.hybrid import HybridConfig, Residuals, ResidualScale, pack_batch
from lasp.megatron import (
    PackedSequence,
    hybrid_block_spec,
    hybrid_of,
    share_packs,
)
from lasp.sequence.layout import SequenceLayout
from tests.closeness import assert_equal_to_rounding
from tests.megatron.attention import HIDDEN, megatrons_pack, parallel_config
from tests.megatron.block import (
    HYBRID,
    MODELS,
    PACKS,
    TOKENS,
    build_block,
    global_name,
    megatron_names,
    plain_model,
    whole_gradient,
)
from tests.megatron.cpu import gathered, initialize
from tests.ranks import run_on_ranks

pytestmark = pytest.mark.megatron


def plain_results(hybrid: HybridConfig = HYBRID) -> dict[str, Tensor]:
    model = plain_model(hybrid)
    batch = pack_batch([PACKS[0] + PACKS[1]], dp_rank=0, num_ranks=1, order="contiguous")
    hidden = random_input().requires_grad_()
    x, aux = hidden, hidden.new_zeros(()).requires_grad_()
    for layer in model.decoder_layers():
        x, aux_loss, _ = layer(x, batch)
        aux = aux + (0.0 if aux_loss is None else aux_loss)
    output = model.final_norm(x)
    torch.autograd.backward([output, aux], [output.detach().cos(), None])
    grads = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    return {"output": output.detach(), "input": hidden.grad, **megatron_names(grads)}


def random_input() -> Tensor:
    return torch.randn(
        TOKENS, HIDDEN, dtype=torch.float64, generator=torch.Generator().manual_seed(5)
    )


def block_on_rank(
    sizes: dict[str, int], order: str, options: dict[str, Any], cut: str | None = None
) -> dict[str, Tensor]:
    """With ``cut`` the layers get Megatron's own packs, and that name of how they are cut."""
    groups = initialize(**sizes)
    block = build_block(sizes, groups, packed_cut=cut, **options)
    dp_rank, dp = groups.dp.rank(), groups.dp.size()
    tp, cp = groups.tp.size(), groups.cp.size()
    lengths = [PACKS[0] + PACKS[1]] if dp == 1 else list(PACKS)
    batch = pack_batch(lengths, dp_rank=dp_rank, num_ranks=cp, tp_size=tp, order=order)
    packed = PackedSequence.of(batch)
    layout = packed.layout
    if cut is not None:
        packed = megatrons_pack(layout)
        if dp > 1:
            packed = share_packs(packed, packed_cut=cut, pg_collection=groups)
    pack = random_input().split([sum(of_replica) for of_replica in lengths])[dp_rank]
    # A loss of every rank's own; dp cp times it, for DDP's mean, and the schedule's factor of cp.
    MoEAuxLossAutoScaler.set_loss_scale(torch.tensor([float(cp)]))

    local = layout.shard(pack, groups.cp.rank(), pad_value=7.0).chunk(tp)[groups.tp.rank()]
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
        mask = layout.shard(torch.ones(len(pack)), groups.cp.rank())
        mask = mask.chunk(tp)[groups.tp.rank()].view(-1, 1, 1)
        grad = output.detach().cos() * mask * (dp * cp)
    output.backward(grad)
    if stage > 0:
        dist.send(hidden.grad.contiguous(), neighbours[stage - 1])

    def join(x: Tensor) -> Tensor:
        return layout.unshard(gathered(torch.cat(gathered(x.squeeze(1), groups.tp)), groups.cp))

    result = {
        global_name(name, block): whole_gradient(name, p, groups) / (dp * cp)
        for name, p in block.named_parameters()
    }
    if stage == stages - 1:
        result["output"] = join(output.detach())
    if stage == 0:
        result["input"] = join(hidden.grad) / (dp * cp)
    return {**result, "dp_rank": dp_rank}


def check(
    num_ranks: int, sizes: dict[str, int], order: str, cut: str | None = None, **options: Any
) -> None:
    expected = plain_results(options.get("hybrid", HYBRID))
    results = run_on_ranks(block_on_rank, num_ranks, sizes, order, options, cut)
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
    ("model", "num_ranks", "sizes", "order"),
    [
        ("ring", 4, {"tp": 2, "cp": 2, "ep": 2, "etp": 2}, "fold"),
        ("ling", 4, {"tp": 2, "cp": 2, "ep": 2, "etp": 2}, "zigzag"),
        ("sala", 4, {"tp": 2, "cp": 2}, "fold"),
        *(
            pytest.param(model, *getattr(split, "values", split), marks=pytest.mark.slow)
            for model in MODELS
            for split in SPLITS
        ),
    ],
)
def test_other_models_equal_the_plain_hybrid(model, num_ranks, sizes, order) -> None:
    if model == "sala":
        sizes = {name: size for name, size in sizes.items() if not name.startswith("e")}
    check(num_ranks, sizes, order, **MODELS[model])


@pytest.mark.parametrize(
    ("num_ranks", "sizes", "cut"),
    [
        (2, {"cp": 2, "ep": 2}, "document_zigzag"),
        (2, {"ep": 2}, "document_zigzag"),  # replicas: they share their packs
        pytest.param(2, {"cp": 2, "ep": 2}, "row_zigzag", marks=pytest.mark.slow),
        pytest.param(
            4,
            {"tp": 2, "cp": 2, "ep": 2, "etp": 2},
            "document_zigzag",
            marks=pytest.mark.slow,
        ),
        pytest.param(4, {"cp": 2, "ep": 2}, "document_zigzag", marks=pytest.mark.slow),
    ],
)
def test_packs_of_megatrons_loaders(num_ranks: int, sizes: dict[str, int], cut: str) -> None:
    """No expert, state or key sees the padding in documents: as the plain model without it."""
    check(num_ranks, sizes, {"row_zigzag": "zigzag"}.get(cut, cut), cut)


def padding_of_unknown_replicas() -> None:
    groups = initialize()
    block = build_block({}, groups)
    packed = megatrons_pack(SequenceLayout((3, 4), 1, "contiguous", (4, 4)))
    hidden = torch.zeros(8, 1, HIDDEN, dtype=torch.float64)
    with pytest.raises(ValueError, match=r"PackedSequence for experts .* give the model share_pac"):
        block(hidden, attention_mask=None, packed_seq_params=packed)


def test_padding_over_replicas_is_refused_until_they_share_it() -> None:
    run_on_ranks(padding_of_unknown_replicas, 2)


@pytest.mark.parametrize(
    "recompute",
    [
        {"recompute_granularity": "selective", "recompute_modules": ["core_attn", "moe"]},
        {
            "recompute_granularity": "full",
            "recompute_method": "uniform",
            "recompute_num_layers": 1,
        },
        {"activations": "softmax_outputs"},
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
    residuals = Residuals(softmax=scale, mlp=scale._replace(beta=3.0))
    hybrid = hybrid_of(config, replace(HYBRID, residuals=residuals))
    torch.manual_seed(6)  # weights are drawn whole on the CPU and cut
    block = TransformerBlock(config, hybrid_block_spec(config, hybrid), pg_collection=groups)
    tp, cp = groups.tp.size(), groups.cp.size()
    batch = pack_batch([(12, 20)], dp_rank=0, num_ranks=cp, tp_size=tp, order="zigzag")
    packed = PackedSequence.of(batch)
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

    # Each rank has rows of gates and of ups of the MLP: joined they are in another order.
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
