"""A value that is not finite spoils its own document and the chunk that it stands in, no more."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from unittest.mock import patch

import pytest
import torch
import torch.distributed as dist
from torch import Tensor

from lasp.exchange import host_groups
from lasp.layout import SequenceLayout
from tests.lasp.cases import Case, attend, gather, names
from tests.ranks import run_on_ranks

CHUNK = 16
NAN, INF = float("nan"), float("inf")
LENGTHS = (40, 9, 30, 60, 5)


@contextmanager
def small_blocks() -> Iterator[None]:
    """Segments of 32 tokens and chunks of 16, so that documents share both."""
    from lasp.kernels import tuning

    blocks = tuning.Blocks(chunk=CHUNK, columns=32, num_warps=4, num_stages=1)
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
        return [attend(case, cp_group, rank) for case in cases]


def run_on_all(cases: list[Case]) -> list[list[Tensor]]:
    return run(cases, dist.group.WORLD)


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
        assert torch.equal(actual[others], good[others]), f"{name} of {case}"
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


def run_by_hosts(cases: list[Case]) -> list[list[Tensor]]:
    hosts = host_groups(dist.group.WORLD, 2)
    return run([case._replace(exchange=hosts) for case in cases], dist.group.WORLD)


@pytest.mark.parametrize("exchange", ["all_gather", "sliced", "scan", "serial", "hosts"])
def test_nor_do_they_over_ranks(exchange: str) -> None:
    num_ranks = 4 if exchange == "hosts" else 2
    base = Case(LENGTHS, num_ranks, order="fold", rates=(0.0, 0.25), with_states=False)
    if exchange != "hosts":
        base = base._replace(exchange=exchange)
    clean, *cases = cases_of(base)
    results = run_on_ranks(
        run_by_hosts if exchange == "hosts" else run_on_all, num_ranks, [clean, *cases]
    )
    expected, *others = (gather(clean, list(parts)) for parts in zip(*results))
    for case, spoiled in zip(cases, others, strict=True):
        check_spoiled(case, expected, spoiled)


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
