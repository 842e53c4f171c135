"""What a rank sends to and receives from each other rank, stage by stage."""

from __future__ import annotations

from typing import NamedTuple

from ring.planner.traffic import KVDelivery, KVTraffic

Message = tuple[int, KVDelivery]  # the other rank, and what goes to it or comes from it


class Messages(NamedTuple):
    """What one rank sends and receives in each stage, by the other rank, then by position.

    That is the order of an all-to-all on both sides.
    """

    kv_sent: list[list[Message]]
    kv_received: list[list[Message]]
    grads_sent: list[list[Message]]
    grads_received: list[list[Message]]


def messages_of(traffic: KVTraffic, rank: int) -> Messages:
    """All messages of a rank."""
    incoming = [d for i in traffic.needed_by(rank) for d in traffic.deliveries(i, rank)]
    owned = (i for i, fragment in enumerate(traffic.fragments) if fragment.owner == rank)
    lent = [d for i in owned for r in traffic.consumers(i) for d in traffic.deliveries(i, r)]
    sent = [d for d in lent if d.sender == rank]
    returned = [d for d in lent if d.returns_to == rank]
    for d in incoming:
        if d.returns_to != d.owner:  # the next of the chain
            sent += traffic.deliveries(d.fragment, d.returns_to)
        if d.sender != d.owner:  # the one before
            returned += traffic.deliveries(d.fragment, d.sender)
    stages = range(traffic.num_stages)
    return Messages(
        kv_sent=_by_stage(stages, [(d.consumer, d) for d in sent]),
        kv_received=_by_stage(stages, [(d.sender, d) for d in incoming]),
        grads_sent=_by_stage(stages, [(d.returns_to, d) for d in incoming]),
        grads_received=_by_stage(stages, [(d.consumer, d) for d in returned]),
    )


def _by_stage(stages: range, messages: list[Message]) -> list[list[Message]]:
    messages = sorted(messages, key=lambda message: (message[0], message[1].start))
    return [[(peer, d) for peer, d in messages if d.stage == stage] for stage in stages]
