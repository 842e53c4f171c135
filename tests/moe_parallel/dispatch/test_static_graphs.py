"""One CUDA graph captures forward and backward of calls of static shapes; on GPUs."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from moe_parallel import ExpertParallelMoE, ExpertTopology, MoEConfig, TokenOrder, check_max_rows
from tests.moe_parallel.batch import groups_of
from tests.moe_parallel.host_memory import memory_of
from tests.moe_parallel.layers import build
from tests.ranks import refusal, run_on_ranks

SMALL = MoEConfig(16, 16, 8, 2, static_shapes=True)
LARGE = MoEConfig(4096, 4096, 4, 2, static_shapes=True)  # a loop, but for static_shapes


def captured(layer: ExpertParallelMoE, order: TokenOrder, x: Tensor) -> list[Tensor]:
    """The results of a replay on other tokens, then those of a call."""

    def step() -> list[Tensor]:
        result = layer(x, token_order=order)
        grads = torch.autograd.grad(result.output.float().sum(), layer.parameters())
        return [result.output, result.stats.dropped, *grads]

    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(2):
            step()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, stream=stream, capture_error_mode="thread_local"):
        inside = step()
    x.copy_(torch.randn_like(x))
    graph.replay()
    torch.cuda.synchronize()
    return [*inside, *step()]


@pytest.mark.gpu
@pytest.mark.parametrize("config", [LARGE, SMALL], ids=["large", "small"])
def test_a_cuda_graph_captures_forward_and_backward(config: MoEConfig) -> None:
    layer = ExpertParallelMoE(config, device="cuda", dtype=torch.bfloat16)
    x = torch.randn(4096, config.hidden_size, device="cuda", dtype=torch.bfloat16)
    results = captured(layer, TokenOrder.contiguous([4096]), x)
    for replayed, expected in zip(results[: len(results) // 2], results[len(results) // 2 :]):
        assert torch.equal(replayed, expected)


def captured_on_rank(max_rows: int | None, copied: bool) -> tuple[list[Tensor], str]:
    """Rank function: :func:`captured` over two ranks, and what the check says."""
    groups = groups_of(ExpertTopology(2, ep=2)).experts
    memory = memory_of(groups, own=True) if copied else None
    config = MoEConfig(64, 128, 8, 4, static_shapes=True, max_rows=max_rows)
    layer = build(
        config, torch.bfloat16, True, groups=groups, symmetric_memory=memory, device="cuda"
    )
    x = torch.randn(64, 64, device="cuda", dtype=torch.bfloat16)
    results = [x.cpu() for x in captured(layer, TokenOrder.contiguous([64, 64]), x)]
    said = "" if max_rows is None else refusal(check_max_rows, layer)
    return results, said


@pytest.mark.multi_gpu
@pytest.mark.parametrize("copied", [False, True])
@pytest.mark.parametrize("max_rows", [None, 260])
def test_a_cuda_graph_captures_it_over_two_gpus(max_rows: int | None, copied: bool) -> None:
    parts = run_on_ranks(captured_on_rank, 2, max_rows, copied, backend="nccl")
    for results, said in parts:
        half = len(results) // 2
        for replayed, expected in zip(results[:half], results[half:]):
            assert torch.equal(replayed, expected)
        assert bool(results[1].any()) == (max_rows is not None)
        assert (max_rows is None) or "max_rows must be at least" in said
