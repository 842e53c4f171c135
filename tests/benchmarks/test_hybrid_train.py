"""The benchmark of training runs in small; its operations are those that torch counts."""

from __future__ import annotations

from typing import Any
from unittest.mock import patch

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from benchmarks import hybrid_train, kept_activations
from benchmarks.even_routers import loads, make_even
from benchmarks.harness import Machine
from benchmarks.layer_group import layer_group, quick_model
from benchmarks.model_flops import step_flops
from benchmarks.trace_parts import Span, covered, part_of, shares
from lasp.hybrid import HybridModel, pack_batch
from lasp.lightning.attention import LightningOutput
from moe_parallel.router.route import Router
from ring.attention import RingOutput
from tests.ranks import run_on_ranks

SMALL = {"hidden_size": 32, "num_experts": 4, "vocab_size": 24}


def rows_on_rank() -> list[dict[str, Any]]:
    options = hybrid_train.Options(
        commit="c",
        device="cpu",
        tokens=(64,),
        parts=("forward_backward", "step"),
        activations=("softmax_outputs+expert_inputs",),
        vocab_size=24,
        hidden_size=32,
        experts=4,
    )
    with patch.object(hybrid_train, "TAIL_TOKENS", 16):
        return list(hybrid_train.rows(options, Machine("cpu", torch.float32, 1, 9.0)))


def test_every_case_is_measured() -> None:
    rows = run_on_ranks(rows_on_rank, 2)[0]
    seen = [(r["case"]["documents"], r["case"]["model"], r["case"]["part"]) for r in rows[::4]]
    assert seen == [
        (documents, model, part)
        for documents in ("one", "tail")
        for model in ("hybrid", "softmax")
        for part in ("forward_backward", "step")
    ]
    assert [r["metric"] for r in rows[:4]] == ["ms", "tokens_per_s", "tflops", "gemm_share"]
    for row in rows:
        if row["metric"] == "ms":
            assert row["p50"] / row["bound"] > 0


def test_short_batches_are_measured_as_a_graph() -> None:
    rows = run_on_ranks(graph_rows_on_rank, 1)[0]
    assert [row["impl"] for row in rows] == ["lasp, CUDA graph"] * 4


def graph_rows_on_rank() -> list[dict[str, Any]]:
    options = hybrid_train.Options(
        commit="c", tokens=(64,), models=("hybrid",), documents=("one",), vocab_size=24,
        hidden_size=32, experts=4, graph=True, trace=True,
    )  # fmt: skip
    return list(hybrid_train.rows(options, Machine("cpu", torch.float32, 1, 9.0)))


def test_routers_of_a_benchmark_are_even() -> None:
    """One whose experts differ by half is changed; another call finds the loads of the first."""
    config = layer_group(num_layers=2, hidden_size=256, num_experts=16)
    model = quick_model(config, "cpu", torch.float32)
    batch = pack_batch([[1024]], dp_rank=0, num_ranks=1, order="contiguous")
    tokens = torch.randint(1024, (1024,))
    busiest = []

    def load(router: Router, args: tuple[torch.Tensor, ...]) -> None:
        busiest.append(loads(args[0] @ router.weight.T, 2).max().item())

    for router in (module for module in model.modules() if isinstance(module, Router)):
        router.register_forward_pre_hook(load)
    model(tokens, batch)
    assert max(busiest) > 1.5
    assert make_even(model, lambda: model(tokens, batch)) < 1.06
    busiest.clear()
    model(tokens, batch)
    assert max(busiest) < 1.06


