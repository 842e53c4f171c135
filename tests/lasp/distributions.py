"""The three length distributions that layouts are judged on, each summing to ``total`` tokens.

A: many short documents and a few up to 152k (the shape of published long-context mixtures).
B: log-normal, median 2k, sigma 1.5, at most 65k.
C: a 1M-context phase: 30 / 30 / 40 % of the tokens in short (< 32k), medium (< 128k) and long
   documents (up to 308k).
"""

from __future__ import annotations

import math
import random


def _fill(total: int, draw) -> tuple[int, ...]:
    lengths: list[int] = []
    while sum(lengths) < total:
        lengths.append(max(1, int(draw())))
    lengths[-1] -= sum(lengths) - total
    return tuple(lengths)


def document_lengths(name: str, total: int, seed: int) -> tuple[int, ...]:
    rng = random.Random(f"{name}{seed}")
    scale = total / 2**20

    def log_uniform(low: float, high: float) -> float:
        return math.exp(rng.uniform(math.log(low), math.log(high))) * scale

    if name == "A":
        # About 620 documents: 97 % short, the rest log-uniform to 152k.
        return _fill(
            total,
            lambda: log_uniform(16384, 152000) if rng.random() < 0.02 else log_uniform(64, 4096),
        )
    if name == "B":
        return _fill(total, lambda: scale * min(65536.0, rng.lognormvariate(math.log(2000.0), 1.5)))
    if name == "C":
        parts: list[int] = []
        for share, low, high in ((0.3, 512, 32768), (0.3, 32768, 131072), (0.4, 131072, 308000)):
            parts += _fill(int(total * share), lambda a=low, b=high: log_uniform(a, b))
        parts.append(total - sum(parts))
        rng.shuffle(parts)
        return tuple(parts)
    raise ValueError(f"name must be A, B or C, got {name!r}")
