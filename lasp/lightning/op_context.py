"""The context of one call of the operator, shared by both implementations."""

from __future__ import annotations

from functools import cache
from typing import NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

from lasp._core.cache import tensor_cache
from lasp._core.derivatives import Reference
from lasp._core.host_constants import to_device
from lasp.sequence.layout import SequenceLayout
from lasp.sequence.state_flow import StateFlow
from lasp.state_exchange import (
    Exchange,
    ExchangeChoice,
    Transitions,
    Wait,
    kept_over,
    start_exchange,
)

REFERENCE = Reference(
    "lightning_attention", "lasp.lightning.reference.recurrent_lightning_attention"
)


class Settings(NamedTuple):
    """A call but for its tensors; see ``lightning_attention``."""

    layout: SequenceLayout | None
    cp_group: dist.ProcessGroup | None
    scale: float
    exchange: Exchange
    output_final_state: bool
    state_eps: float


class OpContext(NamedTuple):
    """Everything about a call that is not a tensor; rows of a batch count as heads."""

    layout: SequenceLayout
    rank: int
    cp_group: dist.ProcessGroup | None
    scale: float
    exchange: tuple[ExchangeChoice, ...]
    with_final_state: bool
    state_eps: float
    rates: tuple[float, ...]


def heads_of_rows(x: Tensor) -> Tensor:
    """``[B, T, H, D]`` as ``[T, B H, D]``: heads are independent and rows share one layout."""
    return x.transpose(0, 1).flatten(1, 2) if x.dim() == 4 else x


def rows_of_heads(x: Tensor, like: Tensor) -> Tensor:
    """``heads_of_rows`` back, if ``like`` has rows."""
    return x.unflatten(1, (like.shape[0], -1)).transpose(0, 1) if like.dim() == 4 else x


def states_of_heads(states: Tensor, q: Tensor) -> Tensor:
    """``[B, H, K, V]`` as the ``[1, B H, K, V]`` of one document, if ``q`` has rows."""
    return states.flatten(0, 1).unsqueeze(0) if q.dim() == 4 else states


def states_of_rows(states: Tensor, q: Tensor) -> Tensor:
    """``states_of_heads`` back."""
    return states.squeeze(0).unflatten(0, (q.shape[0], -1)) if q.dim() == 4 else states


def start(outgoing: Tensor, rates: Tensor, flow: StateFlow, op: OpContext) -> Wait:
    """Start to send the states of this rank's runs on, ``[flow.num_slots, H, K, V]``."""
    passed = transitions_of(op, flow, rates.dtype, rates.device)
    return start_exchange(op.exchange, outgoing, flow, passed, op.cp_group)


def transitions_of(
    op: OpContext, flow: StateFlow, dtype: torch.dtype, device: torch.device
) -> list[Transitions]:
    """For each choice of the exchange, what each run step of ``flow`` passes on."""

    def transitions(choice: ExchangeChoice) -> Transitions:
        some = tuple(op.rates[head] for head in choice.heads)
        decay = cache(lambda length: _decay(some, length, op.state_eps, dtype, device))
        return [decay(step.length) if step.passes else None for step in flow.steps]

    return [transitions(choice) for choice in op.exchange]


@tensor_cache(maxsize=4096)  # a few entries a layer
def _decay(
    rates: tuple[float, ...], length: int, eps: float, dtype: torch.dtype, device: torch.device
) -> Tensor | None:
    """What heads keep over a run ``[H, 1, 1]``; None if that is nothing."""
    kept = [kept_over(rate, length, eps) for rate in rates]
    if not any(kept):
        return None
    with torch.inference_mode(False):  # remembered, and used in training too
        decay = torch.tensor(kept, dtype=torch.float64, device="cpu").to(dtype).view(-1, 1, 1)
        return to_device(decay, device)
