from __future__ import annotations

from importlib.util import find_spec
from unittest.mock import patch

import pytest
import torch

from ring.blocks.merge import Accumulator, Partial, merge, merge_to, plan_merges
from ring.reference import dense_attention
from tests.closeness import assert_equal_to_rounding
from tests.ring.cases import random_tensors

INFINITY = float("inf")
DTYPES = (torch.float32, torch.bfloat16, torch.float16)


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
@pytest.mark.parametrize("of_output", [torch.bfloat16, torch.float32])
def test_merging_in_place(dtype: torch.dtype, of_output: torch.dtype) -> None:
    into = Partial(torch.randn(5, 2, 8).to(of_output), torch.randn(5, 2, dtype=dtype))
    part = Partial(torch.randn(5, 2, 8).bfloat16(), torch.randn(5, 2, dtype=dtype))
    expected = merge(into, part)
    merge_to(into, into, part)
    assert torch.equal(into.output, expected.output.to(of_output))
    assert torch.equal(into.lse, expected.lse)


# ---- several partials, some of the rows each -------------------------------------------------

COMING = (
    ((0, 7),),  # first and last
    ((0, 7), (0, 7)),  # first; last
    ((0, 7), (0, 7), (0, 7), (0, 7)),  # first, between, last
    ((0, 4), (4, 6), (0, 4), (4, 6), (6, 7)),  # tiles of a rectangle and the rest of its rows
    ((0, 4), (0, 7)),  # the second is the last for some and the only one for others
    ((2, 5), (0, 7), (1, 3), (6, 7)),
    (),
)


@pytest.mark.parametrize("coming", COMING)
def test_each_row_has_one_first_and_one_last_merge(coming) -> None:
    planned = plan_merges(coming)
    assert [(some[0].start, some[-1].stop) for some in planned] == list(coming)
    for row in range(7):
        kinds = [
            (merge.first, merge.last)
            for some in planned
            for merge in some
            if merge.start <= row < merge.stop
        ]
        assert len(kinds) == sum(start <= row < stop for start, stop in coming)
        assert [first for first, _ in kinds] == [n == 0 for n in range(len(kinds))]
        assert [last for _, last in kinds] == [n == len(kinds) - 1 for n in range(len(kinds))]


def test_merges_are_as_few_as_can_be() -> None:
    counts = [[len(some) for some in plan_merges(coming)] for coming in COMING]
    assert counts == [[1], [1, 1], [1] * 4, [1] * 5, [1, 2], [1, 6, 1, 1], []]


def random_partial(rows: int, output: torch.dtype, lse: torch.dtype) -> Partial:
    """Rows 0, 3 and 5 without keys at random."""
    some = Partial(torch.randn(rows, 2, 8).to(output), 5 * torch.randn(rows, 2).to(lse))
    for row in range(0, rows, 3):
        if torch.rand(()) < 0.5:
            some.output[row], some.lse[row] = 0, -INFINITY
    return some


@pytest.mark.parametrize("coming", COMING)
@pytest.mark.parametrize(
    ("output", "lse"),
    [
        (torch.bfloat16, torch.float32),
        (torch.float16, torch.float32),
        (torch.float32, torch.float32),
        (torch.float64, torch.float64),
    ],
)
def test_sums_are_wide_and_rounded_once(coming, output, lse) -> None:
    local = random_partial(7, output, lse)
    parts = [random_partial(stop - start, output, lse) for start, stop in coming]
    expected = Partial(local.output.to(lse), local.lse.clone())
    for (start, stop), part in zip(coming, parts):
        merged = merge(Partial(*(x[start:stop] for x in expected)), part)
        expected.output[start:stop], expected.lse[start:stop] = merged
    accumulator = Accumulator(local, [slice(*rows) for rows in coming])
    for part in parts:
        accumulator.add(part)
    assert torch.equal(local.output, expected.output.to(output))
    assert torch.equal(local.lse, expected.lse)


def test_one_partial_needs_no_memory_for_sums() -> None:
    local, *parts = (random_partial(7, torch.bfloat16, torch.float32) for _ in range(3))
    with patch.object(torch, "empty_like", side_effect=AssertionError("sums")):
        Accumulator(local, [slice(0, 7)]).add(parts[0])
        with pytest.raises(AssertionError, match="sums"):
            Accumulator(local, [slice(0, 7)] * 2).add(parts[1])


