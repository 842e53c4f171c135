"""Remembering results: by number or by bytes, by keys that may be long; never fake tensors."""

from __future__ import annotations

from collections import Counter, OrderedDict
from collections.abc import Callable, Hashable, Iterator, Sequence
from contextlib import contextmanager
from functools import lru_cache, wraps
from threading import Lock
from typing import Any, Generic, ParamSpec, TypeVar

import torch
from torch import Tensor

from lasp._core.graphs import makes_fake_tensors

K = TypeVar("K", bound=Hashable)
P = ParamSpec("P")
R = TypeVar("R")


_HOLDERS: list[list[Any]] = []


@contextmanager
def holding_results() -> Iterator[list[Any]]:
    """Holds whatever the caches hand out meanwhile, in any thread, for as long as the list lives.

    A CUDA graph reads the memory of these tensors in every replay, while a cache gives that of the
    oldest ones to others.
    """
    held: list[Any] = []
    _HOLDERS.append(held)
    try:
        yield held
    finally:
        del _HOLDERS[[id(other) for other in _HOLDERS].index(id(held))]


def _held(result: R) -> R:
    for holder in _HOLDERS:
        holder.append(result)
    return result


def hash_once(x: Any) -> int:
    """The ``__hash__`` of objects that never change and may be long: that of ``x.definition``."""
    known: int | None = x.__dict__.get("_hash")
    if known is None:
        known = x.__dict__["_hash"] = hash(x.definition)
    return known


def tensor_cache(maxsize: int) -> Callable[[Callable[P, R]], Callable[P, R]]:
    """``functools.lru_cache`` for what makes tensors: under FakeTensorMode they are made anew.

    Fake tensors that were remembered would fail in real calls, and real ones in a trace.
    """

    def decorate(make: Callable[P, R]) -> Callable[P, R]:
        held = lru_cache(maxsize)(make)

        @wraps(held)
        def call(*args: P.args, **kwargs: P.kwargs) -> R:
            if makes_fake_tensors():
                return make(*args, **kwargs)
            return _held(held(*args, **kwargs))  # type: ignore[arg-type]

        return call

    return decorate


def remembered(tensors: dict[K, Tensor], key: K, build: Callable[[], Tensor]) -> Tensor:
    """The tensor under ``key``; made, where it is not there, and under FakeTensorMode."""
    if makes_fake_tensors():
        return build()
    if key not in tensors:
        with torch.inference_mode(False):  # remembered, and used in training too
            tensors[key] = build()
    return _held(tensors[key])


class ByteCache(Generic[R]):
    """The results that were asked for last, of about ``max_bytes`` together; always the very last.

    Not up to a number of results: batches differ a thousandfold in what they keep.

    Args:
        max_bytes: most bytes of all results.
        size_of: bytes of a result, without those of ``shared_of``.
        shared_of: what a result holds that others may hold too, with its bytes, which count once.
    """

    def __init__(
        self,
        max_bytes: int,
        size_of: Callable[[R], int],
        shared_of: Callable[[R], Sequence[tuple[object, int]]] = lambda _: (),
    ) -> None:
        self.max_bytes, self.num_bytes = max_bytes, 0
        self._size_of, self._shared_of = size_of, shared_of
        self._held: OrderedDict[Hashable, R] = OrderedDict()
        self._holders: Counter[int] = Counter()  # of what is shared, by its id
        self._lock = Lock()  # backward runs in threads of its own

    def get(self, key: Hashable, build: Callable[[], R]) -> R:
        """The result under ``key``; made, where it is not there, and under FakeTensorMode."""
        if makes_fake_tensors():
            return build()
        with self._lock:
            if (held := self._held.get(key)) is not None:
                self._held.move_to_end(key)
                return _held(held)
        result = build()
        with self._lock:
            if (held := self._held.get(key)) is not None:  # another thread was faster
                return _held(held)
            self._held[key] = result
            self._count(result, 1)
            while self.num_bytes > self.max_bytes and len(self._held) > 1:
                self._count(self._held.popitem(last=False)[1], -1)
        return _held(result)

    def _count(self, result: R, number: int) -> None:
        """Add the bytes of a result, or for ``number`` -1 take them away."""
        self.num_bytes += number * self._size_of(result)
        for part, size in self._shared_of(result):
            before = self._holders[id(part)]
            self._holders[id(part)] = after = before + number
            if before == 0 or after == 0:
                self.num_bytes += number * size
            if after == 0:
                del self._holders[id(part)]


def kept_in(cache: ByteCache[R]) -> Callable[[Callable[P, R]], Callable[P, R]]:
    """``functools.lru_cache`` in a cache that is bounded by bytes, for one function alone."""

    def decorate(make: Callable[P, R]) -> Callable[P, R]:
        @wraps(make)
        def call(*args: P.args, **kwargs: P.kwargs) -> R:
            return cache.get((args, *kwargs.items()), lambda: make(*args, **kwargs))

        return call

    return decorate
