"""Experts chosen by kernels and by plain torch: interpreted on the CPU, compiled on GPUs."""

from __future__ import annotations

from collections.abc import Iterator
from unittest.mock import patch

import pytest
import torch
from torch import Tensor

from moe_parallel.router import top_k as top_k_module
from moe_parallel.router.counts import counted
from moe_parallel.router.top_k import choose, summed
from tests.closeness import assert_within_budget
from tests.moe_parallel.router.test_gate import (
    batch,
    bfloat16_parts,
    check,
    check_cancelling,
    check_single_terms,
)

pytest.importorskip("triton", reason="the kernels need triton, which has no wheel here")

from moe_parallel.kernels import router

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
SIZES = [  # tokens, experts, chosen
    (0, 4, 2), (1, 1, 1), (100, 5, 2), (37, 33, 5), (20, 8, 8), (9, 70, 3), (64, 32, 1),
]  # fmt: skip


@pytest.fixture(autouse=True)
def several_programs() -> Iterator[None]:
    """Programs take several chunks each from a hundred tokens on."""
    with patch.multiple(router, ROUTER_TILE=64, MAX_PROGRAMS=4, SCAN_COLUMNS=2, POSITIONS_TILE=32):
        yield


@pytest.fixture
def in_parts() -> Iterator[None]:
    """bfloat16 tokens are multiplied by parts, as on GPUs."""

    def takes_parts(x: Tensor) -> bool:
        return x.dtype == torch.bfloat16

    with patch.object(top_k_module, "takes_parts", takes_parts):
        yield


def logits_of(kind: str, tokens: int, experts: int) -> Tensor:
    logits = torch.randn(tokens, experts)
    if kind == "ties":
        logits = logits.round() * torch.where(torch.rand(tokens, experts) < 0.5, -1, 1)  # -0 too
    if kind == "hot":
        logits[:, -1] += 100
    if kind in ("infinite", "nan"):
        one_of = torch.tensor([-torch.inf, -torch.inf, torch.inf, 0.0, 1.0, -3e38, 1e-42])
        logits = one_of[torch.randint(7, logits.shape)]
    if kind == "nan":
        logits[torch.rand(tokens, experts) < 0.3] = torch.nan
        logits[torch.rand(tokens, experts) < 0.1] = -torch.tensor(torch.nan)
    return logits.to(DEVICE)


@pytest.mark.parametrize("kind", ["random", "ties", "hot", "infinite", "nan"])
@pytest.mark.parametrize("size", SIZES)
def test_the_choice_is_a_stable_sorts(size: tuple[int, int, int], kind: str) -> None:
    tokens, num_experts, top_k = size
    logits = logits_of(kind, tokens, num_experts)
    again, experts, weights, histogram = router.top_k(logits, num_experts, top_k)
    values, ranking = logits.sort(dim=1, descending=True, stable=True)
    assert again.data_ptr() == logits.data_ptr()
    assert torch.equal(experts, ranking[:, :top_k])
    honest, exact = (v[:, :top_k].softmax(1) for v in (values, values.double()))
    assert torch.equal(weights.isnan(), exact.isnan())
    if tokens:
        assert_within_budget(*(w.nan_to_num(0) for w in (weights, exact, honest)))
    span = router.tokens_of_program(tokens, num_experts)
    spans = [counted(part, num_experts) for part in experts.split(span)]
    assert histogram.totals.dtype == torch.int64
    assert torch.equal(histogram.totals, counted(experts, num_experts))
    if tokens:
        assert torch.equal(histogram.before, torch.stack(spans).cumsum(0) - torch.stack(spans))


