"""What an autograd function of the operator must know of a call, whoever computes."""

from __future__ import annotations

from functools import cache
from typing import NamedTuple

import torch.distributed as dist
from torch import Tensor

from lasp.exchange import Wait, start_exchange
from lasp.flow import Flow
from lasp.layout import SequenceLayout
from lasp.ops import decay_over


class Call(NamedTuple):
    """Everything about a call that is not a tensor; the rates are those of the tensor."""

    layout: SequenceLayout
    rank: int
    cp_group: dist.ProcessGroup | None
    scale: float
    exchange: str
    with_final_state: bool
    state_eps: float
    rates: tuple[float, ...]


def start(outgoing: Tensor, rates: Tensor, flow: Flow, call: Call) -> Wait:
    """Start to send the states of this rank's runs on, ``[flow.num_slots, H, K, V]``."""
    decay = cache(lambda length: decay_over(rates, length))
    transitions = [decay(hop.length) if hop.passes else None for hop in flow.hops]
    return start_exchange(call.exchange, outgoing, flow, transitions, call.cp_group)
