"""Decoding: token by token, in one call with prompts, and against the recurrence."""

from __future__ import annotations

from collections.abc import Callable
from importlib.util import find_spec
from itertools import pairwise
from typing import Any, NamedTuple
from unittest.mock import patch

import pytest
import torch
from torch import Tensor

from lasp import LightningOptions, SequenceLayout, lightning_attention, lightning_decode
from lasp.layers.norm_gate import norm_gate
from lasp.lightning.decay import rates_on
from lasp.lightning.reference import recurrent_lightning_attention
from tests.closeness import assert_equal_to_rounding, assert_within_budget
from tests.lasp.layers.test_heads import heads_with

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
RATES = torch.tensor([0.0, 0.25, 8.0])
NEEDS_TRITON = pytest.mark.skipif(find_spec("triton") is None, reason="it has no wheel here")
KERNELS = pytest.param("triton", torch.float32, marks=NEEDS_TRITON)
# Prompts go through tensor cores: bf16 where there are some.
CHUNKED = pytest.param(
    "triton", torch.bfloat16 if DEVICE == "cuda" else torch.float32, marks=NEEDS_TRITON
)
IMPLS = [("eager", torch.float64), ("eager", torch.bfloat16), KERNELS]


class Inputs(NamedTuple):
    """Views of a fused projection ``[B, T, H, 2K + V]`` and states."""

    q: Tensor
    k: Tensor
    v: Tensor
    state: Tensor

    def to(self, dtype: torch.dtype) -> Inputs:
        state_dtype = torch.promote_types(dtype, torch.float32)
        return Inputs(*(x.to(dtype) for x in self[:3]), self.state.to(state_dtype))


def make_inputs(
    batch: int, tokens: int, key_dim: int, value_dim: int, dtype: torch.dtype, heads: int = 3
) -> Inputs:
    fused = torch.randn(batch, tokens, heads, 2 * key_dim + value_dim, device=DEVICE)
    q, k, v = fused.to(dtype).split((key_dim, key_dim, value_dim), dim=-1)
    state_dtype = torch.promote_types(dtype, torch.float32)
    state = torch.randn(batch, heads, key_dim, value_dim, dtype=state_dtype, device=DEVICE)
    return Inputs(q, k, v, state)


def recurrence(inputs: Inputs, rates: Tensor, scale: float) -> tuple[Tensor, Tensor]:
    batch, tokens = inputs.q.shape[:2]
    output, state = recurrent_lightning_attention(
        *(x.flatten(0, 1) for x in inputs[:3]),
        rates.to(DEVICE),
        cu_seqlens=range(0, batch * tokens + 1, tokens),
        scale=scale,
        initial_state=inputs.state,
    )
    return output.unflatten(0, (batch, tokens)), state


def check(
    results: tuple[Tensor, Tensor],
    inputs: Inputs,
    rates: Tensor = RATES,
    scale: float = 1.0,
    honest: tuple[Tensor, Tensor] | None = None,
) -> None:
    exact = recurrence(inputs.to(torch.float64), rates, scale)
    compare(results, exact, honest or recurrence(inputs, rates, scale))


def compare(
    results: tuple[Tensor, Tensor], exact: tuple[Tensor, Tensor], honest: tuple[Tensor, Tensor]
) -> None:
    for actual, true, fair in zip(results, exact, honest):
        assert actual.dtype == fair.dtype
        if actual.dtype == torch.float64:
            assert_equal_to_rounding(actual, true)
        else:
            assert_within_budget(actual, true, fair)


@pytest.mark.parametrize(("impl", "dtype"), IMPLS)
@pytest.mark.parametrize("shape", [(1, 1, 5, 33), (3, 1, 96, 64), (2, 4, 64, 32), (2, 2, 1, 1)])
def test_equals_the_recurrence(
    impl: str, dtype: torch.dtype, shape: tuple[int, int, int, int]
) -> None:
    inputs = make_inputs(*shape, dtype)
    before = inputs.state.clone()
    results = lightning_decode(*inputs[:3], RATES, inputs.state, scale=0.7, impl=impl)
    assert torch.equal(inputs.state, before)
    check(results, inputs, RATES, 0.7)

    state = before.clone()
    output, final_state = lightning_decode(
        *inputs[:3], RATES, state, scale=0.7, in_place=True, impl=impl
    )
    assert final_state is state
    assert torch.equal(state, results.final_state)
    assert torch.equal(output, results.output)


