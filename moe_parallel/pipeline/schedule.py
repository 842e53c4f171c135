"""In which order :mod:`moe_parallel.pipeline.pipeline` starts the stages of the groups.

Example, three groups::

    dispatch 0, experts 0, dispatch 1, dispatch 2, combine 0, experts 1, combine 1, experts 2, ...
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache
from typing import Literal

Step = Literal["dispatch", "gather", "experts", "combine", "beside"]

# Groups whose rows are on their way while one is computed. Over a slow link the results of a group
# leave before the rows of the next: one group ahead, products would wait for both.
AHEAD = 2

# Groups between rows and weights in a backward: so many of them hold what weights are made of.
BESIDE_LAG = 2


@cache  # the device waits meanwhile
def steps(count: int, *, gathers: bool, beside: bool) -> Sequence[tuple[Step, int]]:
    """What is started in which order, the same on all ranks.

    Args:
        count: of groups.
        gathers: whether there are stages of ETP: they are one group ahead of the products and one
            behind.
        beside: whether something is computed that no rank waits for.
    """
    lag, found = int(gathers), list[tuple[Step, int]]()
    for g in range(-AHEAD - lag, count + max(lag, BESIDE_LAG)):
        a_round: list[tuple[Step, int]] = [("dispatch", g + AHEAD + lag)]
        a_round += [("gather", g + lag)] if gathers else []
        a_round += [("experts", g), ("combine", g - lag)]
        a_round += [("beside", g - BESIDE_LAG)] if beside else []
        found += [(step, group) for step, group in a_round if 0 <= group < count]
    if not gathers:  # the second gather would wait for the first sum, which is in its communicator
        # The device waits for the first products: the host starts them as soon as it can.
        found.remove(("experts", 0))
        found.insert(1, ("experts", 0))
    return found
