"""What an exchange costs: bytes received, exactly, and time, by a model of a link.

::

    all_gather   launch + (P - 1) (latency + rank) + bytes / bandwidth      a ring of P - 1 messages
    sliced       2 (launch + latency) + (P - 1) rank + bytes / bandwidth    two all-to-alls
    scan         (depth + blocks - 1) (launch + latency + block / bandwidth)
    one_hop      the scan with depth 1 and one block

    half_duplex  a share more, of messages that wait for what is sent: half a state in all_gather,
                 two slices in sliced over more than 2 ranks, blocks - 1 blocks in scan

where depth counts the rank borders that a state crosses one after the other, at most, and bytes are
those of the rank that receives most.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields
from typing import NamedTuple

from lasp.sequence.state_flow import RunStep

MAX_BLOCKS = 16


@dataclass(frozen=True)
class Link:
    """A link between ranks.

    Attributes:
        latency_us: from a message's start to its arrival, for a message of no size.
        gb_per_s: 1e9 bytes a second that a rank receives.
        launch_us: to start one collective, and the small kernels around it.
        rank_us: what each further rank adds: its messages, and the kernels that combine its states.
        half_duplex: share of what a rank sends that delays what it receives meanwhile. With gloo on
            a slow wire it is near 1: a rank says that it is ready to receive behind what it sends.
    """

    latency_us: float
    gb_per_s: float
    launch_us: float
    rank_us: float
    half_duplex: float = 0.0

    def __post_init__(self) -> None:
        numbers = {field.name: getattr(self, field.name) for field in fields(self)}
        try:
            valid = self.gb_per_s > 0 and all(number >= 0 for number in numbers.values())
        except TypeError:
            valid = False
        if not valid:
            raise ValueError(
                f"a link must have times of 0 or more and a bandwidth above 0, got {numbers}"
            )

    def __str__(self) -> str:
        return ",".join(f"{field.name}={getattr(self, field.name):g}" for field in fields(self))

    @classmethod
    def parse(cls, text: str) -> Link:
        """The link of a text like ``latency_us=5,gb_per_s=150,launch_us=17,rank_us=4``."""
        try:
            return cls(**{name: float(x) for name, x in (p.split("=") for p in text.split(","))})
        except (AttributeError, TypeError, ValueError) as error:
            raise ValueError(
                f"a link must be a text like {NVLINK}, got {text!r}: {error}"
            ) from None


# NVLink is what python -m benchmarks.lasp_model fits to 2 GPUs, rounded; 2 ranks hardly show
# rank_us. The network was not measured.
NVLINK = Link(latency_us=5.0, gb_per_s=150.0, launch_us=17.0, rank_us=4.0)
NETWORK = Link(latency_us=10.0, gb_per_s=50.0, launch_us=20.0, rank_us=4.0)
HOST_RANKS = 8


def link_of(num_ranks: int) -> Link:
    """What ``auto`` takes the link to be: NVLink up to the 8 GPUs of a host, a network above."""
    return NVLINK if num_ranks <= HOST_RANKS else NETWORK


class StateSize(NamedTuple):
    """One state: ``[heads, key_dim, value_dim]`` of so many bytes an element."""

    heads: int
    key_dim: int
    value_dim: int
    itemsize: int = 4

    @property
    def bytes(self) -> int:
        """Bytes of one state."""
        return self.heads * self.key_dim * self.value_dim * self.itemsize


class ExchangeTraffic(NamedTuple):
    """What must cross in one direction, for heads to which the same runs are passable.

    Attributes:
        sends: for each rank, how many of its runs send a state on.
        receives: for each rank, how many receive one.
        depth: borders that a state crosses at most, one after the other; 0 if none is crossed.
    """

    sends: tuple[int, ...]
    receives: tuple[int, ...]
    depth: int

    @property
    def num_ranks(self) -> int:
        """P."""
        return len(self.sends)


def traffic_of(
    steps: Sequence[RunStep], num_ranks: int, passes: Callable[[int], bool]
) -> ExchangeTraffic:
    """Count the run steps.

    Args:
        steps: of a flow.
        num_ranks: P.
        passes: whether anything that matters passes through a run of so many tokens.
    """
    sends, receives = [0] * num_ranks, [0] * num_ranks
    for step in steps:
        sends[step.rank] += step.sends
        receives[step.rank] += step.receives
    reached = depths(steps, [step.passes and passes(step.length) for step in steps])
    return ExchangeTraffic(tuple(sends), tuple(receives), max(reached, default=-1) + 1)


def depths(steps: Sequence[RunStep], passes: Sequence[bool]) -> list[int]:
    """For each run step, how many runs in a row its outgoing state passed; -1 if it sends none."""
    result: list[int] = []
    for step, through in zip(steps, passes):
        before = result[-1] if result else -1
        result.append(-1 if not step.sends else before + 1 if through else 0)
    return result


def received_bytes(name: str, traffic: ExchangeTraffic, size: StateSize, rank: int) -> int:
    """What ``rank`` receives from other ranks, provided no two runs of one rank are neighbours."""
    others = traffic.num_ranks - 1
    if sum(traffic.sends) == 0:
        return 0
    if name == "all_gather":
        return others * max(traffic.sends) * size.bytes
    if name == "sliced":
        slices = sum(traffic.sends) - traffic.sends[rank] + others * traffic.receives[rank]
        return slices * slice_rows(size, traffic.num_ranks) * size.value_dim * size.itemsize
    return traffic.receives[rank] * size.bytes


def slice_rows(size: StateSize, num_ranks: int) -> int:
    """Rows of one slice: the heads * key_dim rows of a state are padded to a multiple of P."""
    return -(-size.heads * size.key_dim // num_ranks)


def exchange_us(
    name: str, traffic: ExchangeTraffic, size: StateSize, link: Link, num_blocks: int = 1
) -> float:
    """Time of one exchange that nothing hides, by the model of the module."""
    if traffic.depth == 0 or size.heads == 0:
        return 0.0
    step = link.launch_us + link.latency_us
    bytes_per_us = link.gb_per_s * 1e3
    if name in ("scan", "one_hop"):
        blocks = num_blocks if name == "scan" else 1
        # A rank with several receiving runs takes in as many blocks a step, at most.
        block = max(traffic.receives) * size.bytes / blocks
        waiting = link.half_duplex * (blocks - 1) * block * (traffic.depth > 1)
        steps = traffic.depth + blocks - 1
        return steps * (step + block / bytes_per_us) + waiting / bytes_per_us
    most: float = max(
        received_bytes(name, traffic, size, rank) for rank in range(traffic.num_ranks)
    )
    others = traffic.num_ranks - 1
    if name == "sliced":
        slice_bytes = slice_rows(size, traffic.num_ranks) * size.value_dim * size.itemsize
        most += 2 * link.half_duplex * slice_bytes * (others > 1)
        return 2 * step + others * link.rank_us + most / bytes_per_us
    most += link.half_duplex * max(traffic.sends) * size.bytes / 2
    return link.launch_us + others * (link.latency_us + link.rank_us) + most / bytes_per_us


def scan_blocks(traffic: ExchangeTraffic, size: StateSize, link: Link) -> int:
    """The number of blocks, a power of two, for which the model has the scan take least time."""
    most = min(MAX_BLOCKS, size.value_dim)
    options = [1 << power for power in range(most.bit_length())]
    return min(options, key=lambda blocks: exchange_us("scan", traffic, size, link, blocks))
