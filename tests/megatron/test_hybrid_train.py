"""The Megatron model of benchmarks.hybrid_train is the plain one: loss, gradients and products."""

from __future__ import annotations

from contextlib import nullcontext
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch.utils.flop_counter import FlopCounterMode

from benchmarks import hybrid_megatron, hybrid_train
from benchmarks.harness import Machine
from benchmarks.hybrid_megatron import MegatronHybrid
from benchmarks.hybrid_train import Case
from benchmarks.layer_group import layer_group
from lasp.megatron import to_megatron
from tests.closeness import assert_equal_to_rounding
from tests.megatron.cpu import run_on_cpu, train_on_cpu
from tests.ranks import run_on_ranks

pytestmark = pytest.mark.megatron

IMPLS = tuple(
    impl for impl in ("megatron", "megatron_logits") if hybrid_megatron.obstacle(impl) is None
)
TOKENS, ON_CPU = 64, Machine("cpu", torch.float32, 1, 9.0)
SMALL: dict[str, Any] = {"vocab_size": 24, "hidden_size": 32}


def rows(**options: Any) -> list[dict[str, Any]]:
    given = {"tokens": (TOKENS,), "models": ("hybrid",), "experts": 4, **SMALL, **options}
    return list(hybrid_train.rows(hybrid_train.Options(commit="c", device="cpu", **given), ON_CPU))


def rows_on_rank(**options: Any) -> list[dict[str, Any]]:
    run_on_cpu()
    return rows(**options)


def test_both_are_measured() -> None:
    options = {"impls": ("lasp", *IMPLS), "activations": ("full",), "documents": ("one",)}
    found = run_on_ranks(rows_on_rank, 2, **options)[0]
    names = ["lasp", *map(hybrid_megatron.name_of, IMPLS)]
    assert [row["impl"] for row in found[::4]] == names
    assert [row["metric"] for row in found[-4:]] == ["ms", "tokens_per_s", "tflops", "gemm_share"]


def compared_on_rank(
    impl: str, documents: str, activations: str, device: str = "cpu"
) -> tuple[int, int]:
    """Check that loss and gradients are equal; the operations of both, as torch counts them."""
    sizes = (SMALL["vocab_size"], "drawn", dist.get_world_size())
    case = Case("hybrid", TOKENS, documents, "forward_backward", activations, *sizes)
    config = layer_group(num_experts=4, **SMALL)
    heads, machine = config.attention, Machine(device, torch.float64)
    plain = hybrid_train.build(case, config, machine, "lasp")
    batch, tokens, labels = hybrid_train.batch_of(case, machine)
    losses, counted = [], []
    with train_on_cpu() if device == "cpu" else nullcontext():
        megatrons = MegatronHybrid(plain, machine, impl, activations, None)
        for model in (plain, megatrons):
            with FlopCounterMode(display=False) as counter:
                output = model(tokens, batch, labels=labels)
                (output.loss / TOKENS + output.aux_loss).backward()
            losses.append(output.loss)
            counted.append(counter.get_total_flops())
    assert_equal_to_rounding(losses[1], losses[0], what="loss")
    grads = {name: parameter.grad for name, parameter in plain.named_parameters()}
    expected = to_megatron(grads, num_heads=heads.num_heads, num_kv_heads=heads.num_kv_heads)
    found = {name: parameter.grad for name, parameter in megatrons.gpt.named_parameters()}
    assert found.keys() == expected.keys()
    for name, grad in found.items():
        assert_equal_to_rounding(grad, expected[name], what=name)
    return counted[0], counted[1]


@pytest.mark.parametrize(
    ("impl", "documents", "activations"),
    [
        ("megatron", "one", "none"),
        ("megatron", "tail", "softmax_outputs"),
        ("megatron_logits", "one", "full"),
    ],
)
def test_it_is_the_plain_model(impl: str, documents: str, activations: str) -> None:
    if (why := hybrid_megatron.obstacle(impl)) is not None:
        pytest.skip(why)
    counted = run_on_ranks(compared_on_rank, 2, impl, documents, activations)
    if activations == "none":  # policies end a recomputation here or there
        assert all(plain == megatrons > 0 for plain, megatrons in counted)


@pytest.mark.multi_gpu
@pytest.mark.parametrize("activations", ["none", "softmax_outputs", "full"])
def test_it_is_the_plain_model_on_gpus(activations: str) -> None:
    if (why := hybrid_megatron.obstacle("megatron")) is not None:
        pytest.skip(why)
    more = {"backend": "nccl", "device": "cuda"}
    run_on_ranks(compared_on_rank, 2, "megatron", "tail", activations, **more)


@pytest.mark.parametrize(
    "options",
    [{"graph": True}, {"parts": ("step",)}, {"activations": ("none", "expert_inputs")}],
    ids=lambda options: next(iter(options)),
)
def test_what_it_cannot_do_is_refused(options: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match="measure lasp alone for these"):
        rows(impls=("lasp", IMPLS[0]), **options)
