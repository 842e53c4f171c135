"""A drawing of what ran when in the pipeline of the experts, from measured times."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Literal, NamedTuple

import torch

TimelineLane = Literal["ep", "etp", "compute"]
_LANES: tuple[TimelineLane, ...] = ("ep", "etp", "compute")
_WIDTH = 72  # characters of a lane


class Span(NamedTuple):
    """One piece of work.

    Attributes:
        lane: who does it.
        name: what it is; its first letter is drawn.
        group: which group of experts.
        start_ms: since the first piece. A collective starts when it is queued, or when the one
            before it in its lane is over.
        stop_ms: since the first piece.
    """

    lane: TimelineLane
    name: str
    group: int
    start_ms: float
    stop_ms: float


class Timeline:
    """Give one to a call of the layer, run forward and backward, print it.

    On a GPU marks are CUDA events. The end of a collective is recorded on a stream of its own, so
    that the lanes keep running at the same time. Groups that are computed on two streams overlap in
    the drawing. On the CPU marks are the clock of the host, and a collective is over when it has
    been waited for.

    Example, two groups: the second is on its way while the first is computed::

        ep       DDDDdddddd......CCCC......cccc
        compute  ....EEEEEEEEEEEEeeeeeeeeee....
    """

    def __init__(self) -> None:
        self._marks: list[tuple[TimelineLane, str, int, _Mark, _Mark]] = []
        self._aside: torch.cuda.Stream | None = None

    @contextmanager
    def computing(self, name: str, group: int, device: torch.device) -> Iterator[None]:
        """Around the work of the current stream."""
        start = _mark(device)
        yield
        self._marks.append(("compute", name, group, start, _mark(device)))

    def queued(self, lane: TimelineLane, name: str, group: int, device: torch.device) -> int:
        """A collective is being started; the number to give to :meth:`over`."""
        mark = _mark(device)
        self._marks.append((lane, name, group, mark, mark))
        return len(self._marks) - 1

    def over(self, number: int, wait: Callable[[None], object], device: torch.device) -> None:
        """Note when a collective is over: call this at once on a GPU, after the wait on the CPU.

        Args:
            number: see :meth:`queued`.
            wait: makes the current stream wait for the collective.
            device: where it runs.
        """
        lane, name, group, start, _ = self._marks[number]
        if device.type != "cuda":
            self._marks[number] = (lane, name, group, start, _mark(device))
            return
        if self._aside is None:
            self._aside = torch.cuda.Stream(device)
        with torch.cuda.stream(self._aside):
            wait(None)
            self._marks[number] = (lane, name, group, start, _mark(device))

    @property
    def spans(self) -> list[Span]:
        """In the order in which they were queued; waits for the device."""
        if not self._marks:
            return []
        if isinstance(self._marks[0][3], torch.cuda.Event):
            torch.cuda.synchronize()
        origin = self._marks[0][3]
        over: dict[TimelineLane, float] = {}
        spans = []
        for lane, name, group, start, stop in self._marks:
            start_ms = _between(origin, start)
            if lane != "compute":
                start_ms = max(start_ms, over.get(lane, 0.0))
            stop_ms = max(start_ms, _between(origin, stop))
            over[lane] = stop_ms
            spans.append(Span(lane, name, group, start_ms, stop_ms))
        return spans

    def __str__(self) -> str:
        spans = self.spans
        if not spans:
            return "nothing ran"
        total = max(span.stop_ms for span in spans)
        lines = []
        for lane in _LANES:
            mine = [span for span in spans if span.lane == lane]
            if not mine:
                continue
            cells = ["."] * _WIDTH
            for span in mine:
                first = int(span.start_ms / total * _WIDTH) if total else 0
                last = max(first + 1, round(span.stop_ms / total * _WIDTH) if total else 1)
                letter = span.name[0].lower() if span.group % 2 else span.name[0].upper()
                cells[first:last] = letter * (min(last, _WIDTH) - first)
            busy = sum(span.stop_ms - span.start_ms for span in mine)
            lines.append(f"{lane:8} {''.join(cells)} {busy:9.3f} ms")
        names = dict.fromkeys(span.name for span in spans)
        legend = ", ".join(f"{name[0].upper()} {name}" for name in names)
        return "\n".join([*lines, f"{'':8} {total:.3f} ms; {legend}; small letters: odd groups"])


_Mark = float | torch.cuda.Event


def _mark(device: torch.device) -> _Mark:
    if device.type != "cuda":
        return time.perf_counter()
    event = torch.cuda.Event(enable_timing=True)
    event.record()
    return event


def _between(start: _Mark, stop: _Mark) -> float:
    if isinstance(start, torch.cuda.Event):
        elapsed: float = start.elapsed_time(stop)  # type: ignore[arg-type]
        return elapsed
    return (stop - start) * 1e3  # type: ignore[operator]
