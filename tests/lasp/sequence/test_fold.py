"""The fold order on packs of real length: balanced, in few runs, planned fast."""

from __future__ import annotations

import statistics
import time

import pytest

from lasp.sequence.fold import DOCUMENT_PAIRS, WorkIndex
from lasp.sequence.layout import SequenceLayout
from tests.lasp.distributions import document_lengths as distribution


@pytest.mark.parametrize(
    ("name", "documents", "longest"),
    [("A", 620, 152_000), ("B", 210, 65_536), ("C", 90, 308_000)],
)
def test_the_distributions_are_what_they_say(name: str, documents: int, longest: int) -> None:
    packs = [distribution(name, 2**20, seed) for seed in range(5)]
    assert statistics.mean(map(len, packs)) == pytest.approx(documents, rel=0.15)
    assert longest / 2 < max(map(max, packs)) <= longest
    assert {sum(pack) for pack in packs} == {2**20}


def works_of(layout: SequenceLayout) -> list[int]:
    """Pairs of each rank, and ``DOCUMENT_PAIRS`` for each document that begins there."""
    index = WorkIndex(layout.borders, document_pairs=DOCUMENT_PAIRS)
    ranks = range(layout.num_ranks)
    return [sum(index.between(*run) for run in layout.runs(rank)) for rank in ranks]


def test_short_documents_count_beside_their_pairs() -> None:
    """One document of half the tokens, and short ones that cost more than their few pairs."""
    layout = SequenceLayout((8192, *(32,) * 256), 2, "fold")
    begun = [sum(f.start == 0 for f in layout.fragments(rank)) for rank in (0, 1)]
    pairs, works = [layout.work(0), layout.work(1)], works_of(layout)
    assert sum(works) == sum(pairs) + 257 * DOCUMENT_PAIRS
    assert [a - b for a, b in zip(works, pairs)] == [n * DOCUMENT_PAIRS for n in begun]
    assert max(works) / statistics.mean(works) <= 1.03
    assert max(pairs) / statistics.mean(pairs) <= 1.2


@pytest.mark.parametrize("name", ["A", "B", "C"])
def test_fold_is_balanced_with_few_runs(name: str) -> None:
    for num_ranks in (4, 8, 16, 32, 64, 128, 256):
        means = []
        for seed in range(5):
            layout = SequenceLayout(distribution(name, 2**20, seed), num_ranks, "fold")
            works = works_of(layout)
            runs = [len(layout.runs(rank)) for rank in range(num_ranks)]
            assert max(works) / statistics.mean(works) <= 1.03
            assert max(runs) <= 5
            means.append(statistics.mean(runs))
        assert statistics.mean(means) <= 3.2


@pytest.mark.parametrize(("num_ranks", "limit_ms"), [(8, 10.0), (256, 100.0)])
def test_planning_a_million_tokens_is_fast(num_ranks: int, limit_ms: float) -> None:
    times = []
    for seed in range(7):
        lengths = distribution("A", 2**20, seed % 3)
        start = time.process_time()
        layout = SequenceLayout(lengths, num_ranks, "fold")
        layout.fragments(0)
        assert layout.run_links
        times.append(1e3 * (time.process_time() - start))
    assert statistics.median(times) < limit_ms
