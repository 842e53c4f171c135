"""Arguments of another type are refused by name, in every public function and class.

Tensors are left out: a check of each would cost every call. What a device, a dtype or a path is,
torch and the standard library say.
"""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import partial
from types import ModuleType
from typing import Any

import pytest
import torch

import lasp
import lasp.checkpoints
import lasp.generation
import lasp.hybrid
import lasp.sequence
import lasp.state_exchange
import moe_parallel
import ring
from lasp.hybrid import (
    AttentionConfig,
    HybridConfig,
    HybridModel,
    Residuals,
    next_in_document,
    pack_batch,
)
from lasp.state_exchange import Link
from moe_parallel import (
    ExpertGroups,
    ExpertParallelMoE,
    ExpertTopology,
    MoEConfig,
    ParallelGroups,
    RouterConfig,
    RoutingReplay,
    TokenOrder,
    TokenSequences,
)
from moe_parallel.dispatch import make_dispatcher
from moe_parallel.mesh import expert_mesh

HEADS: dict[str, Any] = {"num_heads": 2, "num_kv_heads": 1, "head_dim": 8, "rotary_dim": 4}
LATENT = {"kv_lora_rank": 8, "qk_nope_head_dim": 8, "qk_rope_head_dim": 8, "v_head_dim": 8}
MOE = MoEConfig(hidden_size=16, ffn_size=8, num_experts=4, top_k=2)
CONFIG = HybridConfig(2, 32, AttentionConfig(**HEADS), MOE, "G*")
MODEL, TOPOLOGY = HybridModel(CONFIG).eval(), ExpertTopology(1)
CACHE = MODEL.new_cache(num_slots=1, max_tokens=8)
BATCH = pack_batch([[5]], dp_rank=0, num_ranks=1, order="contiguous")
LAYOUT, IDS, HIDDEN = BATCH.layout, torch.zeros(5, dtype=torch.int64), torch.ones(5, 16)
PACK = {"document_lengths": [[5]], "dp_rank": 0, "num_ranks": 1, "order": "contiguous"}
GROUPS = ParallelGroups(*[None] * len(ParallelGroups._fields))
LIGHTNING = {"hidden_size": 16, "num_heads": 2, "head_dim": 8, "layer_index": 0, "num_layers": 2}
QKV = {"q": HIDDEN.view(5, 2, 8), "k": HIDDEN.view(5, 2, 8), "v": HIDDEN.view(5, 2, 8)}
LINK = {"latency_us": 1.0, "gb_per_s": 1.0, "launch_us": 1.0, "rank_us": 1.0}

