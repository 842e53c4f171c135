"""In how many stages ranks receive their keys, and how much in each.

All ranks have the same number of stages, as few as possible: each adds a tile to merge and a point
where ranks wait for each other. What a rank needs is cut so that its stages take equal *times*: all
ranks then stay in step, and the transfer of a stage never waits for a rank whose stage before was
longer.

Example: one document of 2 T tokens, 2 ranks, zigzag. Rank 0 has T / 2 rows for the T tokens of rank
1, and rank 1 has T rows for T / 2 tokens: one stage each, of T^2 / 2 (query, key) pairs.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import accumulate
from typing import NamedTuple

from ring.planner.ranges import RowRange, union
from ring.planner.window import Window


class StageRule(NamedTuple):
    """How transfers are cut into stages, and when fragments are forwarded.

    Attributes:
        max_stages: upper limit of the number of stages.
        min_tokens: the fewest tokens of a stage; a rank that needs less than twice as many has one
            stage. To merge a tile of n keys moves 8 bytes for 4 n operations; at
            2.6 TB/s and 580 TFLOP/s that is 450 / n of its time, 11 % at 4096: less than it costs
            to be out of step.
        pairs_per_token: (query, key) pairs that a rank computes in the time in which it receives
            the key and value of one token: ``Hkv / Hq * FLOP/s / (bytes/s)``. 1400 is 8 query
            heads for one key head, 500 TFLOP/s, 16-bit elements and a 45 GB/s network; NVLink
            needs less, and hides more than the plan counts on.
        chain_gain: chains are taken if direct sending takes more than this many times their time.
        most_joined: the most keys that are copied to save a call of a kernel, own keys beside those
            of a stage or the keys of several tiles: 256 MiB with 8 key heads of 128 in 16 bits.
        row_pairs: pairs that are computed in the time in which one more row is read and written:
            30 ns forward and 75 ns backward, at 1/21 and 1/8 ns a pair, with FlashAttention-4 on an
            H200 and 64 heads of 128.
        call_pairs: (query, key) pairs that a rank computes in the time that one more call of a
            backward costs, its launches and its last, half empty wave: 130 us at 500 TFLOP/s and
            64 heads of 128. With FlashAttention-4 on an H200 it was 80 and 185 us.
        call_rows: fewer rows are not worth a gap in those of the local attention: their merge, the
            second pass of a backward and the sum of dq, 55 ns a row there, take less than a call.
    """

    max_stages: int = 4
    min_tokens: int = 4096
    pairs_per_token: int = 1400
    chain_gain: float = 1.25
    most_joined: int = 65536
    row_pairs: int = 600
    call_pairs: int = 2_000_000
    call_rows: int = 1024


RULE = StageRule()


def stages_asked(needed: int, local_pairs: int, own_tokens: int, rule: StageRule) -> int:
    """The fewest stages that suffice for a rank; all ranks take the largest such number.

    One stage suffices unless it would bring more than ``own_tokens``, the tokens that the rank
    holds, or more than arrives during its ``local_pairs``, the attention within its fragments.
    """
    hidden = max(1, local_pairs // rule.pairs_per_token)
    wanted = max(-(-needed // own_tokens), -(-needed // hidden))
    return stages_filled(needed, min(wanted, rule.max_stages), rule)


def stages_filled(needed: int, stages: int, rule: StageRule) -> int:
    """Number of stages in which this rank receives something: the first ones."""
    return max(1, min(stages, needed // rule.min_tokens))


def stage_tokens(
    needed: int, equal_borders: Sequence[int], buffer_tokens: int, rule: StageRule
) -> list[int]:
    """Tokens that a rank receives in each stage, ``needed`` in all.

    Every stage but the last is cut down to :func:`bucket`, so that shapes of tiles recur; the last
    brings the rest. None brings less than ``rule.min_tokens``, and none more than
    ``buffer_tokens``, or than an equal share where that is more: borders move for that, and are not
    rounded.

    Args:
        needed: tokens that the rank needs.
        equal_borders: after how many tokens each stage but the last would end if all took the same
            time; one fewer than :func:`stages_filled`.
        buffer_tokens: a stage of any rank should bring no more.
        rule: the same on every rank.
    """
    count, sizes, left = len(equal_borders) + 1, [], needed
    least, most = rule.min_tokens, max(buffer_tokens, -(-needed // count))
    for number, border in enumerate(equal_borders, 1):
        low = max(least, left - (count - number) * most)
        high = min(most, left - (count - number) * least)
        size = min(max(border - (needed - left), low), high)
        sizes.append(bucket(size) if bucket(size) >= low else size)
        left -= sizes[-1]
    return [*sizes, left] if left else sizes


def local_work(rows: int, window: Window, rule: StageRule) -> int:
    """What a fragment costs within itself, in the time of (query, key) pairs."""
    return window.pairs(rows) + rule.row_pairs * rows


def around_stages(
    fragments: Sequence[RowRange], window: Window, moved: int, rule: StageRule
) -> tuple[tuple[RowRange, ...], tuple[RowRange, ...]]:
    """Rows whose local backward goes before the stages, and after them: those of whole fragments.

    The first hide the first transfer of keys. They have about a third of the work at most: the
    others hide the transfer of the last gradients, which has twice the bytes. There are none before
    the stages where a side, or the transfer, takes less time than one more call.

    Args:
        fragments: rows of each.
        window: of the rows.
        moved: tokens of the first transfer.
        rule: the same on every rank.
    """
    pairs = [0, *accumulate(local_work(rows.length, window, rule) for rows in fragments)]
    transfer = moved * rule.pairs_per_token
    wanted = min(transfer, pairs[-1] // 3)
    first = min(range(len(pairs)), key=lambda number: abs(pairs[number] - wanted))
    if min(transfer, pairs[first], pairs[-1] - pairs[first]) < rule.call_pairs:
        first = 0
    return union(fragments[:first]), union(fragments[first:])


def bucket(size: int) -> int:
    """Round ``size`` down to its three leading bits: to 4, 5, 6 or 7 times a power of two."""
    granule = 1 << max(0, size.bit_length() - 3)
    return size // granule * granule
