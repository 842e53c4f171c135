from __future__ import annotations

import pytest

from lasp.sequence.layout import SequenceLayout
from ring.planner.ranges import RowRange
from ring.planner.schedule import plan_ring
from ring.planner.stages import RULE, StageRule
from ring.planner.tiles import KVTile, whole_fragments
from ring.planner.window import CAUSAL


def test_fragments_that_go_with_all_their_keys() -> None:
    """Those of one tile, with enough rows, few enough keys, and enough else to do meanwhile."""
    first, second = (
        KVTile(number, RowRange(start, start + 40), (RowRange(start, start + 10),))
        for number, start in enumerate((0, 40))
    )
    pairs = 40 * 41 // 2  # of each fragment
    rule = RULE._replace(row_pairs=0, call_rows=40, most_joined=50)

    def found(own=(), stages=((first,), (second,)), left=2 * pairs, **changes: int) -> set[int]:
        return whole_fragments(own, stages, CAUSAL, left, rule._replace(**changes))

    assert found() == {0, 1}
    assert found(own=(first,)) == {1}
    assert found(stages=((first, second), (first,))) == {1}
    assert found(left=2 * pairs - 1) == {0}
    assert found(left=pairs - 1) == set()
    assert found(row_pairs=1) == {0}
    assert found(call_rows=41) == set()
    assert found(most_joined=49) == set()


@pytest.mark.parametrize(
    ("lengths", "pairs_per_token", "whole"),
    [
        # Rank 1 has 12 rows of a document, 78 pairs, and one of 210 pairs; 12 tokens come.
        ((20, 24, 20), 17, True),
        ((20, 24, 20), 18, False),
        # It has 8 rows of a document, 36 pairs, and 300 pairs of one of which it sends 24 tokens.
        ((28, 12, 56), 12, True),
        ((28, 12, 56), 13, False),
    ],
)
def test_other_fragments_hide_the_first_transfer(
    lengths: tuple[int, ...], pairs_per_token: int, whole: bool
) -> None:
    layout = SequenceLayout(lengths, sum(lengths) // 32, "contiguous")
    rule = StageRule(1, 1, pairs_per_token, row_pairs=0, call_pairs=1, call_rows=1)
    (stage,) = plan_ring(layout, 1, True, rule).stages
    assert [tile.whole for group in stage.groups for tile in group] == [whole]
