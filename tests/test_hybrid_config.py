"""The description of the hybrid model: named shapes, initial values, what is refused."""

from __future__ import annotations

import math
import re
import runpy
from dataclasses import replace

import pytest
import torch
from torch import Tensor

from lasp.hybrid import (
    MINIMAX_TEXT_01,
    NAMED_CONFIGS,
    AttentionConfig,
    DenseConfig,
    HybridModel,
    LatentConfig,
    Residuals,
    ResidualScale,
    VocabularyConfig,
    count_parameters,
    next_in_document,
    pack_batch,
)
from lasp.lightning.decay import decay_rates
from lasp.sequence.layout import SequenceLayout
from tests.closeness import relative_error
from tests.test_hybrid import config


def test_layer_kinds_and_deepnorm_are_minimaxs() -> None:
    assert MINIMAX_TEXT_01.kinds == "GGGGGGG*" * 10
    residuals = MINIMAX_TEXT_01.residuals_or_deepnorm
    assert residuals == Residuals.deepnorm(80)
    assert residuals.norm == "post"
    assert residuals.lightning == residuals.softmax == residuals.mlp
    assert abs(residuals.mlp.alpha - 3.5565588200778455) < 1e-12
    assert residuals.mlp.beta == 1.0
    assert abs(residuals.init_gain - 0.19882) < 5e-6


@pytest.mark.parametrize(
    ("name", "total", "active", "with_vocabulary"),
    [
        ("minimax-text-01", "456.09", "45.94", "48.40"),
        ("minimax-m1", "456.09", "45.94", "48.40"),
        ("minicpm-sala", "9.48", "8.88", "9.48"),
        ("ring-mini-linear-2.0", "16.42", "0.96", "1.60"),
        ("ring-flash-linear-2.0", "104.18", "6.16", "7.44"),
        ("ling-2.5-1t", "1012.23", "61.00", "63.58"),
        ("ring-2.5-1t", "1012.23", "61.00", "63.58"),
    ],
)
def test_parameters_are_the_published(
    name: str, total: str, active: str, with_vocabulary: str
) -> None:
    """456 B, 45.9 B active; 9.5 B; 16.4 B, 957 M and 1.6 B; 104 B, 6.1 B and 7.4 B; 1 T, 63 B."""
    counted = count_parameters(NAMED_CONFIGS[name])
    assert tuple(f"{n / 1e9:.2f}" for n in counted) == (total, active, with_vocabulary)


def test_command_prints_the_parameters(capsys) -> None:
    runpy.run_module("lasp.hybrid", run_name="__main__")
    row = "minimax-text-01 80 70 6144 32 456.09 B 45.94 B 48.40 B"
    assert row in re.sub(" +", " ", capsys.readouterr().out)


def model_call(
    tokens: Tensor | None, mtp_loss_weight: float | None = None, **inputs: Tensor
) -> None:
    batch = pack_batch([(8,)], dp_rank=0, num_ranks=2, order="contiguous")
    chosen = replace(config(), mtp_loss_weight=mtp_loss_weight)
    HybridModel(chosen)(tokens, batch, **inputs)