# What is called, with arguments of the right types.
PUBLIC: dict[str, dict[str, Any]] = {
    "lasp.LightningAttention": LIGHTNING,
    "lasp.LightningOptions": {},
    "lasp.RopeScaling": {"rope_type": "linear", "factor": 2.0},
    "lasp.SequenceLayout": {"document_lengths": (4, 4), "num_ranks": 2},
    "lasp.decay_rates": {"num_heads": 2, "layer_index": 0, "num_layers": 2},
    "lasp.lightning_attention": QKV | {"rates": lasp.decay_rates(2, 0, 2)},
    "lasp.sequence.CostModel": {},
    "lasp.sequence.layout_costs": {"document_lengths": [8], "num_ranks": 2},
    "lasp.sequence.plan_layout": {"document_lengths": [8], "num_ranks": 2},
    "lasp.generation.Sampling": {},
    "lasp.hybrid.AttentionConfig": HEADS,
    "lasp.hybrid.DenseConfig": {"hidden_size": 16, "ffn_size": 8},
    "lasp.hybrid.HybridConfig": {
        **{"num_layers": 2, "vocab_size": 32, "pattern": "G*"},
        **{"attention": CONFIG.attention, "moe": MOE},
    },
    "lasp.hybrid.HybridModel": {"config": CONFIG},
    "lasp.hybrid.LatentConfig": LATENT,
    "lasp.hybrid.Residuals": {},
    "lasp.hybrid.StepGraph": {"model": MODEL, "loss_of": MODEL.embedding},
    "lasp.hybrid.VocabularyConfig": {},
    "lasp.hybrid.count_parameters": {"config": CONFIG},
    "lasp.hybrid.keep_activations": {"model": MODEL, "policy": "none"},
    "lasp.hybrid.missing_ranks": {"group": None},
    "lasp.hybrid.next_in_document": {"x": IDS, "layout": LAYOUT, "pad_value": 0},
    "lasp.hybrid.pack_batch": PACK,
    "lasp.hybrid.parallelize": {"model": MODEL, "topology": TOPOLOGY},
    "lasp.hybrid.reduce_gradients": {"model": MODEL},
    "lasp.checkpoints.Options": {"to": "plain"},
    "lasp.state_exchange.Link": LINK,
    "lasp.state_exchange.exchange_over": {"link": Link(**LINK)},
    "lasp.state_exchange.measure_link": {"cp_group": None},
    "ring.MultiLatentAttention": {"hidden_size": 16, "num_heads": 2, **LATENT},
    "ring.RingAttention": {"hidden_size": 16, **HEADS},
    "ring.ring_attention": QKV,
    "moe_parallel.DenseLayer": {"config": MOE, "ffn_size": 8},
    "moe_parallel.ExpertParallelMoE": {"config": MOE},
    "moe_parallel.ExpertTopology": {"world_size": 1},
    "moe_parallel.MoEConfig": {"hidden_size": 16, "ffn_size": 8, "num_experts": 4, "top_k": 2},
    "moe_parallel.RouterConfig": {},
    "moe_parallel.RoutingReplay": {},
    "moe_parallel.SymmetricMemory": {"group": None},
    "moe_parallel.TokenOrder": {"segments": (((0, 0, 5),),), "rows_per_rank": (5,)},
    "moe_parallel.apply_ddp": {"model": MODEL, "groups": GROUPS},
    "moe_parallel.apply_fsdp": {"model": MODEL, "topology": TOPOLOGY},
    "moe_parallel.check_max_rows": {"model": MODEL},
    "moe_parallel.clip_grad_norm_": {"model": MODEL, "max_norm": 1.0, "groups": GROUPS},
    "moe_parallel.distribute_experts": {"model": MODEL, "topology": TOPOLOGY},
    "moe_parallel.parameter_groups": {"model": MODEL},
    "moe_parallel.update_expert_bias": {"model": MODEL},
}
# What returns or holds results, or takes tensors alone; and what argparse or torch call.
NO_ARGUMENTS_OF_USERS = {
    *("lasp.LightningOutput", "lasp.lightning_decode", "lasp.generation.CacheStep"),
    *("lasp.generation.GenerationCache", "lasp.sequence.Fragment", "lasp.sequence.LayoutCost"),
    *("lasp.sequence.RealTokens", "lasp.sequence.Run", "lasp.sequence.RunLink"),
    *("lasp.hybrid.Generation", "lasp.hybrid.HybridOutput", "lasp.hybrid.PackedBatch"),
    *("lasp.hybrid.ParameterCount", "lasp.hybrid.ResidualScale", "lasp.hybrid.next_token_loss"),
    *("lasp.hybrid.linear_cross_entropy", "lasp.state_exchange.ExchangeChoice"),
    *("lasp.state_exchange.kept_over", "lasp.state_exchange.resolve_exchange"),
    *("lasp.state_exchange.start_exchange", "lasp.state_exchange.ExchangeError"),
    *("lasp.checkpoints.CheckpointPlanner", "lasp.checkpoints.CheckpointReader"),
    *("lasp.checkpoints.Conversion", "lasp.checkpoints.Source", "lasp.checkpoints.convert"),
    *("lasp.checkpoints.open_source", "lasp.checkpoints.plan", "lasp.checkpoints.read_config"),
    *("ring.RingOutput", "ring.ring_latent_attention", "moe_parallel.ExpertGroups"),
    *("moe_parallel.MoEOutput", "moe_parallel.ParallelGroups", "moe_parallel.RoutingStats"),
    *("moe_parallel.Timeline", "moe_parallel.TokenSegment", "moe_parallel.TokenSequences"),
}


def save(*, shard_bytes: int = 1, float32_routers: bool = False) -> None:
    MODEL.save_pretrained("nowhere", shard_bytes=shard_bytes, float32_routers=float32_routers)


# Methods, and functions that are no one's public name.
OTHERS: dict[str, tuple[Callable[..., Any], dict[str, Any]]] = {
    **{name: (getattr(LAYOUT, name), {"rank": 0}) for name in ("runs", "fragments", "work")},
    "check_same_on_ranks": (LAYOUT.check_same_on_ranks, {"group": None}),
    "deepnorm": (Residuals.deepnorm, {"num_layers": 4}),
    "check_heads": (lasp.LightningOptions().check_heads, {"num_heads": 2, "head_dim": 8}),
    "generate": (MODEL.generate, {"prompts": [[1]], "max_new_tokens": 1}),
    "step": (MODEL.step, {"cache": CACHE, "slots": [-1], "tokens": [[1]]}),
    "save": (save, {}),
    "new_cache": (MODEL.new_cache, {"num_slots": 1, "max_tokens": 8}),
    "add": (CACHE.add, {}),
    "accept": (CACHE.accept, {"kept": {}}),
    "reset_parameters": (MODEL.reset_parameters, {"seed": 0}),
    "forward": (MODEL.forward, {"tokens": IDS, "batch": BATCH}),
    "moe": (ExpertParallelMoE(MOE).forward, {"hidden": HIDDEN}),
    "coordinates": (TOPOLOGY.expert_coordinates, {"rank": 0}),
    "groups": (TOPOLOGY.groups, {"axis": "ep"}),
    "contiguous": (TokenOrder.contiguous, {"tokens_per_rank": [5]}),
    "make_dispatcher": (
        partial(make_dispatcher, expert_mesh(ExpertGroups()), ExpertGroups()),
        {"memory": None},
    ),
}
# By what a type must have to take it.
WRONG: dict[str, list[Any]] = {
    **{"None": [None], "str": ["a"], "float": [1.5, 4.0], "[": [[1]], "bool": [True], "int": [0]},
    **{"negative": [-1], "not finite": [math.nan, -math.inf]},
}
SAID_BY_TORCH = {"device", "dtype", "pad_value", "on_step"}
# Warm calls do not check these: torch or Python says what is wrong.
WARM = {("ring_attention", "block"), ("step", "slots"), ("forward", "timeline")}
ANY_INTEGER = {"seed"}
NAMES = {"activations", "block", "policy"}  # texts, of which some are offered
ALSO = {"activations": "policy", "prompts": "tokens", "name": "exchange", "blocks": "block"}


