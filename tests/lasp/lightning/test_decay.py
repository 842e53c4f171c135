from __future__ import annotations

import math

import pytest
import torch

from lasp.lightning.decay import decay_rates


@pytest.mark.parametrize("heads", [1, 3, 5, 64])
@pytest.mark.parametrize(("layer", "layers"), [(0, 1), (0, 80), (41, 80), (79, 80)])
def test_minimax_is_the_formula_of_transformers(heads: int, layer: int, layers: int) -> None:
    base = 1 / (2 ** (8 / heads))  # MiniMaxLightningAttention.get_slope_rate
    factor = 1 - layer / (layers - 1 + 1e-5) + 1e-5
    expected = torch.tensor([base ** (h + 1) * factor for h in range(heads)], dtype=torch.float64)
    rates = decay_rates(heads, layer, layers)
    assert rates.dtype == torch.float32
    assert torch.equal(rates, expected.float())
    assert (rates > 0).all()


def test_minimax_01_known_values() -> None:
    rates = decay_rates(64, 0, 80)
    assert rates[0].item() == pytest.approx(0.917, abs=1e-3)
    assert rates[63].item() == pytest.approx(0.0039, abs=1e-4)
    # The last lightning layer of MiniMax-01 is 78, layer 79 is softmax.
    assert (decay_rates(64, 78, 80)[0] / rates[0]).item() == pytest.approx(0.01267, abs=1e-5)


def test_alibi_slopes() -> None:
    # Eight heads: 1/2 .. 1/256; the factor of layer 0 is 1 + 1e-5.
    expected = torch.tensor([2.0**-n for n in range(1, 9)], dtype=torch.float64) * (1 + 1e-5)
    assert torch.equal(decay_rates(8, 0, 4, "alibi"), expected.float())
    # Three heads: those of two (1/16, 1/256), then the first of four (1/4).
    expected = torch.tensor([2.0**-4, 2.0**-8, 2.0**-2], dtype=torch.float64) * (1e-5)
    assert torch.allclose(decay_rates(3, 3, 4, "alibi").double(), expected, rtol=1e-6)
    assert torch.isfinite(decay_rates(6, 0, 1, "alibi")).all()


def test_linear_and_retnet() -> None:
    assert decay_rates(4, 1, 4, "linear").tolist() == [0.0, 1.5, 3.0, 4.5]
    rates = decay_rates(3, 2, 4, "retnet").tolist()
    assert rates == pytest.approx([-math.log(1 - 2.0 ** (-5 - h)) for h in range(3)])


@pytest.mark.parametrize("variant", ["minimax", "alibi", "linear", "retnet"])
def test_slices_of_tensor_parallel_ranks_make_the_whole(variant: str) -> None:
    whole = decay_rates(12, 3, 8, variant)
    slices = [decay_rates(12, 3, 8, variant, tp_rank=rank, tp_size=3) for rank in range(3)]
    assert torch.equal(torch.cat(slices), whole)
    assert (whole >= 0).all()


@pytest.mark.parametrize(
    ("kwargs", "argument"),
    [
        ({"num_heads": 0}, "num_heads"),
        ({"num_layers": 0}, "num_layers"),
        ({"layer_index": 4}, "layer_index"),
        ({"layer_index": -1}, "layer_index"),
        ({"tp_size": 3}, "tp_size"),
        ({"tp_size": 2, "tp_rank": 2}, "tp_rank"),
        ({"variant": "mini"}, "variant"),
    ],
)
def test_bad_arguments(kwargs: dict, argument: str) -> None:
    with pytest.raises(ValueError, match=argument):
        decay_rates(**{"num_heads": 4, "layer_index": 0, "num_layers": 4, **kwargs})
