"""The hybrid decoder is transformers' MiniMax, with its weights: an oracle that others wrote.

transformers computes norms, angles, the router's softmax and decay rates in float32 whatever the
dtype is. For float64 those four are computed in float64 there too, and the rates are ours.
"""

from __future__ import annotations

from types import MethodType
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn import functional as F

from lasp.hybrid import (
    AttentionConfig,
    HybridConfig,
    HybridModel,
    Residuals,
    ResidualScale,
    next_token_loss,
    pack_batch,
    reduce_gradients,
)
from lasp.layers.lightning_attention import LightningAttention
from moe_parallel import ExpertTopology, MoEConfig
from tests.closeness import assert_equal_to_rounding, assert_within_budget
from tests.ranks import run_on_ranks
from tests.test_hybrid import assemble, groups_of

minimax = pytest.importorskip(
    "transformers.models.minimax.modeling_minimax",
    reason="needs transformers: pip install --group oracles",
)
from transformers import MiniMaxConfig  # noqa: E402

VOCAB, HIDDEN, HEADS, KV_HEADS, DIM, FFN, EXPERTS = 50, 32, 4, 2, 8, 16, 4
LENGTHS = (130, 1, 77, 92)  # one is longer than a chunk of ours, none than a block of 256 there
FULL, LINEAR, MLP = ResidualScale(1.3, 0.7), ResidualScale(0.9, 1.2), ResidualScale(1.1, 0.8)
DEEP = ResidualScale((2 * 80) ** 0.25)


def ours(pattern: str, residuals: Residuals, num_decay_layers: int | None = None) -> HybridConfig:
    return HybridConfig(
        num_layers=len(pattern),
        vocab_size=VOCAB,
        attention=AttentionConfig(HEADS, KV_HEADS, DIM, rotary_dim=DIM, rope_base=1e6),
        moe=MoEConfig(HIDDEN, FFN, EXPERTS, top_k=2, aux_loss_coefficient=0.0),
        pattern=pattern,
        residuals=residuals,
        num_decay_layers=num_decay_layers,
    )


CASES = {
    "its default order, alpha and beta": ours("*G*G", Residuals("post")),
    "other alphas and betas": ours("GG*G", Residuals("post", LINEAR, FULL, MLP)),
    "the first 8 of 80 layers": ours("GGGGGGG*", Residuals("post", DEEP, DEEP, DEEP), 80),
}


def theirs(config: HybridConfig, dtype: torch.dtype, spread: float = 0.2) -> nn.Module:
    """transformers' model of the same description, with random weights."""
    names = {"lightning": "linear_attn", "softmax": "full_attn", "mlp": "mlp"}
    factors = {}
    for ours_name, name in names.items():
        scale = getattr(config.residuals, ours_name)
        factors |= {f"{name}_alpha_factor": scale.alpha, f"{name}_beta_factor": scale.beta}
    kinds = {"G": "linear_attention", "*": "full_attention"}
    described = MiniMaxConfig(
        vocab_size=VOCAB,
        hidden_size=HIDDEN,
        intermediate_size=FFN,
        num_hidden_layers=config.num_layers,
        num_attention_heads=HEADS,
        num_key_value_heads=KV_HEADS,
        head_dim=DIM,
        num_experts_per_tok=2,
        num_local_experts=EXPERTS,
        layer_types=None if config.kinds == "*G*G" else [kinds[kind] for kind in config.kinds],
        attn_implementation="sdpa",
        experts_implementation="eager",
        use_cache=False,
        **factors,
    )
    model = minimax.MiniMaxForCausalLM(described).to(dtype)
    generator = torch.Generator().manual_seed(0)
    for parameter in model.parameters():
        drawn = torch.randn(parameter.shape, generator=generator, dtype=torch.float64)
        parameter.data.copy_(1 + drawn / 10 if parameter.dim() == 1 else drawn * spread)
    ours_of_layers = iter(HybridModel(config).layers)
    for layer in model.model.layers:
        attention = next(ours_of_layers).attention
        if isinstance(attention, LightningAttention):
            depth = config.num_decay_layers or config.num_layers
            set_rates(layer.self_attn, attention.rates, depth)
    return model


