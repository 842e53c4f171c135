"""Two streams for the products of groups in turn.

A product leaves multiprocessors idle in its last round of tiles, and what is bound by memory leaves
their tensor cores idle. Of two groups beside each other, one has work for them.
"""

from __future__ import annotations

from functools import cache
from types import TracebackType

import torch


class TurnStreams:
    """The current stream for even groups, another one of the device for odd ones.

    As a context: the other stream begins where the current one is, and however the context ends,
    the current stream then waits for it. Memory of a group is to be taken and given back in its
    turn, or outside. On the CPU, and of one group, there is nothing to turn.

    Args:
        device: of the products.
        num_groups: that take turns.
    """

    def __init__(self, device: torch.device, num_groups: int) -> None:
        self._streams: tuple[torch.cuda.Stream, ...] = ()
        if device.type == "cuda" and num_groups > 1:
            self._streams = (torch.cuda.current_stream(device), _other_stream(device))
        self._current = 0

    def turn(self, group: int) -> None:
        """From here on the group's stream is the current one."""
        if self._streams and group % 2 != self._current:
            self._current = group % 2
            torch.cuda.set_stream(self._streams[self._current])

    def __enter__(self) -> TurnStreams:
        if self._streams:
            first, other = self._streams
            other.wait_stream(first)
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        if self._streams:
            self.turn(0)
            first, other = self._streams
            first.wait_stream(other)


@cache  # one for all layers, whose memory then serves one after another
def _other_stream(device: torch.device) -> torch.cuda.Stream:
    return torch.cuda.Stream(device)
