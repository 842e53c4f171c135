"""The Triton kernels: interpreted on the CPU with small blocks, compiled where there is a GPU."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from typing import Any
from unittest.mock import patch

import pytest
import torch
import torch.distributed as dist
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

pytest.importorskip("triton", reason="the kernels need triton, which has no wheel here")

from lasp.lightning.attention import lightning_attention
from lasp.lightning.triton import tuning
from lasp.lightning.triton.chunk_scan import _form
from lasp.lightning.triton.scan_launches import _describable
from lasp.sequence.layout import SequenceLayout
from tests.closeness import assert_within_budget
from tests.lasp.cases import Case, attend, bits_equal, gather, names, oracle
from tests.ranks import run_on_ranks

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
RATES = (0.0, 0.25, 8.0)
CASE = Case((), 1, rates=RATES, key_dim=32, value_dim=32, dtype=torch.float32, impl="triton")

# Borders on, before and after the cuts of segments (32) and chunks (16).
PACKS = {
    "one document": (75,),
    "borders on the cuts": (32, 16, 16, 32),
    "borders beside the cuts": (31, 2, 15, 33, 16),
    "empty and tiny ones": (0, 1, 2, 0, 3, 1, 1, 40, 0),
    "borders inside segments": (40, 40, 40),
}


@contextmanager
def small_blocks(segment: int = 32) -> Iterator[None]:
    """Many segments, parts of their states and chunks, of few tokens."""
    blocks = tuning.Blocks(chunk=16, columns=32, operand=32, num_warps=4, num_stages=1)
    with patch.multiple(
        tuning,
        output_blocks=lambda *_: blocks,
        state_blocks=lambda *_: blocks,
        segment_length=lambda *_: segment,
        part_length=lambda *_: 16,
    ):
        yield


class RoundedProducts(TorchDispatchMode):
    """Every matrix product rounds its operands and sums in float32, as tensor cores do.

    Args:
        bits: the low bits of a float32 that an operand loses: 16 for bf16, 13 for tf32.
    """

    products = (torch.ops.aten.mm.default, torch.ops.aten.bmm.default)

    def __init__(self, bits: int) -> None:
        super().__init__()
        self.bits = bits

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func in self.products:
            args = [self.rounded(x) for x in args]
        return func(*args, **(kwargs or {}))

    def rounded(self, x: Tensor) -> Tensor:
        """To nearest, ties away from zero."""
        half, kept = 1 << self.bits - 1, -1 << self.bits
        return (x.view(torch.int32) + half & kept).view(torch.float32)


class ThreeProducts(RoundedProducts):
    """Every matrix product of float32 is the sum of three tf32 products."""

    def __init__(self) -> None:
        super().__init__(13)

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func not in self.products:
            return func(*args, **(kwargs or {}))
        (a, low_a), (b, low_b) = ((x, x - self.rounded(x)) for x in args)
        products = [super(ThreeProducts, self).__torch_dispatch__(func, types, some, kwargs)
                    for some in ((low_a, b), (a, low_b), (a, b))]  # fmt: skip
        return products[0] + products[1] + products[2]


@contextmanager
def tensor_cores() -> Iterator[None]:
    """Float32 products on CUDA are products of tf32."""
    matmul = torch.backends.cuda.matmul
    before, matmul.allow_tf32 = matmul.allow_tf32, True
    try:
        yield
    finally:
        matmul.allow_tf32 = before


@cache
def honest_results(case: Case) -> list[Tensor]:
    """An eager implementation of the precision of the kernels; on a GPU, on its tensor cores.

    Their sums are part of that precision: they cut off where float32 would round.
    """
    if case.dtype == torch.float32 and DEVICE == "cpu":  # the interpreter multiplies float32
        return oracle(case)
    rounding = {torch.bfloat16: 16, torch.float16: 13}
    products = RoundedProducts(rounding[case.dtype]) if case.dtype in rounding else ThreeProducts()
    with products, tensor_cores():
        return attend(case._replace(impl="eager"), None, 0, DEVICE)


def check(case: Case, results: list[Tensor]) -> None:
    exact, honest = oracle(case.one_rank(), exactly=True), honest_results(case.one_rank())
    for name, actual, true, fair in zip(names(case), results, exact, honest):
        assert actual.dtype == fair.dtype
        assert_within_budget(actual, true, fair, what=f"{name} of {case}")


@pytest.mark.parametrize("with_states", [False, True])
@pytest.mark.parametrize("pack", PACKS)
def test_every_result_and_gradient_within_budget(pack: str, with_states: bool) -> None:
    case = CASE._replace(lengths=PACKS[pack], with_states=with_states)
    with small_blocks():
        check(case, attend(case, None, 0, DEVICE))


@pytest.mark.parametrize(
    ("key_dim", "value_dim", "dtype"),
    [
        (64, 32, torch.float32),
        (32, 96, torch.float32),
        (5, 33, torch.float32),
        (40, 72, torch.float16),  # tiles that reach past a head
        pytest.param(128, 192, torch.float32, marks=pytest.mark.slow),
        pytest.param(256, 128, torch.float32, marks=pytest.mark.slow),
    ],
)
def test_dims_and_dtypes(key_dim: int, value_dim: int, dtype: torch.dtype) -> None:
    case = CASE._replace(lengths=(40, 3, 21), key_dim=key_dim, value_dim=value_dim, dtype=dtype)
    case = case._replace(scale=key_dim**-0.5, rates=(0.02, 0.9))
    with small_blocks():
        check(case, attend(case, None, 0, DEVICE))


def test_more_segments_than_a_group() -> None:
    case = CASE._replace(lengths=(5, 150), rates=(0.01,), with_states=False)
    with small_blocks(segment=4):
        check(case, attend(case, None, 0, DEVICE))


def attend_small(cases: list[Case]) -> list[list[Tensor]]:
    with small_blocks():
        return [attend(case, dist.group.WORLD, dist.get_rank()) for case in cases]


@pytest.mark.skipif(DEVICE == "cuda", reason="gloo ranks are on the CPU")
@pytest.mark.parametrize(
    ("num_ranks", "order", "exchange"),
    [(2, "zigzag", "all_gather"), (3, "contiguous", "scan"), (2, "fold", "all_gather")],
)
def test_over_ranks(num_ranks: int, order: str, exchange: str) -> None:
    base = CASE._replace(num_ranks=num_ranks, order=order, exchange=exchange, rates=(0.0, 0.25))
    cases = [
        base._replace(lengths=(99,)),
        base._replace(lengths=(31, 0, 2, 66), pad_value=float("nan")),
        base._replace(lengths=(31, 0, 2, 66), with_states=False, pad_value=float("nan")),
    ]
    results = run_on_ranks(attend_small, num_ranks, cases)
    for index, case in enumerate(cases):
        check(case, gather(case, [result[index] for result in results]))


def describable(x: Tensor, width: int) -> bool:
    return _describable(_form(x), width)


def test_views_of_a_fused_projection_give_the_same_bits() -> None:
    fused = torch.randn(50, 2, 192, device=DEVICE)
    rates = torch.tensor([0.1, 0.0], device=DEVICE)
    views = fused.split(64, dim=-1)
    shifted = torch.randn(50, 2, 193, device=DEVICE)  # rows that no descriptor can describe
    shifted[..., 1:] = fused
    assert all(describable(x, 64) for x in views)
    assert not describable(shifted[..., 1:65], 64)
    with small_blocks():
        contiguous = lightning_attention(*(x.contiguous() for x in views), rates, impl="triton")
        for x in (views, shifted[..., 1:].split(64, dim=-1)):
            assert bits_equal([lightning_attention(*x, rates, impl="triton").output],
                              [contiguous.output])  # fmt: skip


def test_state_eps_leaves_decayed_tokens_out_of_states() -> None:
    x = torch.randn(64, 1, 32, device=DEVICE)
    rates = torch.tensor([0.25], device=DEVICE)

    def run(eps: float | None) -> Tensor:
        with small_blocks():
            return lightning_attention(x, x, x, rates, impl="triton", state_eps=eps).output

    assert torch.equal(run(0.0), run(None))  # by default 2^-32
    assert torch.equal(run(0.0), run(2.0**-32))  # exp(-0.25 * 32) is far above
    assert torch.equal(run(0.0)[:32], run(0.1)[:32])
    assert not torch.equal(run(0.0)[32:], run(0.1)[32:])


@pytest.mark.parametrize(
    ("dim", "dtype", "match"), [(257, torch.float32, "head dim"), (32, torch.float64, "eager")]
)
def test_what_the_kernels_do_not_do(dim: int, dtype: torch.dtype, match: str) -> None:
    x = torch.zeros(4, 1, dim, dtype=dtype, device=DEVICE)
    with pytest.raises(ValueError, match=match):
        lightning_attention(x, x, x, torch.ones(1), impl="triton")


# ---- compiled -----------------------------------------------------------------------------------


@pytest.mark.gpu
@pytest.mark.parametrize(
    "dims", [(16, 64), (64, 64), (96, 128), (128, 128), (192, 64), (160, 224), (256, 256)]
)
def test_bf16_within_budget(dims: tuple[int, int]) -> None:
    case = CASE._replace(key_dim=dims[0], value_dim=dims[1], dtype=torch.bfloat16, scale=0.1)
    for lengths in ((700,), (64, 0, 65, 1, 300, 63)):
        for with_states in (False, True):
            case = case._replace(lengths=lengths, with_states=with_states)
            results = attend(case, None, 0, "cuda")
            check(case, results)
            assert bits_equal(results, attend(case, None, 0, "cuda"))


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float16, torch.float32])
@pytest.mark.parametrize("dim", [64, 128, 256])
def test_wider_operands_within_budget(dim: int, dtype: torch.dtype) -> None:
    case = CASE._replace(key_dim=dim, value_dim=dim, dtype=dtype, scale=0.1, lengths=(300, 0, 65))
    check(case, attend(case, None, 0, "cuda"))


def test_descriptors_where_their_tiles_fit() -> None:
    wide = torch.zeros(8, 2, 256)
    assert not describable(wide, 256)
    assert describable(wide[..., :128], 128)
    assert describable(wide.bfloat16(), 256)
    by_head = torch.zeros(2, 8, 96).transpose(0, 1)
    assert describable(by_head, 128)  # what lies past a head is not fetched
    assert not describable(by_head[:, :1].expand(8, 2, 96), 128)  # no stride of heads
    assert not describable(torch.zeros(8, 2, 90), 128)  # heads not on 16 bytes


@pytest.mark.gpu
@pytest.mark.parametrize("dim", [32, 64, 96, 128, 192, 256])
def test_integers_are_exact(dim: int) -> None:
    """Every sum is an integer below 256, which bf16 holds: a wrong product shows as itself."""
    lengths = (150, 90)
    q, k, v, do = torch.randint(-1, 2, (4, 240, 3, dim), device="cuda").bfloat16().unbind()
    rates, layout = torch.zeros(3, device="cuda"), SequenceLayout(lengths, 1)

    def run(impl: str, dtype: torch.dtype) -> list[Tensor]:
        leaves = [x.to(dtype).requires_grad_() for x in (q, k, v)]
        output = lightning_attention(*leaves, rates, layout=layout, impl=impl).output
        return [output.detach(), *torch.autograd.grad(output, leaves, do.to(dtype))]

    for actual, expected in zip(run("triton", torch.bfloat16), run("eager", torch.float64)):
        assert torch.equal(actual, expected.bfloat16())


@pytest.mark.gpu
@pytest.mark.parametrize("dim", [64, 128])
@pytest.mark.parametrize("rate", [0.0, 4e-8, 0.01, 20.0])
def test_any_decay_over_many_tokens(rate: float, dim: int) -> None:
    q, k, v = torch.randn(3, 200_000, 2, dim, device="cuda").bfloat16().unbind()
    rates = torch.full((2,), rate)
    exact = lightning_attention(*(x.double() for x in (q, k, v)), rates).output
    with RoundedProducts(16):
        honest = lightning_attention(q, k, v, rates, impl="eager").output
    actual = lightning_attention(q, k, v, rates, impl="triton").output
    assert_within_budget(actual, exact, honest)


@pytest.mark.gpu
def test_offsets_past_two_to_the_31() -> None:
    tokens, heads, tail = 2**18 + 4096, 64, 1500
    q, k, v = (
        torch.randn(tokens, heads, 128, device="cuda", dtype=torch.bfloat16) for _ in range(3)
    )
    rates = torch.full((heads,), 0.1, device="cuda")
    output = lightning_attention(q, k, v, rates, impl="triton").output
    expected = lightning_attention(*(x[-tail:].double() for x in (q, k, v)), rates).output
    honest = lightning_attention(*(x[-tail:] for x in (q, k, v)), rates, impl="eager").output
    last = slice(-500, None)
    assert_within_budget(output[last], expected[last], honest[last])
