"""``lightning_attention(impl="triton")`` as an operator of torch: one graph for every pack."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor
from torch.utils.checkpoint import checkpoint

pytest.importorskip("triton", reason="the kernels need triton, which has no wheel here")

from lasp import LightningAttention, SequenceLayout, lightning_attention
from tests.lasp.cases import bits_equal
from tests.lasp.lightning.test_kernels import DEVICE, small_blocks
from tests.ranks import run_on_ranks

RATES = torch.tensor([0.3, 0.0])
PACKS = [(30, 20), (10, 40), (7, 0, 13), (5,), (5, 6, 7, 8)]
BACKENDS = ["aot_eager", pytest.param("inductor", marks=pytest.mark.gpu)]


def make_inputs(*shape: int) -> list[Tensor]:
    return [torch.randn(*shape, device=DEVICE, requires_grad=True) for _ in range(3)]


def attend(q: Tensor, k: Tensor, v: Tensor, layout: SequenceLayout, group: Any = None) -> Tensor:
    output, states = lightning_attention(
        q, k, v, RATES, layout=layout, cp_group=group, impl="triton", state_eps=0
    )
    assert states is not None
    return output.square().sum() + states.sum()


def loss_and_gradients(function: Any, inputs: list[Tensor], *args: Any) -> list[Tensor]:
    loss = function(*inputs, *args)
    return [loss.detach(), *torch.autograd.grad(loss, inputs)]


def count_graphs(backend: str, counted: list[int]) -> Any:
    lookup = torch._dynamo.lookup_backend(backend)

    def compile_graph(graph: Any, inputs: Any) -> Any:
        counted.append(1)
        return lookup(graph, inputs)

    return compile_graph


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("padding", [0, 2])
def test_one_graph_for_every_pack(backend: str, padding: int) -> None:
    """With padding after every document and without."""
    torch._dynamo.reset()
    graphs: list[int] = []
    compiled = torch.compile(attend, fullgraph=True, backend=count_graphs(backend, graphs))
    with small_blocks():
        for lengths in PACKS:
            padded = [length + padding for length in lengths]
            layout = SequenceLayout(lengths, 1, padded_lengths=padded)  # type: ignore[arg-type]
            inputs = make_inputs(layout.num_tokens, 2, 4)
            results = [loss_and_gradients(f, inputs, layout) for f in (compiled, attend)]
            losses = [result.pop(0) for result in results]  # inductor sums in another order
            torch.testing.assert_close(*losses)
            assert bits_equal(*results)
    assert len(graphs) <= 3  # the first, one for any numbers, one for a single document


@pytest.mark.parametrize("padded", [False, True])
def test_well_registered(padded: bool) -> None:
    q, k, v = make_inputs(12, 2, 4)
    initial = torch.randn(3, 2, 4, 4, device=DEVICE, requires_grad=True)
    lengths = torch.tensor([[5, 0, 3], [5, 0, 7]] if padded else [5, 0, 7])
    settings = (lengths, 1, "contiguous", "", 1.0, "auto", True, 0.0)
    with small_blocks():
        lightning_attention(q, k, v, RATES, impl="triton")  # registers both
        operators = torch.ops.lasp
        torch.library.opcheck(operators.attention.default, (q, k, v, RATES, initial, *settings))
        tensors = [x.detach() for x in (q, k, v)]
        output, final_state, *saved = operators.attention(
            *tensors, RATES, initial.detach(), *settings
        )
        torch.library.opcheck(
            operators.attention_backward.default,
            (output, final_state, *tensors, RATES, initial.detach(), *saved, True, *settings),
        )


def test_batched_rows_and_states_compile() -> None:
    def attend_rows(q: Tensor, k: Tensor, v: Tensor, states: Tensor) -> Tensor:
        output, final = lightning_attention(q, k, v, RATES, initial_state=states, impl="triton")
        assert final is not None
        return output.sum() + final.square().sum()

    inputs = make_inputs(3, 9, 2, 4)
    inputs.append(torch.randn(3, 2, 4, 4, device=DEVICE, requires_grad=True))
    compiled = torch.compile(attend_rows, fullgraph=True, backend="aot_eager")
    with small_blocks():
        assert bits_equal(*(loss_and_gradients(f, inputs) for f in (compiled, attend_rows)))


def test_recomputed_activations_give_the_same_bits() -> None:
    layout, inputs = SequenceLayout((9, 14), 1), make_inputs(23, 2, 4)

    def recomputed(*args: Any) -> Any:
        return checkpoint(attend, *args, use_reentrant=False)

    with small_blocks():
        assert bits_equal(*(loss_and_gradients(f, inputs, layout) for f in (attend, recomputed)))


def test_a_layout_made_in_inference_mode_trains() -> None:
    with torch.inference_mode():
        layout = SequenceLayout((9, 14), 1)
        layout.position_ids(0)
    with small_blocks():
        loss_and_gradients(attend, make_inputs(23, 2, 4), layout)
    assert not layout.position_ids(0).is_inference()


def test_the_module_compiles_as_one_graph() -> None:
    torch.manual_seed(0)
    module = LightningAttention(10, 2, 4, 2, 6, impl="triton", device=DEVICE)
    compiled = torch.compile(module, fullgraph=True, backend="aot_eager")
    layout, hidden = SequenceLayout((9, 14), 1), torch.randn(23, 10, device=DEVICE)
    with small_blocks():
        outputs = [f(hidden, layout=layout) for f in (module, compiled)]
        grads = [torch.autograd.grad(x.square().sum(), module.parameters()) for x in outputs]
    assert bits_equal(*([x.detach(), *grad] for x, grad in zip(outputs, grads)))


def test_a_graph_raises_what_a_call_raises() -> None:
    def call(rates: Tensor) -> Tensor:
        return lightning_attention(*inputs, rates, impl="triton").output

    inputs = make_inputs(4, 2, 4)
    compiled = torch.compile(call, fullgraph=True, backend="aot_eager")
    with small_blocks():
        compiled(RATES)
        for function in (call, compiled):
            with pytest.raises(ValueError, match="rates must be finite"):
                function(torch.tensor([0.1, float("nan")]))


def compile_on_ranks(order: str) -> None:
    torch.manual_seed(dist.get_rank())
    layout = SequenceLayout((9, 22, 5), dist.get_world_size(), order)
    inputs = make_inputs(layout.num_local_tokens, 2, 4)
    compiled = torch.compile(attend, fullgraph=True, backend="aot_eager")
    with small_blocks():
        group = dist.group.WORLD
        results = [loss_and_gradients(f, inputs, layout, group) for f in (attend, compiled)]
    assert bits_equal(*results)


@pytest.mark.skipif(DEVICE == "cuda", reason="gloo ranks are on the CPU")
def test_one_graph_over_ranks() -> None:
    run_on_ranks(compile_on_ranks, 2, "zigzag")
