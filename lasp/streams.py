"""Which work comes first: what waits goes on later, and what others wait for goes ahead."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from functools import cache

import torch

HEAD_START_CYCLES = 2_000  # 5 us on an H100


@contextmanager
def later_stream(device: torch.device) -> Iterator[AbstractContextManager[object]]:
    """For work that may wait beside what the current stream goes on with; joined at the end.

    The stream is high in priority: what it waited for makes it the last to end. Memory may be used
    on both streams as long as none is freed inside the block. On the CPU there are no streams, and
    work runs where it is queued.

    Yields:
        A context: what is queued in it follows what the current stream had at the start of the
        block. At its end the current stream waits for it, also if something was raised.
    """
    if device.type != "cuda":
        yield nullcontext()
        return
    main, side = torch.cuda.current_stream(device), _stream(device)
    side.wait_stream(main)
    try:
        yield torch.cuda.stream(side)
    finally:
        main.wait_stream(side)


def give_way(device: torch.device) -> None:
    """Let a collective that was just started have multiprocessors before the next kernel.

    Programs of the output fill the GPU for hundreds of microseconds; a collective that is ready
    2 us after them waits for the first of them to end. On one thread nothing is done for that long.
    """
    if device.type == "cuda":
        torch.cuda._sleep(HEAD_START_CYCLES)


@cache
def _stream(device: torch.device) -> torch.cuda.Stream:
    return torch.cuda.Stream(device, priority=-1)
