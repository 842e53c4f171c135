"""Default ``torch.compile``: operators stay in the graph, or it breaks before them.

``fullgraph=True`` is tested beside each operator. Without it a break is allowed, and the danger is
that the compiler goes on to trace what checks, communicates and launches.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor

pytest.importorskip("triton", reason="the kernels need triton, which has no wheel here")

from torch._dynamo.utils import clear_compilation_metrics, get_compilation_metrics

import lasp
from lasp import LightningAttention, SequenceLayout, decay_rates, lightning_attention
from lasp.hybrid import AttentionConfig, HybridConfig, HybridModel, pack_batch
from moe_parallel import ExpertParallelMoE, MoEConfig
from ring import RingAttention, ring_attention
from tests.closeness import assert_equal_to_rounding

ROOT = Path(lasp.__file__).parents[1]
# What a compiler may read: public functions up to where they hand over, and modules around them.
ENTRANCES = {
    "lasp/_core/graphs.py",
    "lasp/lightning/attention.py",
    "lasp/hybrid/layer.py",
    "lasp/hybrid/model.py",
    "lasp/layers/lightning_attention.py",
    "lasp/layers/rms_norm.py",
    "ring/module.py",
}
LAYOUT = SequenceLayout((5, 3), 1)
RATES = decay_rates(2, 0, 4)
MOE = MoEConfig(hidden_size=16, ffn_size=16, num_experts=4, top_k=2)


class Traced(NamedTuple):
    """Graphs made, and files of ours that were traced frame by frame."""

    num_graphs: int
    files: set[str]


def traced(fn: Callable[..., Tensor], *inputs: Tensor) -> Traced:
    """Compile with no options, check results and gradients against the same without."""
    torch._dynamo.reset()
    clear_compilation_metrics()
    graphs = []

    def backend(graph: Any, _: Any) -> Any:
        graphs.append(graph)
        return graph.forward

    results = [f(*inputs) for f in (torch.compile(fn, backend=backend), fn)]
    grads = [torch.autograd.grad(result.square().sum(), inputs) for result in results]
    for actual, expected in zip((results[0], *grads[0]), (results[1], *grads[1]), strict=True):
        assert_equal_to_rounding(actual, expected, tolerance=1e-6)
    paths = {Path(metrics.co_filename) for metrics in get_compilation_metrics()}
    ours = {str(path.relative_to(ROOT)) for path in paths if ROOT in path.parents}
    return Traced(len(graphs), {path for path in ours if not path.startswith("tests/")})


def lightning(q: Tensor) -> Tensor:
    result = lightning_attention(q * 2, q, q, RATES, layout=LAYOUT, impl="triton")
    return result.output.sum() + result.final_state


def ring(q: Tensor) -> Tensor:
    return ring_attention(q * 2, q, q, layout=LAYOUT).output + 1


@pytest.mark.parametrize("fn", [lightning, ring])
def test_operators_stay_in_one_graph(fn: Callable[[Tensor], Tensor]) -> None:
    assert traced(fn, torch.randn(8, 2, 16, requires_grad=True)) == Traced(1, set())


@pytest.mark.parametrize(
    "mixer",
    [LightningAttention(16, 2, 8, 0, 4, impl="triton"), RingAttention(16, 2, 1, 8, rotary_dim=4)],
)
def test_attention_layers_stay_in_one_graph(mixer: torch.nn.Module) -> None:
    def layer(x: Tensor) -> Tensor:
        return mixer(x * 2, layout=LAYOUT) + 1

    assert traced(layer, torch.randn(8, 16, requires_grad=True)) == Traced(1, set())


def test_graphs_break_before_eager_attention_and_experts() -> None:
    mixer = LightningAttention(16, 2, 8, 0, 4, impl="eager")
    experts = ExpertParallelMoE(MOE)

    def layer(x: Tensor) -> Tensor:
        return experts(mixer(x * 2, layout=LAYOUT) + x).output + 1

    num_graphs, files = traced(layer, torch.randn(8, 16, requires_grad=True))
    assert num_graphs > 1
    assert files <= ENTRANCES


def test_the_hybrid_decoder_breaks_before_eager_attention_and_experts_alone() -> None:
    config = HybridConfig(2, 32, AttentionConfig(2, 1, 8, 8), MOE, pattern="1:1")
    model = HybridModel(config)
    batch = pack_batch([(5, 3)], dp_rank=0, num_ranks=1, order="contiguous")
    tokens = torch.randint(32, (8,))

    def decoder(weight: Tensor) -> Tensor:
        return model(tokens, batch).logits * weight

    num_graphs, files = traced(decoder, torch.ones(32, requires_grad=True))
    assert num_graphs > 1
    assert files <= ENTRANCES
