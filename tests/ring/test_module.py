from __future__ import annotations

from itertools import accumulate

import pytest
import torch
import torch.distributed as dist
from torch import Tensor

from lasp.sequence.layout import SequenceLayout
from ring import RingAttention
from ring.reference import dense_attention
from tests.closeness import assert_equal_to_rounding
from tests.ranks import run_on_ranks
from tests.ring.cases import ORDERS, apply_rotary, rank_device

HIDDEN, HEADS, KV_HEADS, HEAD_DIM = 12, 6, 2, 4
PARAMETERS = ("q_proj.weight", "k_proj.weight", "v_proj.weight", "o_proj.weight")


def make_layer(causal: bool = True) -> RingAttention:
    """The same weights on every rank."""
    torch.manual_seed(1)
    sizes = (HIDDEN, HEADS, KV_HEADS, HEAD_DIM)
    return RingAttention(*sizes, rotary_dim=2, rope_base=100.0, causal=causal, dtype=torch.float64)


def expected_output(layer: RingAttention, hidden: Tensor, lengths: tuple[int, ...]) -> Tensor:
    positions = torch.cat([torch.arange(length) for length in lengths])
    q, k, v = (
        (hidden @ layer.get_parameter(name).T).unflatten(-1, (-1, HEAD_DIM))
        for name in PARAMETERS[:3]
    )
    q, k = (apply_rotary(x, positions, rotary_dim=2, base=100.0) for x in (q, k))
    cu_seqlens = list(accumulate(lengths, initial=0))
    output, _ = dense_attention(
        q, k, v, cu_seqlens=cu_seqlens, causal=layer.causal, scale=HEAD_DIM**-0.5
    )
    return output.flatten(1) @ layer.o_proj.weight.T


def expected_results(layer, hidden, doutput, lengths) -> list[Tensor]:
    """Output, gradient of hidden, gradients of the parameters."""
    hidden = hidden.clone().requires_grad_()
    output = expected_output(layer, hidden, lengths)
    inputs = (hidden, *(layer.get_parameter(name) for name in PARAMETERS))
    return [output.detach(), *torch.autograd.grad(output, inputs, doutput)]


def on_world(hidden, doutput, layout: SequenceLayout, causal: bool) -> list[Tensor]:
    rank, device = dist.get_rank(), rank_device()
    layer = make_layer(causal).to(device)
    hidden = layout.shard(hidden, rank, pad_value=3.0).to(device)
    doutput = layout.shard(doutput, rank).to(device)
    hidden.requires_grad_()
    output = layer(hidden, layout=layout, cp_group=dist.group.WORLD)
    output.backward(doutput)
    gradients = [layer.get_parameter(name).grad for name in PARAMETERS]
    for gradient in gradients:
        dist.all_reduce(gradient)
    return [x.detach().cpu() for x in (output, hidden.grad, *gradients)]


def check_on_ranks(num_ranks: int, order, causal: bool, backend: str = "gloo") -> None:
    lengths = (7, 1, 0, 12)
    hidden, doutput = torch.randn(2, 20, HIDDEN, dtype=torch.float64)
    layout = SequenceLayout(lengths, num_ranks, order)
    results = run_on_ranks(on_world, num_ranks, hidden, doutput, layout, causal, backend=backend)
    outputs, dhiddens, *gradients = zip(*results)
    actual = (layout.unshard(outputs), layout.unshard(dhiddens), *(g[0] for g in gradients))
    expected = expected_results(make_layer(causal), hidden, doutput, lengths)
    for name, a, b in zip(("output", "dhidden", *PARAMETERS), actual, expected, strict=True):
        assert_equal_to_rounding(a, b, what=name)


@pytest.mark.parametrize("num_ranks", [1, 3])
@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize("causal", [True, False])
def test_output_and_gradients(num_ranks: int, order, causal: bool) -> None:
    check_on_ranks(num_ranks, order, causal)


@pytest.mark.multi_gpu
@pytest.mark.parametrize("order", ORDERS)
def test_over_gpus(order) -> None:
    check_on_ranks(2, order, causal=True, backend="nccl")


