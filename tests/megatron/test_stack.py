"""The hybrid model as Megatron's HybridModel is the one as GPTModel."""

from __future__ import annotations

import re
import sys
from dataclasses import replace
from importlib import import_module
from types import SimpleNamespace
from typing import Any
from unittest import mock

import pytest
import torch
from megatron.core.models.gpt import GPTModel
from megatron.core.transformer.moe.moe_utils import MoEAuxLossAutoScaler
from megatron.core.transformer.spec_utils import build_module
from torch import Tensor

from lasp.hybrid import HybridConfig, pack_batch
from lasp.lightning.decay import decay_rates
from lasp.megatron import PackedSequence, hybrid_block_spec, hybrid_of
from tests.closeness import assert_equal_to_rounding
from tests.megatron.attention import HEADS, parallel_config
from tests.megatron.block import HYBRID, MODELS, OPTIONS
from tests.megatron.cpu import initialize, summed
from tests.ranks import refusal, run_on_ranks

stack = pytest.importorskip("lasp.megatron.hybrid_stack", exc_type=ImportError)
hybrid_model = pytest.importorskip("megatron.core.models.hybrid.hybrid_model")
moe_logging = pytest.importorskip("megatron.core.transformer.moe.moe_logging")

pytestmark = pytest.mark.megatron

LAYERS, VOCAB = 4, 24
LENGTHS = (13, 1, 0, 20, 6)
DENSE = {name: value for name, value in OPTIONS.items() if "moe" not in name}


def build(
    symbols: str, sizes: dict[str, int], groups: Any, model: str
) -> tuple[torch.nn.Module, ...]:
    """GPTModel of ``LAYERS`` decoder layers, HybridModel of twice as many, the same weights."""
    chosen = MODELS.get(model, {"hybrid": HYBRID})
    options = (OPTIONS if "E" in symbols else DENSE) | chosen
    like = options.pop("hybrid")
    shared = {
        "vocab_size": VOCAB,
        "max_sequence_length": sum(LENGTHS),
        "position_embedding_type": "none",
        "share_embeddings_and_output_weights": False,
        "pg_collection": groups,
    }
    config = parallel_config(sizes, **options)
    torch.manual_seed(9)
    described = hybrid_of(config, like)
    block = hybrid_block_spec(config, described)
    gpt = GPTModel(config, block, **shared).double()
    in_stack = {"num_layers": 2 * LAYERS, "moe_layer_freq": 1}  # the pattern says it
    config = parallel_config(sizes, **(options | in_stack))
    spec = stack.hybrid_stack_spec(symbols, described)
    hybrid = hybrid_model.HybridModel(config, spec, hybrid_layer_pattern=symbols, **shared).double()
    weights = dict(gpt.named_parameters())
    for name, parameter in hybrid.named_parameters():
        parameter.data.copy_(weights.pop(name_in_gpt(name)))
    assert not weights
    return gpt, hybrid


def name_in_gpt(name: str) -> str:
    if not name.startswith("decoder.layers."):
        return name.replace("decoder.final_norm.", "decoder.final_layernorm.")
    decoder, layers, index, rest = name.split(".", 3)
    return f"{decoder}.{layers}.{int(index) // 2}.{rest}"


def losses_of_a_step(
    symbols: str, sizes: dict[str, int], model: str
) -> list[tuple[Tensor, Tensor]]:
    """The losses of both models before and after a step of gradient descent."""
    groups = initialize(**sizes)
    tp, cp = groups.tp.size(), groups.cp.size()
    batch = pack_batch([LENGTHS], dp_rank=0, num_ranks=cp, tp_size=tp, order="zigzag")
    packed = PackedSequence.of(batch)
    layout = packed.layout
    generator = torch.Generator().manual_seed(8)
    drawn = torch.randint(VOCAB, (2, 1, layout.num_tokens), generator=generator)
    tokens, labels = layout.shard(drawn, groups.cp.rank(), dim=2)
    positions = layout.position_ids(groups.cp.rank()).expand_as(tokens)
    MoEAuxLossAutoScaler.set_loss_scale(torch.ones(1))
    results = []
    for form in build(symbols, sizes, groups, model):
        moe_logging.destroy_moe_metrics_tracker()  # it is for models of one depth
        losses = []
        for _ in range(2):
            loss = form(tokens, positions, None, labels=labels, packed_seq_params=packed).mean()
            losses.append(summed(loss.detach(), groups.cp))
            form.zero_grad()
            loss.backward()
            with torch.no_grad():
                for parameter in form.parameters():
                    parameter -= 0.02 * parameter.grad
        results.append(tuple(losses))
    return results