def merged_by_kernel(
    a: Partial, b: Partial, output: torch.dtype = torch.float32, *, in_place: bool = False
) -> Partial:
    from ring.blocks.merge_kernel import merge_to

    a, b = (
        Partial(*(x.to(DEVICE).clone(memory_format=torch.preserve_format) for x in some))
        for some in (a, b)
    )
    out = a
    if not in_place:
        out = Partial(torch.empty_like(a.output, dtype=output), torch.empty_like(a.lse))
    merge_to(*out, *a, *b)
    return Partial(*(x.cpu() for x in out))


@NEEDS_TRITON
@pytest.mark.filterwarnings("ignore:divide by zero encountered in log")  # of the interpreter
class TestKernel:
    def test_example_of_its_docstring(self) -> None:
        into = Partial(torch.tensor([[[4.0, 0.0]]]), torch.zeros(1, 1))
        part = Partial(torch.tensor([[[0.0, 8.0]]]), torch.tensor([[3.0]]).log())
        output, lse = merged_by_kernel(into, part)
        assert_equal_to_rounding(output, torch.tensor([[[1.0, 6.0]]]), tolerance=1e-6)
        assert_equal_to_rounding(lse, torch.tensor([[4.0]]).log(), tolerance=1e-6)

    @pytest.mark.parametrize("of_a", DTYPES)
    @pytest.mark.parametrize("of_b", DTYPES)
    @pytest.mark.parametrize("of_out", DTYPES)
    @pytest.mark.parametrize(("tokens", "heads", "head_dim"), [(1, 1, 8), (7, 3, 24), (33, 2, 64)])
    def test_is_the_merge_rounded_once(self, of_a, of_b, of_out, tokens, heads, head_dim) -> None:
        a, b = (
            Partial(torch.randn(tokens, heads, head_dim).to(dtype), 5 * torch.randn(tokens, heads))
            for dtype in (of_a, of_b)
        )
        merged, expected = merged_by_kernel(a, b, of_out), merge(a, b)
        assert merged.output.dtype == of_out
        rounding = max(torch.finfo(of_out).eps, 1e-6)  # to the other side, where exp differs
        assert_equal_to_rounding(merged.output.float(), expected.output, tolerance=rounding)
        assert_equal_to_rounding(merged.lse, expected.lse, tolerance=1e-6)
        if of_a == of_out:
            for x, y in zip(merged_by_kernel(a, b, in_place=True), merged):
                assert torch.equal(x, y)

    def test_strided_views(self) -> None:
        """Rows of a longer output, an lse with heads first, a part with heads first."""
        whole, lse_HT = torch.randn(9, 3, 16), torch.randn(3, 9)
        part = Partial(torch.randn(3, 4, 16).transpose(0, 1), torch.randn(3, 4).T)
        expected = merge(Partial(whole[2:6], lse_HT.T[2:6]), part)
        whole_before, lse_before = whole.clone(), lse_HT.clone()
        whole, lse_HT = whole.to(DEVICE), lse_HT.to(DEVICE)
        from ring.blocks.merge_kernel import merge_to

        into = (whole[2:6], lse_HT.T[2:6])
        merge_to(*into, *into, *(x.to(DEVICE) for x in part))
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
        with pytest.raises(ValueError, match="last dim of all outputs must be contiguous"):
            merged_by_kernel(Partial(torch.randn(4, 2, 8), torch.randn(4, 2)), part)

    @pytest.mark.gpu
    def test_offsets_beyond_31_bits(self) -> None:
        tokens, heads, head_dim = 2**19 + 3, 33, 128  # 2.2e9 elements
        into = Partial(
            torch.zeros(tokens, heads, head_dim, device="cuda"),
            torch.zeros(tokens, heads, device="cuda"),
        )
        part = Partial(torch.ones_like(into.output, dtype=torch.bfloat16), into.lse.clone())
        merge_to(into, into, part)
        assert bool((into.output == 0.5).all())
