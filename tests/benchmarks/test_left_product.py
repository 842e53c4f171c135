from __future__ import annotations

import pytest
import torch
from torch import Tensor

from benchmarks.left_product import left_product_attention
from lasp import decay_rates
from lasp.lightning.reference import recurrent_lightning_attention
from tests.closeness import assert_within_budget

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
# Triton's interpreter has no product of bf16.
DTYPE = torch.bfloat16 if DEVICE == "cuda" else torch.float16


def run(forward, inputs: list[Tensor], do: Tensor) -> list[Tensor]:
    leaves = [x.clone().requires_grad_() for x in inputs]
    output = forward(*leaves)
    return [output.detach(), *torch.autograd.grad(output, leaves, do)]


def masked_product(q: Tensor, k: Tensor, v: Tensor, rates: Tensor) -> Tensor:
    """The same sum with all scores at once, rounded where tiles are: as scores and as output."""
    back = torch.arange(q.shape[0]).unsqueeze(1) - torch.arange(q.shape[0])
    weights = torch.exp(-rates[:, None, None] * back.clamp(min=0)) * (back >= 0)
    scores = torch.einsum("thd,shd->hts", q.float(), k.float()) * weights
    return torch.einsum("hts,shd->thd", scores.to(q.dtype).float(), v.float()).to(q.dtype)


@pytest.mark.parametrize(
    ("tokens", "heads", "dim", "layer"),
    [(1, 1, 64, 0), (64, 1, 64, 0), (128, 2, 64, 39), (300, 3, 64, 0), (257, 1, 128, 20)],
)
def test_output_and_gradients_are_the_recurrence(tokens, heads, dim, layer) -> None:
    rates = decay_rates(heads, layer, 40)
    q, k, v, do = (torch.randn(tokens, heads, dim).to(DTYPE) for _ in range(4))
    oracle = run(
        lambda *qkv: recurrent_lightning_attention(*qkv, rates)[0],
        [x.double() for x in (q, k, v)],
        do.double(),
    )
    honest = run(lambda *qkv: masked_product(*qkv, rates), [q, k, v], do)
    on_device = [x.to(DEVICE) for x in (q, k, v)]
    actual = run(
        lambda *qkv: left_product_attention(*qkv, rates.to(DEVICE)), on_device, do.to(DEVICE)
    )
    for what, *tensors in zip(("output", "dq", "dk", "dv"), actual, oracle, honest):
        assert_within_budget(*(x.cpu() for x in tensors), what=what)


def test_fast_decay_over_many_tiles_neither_overflows_nor_leaks() -> None:
    """Heads whose state is forgotten within a tile, and one that forgets nothing."""
    rates = torch.tensor([8.0, 1.0, 0.0])
    q, k, v = (torch.randint(-1, 2, (400, 3, 64)).to(DTYPE) for _ in range(3))
    exact = recurrent_lightning_attention(q.double(), k.double(), v.double(), rates)[0]
    honest = masked_product(q, k, v, rates)
    output = left_product_attention(*(x.to(DEVICE) for x in (q, k, v)), rates.to(DEVICE)).cpu()
    for head in range(3):
        assert_within_budget(output[:, head], exact[:, head], honest[:, head], what=str(head))


def test_what_it_cannot_do_is_said() -> None:
    x = torch.zeros(4, 1, 64)
    with pytest.raises(ValueError, match="bf16 or fp16"):
        left_product_attention(x, x, x, torch.zeros(1))
    wide = torch.zeros(4, 1, 96).bfloat16()
    with pytest.raises(ValueError, match="alike"):
        left_product_attention(wide, wide, wide, torch.zeros(1))