@pytest.mark.parametrize(
    ("symbols", "model"),
    [("GE*E" * 2, ""), ("G-*-" * 2, ""), ("G-*EGE*E", "ling"), ("*-G-G-*-", "sala")],
)
@pytest.mark.parametrize(
    ("num_ranks", "sizes"), [(1, {}), (4, {"tp": 2, "cp": 2, "ep": 2, "etp": 2})]
)
def test_trains_as_gpt_model(
    symbols: str, model: str, num_ranks: int, sizes: dict[str, int]
) -> None:
    if "E" not in symbols:
        sizes = {name: size for name, size in sizes.items() if not name.startswith("e")}
    for gpt, hybrid in run_on_ranks(losses_of_a_step, num_ranks, symbols, sizes, model):
        for actual, expected in zip(hybrid, gpt, strict=True):
            assert_equal_to_rounding(actual, expected)
        assert hybrid[1] < hybrid[0]


def lightning_layers(symbols: str) -> dict[int, Tensor]:
    """Decay rates of the lightning layers on this pipeline stage, by layer number."""
    groups = initialize(pp=2)
    options = OPTIONS | {"num_layers": 6, "linear_attention_freq": None}
    config = parallel_config({"pp": 2}, **options)
    model = hybrid_model.HybridModel(
        config,
        stack.hybrid_stack_spec(symbols, hybrid_of(config, HYBRID, symbols)),
        vocab_size=VOCAB,
        max_sequence_length=8,
        hybrid_layer_pattern=symbols,
        pre_process=groups.pp.rank() == 0,
        post_process=groups.pp.rank() == 1,
        share_embeddings_and_output_weights=False,
        pg_collection=groups,
    )
    keys = {value.key for value in model.sharded_state_dict().values()}
    assert any(key.endswith("mlp.router.weight") for key in keys)
    assert hasattr(model.decoder, "final_norm") == (groups.pp.rank() == 1)
    return {
        layer.layer_number: layer.self_attention.rates
        for layer, symbol in zip(model.decoder.layers, model.decoder.layer_type_list, strict=True)
        if symbol == "G"
    }


def test_decay_counts_attention_layers_over_pipeline_stages() -> None:
    first, second = run_on_ranks(lightning_layers, 2, "GE*E|GE")
    assert list(first) == [1]
    assert list(second) == [5]
    assert torch.equal(first[1], decay_rates(HEADS, 0, 3))
    assert torch.equal(second[5], decay_rates(HEADS, 2, 3))


@pytest.mark.parametrize("pattern", ["", "GE/GE", "MEGE", "G-D-"])
def test_other_layers_are_refused(pattern: str) -> None:
    with pytest.raises(ValueError, match="pattern must be of the layers"):
        stack.hybrid_stack_spec(pattern, HYBRID)


def of_stack(symbols: str) -> HybridConfig:
    kinds = symbols.replace("E", "")
    return replace(HYBRID, num_layers=len(kinds), pattern=kinds)


PIPED = "GE*E|GE"


def stack_on_rank(
    spec: Any, pattern: str, pp: int = 1, argument: str | None = None, **options: Any
) -> tuple[dict[int, Tensor], set[float]]:
    """Rates by layer number and residual weights, with a pattern that the training loop knows."""
    groups = initialize(pp=pp)
    count = sum(symbol != "|" for symbol in pattern)
    shape = {"num_layers": count, "linear_attention_freq": None, "kv_channels": 64}
    training = SimpleNamespace(_GLOBAL_ARGS=SimpleNamespace(hybrid_layer_pattern=argument))
    with mock.patch.dict(sys.modules, {"megatron.training.global_vars": training}):
        model = hybrid_model.HybridModel(
            parallel_config({"pp": pp}, **(OPTIONS | shape | options)),
            spec,
            vocab_size=VOCAB,
            max_sequence_length=8,
            hybrid_layer_pattern=pattern,
            pre_process=groups.pp.rank() == 0,
            post_process=groups.pp.rank() == pp - 1,
            pg_collection=groups,
        )
    layers = model.decoder.layers
    rates = {
        layer.layer_number: layer.self_attention.rates
        for layer in layers
        if hasattr(layer.self_attention, "rates")
    }
    return rates, {layer.attention_scale.alpha for layer in layers}