def test_without_a_layout_the_tokens_are_one_document() -> None:
    hidden, layer = torch.randn(9, HIDDEN, dtype=torch.float64), make_layer()
    assert_equal_to_rounding(layer(hidden), expected_output(layer, hidden, (9,)))


def test_rows_of_a_batch_are_attended_apart() -> None:
    hidden, layer = torch.randn(2, 9, HIDDEN, dtype=torch.float64), make_layer()
    for row, alone in zip(layer(hidden), hidden):
        assert_equal_to_rounding(row, expected_output(layer, alone, (9,)))


def test_compiled_layer_equals_the_layer_in_every_bit() -> None:
    hidden, layer = torch.randn(9, HIDDEN, dtype=torch.float64, requires_grad=True), make_layer()
    inputs = (hidden, *layer.parameters())
    compiled = torch.compile(layer, fullgraph=True, backend="aot_eager")
    for layout in (None, SequenceLayout((4, 5), 1), SequenceLayout((2, 0, 7), 1)):
        results = []
        for forward in (layer, compiled):
            output = forward(hidden, layout=layout)
            results.append([output, *torch.autograd.grad(output.square().sum(), inputs)])
        for name, a, b in zip(("output", "dhidden", *PARAMETERS), *results, strict=True):
            assert torch.equal(a, b), name


def test_parameters_are_those_of_hugging_face_models() -> None:
    shapes = {name: tuple(p.shape) for name, p in make_layer().named_parameters()}
    assert shapes == {
        "q_proj.weight": (HEADS * HEAD_DIM, HIDDEN),
        "k_proj.weight": (KV_HEADS * HEAD_DIM, HIDDEN),
        "v_proj.weight": (KV_HEADS * HEAD_DIM, HIDDEN),
        "o_proj.weight": (HIDDEN, HEADS * HEAD_DIM),
    }


def test_device_and_dtype() -> None:
    layer = RingAttention(12, 6, 2, 4, rotary_dim=0, device="meta", dtype=torch.bfloat16)
    assert {(p.device.type, p.dtype) for p in layer.parameters()} == {("meta", torch.bfloat16)}


@pytest.mark.parametrize("rotary_dim", [0, 2])
def test_query_and_key_norms_come_before_the_rotation(rotary_dim: int) -> None:
    torch.manual_seed(0)
    layer = RingAttention(
        HIDDEN, HEADS, KV_HEADS, HEAD_DIM, rotary_dim=rotary_dim, rope_base=100.0, qk_norm=True,
        norm_eps=0.1, window=(3, 0), dtype=torch.float64,
    )  # fmt: skip
    weights = dict(layer.named_parameters())
    assert {name for name in weights if "norm" in name} == {"q_norm.weight", "k_norm.weight"}
    for name in ("q_norm.weight", "k_norm.weight"):
        torch.nn.init.normal_(weights[name])
    x = torch.randn(9, HIDDEN, dtype=torch.float64)
    q, k, v = ((x @ weights[f"{n}_proj.weight"].T).unflatten(-1, (-1, HEAD_DIM)) for n in "qkv")
    q, k = (
        y * weights[f"{n}_norm.weight"] / (y.square().mean(-1, keepdim=True) + 0.1).sqrt()
        for n, y in zip("qk", (q, k))
    )
    q, k = (apply_rotary(y, torch.arange(9), rotary_dim=rotary_dim, base=100.0) for y in (q, k))
    expected, _ = dense_attention(
        q, k, v, cu_seqlens=(0, 9), causal=True, scale=HEAD_DIM**-0.5, window=(3, 0)
    )
    expected = expected.flatten(1) @ weights["o_proj.weight"].T
    output = layer(x)
    assert_equal_to_rounding(output, expected)
    leaves, doutput = list(weights.values()), torch.randn_like(output)
    for a, b in zip(*(torch.autograd.grad(y, leaves, doutput) for y in (output, expected))):
        assert_equal_to_rounding(a, b)
