"""Values that nobody expects: not finite, past float32's range, small beside the dtype's digits.

A value that is not finite spoils its own document and the chunk that it stands in, no more.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from unittest.mock import patch

import pytest
import torch
import torch.distributed as dist
from torch import Tensor

from lasp.lightning.decode import lightning_decode
from lasp.sequence.layout import SequenceLayout
from tests.closeness import assert_equal_to_rounding
from tests.lasp.cases import Case, attend, gather, names, oracle
from tests.ranks import run_on_ranks

CHUNK = 16
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"  # of the kernels
NAN, INF = float("nan"), float("inf")
LENGTHS = (40, 9, 30, 60, 5)


@contextmanager
def small_blocks() -> Iterator[None]:
    """Segments of 32 tokens and chunks of 16, so that documents share both."""
    from lasp.lightning.triton import tuning

    blocks = tuning.Blocks(chunk=CHUNK, columns=32, operand=32, num_warps=4, num_stages=1)
    with patch.multiple(
        tuning,
        output_blocks=lambda *_: blocks,
        state_blocks=lambda *_: blocks,
        segment_length=lambda *_: 32,
        part_length=lambda *_: 16,
    ):
        yield


def run(cases: list[Case], cp_group: dist.ProcessGroup | None = None) -> list[list[Tensor]]:
    rank = 0 if cp_group is None else cp_group.rank()
    if cases[0].impl == "eager":
        return [attend(case, cp_group, rank) for case in cases]
    with small_blocks():
        return [attend(case, cp_group, rank, DEVICE) for case in cases]


def run_on_all(cases: list[Case]) -> list[list[Tensor]]:
    return run(cases, dist.group.WORLD)


def run_one(case: Case) -> list[Tensor]:
    return run([case], dist.group.WORLD)[0]


def assert_same(actual: Tensor, expected: Tensor, what: str) -> None:
    """The same bits; compilers may contract sums in one of two loops, so on GPUs to rounding."""
    if DEVICE == "cpu":
        assert torch.equal(actual, expected), what
    else:
        assert_close = partial(torch.testing.assert_close, msg=lambda text: f"{what}: {text}")
        assert_close(actual, expected, rtol=2**-7, atol=2**-7 * expected.abs().max().item())


def check_spoiled(case: Case, clean: list[Tensor], spoiled: list[Tensor]) -> None:
    """Equal bits but in the document of the bad value and, by kernels, nearer than a chunk."""
    assert case.bad is not None
    token = case.bad[1]
    borders = SequenceLayout(case.lengths, 1).borders
    bad = next(n for n in range(len(case.lengths)) if borders[n] <= token < borders[n + 1])
    other_tokens = torch.ones(sum(case.lengths), dtype=torch.bool)
    other_tokens[borders[bad] : borders[bad + 1]] = False
    if case.impl == "triton":
        other_tokens[max(0, token - CHUNK + 1) : token + CHUNK] = False
    other_documents = torch.arange(len(case.lengths)) != bad
    for name, good, actual in zip(names(case), clean, spoiled, strict=True):
        others = other_documents if name in ("final_state", "dinitial") else other_tokens
        assert_same(actual[others], good[others], f"{name} of {case}")
    assert not all(x.isfinite().all() for x in spoiled), "the value was not read"


def cases_of(base: Case) -> list[Case]:
    """The clean one first."""
    bad = [("q", 44, NAN), ("k", 44, NAN), ("v", 10, NAN), ("grad_output", 50, NAN), ("k", 10, INF)]
    return [base, *(base._replace(bad=some) for some in bad)]


@pytest.mark.parametrize("with_states", [False, True])
@pytest.mark.parametrize("impl", ["eager", "triton"])
def test_other_documents_do_not_notice(impl: str, with_states: bool) -> None:
    if impl == "triton":
        pytest.importorskip("triton", reason="the kernels need triton, which has no wheel here")
    base = Case(
        LENGTHS, 1, rates=(0.0, 0.25), key_dim=32, value_dim=32, dtype=torch.float32, impl=impl
    )
    clean, *cases = cases_of(base._replace(with_states=with_states))
    expected, *results = run([clean, *cases])
    for case, spoiled in zip(cases, results, strict=True):
        check_spoiled(case, expected, spoiled)


@pytest.mark.parametrize("exchange", ["all_gather", "sliced", "scan"])
def test_nor_do_they_over_ranks(exchange: str) -> None:
    base = Case(LENGTHS, 2, order="fold", rates=(0.0, 0.25), with_states=False)
    clean, *cases = cases_of(base._replace(exchange=exchange))
    results = run_on_ranks(run_on_all, 2, [clean, *cases])
    expected, *others = (gather(clean, list(parts)) for parts in zip(*results))
    for case, spoiled in zip(cases, others, strict=True):
        check_spoiled(case, expected, spoiled)


@pytest.mark.skipif(DEVICE == "cuda", reason="gloo ranks are on the CPU")
def test_nor_do_they_over_ranks_by_kernels() -> None:
    pytest.importorskip("triton", reason="the kernels need triton, which has no wheel here")
    base = Case(
        LENGTHS, 2, order="zigzag", rates=(0.1,), key_dim=32, value_dim=32, dtype=torch.float32,
        impl="triton", with_states=False,
    )  # fmt: skip
    clean, *cases = cases_of(base)
    cases = cases[1:3]
    results = run_on_ranks(run_on_all, 2, [clean, *cases])
    expected, *others = (gather(clean, list(parts)) for parts in zip(*results))
    for case, spoiled in zip(cases, others, strict=True):
        check_spoiled(case, expected, spoiled)


@pytest.mark.gpu
@pytest.mark.parametrize(
    ("dim", "with_states"), [(64, False), (128, False), (128, True), (256, True)]
)
@pytest.mark.parametrize("what", ["q", "k", "v", "grad_output"])
def test_other_documents_do_not_notice_in_bfloat16(what: str, dim: int, with_states: bool) -> None:
    """Tensor descriptors, and the blocks and segments of GPUs; last chunks of documents too."""
    base = Case(
        (100, 300, 50) * 80, 1, rates=(0.0, 0.02), key_dim=dim, value_dim=dim,
        dtype=torch.bfloat16, impl="triton", with_states=with_states,
    )  # fmt: skip
    token, reach = 120, 128  # in the second document; no chunk is longer
    clean = attend(base, None, 0, "cuda")
    spoiled = attend(base._replace(bad=(what, token, NAN)), None, 0, "cuda")
    others = torch.ones(len(clean[0]), dtype=torch.bool)
    others[100:400] = others[max(0, token - reach) : token + reach] = False
    documents = torch.arange(len(base.lengths)) != 1
    for name, good, actual in zip(names(base), clean, spoiled, strict=True):
        same = others if len(good) == len(others) else documents  # states have one row a document
        assert_same(actual[same], good[same], name)
    assert not all(x.isfinite().all() for x in spoiled), "the value was not read"


@pytest.mark.parametrize("impl", ["eager", "triton"])
def test_nor_do_other_sequences_in_decoding(impl: str) -> None:
    if impl == "triton":
        pytest.importorskip("triton", reason="the kernels need triton, which has no wheel here")
    device = DEVICE if impl == "triton" else "cpu"
    q, k, v = torch.randn(3, 3, 2, 2, 16, device=device).unbind()
    state = torch.randn(3, 2, 16, 16, device=device)
    rates = torch.tensor([1e39, 0.25], dtype=torch.float64)
    clean = lightning_decode(q, k, v, rates, state, impl=impl)
    k[1, 0, 0, 3] = NAN
    for actual, expected in zip(lightning_decode(q, k, v, rates, state, impl=impl), clean):
        assert torch.equal(actual[::2], expected[::2])
        assert expected.isfinite().all()
        assert not actual[1].isfinite().all()


# ---- rates and states ---------------------------------------------------------------------------


def bits_of_200(case: Case, run_case: Callable[[Case], list[Tensor]]) -> None:
    """A rate of 200 leaves nothing after one token, in float32."""
    expected = run_case(case._replace(rates=(200.0, 200.0, 0.25)))
    for name, actual, right in zip(names(case), run_case(case), expected, strict=True):
        assert right.isfinite().all()
        assert torch.equal(actual, right), f"{name} of {case}"


@pytest.mark.parametrize("impl", ["eager", "triton"])
def test_a_rate_past_float32_forgets_all(impl: str) -> None:
    if impl == "triton":
        pytest.importorskip("triton", reason="the kernels need triton, which has no wheel here")
    case = Case(
        (40, 3), 1, rates=(1e39, 3e38, 0.25), key_dim=32, value_dim=32, dtype=torch.float32,
        impl=impl,
    )  # fmt: skip
    bits_of_200(case, lambda case: run([case])[0])


@pytest.mark.parametrize("exchange", ["auto", "all_gather", "sliced", "scan"])
def test_a_rate_past_float32_forgets_all_over_ranks(exchange: str) -> None:
    case = Case((70, 3), 2, order="zigzag", rates=(1e39, 3e38, 0.25), dtype=torch.float32)
    case = case._replace(exchange=exchange)
    bits_of_200(case, lambda case: gather(case, run_on_ranks(run_one, 2, case)))


def test_float64_states_keep_what_float32_could_not() -> None:
    """exp(-0.45 * 50), over the run of the second rank, is below 2^-32 and far above 2^-52."""
    case = Case((100,), 2, order="zigzag", rates=(0.45,), exchange="auto")
    together = gather(case, run_on_ranks(run_one, 2, case))
    for name, actual, expected in zip(names(case), together, oracle(case.one_rank()), strict=True):
        assert_equal_to_rounding(actual, expected, tolerance=1e-13, what=name)
