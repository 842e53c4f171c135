"""How states cross rank borders: one interface, one strategy a name, chosen for each head.

Run j of the flow sends on ``S_j = U_j + M_j S_{j-1}``: its own part U_j (``chunk_state`` of
``lasp.lightning.eager``) plus what it received, moved through by the transition M_j. That affine
pair is all that crosses ranks. For lightning attention M_j = lambda^length, one number a head, but
a strategy takes any tensor that broadcasts to a state: a gate that depends on data changes nothing
here.

A strategy starts the exchange and returns a function that waits for it. All add in the order of
the flow: same bits from each, run to run. Volumes are for one direction, with state = H K V 4 bytes
(8 in fp64); docs/lasp.md derives them:

- ``all_gather`` (LASP+): each rank gathers the U of all ranks in one collective and combines those
  before its own runs. (P - 1) slots states received, one step.
  Source: MiniMax-01, arXiv:2501.08313; LASP-2, arXiv:2502.07563.
- ``sliced``: each rank gets one P-th of the U of all ranks, scans that part for everybody, and
  sends the results back: two all-to-alls, less than two states received a run, whatever P is.
- ``scan``: states are handed from run to run in blocks of their columns, so that a rank sends on
  one block while it receives the next. One state received a run, P + blocks - 2 steps of a block.
  Source: ZeCO, arXiv:2507.01004.
- ``one_hop``: each U goes to the next run only: the scan where nothing passes through a run, or so
  little that it does not matter. One state received a run, one step.
- ``auto``: the least time by the cost model of ``lasp.state_exchange.cost``. Heads that decay fast
  may go one hop while slow ones take another way, see ``lasp.state_exchange.choice``. The model
  takes the link to be NVLink, above 8 ranks InfiniBand; where it is another, ``exchange`` is
  ``exchange_over(measure_link(cp_group))``, a text that layers and configs take like a name.

On a GPU an exchange is queued on a stream of its own, whole, when it is started; ``one_hop`` needs
none, it is one collective. On the CPU the first collective runs behind the caller's back and the
rest when it is waited for.
"""

from lasp._core.failure import ExchangeError
from lasp.state_exchange.choice import (
    Exchange,
    ExchangeChoice,
    exchange_over,
    kept_over,
    resolve_exchange,
)
from lasp.state_exchange.cost import Link
from lasp.state_exchange.link import measure_link
from lasp.state_exchange.start import Wait, start_exchange
from lasp.state_exchange.strategies import STRATEGIES
from lasp.state_exchange.task import Transitions

__all__ = [
    "STRATEGIES",
    "Exchange",
    "ExchangeChoice",
    "ExchangeError",
    "Link",
    "Transitions",
    "Wait",
    "exchange_over",
    "kept_over",
    "measure_link",
    "resolve_exchange",
    "start_exchange",
]