def test_operations_of_weights_are_those_that_torch_counts() -> None:
    """With attention left out, forward and backward."""
    config, tokens = layer_group(**SMALL), 40
    model = HybridModel(config)
    batch = pack_batch([[tokens]], dp_rank=0, num_ranks=1, order="contiguous")

    def no_lightning(q: Any, k: Any, v: Any, *_: Any, **__: Any) -> LightningOutput:
        return LightningOutput(q + k + v, None)

    def no_softmax(q: Any, k: Any, v: Any, **_: Any) -> RingOutput:
        return RingOutput(q + k + v, q[..., 0])

    inputs = torch.randn(tokens, 32, requires_grad=True)
    with (
        patch("lasp.layers.lightning_attention.lightning_attention", no_lightning),
        patch("ring.module.ring_attention", no_softmax),
        FlopCounterMode(display=False) as counter,
    ):
        output = model(None, batch, inputs_embeds=inputs)
        (output.logits.sum() + output.aux_loss).backward()
    assert step_flops(config, [tokens]).weights == counter.get_total_flops()


def test_operations_of_attention() -> None:
    config = layer_group(**SMALL)  # 2 heads of 16; one softmax layer of eight
    counted = step_flops(config, [3, 2])
    assert counted.softmax == 3.5 * (6 + 3) * 2 * (2 * 16 + 2 * 16)
    assert counted.lightning == 3 * 7 * 5 * 2 * (2 * 16 * 16 + 2 * 16 * 16)
    assert step_flops(layer_group("0:1", **SMALL), [5]).lightning == 0
    assert counted.total == sum(counted)


def test_a_long_case_takes_one_sample() -> None:
    assert len(run_on_ranks(sampled_on_rank, 1)[0]) == 1


def sampled_on_rank() -> list[float]:
    return hybrid_train.step_ms(lambda: None, Machine("cpu", torch.float32, 5, 1e-9))


@pytest.mark.parametrize(
    ("name", "part"),
    [
        ("ncclDevKernel_SendRecv", "communication"),
        ("nvjet_hsh_128x256", "products"),
        ("hopper_scan_kernel", "lightning attention"),
        ("cudnn_generated_fort_native_sdpa_sm90_flash_fprop", "softmax attention"),
        ("vectorized_elementwise_kernel", "other kernels"),
    ],
)
def test_kernels_have_parts(name: str, part: str) -> None:
    assert part_of(name) == part


def test_exposed_communication_is_what_nothing_hides() -> None:
    spans = [Span("gemm", 0, 4), Span("nccl", 2, 7), Span("gemm", 6, 8), Span("gemm", 9, 10)]
    assert covered(spans) == 9
    found = shares(spans)
    assert found["exposed communication"] == pytest.approx(0.2)
    assert found["communication"] == pytest.approx(0.5)
    assert found["products"] == pytest.approx(0.7)
    assert found["idle"] == pytest.approx(0.1)


def test_what_layers_keep_is_counted() -> None:
    """A softmax layer of hidden size 32, in float32: two heads of 16, rows of two experts."""
    size, sizes = 32 * 4, {"tokens": 64, "hidden_size": 32, "num_experts": 4}
    options = kept_activations.Sizes(commit="c", **sizes)
    policies = ("none", "expert_inputs", "softmax_outputs", "full")
    with (
        patch.object(kept_activations, "measure_ms", lambda call: (call(), (1.0, 1.0, 1.0))[1]),
        patch.object(kept_activations, "POLICIES", policies),
    ):
        rows = list(kept_activations.rows(options, Machine("cpu", torch.float32)))
    kept = {
        (row["case"]["layer"], row["case"]["policy"]): row["p50"]
        for row in rows
        if row["metric"] == "kept"
    }
    once = 128  # bytes a token of what is kept once a call, at 64 tokens
    assert size <= kept["softmax", "full"] <= size + once
    assert size <= kept["lightning", "full"] <= size + once
    # The input of each half, the output, the log-sum-exp of two heads.
    assert 3 * size + 8 <= kept["softmax", "softmax_outputs"] <= 3 * size + 8 + once
    for layer in ("lightning", "softmax"):
        first_product = 2 * 2 * 48 * 4
        assert kept[layer, "none"] - kept[layer, "expert_inputs"] >= first_product
