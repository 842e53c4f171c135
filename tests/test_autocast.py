"""Float32 layers under ``torch.autocast``: as ``torch.nn.Linear``, they compute in its dtype."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import Tensor, nn

from lasp import LightningAttention, SequenceLayout
from lasp.hybrid import AttentionConfig, HybridConfig, HybridModel, next_token_loss, pack_batch
from moe_parallel import ExpertParallelMoE, ExpertTopology, MoEConfig, TokenOrder
from ring import RingAttention
from tests.closeness import assert_within_budget
from tests.moe_parallel.batch import groups_of
from tests.ranks import run_on_ranks

LAYOUT = SequenceLayout((9, 1, 6), 1)
MOE = MoEConfig(16, 24, 4, 2)
LAYERS = {
    "lightning": lambda: LightningAttention(16, 2, 8, 0, 4),
    "lightning, triton": lambda: LightningAttention(16, 2, 8, 0, 4, impl="triton"),
    "ring": lambda: RingAttention(16, 2, 1, 8, rotary_dim=4),
    "experts": lambda: ExpertParallelMoE(MOE),
}


def called(layer: nn.Module, hidden: Tensor) -> Tensor:
    if isinstance(layer, ExpertParallelMoE):
        return layer(hidden).output
    return layer(hidden, layout=LAYOUT)


@pytest.mark.parametrize("name", LAYERS)
@pytest.mark.parametrize("hidden_dtype", [torch.float32, torch.bfloat16])
def test_a_float32_layer_is_a_bfloat16_layer(name: str, hidden_dtype: torch.dtype) -> None:
    """Bit for bit, if its weights are bfloat16 numbers; gradients come in the weights' dtype."""
    if "triton" in name:
        pytest.importorskip("triton", reason="the kernels need triton, which has no wheel here")
    wide = LAYERS[name]()
    with torch.no_grad():
        for weight in wide.parameters():
            weight.copy_(weight.bfloat16())
    narrow = copy.deepcopy(wide)
    for part, weight in narrow.named_parameters():
        if part != "gate.weight":  # the router's, float32 in every layer
            weight.data = weight.data.bfloat16()
    values = torch.randn(16, 16).bfloat16()
    inputs = [values.to(t, copy=True).requires_grad_() for t in (hidden_dtype, torch.bfloat16)]
    with torch.autocast("cpu", torch.bfloat16):
        actual = called(wide, inputs[0])
    expected = called(narrow, inputs[1])
    assert actual.dtype == torch.bfloat16
    assert torch.equal(actual, expected)
    grad = torch.randn_like(actual)
    torch.autograd.backward([actual, expected], [grad, grad])
    assert torch.equal(inputs[0].grad, inputs[1].grad.to(hidden_dtype))
    pairs = zip(wide.named_parameters(), narrow.parameters(), strict=True)
    for (part, a), b in pairs:
        assert a.grad.dtype == torch.float32
        assert torch.equal(a.grad.to(b.dtype), b.grad), part


def test_a_linear_layer_may_come_before_experts() -> None:
    projection, experts = nn.Linear(16, 16), ExpertParallelMoE(MOE)
    with torch.autocast("cpu", torch.bfloat16):
        assert experts(projection(torch.randn(6, 16))).output.dtype == torch.bfloat16


def test_float64_layers_do_not_take_part() -> None:
    layer, hidden = ExpertParallelMoE(MOE, dtype=torch.float64), torch.randn(6, 16).double()
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(layer(hidden).output, layer(hidden).output)
        assert layer(hidden).output.dtype == torch.float64


def on_rank(topology: ExpertTopology) -> list[Tensor]:
    layer = ExpertParallelMoE(MOE, groups=groups_of(topology).experts)
    rank, order = layer.mesh.token_rank, TokenOrder.contiguous([8] * topology.world_size)
    hidden = torch.randn(16, 16, generator=torch.Generator().manual_seed(0))
    mine = hidden.view(topology.world_size, -1, 16)[rank]
    with torch.autocast("cpu", torch.bfloat16):
        output = layer(mine, token_order=order if topology.world_size > 1 else None).output
    output.float().square().sum().backward()
    return [output.detach(), layer.gate.weight.grad]


@pytest.mark.parametrize("sizes", [{"ep": 2}, {"etp": 2}])
def test_experts_over_ranks_compute_in_the_autocast_dtype(sizes: dict[str, int]) -> None:
    parts = run_on_ranks(on_rank, 2, ExpertTopology(2, **sizes))
    honest, honest_gate = run_on_ranks(on_rank, 1, ExpertTopology(1))[0]
    layer, x = ExpertParallelMoE(MOE).double(), torch.randn(
        16, 16, generator=torch.Generator().manual_seed(0)
    )  # fmt: skip
    exact = layer(x.double()).output
    exact.square().sum().backward()
    assert_within_budget(torch.cat([part[0] for part in parts]), exact.detach(), honest)
    gate = sum(part[1] for part in parts)
    assert_within_budget(gate, layer.gate.weight.grad, honest_gate)


# Every expert is chosen: a choice that rounding turns is no error of the numbers.
CONFIG = HybridConfig(2, 32, AttentionConfig(2, 1, 8, 8), MoEConfig(16, 24, 4, 4), pattern="1:1")


def decoder_gradients(dtype: torch.dtype, autocast: torch.dtype | None) -> dict[str, Tensor]:
    """Loss and gradients of the same batch, with a gradient scaler for float16."""
    model = HybridModel(CONFIG, dtype=dtype)
    model.reset_parameters(0)
    batch = pack_batch([[9, 1, 6]], dp_rank=0, num_ranks=1, order="contiguous")
    tokens = torch.arange(16) * 5 % 32
    optimizer = torch.optim.SGD(model.parameters())
    scaler = torch.amp.GradScaler("cpu", enabled=autocast == torch.float16)
    with torch.autocast("cpu", autocast, enabled=autocast is not None):
        output = model(tokens, batch)
        loss = next_token_loss(output.logits, (tokens + 1) % 32, len(tokens)) + output.aux_loss
    if autocast is not None:
        assert output.logits.dtype == autocast
    scaler.scale(loss).backward()
    scaler.unscale_(optimizer)
    scaler.step(optimizer)
    return {"loss": loss.detach(), **{n: p.grad for n, p in model.named_parameters()}}


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_the_decoder_errs_no_more_than_in_bfloat16(dtype: torch.dtype) -> None:
    exact = decoder_gradients(torch.float64, None)
    honest = decoder_gradients(torch.bfloat16, None)
    for name, actual in decoder_gradients(torch.float32, dtype).items():
        assert actual.dtype == torch.float32
        assert_within_budget(actual, exact[name], honest[name], what=name)