def found(name: str) -> Any:
    module, _, attribute = name.rpartition(".")
    return getattr(__import__(module, fromlist=["_"]), attribute)


def wrong_values(name: str, annotation: str) -> Iterator[Any]:
    """Values that are not of a type, and those below any size or count."""
    for kind, values in WRONG.items():
        if kind == "negative":
            wrong = annotation.startswith("int") and name not in ANY_INTEGER
        elif kind == "not finite":
            wrong = annotation.startswith("float")
        elif kind == "str":
            wrong = kind not in annotation or name in NAMES
        elif kind in ("bool", "int"):
            wrong = kind not in annotation and not annotation.startswith(("int", "float"))
        else:
            wrong = kind not in annotation
        if wrong:
            yield from values


def wrong_ends(call: Callable[..., Any], good: dict[str, Any]) -> Iterator[str]:
    """What ends otherwise than by an error that names the argument."""
    for parameter in inspect.signature(call).parameters.values():
        name, annotation = parameter.name, str(parameter.annotation)
        if name in SAID_BY_TORCH or annotation.startswith(("Tensor", "Any", "object")):
            continue
        if (getattr(call, "__name__", ""), name) in WARM:
            continue
        for value in wrong_values(name, annotation):
            try:
                call(**(good | {name: value}))
            except (TypeError, ValueError) as error:
                told = f"{name} must be True or False" if annotation == "bool" else name
                if ALSO.get(name, told) not in str(error):
                    yield f"{name}={value!r}: {type(error).__name__} {error}"
            except Exception as error:
                yield f"{name}={value!r}: {type(error).__name__} {error}"
            else:
                yield f"{name}={value!r} is taken"


@pytest.mark.parametrize("name", [*PUBLIC, *OTHERS])
def test_wrong_types_are_refused_by_name(name: str) -> None:
    call, good = OTHERS[name] if name in OTHERS else (found(name), PUBLIC[name])
    assert not [*wrong_ends(call, good)]


def test_what_collections_hold_is_of_its_type_too() -> None:
    config = replace(MOE, router=RouterConfig(sequence_loss_coefficient=0.1))
    for match, call in (
        ("tokens must be ids", lambda: MODEL.step(CACHE, [-1], ["yes"])),
        ("tokens must be of type Tensor", lambda: MODEL([1] * 5, BATCH)),
        ("experts must be of type Tensor or None", lambda: RoutingReplay([[0, 1]])),
        (
            "sequences.numbers must be of type Tensor",
            lambda: ExpertParallelMoE(config)(HIDDEN, sequences=TokenSequences([0] * 5, 1)),
        ),
        ("segments must hold", lambda: TokenOrder([[1]], [1])),
        ("rows_per_rank must be integers", lambda: TokenOrder([[(0, 0, 1)]], [1.5])),
        ("rows_per_rank must be integers", lambda: TokenOrder([[(0, 0, 1)]], [True])),
        ("rows_per_rank must be integers", lambda: TokenOrder.contiguous([True])),
        ("x must be of type Tensor", lambda: next_in_document([1], LAYOUT, pad_value=0)),
    ):
        with pytest.raises(ValueError, match=match):
            call()


ROTATING = ("lasp.LightningOptions", "lasp.hybrid.AttentionConfig", "ring.RingAttention")


@pytest.mark.parametrize("name", [*ROTATING, "ring.MultiLatentAttention"])
def test_yarn_needs_a_base_above_1(name: str) -> None:
    yarn = lasp.RopeScaling("yarn", 4.0, original_max_position_embeddings=64)
    with pytest.raises(ValueError, match=r"rope_base must be above 1 .* got 1\.0"):
        found(name)(**PUBLIC[name], rope_base=1.0, rope_scaling=yarn)


def test_what_is_compiled_is_of_its_kind() -> None:
    lasp.hybrid.reduce_gradients(torch.compile(MODEL, backend="eager"))


MODULES = (lasp, lasp.sequence, lasp.generation, lasp.hybrid, lasp.checkpoints)


@pytest.mark.parametrize("module", [*MODULES, lasp.state_exchange, ring, moe_parallel])
def test_nothing_public_is_left_out(module: ModuleType) -> None:
    known = {name.rpartition(".")[2] for name in (*PUBLIC, *NO_ARGUMENTS_OF_USERS)}
    public = {name for name in module.__all__ if inspect.isroutine(getattr(module, name))}
    public |= {name for name in module.__all__ if inspect.isclass(getattr(module, name))}
    assert public <= known
