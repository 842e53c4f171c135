"""The multi-head latent attention layer against the same equations in dense torch."""

from __future__ import annotations

from itertools import accumulate
from typing import Any
from unittest.mock import patch

import pytest
import torch
import torch.distributed as dist
from torch import Tensor
from torch.nn.functional import linear, rms_norm

from lasp._core.rotary import rotary_table
from lasp.sequence.layout import SequenceLayout
from ring import MultiLatentAttention
from ring.reference import dense_attention
from tests.closeness import assert_equal_to_rounding
from tests.ranks import run_on_ranks
from tests.ring.cases import ORDERS

PACKS = ((16,), (5, 1, 10), (37, 1, 2))
BASE: dict[str, Any] = {
    "kv_lora_rank": 5, "qk_nope_head_dim": 4, "qk_rope_head_dim": 4, "v_head_dim": 3,
    "rope_base": 100.0,
}  # fmt: skip
OPTIONS: tuple[dict[str, Any], ...] = (
    {"q_lora_rank": 6},
    {"gate": True, "rope_interleaved": True},
    {"q_lora_rank": 3, "rope_base": None, "causal": False},
    {"qk_rope_head_dim": 0, "gate": True, "window": (4, 0)},
)
HIDDEN, HEADS = 7, 2


def test_queries_and_keys_share_one_table() -> None:
    layer = make_layer({})
    with patch("ring.latent_module.rotary_table", wraps=rotary_table) as made:
        layer(torch.ones(4, HIDDEN, dtype=torch.float64))
    assert made.call_count == 1


def make_layer(options: dict[str, Any]) -> MultiLatentAttention:
    torch.manual_seed(0)
    layer = MultiLatentAttention(HIDDEN, HEADS, **{**BASE, **options}, dtype=torch.float64)
    for parameter in layer.parameters():
        torch.nn.init.normal_(parameter, std=0.5)
    return layer


def turned(x: Tensor, positions: Tensor, base: float, neighbours: bool) -> Tensor:
    """Each pair of dims as a complex number, times exp(i angle): [T, ..., P]."""
    pairs = x.unflatten(-1, (-1, 2)) if neighbours else x.unflatten(-1, (2, -1)).transpose(-1, -2)
    half = pairs.shape[-2]
    angles = positions.double()[:, None] * base ** (-torch.arange(half).double() / half)
    angles = angles.view(len(x), *[1] * (x.dim() - 2), half)
    return torch.view_as_real(torch.view_as_complex(pairs.contiguous()) * torch.exp(1j * angles))


def dense(
    p: dict[str, Tensor], x: Tensor, lengths: tuple[int, ...], options: dict[str, Any]
) -> Tensor:
    """The layer in dense torch; rotated pairs stay pairs, which scores do not see."""
    o = {**BASE, "q_lora_rank": None, "gate": False, "causal": True, "window": (-1, -1),
         "rope_interleaved": False} | options  # fmt: skip
    own, shared, rank = o["qk_nope_head_dim"], o["qk_rope_head_dim"], o["kv_lora_rank"]
    if o["q_lora_rank"] is None:
        q = linear(x, p["q_proj.weight"])
    else:
        q = linear(x, p["q_a_proj.weight"])
        q = rms_norm(q, q.shape[-1:], p["q_a_layernorm.weight"], 1e-6)
        q = linear(q, p["q_b_proj.weight"])
    q = q.unflatten(-1, (HEADS, -1))
    compressed = linear(x, p["kv_a_proj_with_mqa.weight"])
    c = rms_norm(compressed[:, :rank], (rank,), p["kv_a_layernorm.weight"], 1e-6)
    both = linear(c, p["kv_b_proj.weight"]).unflatten(-1, (HEADS, -1))
    q_part, k_part = q[..., own:], compressed[:, None, rank:]
    if shared and o["rope_base"] is not None:
        positions = torch.cat([torch.arange(n) for n in lengths])
        q_part, k_part = (
            turned(part, positions, o["rope_base"], o["rope_interleaved"]).flatten(-2)
            for part in (q_part, k_part)
        )
    q = torch.cat((q[..., :own], q_part), -1)
    k = torch.cat((both[..., :own], k_part.expand(-1, HEADS, -1)), -1)
    y, _ = dense_attention(
        q, k, both[..., own:], cu_seqlens=list(accumulate(lengths, initial=0)), causal=o["causal"],
        scale=(own + shared) ** -0.5, window=o["window"],
    )  # fmt: skip
    y = y.flatten(-2)
    y = y * torch.sigmoid(linear(x, p["g_proj.weight"])) if o["gate"] else y
    return linear(y, p["o_proj.weight"])


