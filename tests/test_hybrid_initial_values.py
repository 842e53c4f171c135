"""Initial values of the hybrid model: DeepNorm's, the same for any ranks and defaults of torch."""

from __future__ import annotations

import pytest
import torch

from lasp.hybrid import (
    HybridModel,
    Residuals,
)
from tests.test_hybrid import MEDIUM, config


def test_initial_values_are_deepnorms_and_independent() -> None:
    model = HybridModel(MEDIUM)
    model.reset_parameters(0)
    drawn = dict(model.named_parameters())
    beta, width = Residuals.deepnorm(MEDIUM.num_layers).init_gain, MEDIUM.moe.hidden_size
    inner, kv = 4 * 32, 2 * 32
    qkv = drawn["layers.0.attention.qkv_proj.weight"].view(4, 3, 32, width).transpose(0, 1)
    for weight, rows, gain in [
        (qkv[0], inner, 1.0),
        (qkv[1], inner, 1.0),
        (qkv[2], inner, beta),
        (drawn["layers.0.attention.output_gate.weight"], inner, 1.0),
        (drawn["layers.0.attention.out_proj.weight"], inner, beta),
        (drawn["layers.2.attention.q_proj.weight"], inner, 1.0),
        (drawn["layers.2.attention.k_proj.weight"], kv, 1.0),
        (drawn["layers.2.attention.v_proj.weight"], kv, beta),
        (drawn["layers.2.attention.o_proj.weight"], inner, beta),
        (drawn["layers.1.moe.experts.w13"], 128, beta),
        (drawn["layers.1.moe.experts.w2"], 128, beta),
    ]:
        expected = gain * (2 / (rows + width)) ** 0.5
        # The standard deviation of n uniform draws is known to about 1 / sqrt(n).
        assert weight.std().item() == pytest.approx(expected, rel=4 / weight.numel() ** 0.5)
    flat = [p.flatten()[:64] / p.flatten()[:64].norm() for p in drawn.values() if p.ndim > 1]
    cosines = torch.stack(flat) @ torch.stack(flat).T - torch.eye(len(flat))
    assert cosines.abs().max() < 0.7  # no two start from the same numbers


def test_a_model_built_on_meta_is_whole_after_reset() -> None:
    model = HybridModel(config(), device="meta").to_empty(device="cpu")
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.fill_(torch.nan)
    model.reset_parameters(0)
    built = HybridModel(config())
    built.reset_parameters(0)
    for (name, a), b in zip(model.named_parameters(), built.parameters()):
        assert torch.equal(a, b), name


def test_initial_values_are_drawn_alike_whatever_the_defaults_of_torch() -> None:
    model, other = (HybridModel(config(), dtype=torch.float32) for _ in range(2))
    model.reset_parameters(0)
    torch.set_default_dtype(torch.float64)
    try:
        with torch.device("meta"):
            other.reset_parameters(0)
    finally:
        torch.set_default_dtype(torch.float32)
    for (name, a), b in zip(model.named_parameters(), other.parameters()):
        assert torch.equal(a, b), name
