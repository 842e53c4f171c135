"""Two streams for the products of groups in turn.

A product leaves multiprocessors idle in its last round of tiles, and kernels bound by memory leave
tensor cores idle. With two groups on two streams, one has work for what the other leaves idle.
"""

from __future__ import annotations

from contextlib import ExitStack
from functools import cache
from types import TracebackType

import torch


class TurnStreams:
    """The current stream for even groups, another one of the device for odd ones.

    As a context: the other stream begins where the current one is, and however the context ends,
    the current stream then waits for it. Allocate and free the memory of a group in its turn, or
    outside. On the CPU, and with one group, there is nothing to turn.

    Args:
        device: where the products run.
        num_groups: number of groups that take turns.
    """

    def __init__(self, device: torch.device, num_groups: int) -> None:
        self._streams: tuple[torch.cuda.Stream, ...] = ()
        if device.type == "cuda":
            self._streams += (torch.cuda.current_stream(device),)
            self._streams += (other_stream(device),) if num_groups > 1 else ()
        self._current, self._restored = 0, ExitStack()

    def turn(self, group: int) -> torch.cuda.Stream | None:
        """From here on the group's stream is the current one; it is returned, on a GPU."""
        if not self._streams:
            return None
        if len(self._streams) > 1 and group % 2 != self._current:
            self._current = group % 2
            torch.cuda.set_stream(self._streams[self._current])
        return self._streams[self._current]

    def __enter__(self) -> TurnStreams:
        for other in self._streams[1:]:
            # Making a stream current makes its device current too.
            self._restored.enter_context(torch.cuda.device(other.device))
            other.wait_stream(self._streams[0])
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.turn(0)
        for other in self._streams[1:]:
            self._streams[0].wait_stream(other)
        self._restored.close()


def at_other_stream(device: torch.device) -> bool:
    """Whether an odd group has its turn."""
    return device.type == "cuda" and torch.cuda.current_stream(device) == other_stream(device)


@cache  # one for all layers, whose memory then serves one after another
def other_stream(device: torch.device) -> torch.cuda.Stream:
    """The stream of odd groups, and of what is computed while rows travel."""
    return torch.cuda.Stream(device)