def set_rates(layer: Any, rates: Tensor, num_layers: int) -> None:
    """Our rates, which are theirs to float32's rounding, in their buffers."""
    layer.num_hidden_layers = num_layers
    formula = layer.get_slope_rate()
    assert torch.allclose(formula.flatten(), rates, rtol=2e-6, atol=0)
    slopes = rates.to(layer.slope_rate.dtype).view(-1, 1, 1)
    layer.slope_rate = slopes
    layer.query_decay, layer.key_decay, layer.diagonal_decay = layer.decay_factors(slopes)


def take_float32_out(model: nn.Module) -> None:
    """Norms, angles and the router's softmax in float64."""

    def norm(self: Any, x: Tensor) -> Tensor:
        variance = x.square().mean(-1, keepdim=True)
        return self.weight * (x * torch.rsqrt(variance + self.variance_epsilon))

    def rotary(self: Any, x: Tensor, position_ids: Tensor) -> tuple[Tensor, Tensor]:
        base = self.config.rope_parameters["rope_theta"]
        exponents = torch.arange(0, DIM, 2, dtype=torch.float64) / DIM
        angles = position_ids[..., None].double() * base**-exponents
        angles = torch.cat((angles, angles), dim=-1)
        return angles.cos(), angles.sin()

    def router(self: Any, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        logits = F.linear(x.reshape(-1, self.hidden_dim), self.weight)
        scores, indices = logits.softmax(-1).topk(self.top_k, dim=-1)
        return logits, scores / scores.sum(-1, keepdim=True), indices

    replaced = {
        minimax.MiniMaxRMSNorm: norm,
        minimax.MiniMaxRotaryEmbedding: rotary,
        minimax.MiniMaxTopKRouter: router,
    }
    for module in model.modules():
        if type(module) in replaced:
            module.forward = MethodType(replaced[type(module)], module)


def to_ours(values: dict[str, Tensor]) -> dict[str, Tensor]:
    """Their names and shapes as ours."""
    swapped = [
        ("model.embed_tokens.", "embedding."),
        ("model.norm.", "final_norm."),
        ("lm_head.", "head."),
        ("model.layers.", "layers."),
        (".input_layernorm.", ".attention_norm."),
        (".post_attention_layernorm.", ".moe_norm."),
        (".self_attn.", ".attention."),
        (".mlp.gate.", ".moe.gate."),
        (".mlp.experts.gate_up_proj", ".moe.experts.w13"),
        (".mlp.experts.down_proj", ".moe.experts.w2"),
    ]
    named = {}
    for name, value in values.items():
        for theirs_part, our_part in swapped:
            name = name.replace(theirs_part, our_part)
        named[name] = value.unflatten(1, (2, -1)) if name.endswith("w13") else value
    return named


def data() -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(1)
    tokens, labels = torch.randint(VOCAB, (2, sum(LENGTHS)), generator=generator)
    return tokens, labels


def their_results(model: nn.Module) -> dict[str, Tensor]:
    """Logits, and gradients of the mean cross entropy, document by document."""
    logits = []
    for tokens, labels in zip(*(x.split(LENGTHS) for x in data())):
        of_document = model(tokens[None], use_cache=False).logits[0]
        (F.cross_entropy(of_document, labels, reduction="sum") / sum(LENGTHS)).backward()
        logits.append(of_document.detach())
    gradients = to_ours({name: p.grad for name, p in model.named_parameters()})
    return {"logits": torch.cat(logits), **gradients}


def our_results(
    config: HybridConfig, weights: dict[str, Tensor], sizes: dict[str, int]
) -> dict[str, Any]:
    """On one rank: what it has of the same."""
    topology = ExpertTopology(dist.get_world_size(), **sizes)
    at = topology.expert_coordinates(dist.get_rank())
    dtype = weights["embedding.weight"].dtype
    model = HybridModel(config, groups=groups_of(topology), dtype=dtype)
    sharding = model.layers[0].moe.experts.sharding()
    for name, parameter in model.named_parameters():
        part = weights.pop(name)
        if ".experts." in name:
            ep_dim, etp_dim = sharding[name.rpartition(".")[2]]
            part = part.chunk(topology.ep, ep_dim)[at.ep].chunk(topology.etp, etp_dim)[at.etp]
        parameter.data.copy_(part)
    assert not weights
    batch = pack_batch([LENGTHS], dp_rank=0, num_ranks=topology.cp, order="zigzag")
    rank = topology.dense_coordinates(dist.get_rank()).cp
    tokens, labels = data()
    output = model(batch.layout.shard(tokens, rank), batch)
    labels = batch.layout.shard(labels, rank, pad_value=-100)
    loss = next_token_loss(output.logits, labels, sum(LENGTHS))
    loss.backward()
    reduce_gradients(model)
    return {
        "loss": loss.detach() * 0,
        "logits": output.logits.detach(),
        "layout": batch.layout,
        "dense": {name: p.grad for name, p in model.dense_parameters()},
        "experts": {name: p.grad for name, p in model.expert_parameters()},
        "sharding": sharding,
        "coordinates": at,
    }


def check(
    config: HybridConfig, model: nn.Module, sizes: dict[str, int]
) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """What we and they have, by the same names."""
    weights = {name: p.detach() for name, p in model.named_parameters()}
    expected, num_ranks = their_results(model), sizes.get("cp", 1)
    results = run_on_ranks(our_results, num_ranks, config, to_ours(weights), sizes)
    actual = assemble(results)
    logits = [result["logits"] for result in results]
    actual = actual | {"logits": results[0]["layout"].unshard(logits)}
    del actual["loss"]
    assert actual.keys() == expected.keys()
    return actual, expected


SIZES = pytest.mark.parametrize("sizes", [{}, {"cp": 2, "ep": 2}], ids=["whole", "over ranks"])


@SIZES
@pytest.mark.parametrize("config", CASES.values(), ids=CASES.keys())
def test_float64(config: HybridConfig, sizes: dict[str, int]) -> None:
    model = theirs(config, torch.float64)
    take_float32_out(model)
    actual, expected = check(config, model, sizes)
    for name, tensor in expected.items():
        assert_equal_to_rounding(actual[name], tensor, tolerance=1e-14, what=name)


@SIZES
@pytest.mark.parametrize("config", CASES.values(), ids=CASES.keys())
def test_float32_as_shipped(config: HybridConfig, sizes: dict[str, int]) -> None:
    """With weights of its own initial size: logits and every gradient."""
    actual, shipped = check(config, theirs(config, torch.float32, spread=0.02), sizes)
    for name, tensor in shipped.items():
        assert_equal_to_rounding(actual[name], tensor, tolerance=5e-7, what=name)


def test_float32_errs_no_more_than_it_does_as_shipped() -> None:
    """With ten times larger weights: both errors are larger than their difference may be."""
    config = CASES["other alphas and betas"]
    exact = theirs(config, torch.float64)
    take_float32_out(exact)
    shipped = theirs(config, torch.float32)
    oracle = {name: value.double() for name, value in their_results(exact).items()}
    actual, honest = check(config, shipped, {})
    for name in oracle:
        assert_within_budget(actual[name], oracle[name], honest[name], what=name)


def test_greedy_tokens_are_those_of_its_generate() -> None:
    config = CASES["the first 8 of 80 layers"]
    theirs_64 = theirs(config, torch.float64)
    take_float32_out(theirs_64)
    theirs_64.generation_config.eos_token_id = theirs_64.generation_config.pad_token_id = None
    model = HybridModel(config, dtype=torch.float64)
    model.load_state_dict(to_ours({name: p.detach() for name, p in theirs_64.named_parameters()}))
    prompts = data()[0].split(LENGTHS)
    expected = [
        theirs_64.generate(x[None], max_new_tokens=12, do_sample=False, use_cache=True)[0, len(x) :]
        for x in prompts
    ]
    found = model.generate(prompts, max_new_tokens=12, chunk_tokens=50)
    assert found.tokens == [tokens.tolist() for tokens in expected]
    assert len({token for text in found.tokens for token in text}) > 10
