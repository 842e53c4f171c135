"""The order in which :mod:`moe_parallel.pipeline.pipeline` starts the stages of the groups.

Example, three groups::

    dispatch 0, experts 0, dispatch 1, dispatch 2, combine 0, experts 1, combine 1, experts 2, ...
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache
from typing import Literal

PipelineStep = Literal["dispatch", "gather", "experts", "combine", "wgrad"]

# Groups whose rows are on their way while one is computed. Over a slow link the results of a group
# leave before the rows of the next: one group ahead, products would wait for both.
AHEAD = 2

# Weight gradients follow their group by so many groups, whose rows they keep in memory.
WGRAD_LAG = 2


@cache  # the device waits meanwhile
def steps(count: int, *, gathers: bool, wgrad: bool) -> Sequence[tuple[PipelineStep, int]]:
    """The steps of a run, the same on all ranks.

    Args:
        count: number of groups.
        gathers: whether there are stages over ETP. They run one group ahead of the products and one
            behind.
        wgrad: whether weight gradients are computed, for which no rank waits.
    """
    lag, found = int(gathers), list[tuple[PipelineStep, int]]()
    for g in range(-AHEAD - lag, count + max(lag, WGRAD_LAG)):
        a_round: list[tuple[PipelineStep, int]] = [("dispatch", g + AHEAD + lag)]
        a_round += [("gather", g + lag)] if gathers else []
        a_round += [("experts", g), ("combine", g - lag)]
        a_round += [("wgrad", g - WGRAD_LAG)] if wgrad else []
        found += [(step, group) for step, group in a_round if 0 <= group < count]
    if not gathers:  # the second gather would wait for the first sum, which is in its communicator
        # The device waits for the first products: the host starts them as soon as it can.
        found.remove(("experts", 0))
        found.insert(1, ("experts", 0))
    return found
