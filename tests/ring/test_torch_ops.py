"""Ring attention as operators of torch: one graph for every pack, and checkpoints that keep it."""

from __future__ import annotations

from functools import partial
from itertools import product
from typing import Any
from unittest.mock import Mock, patch

import pytest
import torch
import torch.distributed as dist
from torch import Tensor
from torch.utils.checkpoint import checkpoint, create_selective_checkpoint_contexts

from lasp.sequence.layout import SequenceLayout
from ring import ring_attention
from ring.blocks.registry import BLOCKS
from ring.planner.schedule import plan_ring
from tests.ranks import run_on_ranks
from tests.ring.cases import random_tensors

PACKS = [(30, 20), (10, 40), (7, 0, 13), (5,), (5, 6, 7, 8)]


def make_inputs(tokens: int, dtype: torch.dtype = torch.float32) -> list[Tensor]:
    return [x.requires_grad_() for x in random_tensors(tokens, 4, 2, 8, dtype)[:3]]


@pytest.mark.parametrize("padded", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_operators_are_well_registered(dtype: torch.dtype, padded: bool) -> None:
    inputs = make_inputs(12, dtype)
    lengths = torch.tensor([[5, 3], [5, 7]] if padded else [5, 7])
    settings = (lengths, 1, "contiguous", "", True, (-1, -1), 0.3, "auto")
    for sinks in (None, torch.randn(4, requires_grad=True)):
        arguments = (*inputs, sinks, *settings)
        torch.library.opcheck(torch.ops.ring.attention.default, arguments)
    qkv = [x.detach() for x in inputs]
    results = torch.ops.ring.attention(*qkv, None, *settings)
    doutput = torch.randn_like(results[0])
    for dlse in (None, torch.randn_like(results[1])):
        arguments = (doutput, dlse, *qkv, *results, *settings)
        torch.library.opcheck(torch.ops.ring.attention_backward.default, arguments)


def loss(q: Tensor, k: Tensor, v: Tensor, layout, group: Any = None) -> Tensor:
    output, lse = ring_attention(q, k, v, layout=layout, cp_group=group)
    return output.square().sum() + lse.square().sum()


def loss_and_gradients(function: Any, inputs: list[Tensor], *args: Any) -> list[Tensor]:
    value = function(*inputs, *args)
    return [value.detach(), *torch.autograd.grad(value, inputs)]


def counting(counted: list[int]) -> Any:
    eager = torch._dynamo.lookup_backend("aot_eager")

    def compile_graph(graph: Any, inputs: Any) -> Any:
        counted.append(1)
        return eager(graph, inputs)

    return compile_graph


@pytest.mark.parametrize("padding", [0, 2])
def test_one_graph_for_every_pack(padding: int) -> None:
    """With padding after every document and without."""
    torch._dynamo.reset()
    graphs: list[int] = []
    compiled = torch.compile(loss, fullgraph=True, backend=counting(graphs))
    for lengths in PACKS:
        layout = SequenceLayout(lengths, 1, padded_lengths=tuple(n + padding for n in lengths))
        inputs = make_inputs(layout.num_tokens)
        results = [loss_and_gradients(f, inputs, layout) for f in (compiled, loss)]
        assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))
    assert len(graphs) == 3  # of the first sizes, of any, and of one document


def compiled_on_world(tensors, lengths) -> bool:
    layout, rank = SequenceLayout(lengths, 2, "document_zigzag"), dist.get_rank()
    inputs = [layout.shard(x, rank).detach().requires_grad_() for x in tensors]
    compiled = torch.compile(loss, fullgraph=True, backend="aot_eager")
    results = [loss_and_gradients(f, inputs, layout, dist.group.WORLD) for f in (compiled, loss)]
    return all(torch.equal(a, b) for a, b in zip(*results, strict=True))


def test_one_graph_over_ranks() -> None:
    assert all(run_on_ranks(compiled_on_world, 2, make_inputs_detached(20), (13, 7)))


def make_inputs_detached(tokens: int) -> list[Tensor]:
    return [x.detach() for x in make_inputs(tokens)]


def test_a_graph_checks_its_arguments_when_it_runs() -> None:
    torch._dynamo.reset()
    compiled = torch.compile(loss, fullgraph=True, backend="aot_eager")
    with pytest.raises(ValueError, match="layout must hold the 20 tokens"):
        compiled(*make_inputs(20), SequenceLayout((19,), 1))


def test_no_second_derivative() -> None:
    """The gradient to any of the three has none to any of them, whatever asks for it."""
    for first, second in product(range(3), range(3)):
        tensors = make_inputs(6)
        value = loss(*tensors, SequenceLayout((6,), 1))
        (gradient,) = torch.autograd.grad(value, tensors[first], create_graph=True)
        with pytest.raises(RuntimeError, match="cannot be differentiated again"):
            torch.autograd.grad(gradient.sum(), tensors[second], retain_graph=True)
        with pytest.raises(RuntimeError, match="cannot be differentiated again"):
            gradient.sum().backward()


KEPT = partial(create_selective_checkpoint_contexts, [torch.ops.ring.attention.default])


@pytest.mark.parametrize(("context_fn", "forwards"), [(KEPT, 1), (None, 2)])
def test_a_checkpoint_that_keeps_the_operator_does_not_run_it_again(context_fn, forwards) -> None:
    calls, block = [], BLOCKS["cpu_flash"]

    def counted(*args: Any, **kwargs: Any) -> Any:
        calls.append(1)
        return type(block).forward_varlen(block, *args, **kwargs)

    def layer(x: Tensor, weight: Tensor) -> Tensor:
        q, k, v = (x @ weight).unflatten(-1, (4, 3 * 8)).split(8, -1)
        return ring_attention(q, k, v).output.flatten(1)

    x, weight = torch.randn(9, 32), torch.randn(32, 96, requires_grad=True)
    layer(x, weight).square().sum().backward()
    expected, weight.grad = weight.grad, None
    options = {} if context_fn is None else {"context_fn": context_fn}
    with patch.object(block, "forward_varlen", counted):
        output = checkpoint(layer, x, weight, use_reentrant=False, **options)
        output.square().sum().backward()
    assert len(calls) == forwards
    assert torch.equal(weight.grad, expected)


@pytest.mark.parametrize(("heads", "grouped"), [((4, 1), True), ((4, 2), True), ((3, 3), False)])
def test_the_plan_knows_whether_query_heads_share_key_heads(heads, grouped: bool) -> None:
    q, k, v, _ = random_tensors(8, *heads, 4, torch.float32)
    plan = Mock(wraps=plan_ring)
    with patch("ring.torch_ops.plan_ring", plan):
        ring_attention(q, k, v)
    assert plan.call_args.kwargs["grouped"] is grouped
