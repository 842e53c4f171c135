from __future__ import annotations

import math
from typing import get_args

import pytest
import torch

from lasp.lightning.decay import Variant, decay_rates


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


@pytest.mark.parametrize(
    ("variant", "factors"),
    [
        # Layers 0, 1 and 4 of five: (l - 1) / 4, the same not below 0, and no factor.
        ("bailing", (1.25001, 1.00001, 0.25001)),
        ("bailing_clamped", (1.00001, 1.00001, 0.25001)),
        ("alibi", (1.00001, 0.75001, 0.00001)),
        ("sala", (1.0, 1.0, 1.0)),
    ],
)
def test_factors_of_layers_on_alibi_slopes(variant: str, factors: tuple[float, ...]) -> None:
    for layer, factor in zip((0, 1, 4), factors, strict=True):
        slopes = torch.tensor([2.0**-n for n in range(1, 9)], dtype=torch.float64)
        rates = decay_rates(8, layer, 5, variant)
        assert torch.allclose(rates.double(), slopes * factor, rtol=1e-7, atol=0)
    # Six heads: those of four, then every second one of eight.
    six = decay_rates(6, 1, 5, variant).double() / factors[1]
    expected = torch.tensor([2.0**-n for n in (2, 4, 6, 8, 1, 3)], dtype=torch.float64)
    assert torch.allclose(six, expected, rtol=1e-7, atol=0)
    assert torch.isfinite(decay_rates(6, 0, 1, variant)).all()


def test_rates_may_be_given() -> None:
    given = torch.tensor([0.5, 0.0, 0.25, 2.0], dtype=torch.float64)
    assert torch.equal(decay_rates(4, 0, 1, given), given.float())
    assert torch.equal(decay_rates(4, 0, 1, given, tp_rank=1, tp_size=2), given[2:].float())


@pytest.mark.parametrize("variant", get_args(Variant))
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
        ({"variant": "mini"}, "variant must be one of"),
        ({"variant": torch.ones(3)}, "rates of all 4 heads, got a tensor \\(3,\\)"),
        ({"variant": torch.ones(4, dtype=torch.int64)}, "float rates"),
        ({"variant": torch.tensor([1.0, 1.0, 1.0, -1.0])}, "rates must be finite and >= 0"),
    ],
)
def test_bad_arguments(kwargs: dict, argument: str) -> None:
    with pytest.raises(ValueError, match=argument):
        decay_rates(**{"num_heads": 4, "layer_index": 0, "num_layers": 4, **kwargs})