def honestly(run: Callable[[str], Any]) -> Any:
    """``run`` by an eager implementation of the precision of the kernels; None: the recurrence."""
    if DEVICE == "cpu":
        return None
    from tests.lasp.lightning.test_kernels import RoundedProducts  # needs triton

    with RoundedProducts(16):
        return run("eager")


@pytest.mark.parametrize(("impl", "dtype"), [IMPLS[0], CHUNKED])
def test_prefill_then_decode_equals_the_recurrence(impl: str, dtype: torch.dtype) -> None:
    """The prompt in chunks, then drafts of two tokens, then one by one."""
    prompt, drafts, total = 70, 74, 76
    inputs = make_inputs(2, total, 32, 16, dtype)

    def run(impl: str) -> tuple[Tensor, Tensor]:
        start = lightning_attention(
            *(x[:, :prompt] for x in inputs[:3]), RATES, initial_state=inputs.state, impl=impl
        )
        outputs, state = [start.output], start.final_state
        for begin, end in pairwise([*range(prompt, drafts, 2), *range(drafts, total + 1)]):
            tokens = (x[:, begin:end] for x in inputs[:3])
            output, state = lightning_decode(*tokens, RATES, state, impl=impl)
            outputs.append(output)
        return torch.cat(outputs, dim=1), state

    check(run(impl), inputs, honest=honestly(run) if impl == "triton" else None)


