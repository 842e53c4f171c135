"""A progress bar on terminals."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager

from rich.console import Console
from rich.progress import BarColumn, DownloadColumn, Progress, TimeRemainingColumn


@contextmanager
def progress(num_bytes: int) -> Iterator[Callable[[int], None]]:
    """Shows how many of ``num_bytes`` are done; what it gives is called with bytes more."""
    columns = (BarColumn(), DownloadColumn(), TimeRemainingColumn())
    console = Console(stderr=True)
    with Progress(*columns, console=console, disable=not console.is_terminal) as bar:
        task = bar.add_task("converting", total=num_bytes)
        yield lambda more: bar.advance(task, more)