def test_a_float32_head_is_float32_whatever_the_rest_is() -> None:
    for tied in (False, True):
        chosen = replace(config(), vocabulary=VocabularyConfig(tied, float32_head=True))
        model = HybridModel(chosen, dtype=torch.bfloat16)
        model.reset_parameters(0)
        batch = pack_batch([(8,)], dp_rank=0, num_ranks=1, order="contiguous")
        normed: list[Tensor] = []
        model.final_norm.register_forward_hook(lambda *call, to=normed: to.append(call[2]))
        with torch.autocast("cpu", torch.bfloat16):
            logits = model(torch.arange(8), batch).logits
        weight = (model.embedding if tied else model.head).weight
        assert logits.dtype == torch.float32
        assert weight.dtype == (torch.bfloat16 if tied else torch.float32)
        exact = normed[0].double() @ weight.double().T
        assert relative_error(logits, exact) < 1e-6


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (
            lambda: AttentionConfig(4, 2, 8, 4, latent=LatentConfig(8, 4, 4, 4)),
            "num_kv_heads must be 4 with latent attention, got 2",
        ),
        (lambda: model_call(torch.zeros(8, dtype=torch.int64)), "tokens must be int64 of shape"),
        (lambda: model_call(torch.zeros(4)), "tokens must be int64 of shape"),
        (lambda: model_call(None), "one of tokens and inputs_embeds must be given, got neither"),
        (
            lambda: model_call(torch.zeros(4), inputs_embeds=torch.zeros(4, 10)),
            "one of tokens and inputs_embeds must be given, got both",
        ),
        (
            lambda: model_call(None, inputs_embeds=torch.zeros(4, 9)),
            r"inputs_embeds must be floats of shape \(4, 10\)",
        ),
        (lambda: replace(config(), mtp_loss_weight=0.0), "mtp_loss_weight must be a finite .* > 0"),
        (
            lambda: model_call(torch.arange(4), next_tokens=torch.arange(4)),
            "next_tokens must be None for a model without multi-token prediction",
        ),
        (
            lambda: model_call(torch.arange(4), mtp_loss_weight=0.1),
            "next_tokens must be given to train multi-token prediction",
        ),
        (
            lambda: model_call(torch.arange(4), mtp_loss_weight=0.1, next_tokens=torch.arange(3)),
            r"next_tokens must be int64 of shape \(4,\)",
        ),
        (
            lambda: next_in_document(torch.arange(3), SequenceLayout((4,), 1), pad_value=0),
            r"layout must hold the 3 tokens a rank of x \(3,\), got 4",
        ),
        (
            lambda: next_in_document(torch.zeros(4, 2), SequenceLayout((4,), 1), pad_value=0),
            r"x must be \[T\], one number a token, got \[4, 2\]",
        ),
        (
            lambda: next_in_document(torch.arange(2), SequenceLayout((4,), 2), pad_value=0),
            "layout must be for the 1 ranks of cp_group, got num_ranks 2",
        ),
        (lambda: replace(config(), num_decay_layers=2), "num_decay_layers must be at least"),
        *(
            (lambda dense=dense, moe=moe: replace(config(), dense=dense, **moe), message)
            for dense, moe, message in (
                (DenseConfig(10, 8, 1), {"moe": None}, "dense.num_layers must be None with moe"),
                (DenseConfig(9, 8, 1), {}, "dense.hidden_size must be moe.hidden_size 10, got 9"),
                (DenseConfig(10, 8, 3), {}, r"dense.num_layers must be in \(0, 3\)"),
                (DenseConfig(10, 8), {}, r"dense.num_layers must be in \(0, 3\)"),
            )
        ),
        (lambda: replace(config(), decay=torch.ones(2, 4)), r"decay must .* \(3, 4\), got torch.f"),
        (lambda: replace(config(), decay=torch.ones(3, 4) * -1), "rates must be finite and >= 0"),
        (
            lambda: replace(config(), decay=torch.ones(3, 4), num_decay_layers=9),
            "num_decay_layers must be None with rates given, got 9",
        ),
        (lambda: replace(config(), num_layers=0), "num_layers must be an integer >= 1"),
        (lambda: replace(config(), num_layers=2, pattern="GG*"), "pattern must be .* or 2 of G"),
        *(
            (lambda pattern=pattern: replace(config(), pattern=pattern), "pattern must be")
            for pattern in ("7", "0:0", "a:b", "-1:2", None)
        ),
        (lambda: replace(config(), norm_eps=-1.0), "norm_eps must be a finite number > 0, got -1"),
        (lambda: DenseConfig(8, 0), "ffn_size must be an integer >= 1, got 0"),
        *(
            (lambda rates=rates: replace(config(), decay=rates), "decay must be")
            for rates in (
                ((1.0, 2.0), (1.0,)),
                torch.ones(3, 4, device="meta"),
                torch.ones(3, 4, dtype=torch.int64),
            )
        ),
        (lambda: LatentConfig(5, 3, 4, 7, 0), "q_lora_rank must be an integer >= 1, got 0"),
        (lambda: Residuals(mlp=ResidualScale(math.nan)), "mlp.alpha must be a finite number, got"),
        (lambda: Residuals(init_gain=-1.0), "init_gain must be a finite number > 0, got -1"),
        (lambda: Residuals.deepnorm(0), "num_layers must be an integer >= 1, got 0"),
        (
            lambda: HybridModel(replace(config(), moe=None)),
            "moe or dense must be given, got None for both",
        ),
        (
            lambda: pack_batch([(8,)], dp_rank=1, num_ranks=2, order="contiguous"),
            r"dp_rank must be in \[0, 1\)",
        ),
        (
            lambda: pack_batch(
                [(8,), (3,)], dp_rank=0, num_ranks=2, order="zigzag", padded_lengths=[(8,)]
            ),
            "padded_lengths must hold the documents of the 2 replicas",
        ),
        (
            lambda: pack_batch([8, 3], dp_rank=0, num_ranks=2, order="fold"),
            r"document_lengths must hold the lengths of every replica.* got \[8, 3\]",
        ),
        (
            lambda: pack_batch([(8,)], dp_rank=0, num_ranks=2, order="fold", padded_lengths=[8]),
            "padded_lengths must hold the lengths of every replica",
        ),
        (
            lambda: pack_batch([(8,)], dp_rank=0, num_ranks=2, order="fold", tp_size=0),
            "tp_size must be an integer >= 1, got 0",
        ),
    ],
)
def test_bad_input(call, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        call()


def test_rates_in_place_of_a_formula() -> None:
    rates = torch.stack([decay_rates(4, layer, 7, "sala") for layer in range(3)]) * 0.7
    given, same = (replace(config(), decay=rates) for _ in range(2))
    assert given == same != config()
    assert hash(given) == hash(same)
    found = [layer.attention.rates for layer in HybridModel(given).layers[:2]]
    for actual, expected in zip(found, rates):
        assert torch.equal(actual, expected)
    assert HybridModel(replace(given, mtp_loss_weight=0.1)).mtp is not None


def test_rates_are_kept_to_the_last_bit_whatever_the_defaults_of_torch() -> None:
    given = replace(config(), decay=torch.rand(3, 4, dtype=torch.float64))
    torch.set_default_dtype(torch.bfloat16)
    try:
        with torch.device("meta"):
            assert replace(given, norm_eps=1e-6).decay == given.decay
    finally:
        torch.set_default_dtype(torch.float32)


def test_a_pattern_may_have_longer_groups_than_there_are_layers() -> None:
    assert replace(config(), pattern="9999999999:1").kinds == "GGG"
    assert replace(config(), pattern="1:9999999999").kinds == "G**"
