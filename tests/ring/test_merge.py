from __future__ import annotations

from importlib.util import find_spec

import pytest
import torch

from ring.merge import Partial, merge, merge_into
from ring.reference import dense_attention
from tests.closeness import assert_equal_to_rounding
from tests.ring.cases import random_tensors

INFINITY = float("inf")


# The kernel runs in the interpreter where there is no GPU.
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
NEEDS_TRITON = pytest.mark.skipif(find_spec("triton") is None, reason="it has no wheel here")


def over_keys(q, k, v) -> Partial:
    """Attention of one row to these keys: none of them is in the future of the last row."""
    rows = torch.cat((q.expand(len(k), -1, -1)[:-1], q))
    output, lse = dense_attention(rows, k, v, cu_seqlens=(0, len(k)), causal=True, scale=1.0)
    return Partial(output[-1:], lse[-1:])


@pytest.mark.parametrize("cut", [1, 4, 8])
@pytest.mark.parametrize("shift", [0.0, 1e4, -1e4])
def test_merging_two_parts_is_attention_to_all_keys(cut: int, shift: float) -> None:
    _, k, v, _ = random_tensors(9, 4, 2, 3, torch.float64)
    q = torch.randn(1, 4, 3, dtype=torch.float64)
    first, second = over_keys(q, k[:cut], v[:cut]), over_keys(q, k[cut:], v[cut:])
    moved = (Partial(part.output, part.lse + shift) for part in (first, second))
    merged, expected = merge(*moved), over_keys(q, k, v)
    assert_equal_to_rounding(merged.output, expected.output)
    assert_equal_to_rounding(merged.lse - shift, expected.lse)


def test_a_side_without_keys_changes_nothing() -> None:
    some = Partial(torch.randn(3, 2, 4), torch.tensor([[0.0, 500.0], [-500.0, 3.0], [1.0, 2.0]]))
    none = Partial(torch.zeros(3, 2, 4), torch.full((3, 2), -INFINITY))
    for merged in (merge(some, none), merge(none, some)):
        assert torch.equal(merged.output, some.output)
        assert torch.equal(merged.lse, some.lse)


def test_two_sides_without_keys_are_zero_and_minus_infinity() -> None:
    none = Partial(torch.zeros(3, 2, 4), torch.full((3, 2), -INFINITY))
    merged = merge(none, none)
    assert torch.equal(merged.output, none.output)
    assert torch.equal(merged.lse, none.lse)


def test_lopsided_parts_neither_overflow_nor_vanish() -> None:
    small = Partial(torch.ones(1, 1, 2), torch.tensor([[-3e4]]))
    large = Partial(torch.full((1, 1, 2), 2.0), torch.tensor([[3e4]]))
    for merged in (merge(small, large), merge(large, small)):
        assert torch.equal(merged.output, large.output)
        assert torch.equal(merged.lse, large.lse)


def test_16_bit_outputs_are_merged_in_the_precision_of_the_lse() -> None:
    a = Partial(torch.randn(5, 2, 8).bfloat16(), torch.randn(5, 2))
    b = Partial(torch.randn(5, 2, 8).bfloat16(), torch.randn(5, 2))
    merged = merge(a, b)
    assert merged.output.dtype == merged.lse.dtype == torch.float32
    wide = [Partial(part.output.double(), part.lse.double()) for part in (a, b)]
    assert_equal_to_rounding(merged.output, merge(*wide).output, tolerance=1e-6)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_merging_in_place(dtype: torch.dtype) -> None:
    into = Partial(torch.randn(5, 2, 8, dtype=dtype), torch.randn(5, 2, dtype=dtype))
    part = Partial(torch.randn(5, 2, 8).bfloat16(), torch.randn(5, 2, dtype=dtype))
    expected = merge(into, part)
    merge_into(into, part)
    assert torch.equal(into.output, expected.output)
    assert torch.equal(into.lse, expected.lse)


def merged_by_kernel(into: Partial, part: Partial) -> Partial:
    from ring.kernels.merge import merge_into

    into = Partial(*(x.to(DEVICE).clone(memory_format=torch.preserve_format) for x in into))
    merge_into(*into, *(x.to(DEVICE) for x in part))
    return Partial(*(x.cpu() for x in into))


