"""A run's folder, shared by its ranks: one run at a time, files that are whole, errors of all."""

from __future__ import annotations

import fcntl
import hashlib
import os
import socket
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import TypeVar

import torch.distributed as dist

R = TypeVar("R")


class FolderLock:
    """Makes a folder, and keeps other runs out of it for as long as this process lives.

    The system frees the lock when the process ends, however it ends.

    Raises:
        ValueError: if a process that is alive holds it.
    """

    def __init__(self, folder: Path) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        self._file = (folder / "run.lock").open("a+")
        try:
            fcntl.flock(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            self._file.seek(0)
            raise ValueError(
                f"out must belong to one run at a time, got {folder}, which"
                f" {self._file.read().strip() or 'another process'} writes: wait for it, or name"
                " another folder"
            ) from None
        self._file.truncate(0)
        self._file.write(f"process {os.getpid()} on {socket.gethostname()}\n")
        self._file.flush()


def write_whole(path: Path, text: str) -> None:
    """Write a file that has the old text or the new one, whenever the process or host ends."""
    new = path.with_name(f"{path.name}.new")
    with new.open("w") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())
    new.replace(path)


def digests(folder: Path, names: Iterable[str]) -> dict[str, str]:
    """SHA-256 of files by name."""
    found = {}
    for name in names:
        with (folder / name).open("rb") as file:
            found[name] = hashlib.file_digest(file, "sha256").hexdigest()
    return found


def on_all(act: Callable[[], R]) -> list[R]:
    """What ``act`` returns on every rank; where one raises, all do.

    Communication: one gather of objects.

    Raises:
        ValueError: on every rank, with the error of the first that failed.
    """
    result: list[R] = []
    error = ""
    try:
        result = [act()]
    except ValueError as refused:
        error = str(refused)
    except OSError as failed:
        error = f"rank {dist.get_rank()}: {failed}"
    answers = [(result, error)] * dist.get_world_size()
    dist.all_gather_object(answers, (result, error))
    if told := next((error for _, error in answers if error), ""):
        raise ValueError(told)
    return [result for results, _ in answers for result in results]


def on_first(act: Callable[[], R]) -> R:
    """What ``act`` returns on rank 0, where alone it runs; every rank gets it, or its error."""
    return on_all(lambda: [act()] if dist.get_rank() == 0 else [])[0][0]
