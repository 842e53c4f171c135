"""The three length distributions that layouts are judged on, each summing to ``total`` tokens.

For 1,048,576 tokens; shorter packs scale the lengths:

A: about 620 documents, most of them short, a few up to 152k.
B: about 210 documents, log-normal with median 2k and sigma 1.5, none above 65k.
C: about 90 documents of a 1M-context phase: 30 / 30 / 40 % of the tokens in short (below 32k),
   medium (below 128k) and long ones (up to 308k).
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

        def draw_a() -> float:
            is_long = rng.random() < 0.016
            return log_uniform(12000, 152000) if is_long else log_uniform(64, 3200)

        return _fill(total, draw_a)
    if name == "B":

        def draw_b() -> float:
            length = math.inf
            while length > 65536:
                length = rng.lognormvariate(math.log(2000.0), 1.5)
            return length * scale

        return _fill(total, draw_b)
    if name == "C":
        parts: list[int] = []
        for share, low, high in ((0.3, 8, 32768), (0.3, 32768, 131072), (0.4, 131072, 308000)):
            parts += _fill(int(total * share), lambda a=low, b=high: log_uniform(a, b))
        parts.append(total - sum(parts))
        rng.shuffle(parts)
        return tuple(parts)
    raise ValueError(f"name must be A, B or C, got {name!r}")