@NEEDS_TRITON
@pytest.mark.filterwarnings("ignore:divide by zero encountered in log")  # of the interpreter
class TestKernel:
    def test_example_of_its_docstring(self) -> None:
        into = Partial(torch.tensor([[[4.0, 0.0]]]), torch.zeros(1, 1))
        part = Partial(torch.tensor([[[0.0, 8.0]]]), torch.tensor([[3.0]]).log())
        output, lse = merged_by_kernel(into, part)
        assert_equal_to_rounding(output, torch.tensor([[[1.0, 6.0]]]), tolerance=1e-6)
        assert_equal_to_rounding(lse, torch.tensor([[4.0]]).log(), tolerance=1e-6)

    @pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
    @pytest.mark.parametrize(("tokens", "heads", "head_dim"), [(1, 1, 8), (7, 3, 24), (33, 2, 64)])
    def test_is_the_merge_in_place(self, dtype, tokens, heads, head_dim) -> None:
        into = Partial(torch.randn(tokens, heads, head_dim), 5 * torch.randn(tokens, heads))
        part = Partial(
            torch.randn(tokens, heads, head_dim).to(dtype), 5 * torch.randn(tokens, heads)
        )
        merged, expected = merged_by_kernel(into, part), merge(into, part)
        assert_equal_to_rounding(merged.output, expected.output, tolerance=1e-6)
        assert_equal_to_rounding(merged.lse, expected.lse, tolerance=1e-6)

    def test_strided_views(self) -> None:
        """Rows of a longer output, an lse with heads first, a part with heads first."""
        whole, lse_HT = torch.randn(9, 3, 16), torch.randn(3, 9)
        part = Partial(torch.randn(3, 4, 16).transpose(0, 1), torch.randn(3, 4).T)
        expected = merge(Partial(whole[2:6], lse_HT.T[2:6]), part)
        whole_before, lse_before = whole.clone(), lse_HT.clone()
        whole, lse_HT = whole.to(DEVICE), lse_HT.to(DEVICE)
        from ring.kernels.merge import merge_into

        merge_into(whole[2:6], lse_HT.T[2:6], *(x.to(DEVICE) for x in part))
        whole, lse_HT = whole.cpu(), lse_HT.cpu()
        assert_equal_to_rounding(whole[2:6], expected.output, tolerance=1e-6)
        assert_equal_to_rounding(lse_HT.T[2:6], expected.lse, tolerance=1e-6)
        for some in (slice(0, 2), slice(6, 9)):
            assert torch.equal(whole[some], whole_before[some])
            assert torch.equal(lse_HT[:, some], lse_before[:, some])

    def test_rows_without_keys_are_exact(self) -> None:
        some = Partial(torch.randn(3, 2, 8), torch.tensor([[0.0, 5e2], [-5e2, 3.0], [1.0, 2.0]]))
        none = Partial(torch.zeros(3, 2, 8), torch.full((3, 2), -INFINITY))
        for a, b in ((some, none), (none, some), (none, none)):
            output, lse = merged_by_kernel(a, b)
            expected = none if a is b else some
            assert torch.equal(output, expected.output)
            assert torch.equal(lse, expected.lse)

    def test_columns_must_be_contiguous(self) -> None:
        part = Partial(torch.randn(4, 8, 2).mT, torch.randn(4, 2))
        with pytest.raises(ValueError, match="last dim of both outputs must be contiguous"):
            merged_by_kernel(Partial(torch.randn(4, 2, 8), torch.randn(4, 2)), part)

    @pytest.mark.gpu
    def test_offsets_beyond_31_bits(self) -> None:
        tokens, heads, head_dim = 2**19 + 3, 33, 128  # 2.2e9 elements
        into = Partial(
            torch.zeros(tokens, heads, head_dim, device="cuda"),
            torch.zeros(tokens, heads, device="cuda"),
        )
        part = Partial(torch.ones_like(into.output, dtype=torch.bfloat16), into.lse.clone())
        merge_into(into, part)
        assert bool((into.output == 0.5).all())
