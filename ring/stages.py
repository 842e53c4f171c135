"""In which stages a rank receives its keys: a rule of sizes, so that transfers hide under work."""

from __future__ import annotations

from typing import NamedTuple


class StageRule(NamedTuple):
    """How transfers are cut into stages, and when fragments are forwarded.

    Attributes:
        max_stages: at most so many.
        min_tokens: a stage brings at least so many tokens (the last one what is left). To merge a
            tile of n keys moves 10 bytes for 4 n operations; at 2.6 TB/s and 580 TFLOP/s that is
            560 / n of its time, 7 % at 8192.
        pairs_per_token: (query, key) pairs that a rank computes in the time in which it receives
            the key and value of one token: ``Hkv / Hq * FLOP/s / (bytes/s)``. 1400 is 8 query
            heads for one key head, 500 TFLOP/s, 16-bit elements and a 45 GB/s network; NVLink
            needs less, and hides more than the plan counts on.
        chain_gain: chains are taken if direct sending takes more than so many times their time.
    """

    max_stages: int = 4
    min_tokens: int = 8192
    pairs_per_token: int = 1400
    chain_gain: float = 1.25


RULE = StageRule()


def stage_tokens(needed: int, local_pairs: int, rows: int, rule: StageRule) -> list[int]:
    """Tokens that a rank receives in each stage when it may choose; they sum to ``needed``.

    A stage brings what arrives under the work before it: the first under the local attention of
    ``local_pairs`` pairs, each next one under its predecessor's tile of ``rows`` queries. But no
    more than an equal share of what is left, so that two receive buffers hold about half of it all;
    and no less than half an equal share of the whole, nor than ``rule.min_tokens``. Sizes are cut
    down to :func:`bucket`, so that shapes of tiles recur. The last stage brings the rest.
    """
    sizes: list[int] = []
    left, hidden = needed, local_pairs // rule.pairs_per_token
    least = max(rule.min_tokens, needed // (2 * rule.max_stages))
    while left:
        share = -(-left // (rule.max_stages - len(sizes)))
        size = bucket(max(min(hidden, share), least))
        if len(sizes) == rule.max_stages - 1 or left <= size:
            size = left
        sizes.append(size)
        left, hidden = left - size, size * rows // rule.pairs_per_token
    return sizes


def bucket(size: int) -> int:
    """The largest of 1 to 7 times a power of two, at least half of them above 3, up to ``size``."""
    granule = 1 << max(0, size.bit_length() - 3)
    return size // granule * granule