def test_minimax_stack_follows_the_pattern_of_the_model() -> None:
    ((rates, alphas),) = run_on_ranks(stack_on_rank, 1, stack.minimax_stack_spec, "GEGE*E")
    assert alphas == {(2 * 3) ** 0.25}
    assert torch.equal(rates[1], decay_rates(HEADS, 0, 3))
    assert torch.equal(rates[3], decay_rates(HEADS, 1, 3))


def test_minimax_stack_over_pipeline_stages_asks_the_training_loop() -> None:
    arguments = (stack.minimax_stack_spec, PIPED, 2)
    first, second = run_on_ranks(stack_on_rank, 2, *arguments, PIPED)
    assert first[1] == second[1] == {(2 * 3) ** 0.25}
    assert torch.equal(second[0][5], decay_rates(HEADS, 2, 3))
    for said in run_on_ranks(refusal, 2, stack_on_rank, *arguments):
        assert said.startswith("hybrid_layer_pattern must be among Megatron's training")


@pytest.mark.parametrize(
    ("symbols", "options", "names"),
    [
        ("GEGE", {}, "pattern must be the hybrid_layer_pattern of the model, got 'GEGE'"),
        ("*EGE*E", {}, "pattern must be the hybrid_layer_pattern of the model, got"),
        (
            "GEGE*E",
            {"linear_attention_freq": 2},
            r"linear_attention_freq must give the layers of pattern 'GG\*', got 2, .* G\*G ",
        ),
    ],
)
def test_another_pattern_than_the_models_is_refused(symbols: str, options: Any, names: str) -> None:
    spec = stack.hybrid_stack_spec(symbols, of_stack(symbols))
    (said,) = run_on_ranks(refusal, 1, stack_on_rank, spec, "GEGE*E", **options)
    assert re.search(names, said)


def test_multi_token_prediction_is_refused() -> None:
    like = replace(of_stack("GEGE*E"), mtp_loss_weight=0.1)
    spec = stack.hybrid_stack_spec("GEGE*E", like)
    (said,) = run_on_ranks(refusal, 1, stack_on_rank, spec, "GEGE*E")
    assert "mtp_loss_weight must be None for HybridModel, got 0.1" in said


@pytest.mark.parametrize("symbols", ["*E*EGE", "G-G-*-"], ids=["kinds", "experts"])
def test_another_pattern_than_the_configs_is_refused(symbols: str) -> None:
    with pytest.raises(ValueError, match=r"pattern must have the attention layers .* GG\*, and E"):
        stack.hybrid_stack_spec(symbols, of_stack("GEGE*E"))


def layers_with_configs_of_their_own() -> None:
    """Megatron's main has a class of config for each kind of layer."""
    for symbol, name, kind in (
        ("gdn_layer", "megatron.core.ssm.gdn_layer_config", "GDNLayerConfig"),
        ("moe_layer", "megatron.core.transformer.moe.moe_layer_config", "MoELayerConfig"),
    ):
        config = parallel_config({}, **OPTIONS)
        config.__class__ = getattr(import_module(name), kind)
        spec = getattr(stack.hybrid_stack_spec("GE*E", of_stack("GE*E")).submodules, symbol)
        layer = build_module(spec, config=config, layer_number=1, pg_collection=initialize())
        hidden = torch.randn(8, 1, config.hidden_size, dtype=torch.float64)
        output, _ = layer(hidden)
        assert output.isfinite().all()


def test_layers_take_configs_of_their_own() -> None:
    pytest.importorskip("megatron.core.transformer.moe.moe_layer_config")
    run_on_ranks(layers_with_configs_of_their_own, 1)