@pytest.mark.parametrize(("impl", "dtype"), [IMPLS[0], CHUNKED])
def test_prompts_and_steps_in_one_call(impl: str, dtype: torch.dtype) -> None:
    """Sequences that get one token lie beside prompts in a pack, each with its state.

    As if every sequence had got its tokens one by one.
    """
    lengths = (1, 70, 1, 0, 2, 1)
    layout = SequenceLayout(lengths, 1)
    pack = [x[0] for x in make_inputs(1, sum(lengths), 32, 16, dtype)[:3]]
    given = make_inputs(len(lengths), 1, 32, 16, dtype).state

    def run(impl: str) -> tuple[Tensor, Tensor]:
        return lightning_attention(*pack, RATES, layout=layout, initial_state=given, impl=impl)

    def recurrence_in(dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        state = given.to(torch.promote_types(dtype, torch.float32))
        return recurrent_lightning_attention(
            *(x.to(dtype) for x in pack), RATES.to(DEVICE),
            cu_seqlens=layout.borders, initial_state=state,
        )  # fmt: skip

    outputs, states = torch.empty_like(pack[2]), given.clone()
    for document, (begin, end) in enumerate(pairwise(layout.borders)):
        for token in range(begin, end):
            outputs[token] = lightning_decode(
                *(x[None, None, token] for x in pack), RATES, states[document, None],
                in_place=True, impl=impl,
            ).output  # fmt: skip
    exact, fair = recurrence_in(torch.float64), recurrence_in(dtype)
    honest = honestly(run) if impl == "triton" else None
    compare((outputs, states), exact, fair)
    compare(run(impl), exact, honest or fair)


@NEEDS_TRITON
def test_a_sequence_gets_the_same_bits_in_any_batch() -> None:
    inputs = make_inputs(3, 2, 32, 16, torch.float32)
    alone = Inputs(*(x[1:2] for x in inputs))
    together, alone = (
        lightning_decode(*x[:3], RATES, x.state, impl="triton") for x in (inputs, alone)
    )
    assert torch.equal(together.output[1:2], alone.output)
    assert torch.equal(together.final_state[1:2], alone.final_state)


def test_bad_input() -> None:
    q, k, v, state = make_inputs(2, 1, 4, 4, torch.float32)

    def call(match: str, **changed: object) -> None:
        arguments = {"q": q, "k": k, "v": v, "rates": RATES, "state": state} | changed
        with pytest.raises(ValueError, match=match):
            lightning_decode(**arguments)

    call("impl", impl="cuda")
    call("q must be.*: for one token", q=q[0], k=k[0], v=v[0])
    call("k must", k=k[..., :3])
    call("rates must", rates=RATES[:2])
    call("rates must", rates=RATES.bfloat16())
    call("rates must be finite", rates=torch.tensor([1.0, float("nan"), 0.0]))
    call("rates must be finite", rates=-RATES)
    call("rates must be on.*: move", rates=RATES.to("meta"))
    call("state must.*: start from zeros", state=state[:1])
    call("state must", state=state.double())
    call("contiguous", state=state.mT, in_place=True)
    call("require grad", q=q.clone().requires_grad_())
    call("require grad", state=state.clone().requires_grad_())
    with torch.no_grad():
        lightning_decode(q, k, v, RATES, state.clone().requires_grad_())


@NEEDS_TRITON
def test_what_the_kernel_does_not_do() -> None:
    for dim, dtype, match in ((257, torch.float32, "head dim"), (4, torch.float64, "eager")):
        q, k, v, state = make_inputs(1, 1, dim, dim, dtype)
        with pytest.raises(ValueError, match=match):
            lightning_decode(q, k, v, RATES, state, impl="triton")


def test_without_triton() -> None:
    q, k, v, state = make_inputs(1, 1, 4, 4, torch.float32)
    with patch("lasp._core.impl.HAS_TRITON", False):
        for call in (
            lambda: lightning_decode(q, k, v, RATES, state, impl="triton"),
            lambda: heads_with("triton", LightningOptions())(q[..., :3]),
            lambda: norm_gate(q, q, q[0, 0, 0], eps=1e-6, impl="triton"),
        ):
            with pytest.raises(ValueError, match="install triton"):
                call()


# ---- compiled -----------------------------------------------------------------------------------


@pytest.mark.gpu
@pytest.mark.parametrize("dims", [(16, 64), (64, 64), (96, 192), (128, 128), (256, 256)])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_on_a_gpu(dims: tuple[int, int], dtype: torch.dtype) -> None:
    for batch, tokens in ((1, 1), (33, 1), (5, 4)):
        inputs = make_inputs(batch, tokens, *dims, dtype)
        results = lightning_decode(*inputs[:3], RATES, inputs.state, scale=0.1, impl="triton")
        check(results, inputs, RATES, 0.1)


@pytest.mark.gpu
def test_states_past_two_to_the_31() -> None:
    inputs = make_inputs(2**17 + 2, 1, 128, 128, torch.bfloat16, heads=1)
    rates = torch.tensor([0.25])
    ends = [Inputs(*(x[rows].clone() for x in inputs)) for rows in (slice(2), slice(-2, None))]
    output, state = lightning_decode(*inputs[:3], rates, inputs.state, in_place=True, impl="triton")
    check((output[:2], state[:2]), ends[0], rates, 1.0)
    check((output[-2:], state[-2:]), ends[1], rates, 1.0)


@pytest.mark.gpu
def test_graph_capture_and_no_device_sync() -> None:
    inputs = make_inputs(4, 1, 128, 128, torch.bfloat16)
    rates = RATES.to(DEVICE)

    def step(state: Tensor) -> Tensor:
        return lightning_decode(*inputs[:3], rates, state, in_place=True, impl="triton").output

    expected_state = inputs.state.clone()
    expected = [step(expected_state) for _ in range(3)]
    torch.cuda.set_sync_debug_mode("error")
    try:
        step(inputs.state.clone())
    finally:
        torch.cuda.set_sync_debug_mode("default")
    state, graph = inputs.state.clone(), torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        output = step(state)
    for true in expected:
        graph.replay()
        assert torch.equal(output, true)
    assert torch.equal(state, expected_state)


def test_rates_on_a_device_lie_one_after_the_other() -> None:
    rates = torch.ones(8, device="meta")[::2]
    assert rates_on(rates, rates.device, torch.float32).is_contiguous()


def test_under_autocast_it_decodes_its_dtype_and_the_states_stay_wide() -> None:
    q, k, v = (torch.randn(2, 1, 3, 8) for _ in range(3))
    state, rates = torch.randn(2, 3, 8, 8), torch.full((3,), 0.1)
    narrow = lightning_decode(q.bfloat16(), k.bfloat16(), v.bfloat16(), rates, state)
    with torch.autocast("cpu", torch.bfloat16):
        under_autocast = lightning_decode(q, k, v, rates, state)
    assert [x.dtype for x in under_autocast] == [torch.bfloat16, torch.float32]
    assert all(torch.equal(a, b) for a, b in zip(narrow, under_autocast))
