"""The plain hybrid and Megatron's GPTModel are one model: weights go there and back."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from megatron.core import dist_checkpointing
from megatron.core.models.gpt import GPTModel
from torch import Tensor, nn

from lasp.hybrid import HybridConfig, HybridModel, next_token_loss, pack_batch
from lasp.megatron import (
    hybrid_block_spec,
    load_plain_weights,
    plain_weights,
    to_megatron,
    to_plain,
)
from moe_parallel.router.counts import Routing
from moe_parallel.router.route import Router
from tests.closeness import assert_equal_to_rounding
from tests.megatron import block
from tests.megatron.attention import parallel_config
from tests.megatron.cpu import initialize, train_on_cpu
from tests.megatron.test_checkpoint import save
from tests.megatron.test_pretrain import OPTIONS, sizes_of
from tests.ranks import run_on_ranks

# After test_pretrain, which says where the examples are.
from hybrid_gpt import build_model  # isort: skip
from hybrid_training.corpus import NO_LABEL, Corpus  # isort: skip
from hybrid_training.model import small_hybrid  # isort: skip
from pretrain_hybrid import Options, forward_backward  # isort: skip

pytestmark = pytest.mark.megatron

CPU = torch.device("cpu")
HEADS = {"num_heads": 6, "num_kv_heads": 2}
# The sums of gradients are looked at, which the distributed optimizer has in pieces only.
OPTIONS = replace(OPTIONS, distributed_optimizer=False)
SPLITS = [
    (1, {}),
    (4, {"tp": 2, "pp": 2, "vpp": 2, "ep": 2}),
    pytest.param(2, {"cp": 2, "ep": 2}, marks=pytest.mark.slow),
    pytest.param(4, {"etp": 2, "pp": 2}, marks=pytest.mark.slow),
    pytest.param(4, {"tp": 2, "cp": 2, "ep": 2, "etp": 2, "order": "fold"}, marks=pytest.mark.slow),
]


def plain_model() -> HybridModel:
    model = HybridModel(small_hybrid(OPTIONS.capacity_factor), dtype=torch.float64)
    model.reset_parameters(OPTIONS.seed)
    return model


def step_aux_losses(model: HybridModel) -> list[Tensor]:
    """Filled as the model runs: the auxiliary losses, with counts of all micro-batches so far."""
    losses: list[Tensor] = []
    counted: dict[nn.Module, tuple[Any, int]] = {}

    def add(router: nn.Module, _: Any, routing: Routing) -> None:
        assigned, num_tokens = counted.get(router, (0, 0))
        assigned = assigned + routing.counts.assigned.sum(0)
        num_tokens += routing.num_tokens
        counted[router] = assigned, num_tokens
        losses.append(routing.balance_loss(assigned, num_tokens))

    for module in model.modules():
        if isinstance(module, Router):
            module.register_forward_hook(add)
    return losses


def plain_loss_and_gradients() -> tuple[float, dict[str, Tensor]]:
    """The first step; the auxiliary loss weighs tokens / targets, as Megatron divides it."""
    model, corpus, losses = plain_model(), Corpus.from_standard_library(OPTIONS.seed), []
    aux_losses = step_aux_losses(model)
    sizes = {"per_step": OPTIONS.packs, "num_tokens": OPTIONS.pack_tokens}
    packs = [
        corpus.replicas(index, num_replicas=1, **sizes)[0] for index in range(OPTIONS.micro_batches)
    ]
    targets = sum(int((pack.labels != NO_LABEL).sum()) for pack in packs)
    for pack in packs:
        batch = pack_batch([pack.document_lengths], dp_rank=0, num_ranks=1, order="contiguous")
        losses.append(next_token_loss(model(pack.tokens, batch).logits, pack.labels, targets))
        aux_loss = torch.stack(aux_losses).sum()
        aux_losses.clear()
        (losses[-1] + aux_loss * (len(pack.tokens) / targets)).backward()
    return sum(losses).item(), {name: p.grad for name, p in model.named_parameters()}


def loss_and_gradients(options: Options) -> tuple[float, dict[str, Tensor], dict[str, Tensor]]:
    """The first step in Megatron, and the weights, by the names of the plain model."""
    initialize(**sizes_of(options))
    with train_on_cpu():
        chunks = build_model(options, CPU)
        stages = [chunk.module for chunk in chunks]
        weights = plain_weights(stages)
        corpus = Corpus.from_standard_library(options.seed)
        loss = forward_backward(options, corpus, 0, chunks, CPU)
        for stage in stages:
            for parameter in stage.parameters():
                parameter.data.copy_(parameter.main_grad)
        return loss, plain_weights(stages), weights


@pytest.mark.parametrize(("num_ranks", "changes"), SPLITS)
def test_losses_and_gradients_equal_the_plain_models(num_ranks: int, changes: Any) -> None:
    expected_loss, expected = plain_loss_and_gradients()
    weights = dict(plain_model().named_parameters())
    for loss, grads, converted in run_on_ranks(
        loss_and_gradients, num_ranks, replace(OPTIONS, **changes)
    ):
        assert loss == pytest.approx(expected_loss, rel=1e-10)
        assert grads.keys() == expected.keys() == converted.keys()
        for name, grad in expected.items():
            assert_equal_to_rounding(grads[name], grad, what=name)
            assert torch.equal(converted[name], weights[name]), name


def save_on_rank(options: Options, directory: Path) -> None:
    initialize(**sizes_of(options))
    with train_on_cpu():
        (chunk,) = build_model(options, CPU)
        save(chunk.module.sharded_state_dict(), directory)


def load_on_rank(options: Options, directory: Path) -> dict[str, Tensor]:
    initialize(**sizes_of(options))
    with train_on_cpu():
        (chunk,) = build_model(options, CPU)
        for parameter in chunk.module.parameters():
            parameter.data.fill_(torch.nan)
        loaded = dist_checkpointing.load(chunk.module.sharded_state_dict(), str(directory))
        chunk.module.load_state_dict(loaded)
        return plain_weights([chunk.module])


def test_through_a_checkpoint_under_other_sizes(tmp_path: Path) -> None:
    """Plain, cut over 4 ranks, saved, loaded in 2 stages of 2, plain again."""
    saved = replace(OPTIONS, tp=2, cp=2, ep=2, etp=2)
    run_on_ranks(save_on_rank, 4, saved, tmp_path)
    expected = dict(plain_model().named_parameters())
    for weights in run_on_ranks(load_on_rank, 4, replace(OPTIONS, pp=2, etp=2), tmp_path):
        model = HybridModel(small_hybrid(OPTIONS.capacity_factor), dtype=torch.float64)
        _, unexpected = model.load_state_dict(weights, strict=False)
        assert not unexpected
        assert weights.keys() == expected.keys()
        for name, parameter in model.named_parameters():
            assert torch.equal(parameter, expected[name]), name


def test_names_go_there_and_back() -> None:
    weights = dict(plain_model().named_parameters())
    named = to_megatron(weights, **HEADS)
    assert len(named) < len(weights)
    back = to_plain(named, **HEADS)
    assert back.keys() == weights.keys()
    assert all(torch.equal(back[name], weight) for name, weight in weights.items())
    some = {name: weight for name, weight in weights.items() if name.startswith("layers.7.")}
    assert to_megatron(some, **HEADS).keys() == {
        name for name in named if name.startswith("decoder.layers.7.")
    }
    with pytest.raises(ValueError, match=r"of lasp\.hybrid\.HybridModel, got \['bias'\] besides"):
        to_megatron({**weights, "bias": weights["final_norm.weight"]}, **HEADS)
    with pytest.raises(ValueError, match=r"of hybrid layers, got \['decoder.layers.0.mlp"):
        to_plain({"decoder.layers.0.mlp.linear_fc3.weight": torch.ones(2)}, **HEADS)


def there_and_back(hybrid: HybridConfig, options: dict[str, Any]) -> dict[str, Tensor]:
    groups = initialize(tp=2)
    config = parallel_config({"tp": 2}, **(block.OPTIONS | options))
    model = GPTModel(
        config,
        hybrid_block_spec(config, hybrid),
        vocab_size=8,
        max_sequence_length=0,
        position_embedding_type="none",
        share_embeddings_and_output_weights=False,
        pg_collection=groups,
    )
    plain = HybridModel(replace(hybrid, vocab_size=8), dtype=torch.float64)
    weights = {k: v for k, v in plain.state_dict().items() if "tokens_per_expert" not in k}
    load_plain_weights(model, weights, pg_collection=groups)
    halves = weights["layers.0.mlp.w13"].chunk(2, 1)[groups.tp.rank()]
    loaded = model.decoder.layers[0].mlp.linear_fc1.weight
    assert torch.equal(loaded, halves.flatten(0, 1))
    back = plain_weights([model], pg_collection=groups)
    assert back.keys() == weights.keys()
    for name, weight in weights.items():
        assert torch.equal(back[name], weight), name
    return back


@pytest.mark.parametrize(
    ("hybrid", "options", "names"),
    [
        (block.RING, block.RING_OPTIONS, ["0.attention.q_norm", "1.attention.q_norm"]),
        (block.LING, block.LING_OPTIONS_OF_CONFIG, ["1.attention.q_a_layernorm"]),
        (block.SALA, block.SALA_OPTIONS, ["0.attention.output_gate", "1.attention.output_gate"]),
    ],
    ids=["ring", "ling", "sala"],
)
def test_other_models_go_there_and_back_over_tensor_parallel_ranks(
    hybrid: HybridConfig, options: dict[str, Any], names: list[str]
) -> None:
    """Norms are whole on every rank; a dense MLP has halves of two matrices."""
    first, second = run_on_ranks(there_and_back, 2, hybrid, options)
    assert {f"layers.{name}.weight" for name in names} <= first.keys()
    assert first.keys() == second.keys()


def refusals() -> None:
    initialize()
    with train_on_cpu():
        (chunk,) = build_model(OPTIONS, CPU)
    weights = dict(plain_model().named_parameters())
    longer = {**weights, "embedding.weight": torch.zeros(300, 64)}
    with pytest.raises(ValueError, match=r"must have shape \(256, 64\) on this rank, got \(300"):
        load_plain_weights(chunk.module, longer)
    del weights["head.weight"]
    with pytest.raises(ValueError, match=r"weights must have output_layer\.weight"):
        load_plain_weights(chunk.module, weights)


def test_other_models_are_refused() -> None:
    run_on_ranks(refusals, 1)