def on_world(cases) -> list[list[Tensor]]:
    found = []
    for x, doutput, layout, options in cases:
        layer, rank = make_layer(options), dist.get_rank()
        mine = layout.shard(x, rank).clone().requires_grad_()
        output = layer(mine, layout=layout, cp_group=dist.group.WORLD)
        output.backward(layout.shard(doutput, rank))
        found.append([output.detach(), mine.grad, *(w.grad for w in layer.parameters())])
    return found


@pytest.mark.parametrize("num_ranks", [1, 3])
def test_layer_over_ranks(num_ranks: int) -> None:
    cases = []
    for index, options in enumerate(OPTIONS):
        for number, lengths in enumerate(PACKS):
            layout = SequenceLayout(lengths, num_ranks, ORDERS[(index + number) % 3])
            x, doutput = torch.randn(2, sum(lengths), HIDDEN, dtype=torch.float64)
            cases.append((x, doutput, layout, options))
    for (x, doutput, layout, options), *parts in zip(
        cases, *run_on_ranks(on_world, num_ranks, cases)
    ):
        layer = make_layer(options)
        x = x.requires_grad_()
        output = dense(dict(layer.named_parameters()), x, layout.document_lengths, options)
        leaves = [x, *layer.parameters()]
        expected = [output.detach(), *torch.autograd.grad(output, leaves, doutput)]
        by_name = list(zip(*parts))
        rows = [layout.unshard(some) for some in by_name[:2]]
        actual = [*rows, *(sum(some) for some in by_name[2:])]
        names = ("output", "dx", *(name for name, _ in layer.named_parameters()))
        for name, a, b in zip(names, actual, expected, strict=True):
            assert_equal_to_rounding(a, b, what=f"{name} with {options}")


def test_rows_of_a_batch() -> None:
    layer, rows = make_layer(OPTIONS[0]), torch.randn(3, 5, HIDDEN, dtype=torch.float64)
    assert_equal_to_rounding(layer(rows), torch.stack([layer(row) for row in rows]))


def test_names_are_those_of_deepseek() -> None:
    shapes = {name: tuple(x.shape) for name, x in make_layer(OPTIONS[0]).named_parameters()}
    assert shapes == {
        "q_a_proj.weight": (6, HIDDEN),
        "q_a_layernorm.weight": (6,),
        "q_b_proj.weight": (HEADS * 8, 6),
        "kv_a_proj_with_mqa.weight": (9, HIDDEN),
        "kv_a_layernorm.weight": (5,),
        "kv_b_proj.weight": (HEADS * 7, 5),
        "o_proj.weight": (HIDDEN, HEADS * 3),
    }


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"kv_lora_rank": 0}, "must be an integer >= 1"),
        ({"q_lora_rank": 0}, "must be an integer >= 1"),
        ({"qk_rope_head_dim": 3}, "qk_rope_head_dim must be even"),
        ({"qk_rope_head_dim": -2}, "qk_rope_head_dim must be an integer >= 0"),
        ({"window": (1, 1)}, "window must end at the query"),
    ],
)
def test_bad_sizes(change: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        MultiLatentAttention(HIDDEN, HEADS, **{**BASE, **change})


@pytest.mark.parametrize("shape", [(HIDDEN,), (6, HIDDEN + 1), (0, HIDDEN)])
def test_bad_hidden(shape: tuple[int, ...]) -> None:
    with pytest.raises(ValueError, match="hidden must be"):
        make_layer({})(torch.ones(shape, dtype=torch.float64))