def test_programs_take_several_chunks_and_are_few() -> None:
    chunk, span = router.tokens_at_a_time(5), router.tokens_of_program(100, 5)
    assert span // chunk > 1
    assert 1 < -(-100 // span) <= 4
    assert router.tokens_at_a_time(1000) == 1
    assert router.tokens_of_program(0, 5) == chunk


@pytest.mark.parametrize("size", SIZES)
def test_parts_of_logits_are_summed_as_by_torch(size: tuple[int, int, int]) -> None:
    tokens, num_experts, top_k = size
    product = torch.randn(tokens, 3 * num_experts, device=DEVICE)
    logits, experts, *_ = router.top_k(product, num_experts, top_k)
    expected = summed(product.chunk(3, dim=1))
    assert torch.equal(logits, expected)
    assert torch.equal(experts, expected.sort(dim=1, descending=True, stable=True)[1][:, :top_k])


def test_parts_are_those_of_plain_torch() -> None:
    x = torch.randn(4000) * torch.exp2(torch.randint(-140, 120, (4000,)).float())
    x = torch.cat((x, torch.tensor([0.0, -0.0, 1 + 2**-23, 1 - 2**-24, 2.0**-110, 3.38e38])))
    x = x.view(2, -1).to(DEVICE)
    high, middle, low = bfloat16_parts(x)
    expected = [(high, middle, low), (low, middle, high, middle, high, high)]
    for pairs, parts in zip((False, True), expected):
        actual = router.split(x, pairs=pairs)
        assert torch.equal(actual.view(torch.int16), torch.cat(parts).view(torch.int16))
    assert router.split(x[:0]).shape == (0, x.shape[1])


@pytest.mark.parametrize("size", SIZES)
def test_gradients_come_as_the_parts_that_products_take(size: tuple[int, int, int]) -> None:
    tokens, num_experts, top_k = size
    logits = torch.randn(tokens, num_experts, device=DEVICE)
    _, experts, weights, _ = router.top_k(logits, num_experts, top_k)
    grads = torch.randn_like(weights), torch.randn_like(logits)
    arguments = grads, weights, experts, num_experts
    high, middle, low = bfloat16_parts(router.top_k_backward(*arguments, parts=False))
    expected = [(low, middle, high), (high, middle, low, high, middle, high)]
    for pairs, parts in zip((False, True), expected):
        actual = router.top_k_backward(*arguments, parts=True, pairs=pairs)
        assert torch.equal(actual, torch.cat(parts, dim=1))


def gradients(
    x: Tensor, gate: Tensor, grads: tuple[Tensor | None, Tensor | None], impl: str, top_k: int
) -> list[Tensor]:
    """Logits, weights, and gradients through weights, logits, or both."""
    leaves = [x.detach().requires_grad_(), gate.detach().requires_grad_()]
    choice = choose(*leaves, top_k, impl)
    pairs = [(y, g) for y, g in zip((choice.weights, choice.logits), grads) if g is not None]
    outputs, wanted = zip(*((y, g.to(y.dtype)) for y, g in pairs))
    return [
        choice.logits.detach(),
        choice.weights.detach(),
        *torch.autograd.grad(outputs, leaves, wanted),
    ]


@pytest.mark.parametrize("through", ["weights", "logits", "both"])
@pytest.mark.parametrize(
    ("dtype", "gate_dtype"),
    [
        (torch.bfloat16, torch.float32),
        (torch.bfloat16, torch.bfloat16),
        (torch.float32, torch.float32),
        (torch.float16, torch.float32),
    ],
)
@pytest.mark.parametrize("size", [(100, 5, 2), (1, 8, 8), (37, 33, 3)])
def test_gradients_are_within_the_budget(
    in_parts: None,
    size: tuple[int, int, int],
    dtype: torch.dtype,
    gate_dtype: torch.dtype,
    through: str,
) -> None:
    tokens, num_experts, top_k = size
    x = torch.randn(tokens, 40, device=DEVICE).to(dtype)
    gate = (torch.randn(num_experts, 40, device=DEVICE) / 40**0.5).to(gate_dtype)
    dweights = torch.randn(tokens, top_k, device=DEVICE) if through != "logits" else None
    dlogits = torch.randn(tokens, num_experts, device=DEVICE) if through != "weights" else None
    grads = dweights, dlogits
    actual = gradients(x, gate, grads, "triton", top_k)
    honest = gradients(x, gate, grads, "eager", top_k)
    exact = gradients(x.double(), gate.double(), grads, "eager", top_k)
    if dtype != torch.bfloat16:  # whose product here is of parts
        assert torch.equal(actual[0], honest[0])
    for tensor, wanted, eager in zip(actual, exact, honest):
        assert tensor.dtype == eager.dtype
        assert_within_budget(tensor, wanted, eager)


def kernel_logits(x: Tensor, gate: Tensor) -> Tensor:
    return choose(x, gate, 1, "triton").logits


@pytest.mark.parametrize("gate_dtype", [torch.float32, torch.bfloat16])
def test_products_are_as_exact_as_in_float32(in_parts: None, gate_dtype: torch.dtype) -> None:
    for sizes in [(300, 512, 8), (1, 16, 1), (65, 50, 33)]:
        check(kernel_logits, sizes, gate_dtype, DEVICE)


def test_a_single_term_is_exact(in_parts: None) -> None:
    check_single_terms(DEVICE, kernel_logits)


def test_the_same_weights_have_the_same_logits(in_parts: None) -> None:
    x, gate, _ = batch((70, 200, 1), torch.float32, DEVICE)
    logits = kernel_logits(x, gate.expand(40, -1))
    assert torch.equal(logits, logits[:, :1].expand(-1, 40))


@pytest.mark.skipif(DEVICE != "cpu", reason="its tensors are on the CPU")
@pytest.mark.parametrize("gates_differ", [False, True])
def test_gradients_to_tokens_that_nearly_cancel(in_parts: None, gates_differ: bool) -> None:
    check_cancelling(kernel_logits, gates_differ)


@pytest.mark.parametrize("wanted", [0, 1])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_either_gradient_alone(in_parts: None, dtype: torch.dtype, wanted: int) -> None:
    leaves = [torch.randn(30, 20, device=DEVICE).to(dtype), torch.randn(5, 20, device=DEVICE)]
    both = [leaf.clone().requires_grad_() for leaf in leaves]
    grad = torch.randn(30, 2, device=DEVICE)
    expected = torch.autograd.grad(choose(*both, 2, "triton").weights, both, grad)[wanted]
    leaves[wanted].requires_grad_()
    choose(*leaves, 2, "triton").weights.backward(grad)
    assert torch.equal(leaves[wanted].grad, expected)


def test_no_tokens(in_parts: None) -> None:
    x = torch.zeros(0, 8, device=DEVICE).bfloat16().requires_grad_()
    gate = torch.randn(3, 8, device=DEVICE, requires_grad=True)
    choice = choose(x, gate, 2, "triton")
    (choice.weights.sum() + choice.logits.sum()).backward()
    assert x.grad.shape == (0, 8)
    assert not gate.grad.any()
    assert choice.histogram.totals.tolist() == [0, 0, 0]


def test_autocast_does_not_reach_the_choice(in_parts: None) -> None:
    for dtype in (torch.bfloat16, torch.float32):
        x, gate = torch.randn(9, 20, device=DEVICE).to(dtype), torch.randn(4, 20, device=DEVICE)
        results = []
        for enabled in (False, True):
            leaves = [x.clone().requires_grad_(), gate.clone().requires_grad_()]
            with torch.autocast(DEVICE, torch.bfloat16, enabled=enabled):
                choice = choose(*leaves, 2, "triton")
                loss = choice.weights.square().sum() + choice.logits.sum()
                results.append([*choice[:3], *torch.autograd.grad(loss, leaves)])
        for plain, under_autocast in zip(*results):
            assert torch.equal(plain, under_autocast)


def test_only_arguments_and_the_choice_are_kept(in_parts: None) -> None:
    x, gate = torch.randn(9, 20, device=DEVICE).bfloat16(), torch.randn(4, 20, device=DEVICE)
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        choice = choose(x.requires_grad_(), gate.requires_grad_(), 2, "triton")
    expected = [x, gate, choice.experts, choice.weights]
    assert [t.data_ptr() for t in kept] == [t.data_ptr() for t in expected]


def test_a_penalty_on_gradients_raises(in_parts: None) -> None:
    leaves = [torch.randn(4, 8, device=DEVICE).bfloat16(), torch.randn(3, 8, device=DEVICE)]
    leaves = [leaf.requires_grad_() for leaf in leaves]
    for leaf in leaves:
        choice = choose(*leaves, 2, "triton")
        loss = choice.weights.square().sum() + choice.logits.square().sum()
        (gradient,) = torch.autograd.grad(loss, leaf, create_graph=True)
        with pytest.raises(RuntimeError, match="cannot be differentiated again"):
            torch.autograd.grad(gradient.square().sum(), leaves)
