from __future__ import annotations

from itertools import pairwise

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from lasp.sequence.layout import Fragment, RealTokens, Run, RunLink, SequenceLayout

ORDERS = ("contiguous", "zigzag", "fold", "document_zigzag")


@st.composite
def _layouts(draw: st.DrawFn) -> SequenceLayout:
    length = st.one_of(st.integers(0, 3), st.integers(0, 300))
    lengths = draw(st.lists(length, min_size=1, max_size=12).filter(any).map(tuple))
    num_ranks, order = draw(st.integers(1, 9)), draw(st.sampled_from(ORDERS))
    padded = None
    if draw(st.booleans()):
        padded = tuple(length + draw(st.integers(0, 20)) for length in lengths)
        if order == "document_zigzag":
            padded = tuple(-(-length // (2 * num_ranks)) * 2 * num_ranks for length in padded)
    return SequenceLayout(lengths, num_ranks, order, padded)


layouts = _layouts()


def _where(layout: SequenceLayout) -> list[tuple[int, int]]:
    """Document and position of every token of the pack; the document of padding is N."""
    where = []
    for n, length in enumerate(layout.document_lengths):
        padding = layout.padding_lengths[n]
        where += [(n, i) for i in range(length)]
        where += [(layout.num_documents, i) for i in range(padding)]
    return where


def test_worked_example() -> None:
    layout = SequenceLayout((5, 3), 2, "zigzag")
    assert layout.runs(0) == (Run(0, 2), Run(6, 8))
    assert layout.runs(1) == (Run(2, 6),)
    assert layout.fragments(0) == (Fragment(0, 0, 2, 0, 0), Fragment(1, 1, 3, 2, 1))
    assert layout.fragments(1) == (Fragment(0, 2, 5, 0, 0), Fragment(1, 0, 1, 3, 0))
    assert layout.run_links == (
        RunLink(0, 0, 0, 2, continues=False, passes=False),
        RunLink(1, 0, 2, 6, continues=True, passes=False),
        RunLink(0, 1, 6, 8, continues=True, passes=True),
    )
    assert layout.cu_seqlens(1).tolist() == [0, 3, 4]
    assert layout.position_ids(1).tolist() == [2, 3, 4, 0]
    assert layout.work(0) == 1 + 2 + 2 + 3


@settings(max_examples=300, deadline=None)
@given(layouts)
def test_every_token_exactly_once_and_equal_tokens_a_rank(layout: SequenceLayout) -> None:
    ranks = range(layout.num_ranks)
    held = [token for rank in ranks for run in layout.runs(rank) for token in range(*run)]
    assert sorted(held) == list(range(layout.num_tokens))
    for rank in ranks:
        runs = layout.runs(rank)
        assert sum(stop - start for start, stop in runs) == layout.num_local_tokens
        assert all(a.stop < b.start for a, b in pairwise(runs))  # sorted and maximal
    multiple = layout.num_ranks * (2 if "zigzag" in layout.order else 1)
    padded = layout.padded_lengths or layout.document_lengths
    assert 0 <= layout.num_tokens - sum(padded) < multiple  # at the tail
    assert layout.order != "document_zigzag" or layout.num_tokens == sum(padded)
    assert layout.num_padding_tokens == sum(layout.padding_lengths)


@settings(max_examples=300, deadline=None)
@given(layouts)
def test_fragments_and_links_agree_with_a_map_of_every_token(layout: SequenceLayout) -> None:
    """Checked against the definition token by token, not against the borders' arithmetic."""
    where = _where(layout)
    assert len(where) == layout.num_tokens
    for n, start in enumerate(layout.document_starts):
        assert layout.document_lengths[n] == 0 or where[start] == (n, 0)
    real = [token for token in where if token[0] < layout.num_documents]
    for rank in range(layout.num_ranks):
        tokens = [where[t] for run in layout.runs(rank) for t in range(*run)]
        from_fragments = [
            (f.document, i) for f in layout.fragments(rank) for i in range(f.start, f.stop)
        ]
        assert from_fragments == tokens
        assert layout.position_ids(rank).tolist() == [i for _, i in tokens]
        ends = [f.offset for f in layout.fragments(rank)] + [layout.num_local_tokens]
        assert layout.cu_seqlens(rank).tolist() == ends
        assert layout.work(rank) == sum(i + 1 for _, i in tokens)
        for f in layout.fragments(rank):
            run = layout.runs(rank)[f.run]
            assert (f.document, f.start) in where[slice(*run)]
        held = [(t, token) for t, token in enumerate(tokens) if token[0] < layout.num_documents]
        stretches = layout.real_tokens(rank)
        assert [(a + i, real[p + i]) for p, a, n in stretches for i in range(n)] == held
        assert all(
            (a.position + a.length, a.offset + a.length) != (b.position, b.offset)
            for a, b in pairwise(stretches)
        )
    for link in layout.run_links:
        in_run = [where[t] for t in range(link.start, link.stop)]
        assert layout.runs(link.rank)[link.run] == (link.start, link.stop)
        document, first = in_run[0]
        assert link.continues == (document < layout.num_documents and first > 0)
        assert link.passes == (link.continues and {n for n, _ in in_run} == {document})
    starts = [link.start for link in layout.run_links]
    assert starts == sorted(starts)


@settings(max_examples=100, deadline=None)
@given(layouts, st.booleans())
def test_unshard_inverts_shard(layout: SequenceLayout, padded: bool) -> None:
    pack = torch.randn(3, layout.num_tokens, 2)
    is_padding = torch.tensor([n == layout.num_documents for n, _ in _where(layout)])
    pack[:, is_padding] = 7.0
    documents = pack[:, ~is_padding]
    x = pack if padded else documents
    parts = [layout.shard(x, rank, dim=1, pad_value=7.0) for rank in range(layout.num_ranks)]
    for rank, part in enumerate(parts):
        assert torch.equal(part, torch.cat([pack[:, a:b] for a, b in layout.runs(rank)], 1))
    assert torch.equal(layout.unshard(parts, dim=1), documents)


def test_shard_is_differentiable_and_a_view_where_it_can_be() -> None:
    layout = SequenceLayout((4, 4), 2, "contiguous")
    x = torch.randn(8, 3, requires_grad=True)
    part = layout.shard(x, 1)
    assert part.data_ptr() == x[4:].data_ptr()
    part.sum().backward()
    assert x.grad is not None
    assert x.grad.sum(1).tolist() == [0, 0, 0, 0, 3, 3, 3, 3]


def test_zigzag_is_megatrons_order_for_one_document() -> None:
    layout = SequenceLayout((16,), 4, "zigzag")
    chunks = torch.arange(16).view(8, 2)
    for rank in range(4):
        expected = torch.cat([chunks[rank], chunks[7 - rank]])
        assert torch.equal(layout.shard(torch.arange(16), rank), expected)
    assert len({layout.work(rank) for rank in range(4)}) == 1


def _indices_of_transformer_engine(padded_lengths: list[int], num_ranks: int, rank: int):
    """What its thd kernel takes: of every document chunk ``rank``, then ``2P - 1 - rank``."""
    indices, start = [], 0
    for length in padded_lengths:
        chunks = torch.arange(start, start + length).view(2 * num_ranks, -1)
        indices += [chunks[rank], chunks[2 * num_ranks - 1 - rank]]
        start += length
    return torch.cat(indices)


@settings(max_examples=100, deadline=None)
@given(st.lists(st.integers(0, 40), min_size=1).filter(any), st.integers(2, 6), st.integers(0, 9))
def test_document_zigzag_is_the_cut_of_megatrons_packs(
    lengths: list[int], num_ranks: int, more: int
) -> None:
    """Padded by the layout, and padded more than needed."""
    multiple = 2 * num_ranks
    least = [length + -length % multiple for length in lengths]
    longer = [length + more * multiple for length in least]
    for given_lengths, padded in ((None, least), (tuple(longer), longer)):
        layout = SequenceLayout(tuple(lengths), num_ranks, "document_zigzag", given_lengths)
        assert layout.padded_lengths == tuple(padded)
        assert layout.num_tokens == sum(padded)
        for rank in range(num_ranks):
            expected = _indices_of_transformer_engine(padded, num_ranks, rank)
            assert torch.equal(layout.shard(torch.arange(sum(padded)), rank), expected)


def test_worked_example_of_document_zigzag() -> None:
    layout = SequenceLayout((5, 3), 2, "document_zigzag")
    assert layout.padded_lengths == (8, 4)
    assert layout.borders == (0, 5, 8, 11, 12)
    assert layout.document_starts == (0, 8)
    assert layout.runs(0) == (Run(0, 2), Run(6, 9), Run(11, 12))
    assert layout.runs(1) == (Run(2, 6), Run(9, 11))
    assert layout.fragments(0) == (
        Fragment(0, 0, 2, 0, 0),
        Fragment(2, 1, 3, 2, 1),
        Fragment(1, 0, 1, 4, 1),
        Fragment(2, 0, 1, 5, 2),
    )
    assert layout.run_links == (
        RunLink(0, 0, 0, 2, continues=False, passes=False),
        RunLink(1, 0, 2, 6, continues=True, passes=False),
        RunLink(0, 1, 6, 9, continues=False, passes=False),
        RunLink(1, 1, 9, 11, continues=True, passes=True),
        RunLink(0, 2, 11, 12, continues=False, passes=False),
    )
    assert layout.real_tokens(0) == (RealTokens(0, 0, 2), RealTokens(5, 4, 1))
    assert layout.cu_seqlens(0).tolist() == [0, 2, 4, 5, 6]
    assert layout.position_ids(0).tolist() == [0, 1, 1, 2, 0, 0]
    assert layout.shard(torch.arange(8), 0, pad_value=-1).tolist() == [0, 1, -1, -1, 5, -1]


def test_zero_length_documents_hold_no_fragment() -> None:
    layout = SequenceLayout((0, 3, 0, 0, 5, 0), 2)
    documents = [f.document for rank in range(2) for f in layout.fragments(rank)]
    assert documents == [1, 4, 4]
    assert layout.num_documents == 6


def test_what_a_caller_writes_changes_no_later_result() -> None:
    layout = SequenceLayout((5, 3), 2)
    tensors = (layout.position_ids, layout.cu_seqlens)
    before = [make(1).tolist() for make in tensors]
    for make in tensors:
        make(1).zero_()
    layout.lengths_tensor.zero_()
    assert [make(1).tolist() for make in tensors] == before
    assert layout.lengths_tensor.tolist() == [5, 3]


def test_dtypes_of_device_tensors() -> None:
    layout = SequenceLayout((5, 3), 2)
    assert layout.cu_seqlens(1).dtype == torch.int32
    assert layout.position_ids(1).dtype == torch.int64


@pytest.mark.parametrize(
    ("build", "message"),
    [
        (lambda: SequenceLayout((3, -1), 2), "document_lengths must be >= 0"),
        (lambda: SequenceLayout((0, 0), 2), "document_lengths must hold at least one token"),
        (lambda: SequenceLayout((), 2), "document_lengths must hold at least one token"),
        (lambda: SequenceLayout((4,), 0), "num_ranks must be an integer >= 1"),
        (lambda: SequenceLayout((1.5, 2.5), 2), "document_lengths must be integers"),
        (lambda: SequenceLayout((4,), 2.0), "num_ranks must be integers"),
        (lambda: SequenceLayout.from_cu_seqlens([0, 2.5], 2), "cu_seqlens must be integers"),
        (lambda: SequenceLayout((4,), 2, "ring"), "order must be one of"),  # type: ignore[arg-type]
        (lambda: SequenceLayout.from_cu_seqlens([0, 5, 3], 2), "cu_seqlens must start at 0"),
        (lambda: SequenceLayout.from_cu_seqlens([1, 5], 2), "cu_seqlens must start at 0"),
        (lambda: SequenceLayout.from_cu_seqlens([], 2), "cu_seqlens must start at 0"),
        (
            lambda: SequenceLayout((4, 2), 1, padded_lengths=(4,)),
            "padded_lengths must be one length for each of the 2 documents, got 1",
        ),
        (
            lambda: SequenceLayout((4, 2), 1, padded_lengths=(4, 1)),
            "padded_lengths must be at least document_lengths, got 1 for the 2",
        ),
        (
            lambda: SequenceLayout((4, 2), 2, "document_zigzag", (4, 6)),
            "padded_lengths must be multiples of 4.*got 6 for document 1",
        ),
        (lambda: SequenceLayout((4,), 1, padded_lengths=(4.5,)), "padded_lengths must be integers"),  # type: ignore[arg-type]
        (
            lambda: SequenceLayout.from_cu_seqlens([0, 5], 2, cu_seqlens_padded=[0, 5, 3]),
            "cu_seqlens_padded must start at 0",
        ),
        (lambda: SequenceLayout((4,), 2).runs(2), r"rank must be in \[0, 2\)"),
        (lambda: SequenceLayout((4,), 2).fragments(-1), r"rank must be in \[0, 2\)"),
        (lambda: SequenceLayout((4,), 2).shard(torch.ones(5), 0), "x must have 4 tokens"),
        (lambda: SequenceLayout((4,), 2).unshard([torch.ones(2)]), "parts must hold 2 tensors"),
        (
            lambda: SequenceLayout((4,), 2).unshard([torch.ones(2), torch.ones(3)]),
            r"parts\[1\] must have 2 tokens",
        ),
    ],
)
def test_bad_input(build, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        build()
