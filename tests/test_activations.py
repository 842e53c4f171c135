"""What layers keep for their backward: the same bits by every policy, and nothing made twice."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from dataclasses import replace
from functools import wraps
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor

pytest.importorskip("triton", reason="the kernels need triton, which has no wheel here")

from lasp._core.impl import Impl
from lasp.hybrid import HybridModel, keep_activations, next_token_loss, pack_batch, reduce_gradients
from lasp.lightning import attention
from lasp.lightning.triton import schedule
from moe_parallel import ExpertTopology
from moe_parallel.experts import experts
from moe_parallel.router.route import Router
from ring import passes
from tests.ranks import run_on_ranks
from tests.test_hybrid import groups_of
from tests.test_training import CONFIG, VOCAB

LIGHTNING, SOFTMAX = 2, 1
SMALL = replace(CONFIG, num_layers=3, pattern="G*G")
LENGTHS = (5, 7, 4)
# How often in one forward and backward: attention of either kind, routers, products of experts.
ONCE = {"lightning": LIGHTNING, "softmax": SOFTMAX, "routers": 3, "products": 2 * 3}
TWICE = {name: 2 * count for name, count in ONCE.items()}
ROWS_KEPT = {"routers": 3, "products": 3 * 3}
CALLS = {
    "none": ONCE,
    "full": TWICE,
    "full+offload": TWICE,
    "softmax_outputs": TWICE | {"softmax": SOFTMAX},
    "expert_inputs": TWICE | ROWS_KEPT,
    "softmax_outputs+expert_inputs": TWICE | ROWS_KEPT | {"softmax": SOFTMAX},
}
OVER_RANKS = {name: CALLS[name] for name in ("none", "full", "softmax_outputs+expert_inputs")}
# Kernels, interpreted here, are needed to keep what lightning attention returns.
CALLS_OF_KERNELS = {
    "none": ONCE,
    "attention_outputs": TWICE | {"softmax": SOFTMAX, "lightning": LIGHTNING},
    "attention_outputs+expert_inputs+offload": ONCE | ROWS_KEPT,
}


def counted(patch: pytest.MonkeyPatch) -> Counter[str]:
    calls: Counter[str] = Counter()

    def count(name: str, owner: Any, attribute: str) -> None:
        function: Callable[..., Any] = getattr(owner, attribute)

        @wraps(function)
        def call(*args: Any, **kwargs: Any) -> Any:
            calls[name] += 1
            return function(*args, **kwargs)

        patch.setattr(owner, attribute, call)

    count("lightning", schedule, "forward")
    count("lightning", attention, "_attend")
    count("softmax", passes, "forward")
    count("routers", Router, "forward")
    count("products", experts, "forward_product")
    return calls


def trained(
    policy: str, sizes: dict[str, int], impl: Impl, device: str
) -> tuple[dict[str, Tensor], Counter[str]]:
    """Loss, logits and gradients of one step of this rank, and how often what was computed."""
    topology = ExpertTopology(dist.get_world_size(), **sizes)
    at = topology.dense_coordinates(dist.get_rank())
    chosen, groups = replace(SMALL, lightning_impl=impl), groups_of(topology)
    model = HybridModel(chosen, groups=groups, device=device)
    model.reset_parameters(0)
    keep_activations(model, policy)
    batch = pack_batch([LENGTHS], dp_rank=0, num_ranks=topology.cp, order="zigzag")
    pack = torch.arange(sum(LENGTHS)) * 5 % VOCAB
    tokens = batch.layout.shard(pack, at.cp).to(device)
    with pytest.MonkeyPatch.context() as patch:
        calls = counted(patch)
        output = model(tokens, batch)
        loss = next_token_loss(output.logits, (tokens + 3) % VOCAB, len(pack)) + output.aux_loss
        loss.backward()
    reduce_gradients(model)
    found = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    return {"loss": loss.detach(), "logits": output.logits.detach(), **found}, calls


def by_policy_on_rank(
    sizes: dict[str, int], impl: Impl, expected: dict[str, Any], device: str = "cpu"
) -> None:
    bits: dict[str, Tensor] = {}
    for policy, how_often in expected.items():
        actual, calls = trained(policy, sizes, impl, device)
        assert calls == how_often, policy
        bits = bits or actual  # those of "none", which comes first
        assert actual.keys() == bits.keys()
        for name, tensor in bits.items():
            assert torch.equal(actual[name], tensor), (policy, name)


@pytest.mark.parametrize(
    ("num_ranks", "sizes", "impl", "expected"),
    [
        (1, {}, "eager", CALLS),
        (1, {}, "triton", CALLS_OF_KERNELS),
        (2, {"cp": 2, "ep": 2}, "eager", OVER_RANKS),
    ],
)
def test_policies_give_the_same_bits_and_keep_what_they_say(
    num_ranks: int, sizes: dict[str, int], impl: Impl, expected: dict[str, Any]
) -> None:
    run_on_ranks(by_policy_on_rank, num_ranks, sizes, impl, expected)


@pytest.mark.gpu
def test_policies_give_the_same_bits_on_a_gpu() -> None:
    """In float32, whose softmax attention has the same bits twice."""
    expected = CALLS | CALLS_OF_KERNELS
    run_on_ranks(by_policy_on_rank, 1, {}, "triton", expected, "cuda", backend="nccl")


@pytest.mark.parametrize(
    ("policy", "change", "message"),
    [
        ("half", {}, "policy must be names of .* got 'half'"),
        ("full+full", {}, "must name each policy once"),
        ("none+offload", {}, "must not join 'none'"),
        ("full+softmax_outputs", {}, "must not join 'full'"),
        ("offload", {}, "must say what is kept, got 'offload' alone"),
        ("softmax_outputs", {"pattern": "GGG"}, "got 'softmax_outputs' for a model without"),
        ("attention_outputs", {"lightning_impl": "eager"}, "needs lightning attention as an oper"),
    ],
)
def test_policies_that_cannot_be_kept_raise(
    policy: str, change: dict[str, Any], message: str
) -> None:
    model = HybridModel(replace(SMALL, **change))
    with pytest.raises(ValueError, match=message):
        keep_activations(model, policy)


def test_a_second_policy_raises() -> None:
    model = HybridModel(SMALL)
    keep_activations(model, "full")
    with pytest.raises(ValueError, match="model must have plain layers"):
        keep_activations(model, "expert_inputs")


@pytest.mark.gpu
def test_offloaded_inputs_leave_the_device() -> None:
    kept = {}
    for policy in ("full", "full+offload"):
        model = HybridModel(replace(SMALL, num_layers=8, pattern="7:1"), device="cuda")
        keep_activations(model, policy)
        batch = pack_batch([(4096,)], dp_rank=0, num_ranks=1, order="contiguous")
        tokens = torch.arange(4096, device="cuda") % VOCAB
        before = torch.cuda.memory_allocated()
        output = model(tokens, batch)
        kept[policy] = torch.cuda.memory_allocated() - before
        output.logits.sum().backward()
    inputs = 8 * 4096 * SMALL.hidden_size * 4
    assert kept["full"] - kept["full+offload"] >= 0.9 * inputs
