"""Real text that every machine has: the Python standard library's own source files.

One file is one document of byte tokens, closed by ``END_OF_DOCUMENT``. Documents are laid end to
end in a seeded order and cut into packs of equal length, so that documents of wildly different
length begin and end anywhere. What a step trains on depends on the seed and the step alone, never
on how many ranks there are.
"""

from __future__ import annotations

import random
import sysconfig
from bisect import bisect_right
from dataclasses import dataclass
from functools import cached_property
from itertools import accumulate, pairwise
from pathlib import Path

import torch
from torch import Tensor

END_OF_DOCUMENT = 0  # the NUL byte, which no source file holds
VOCAB_SIZE = 256
NO_LABEL = -100


@dataclass(frozen=True)
class Pack:
    """One pack: documents end to end.

    Attributes:
        tokens: int64 ``[S]``.
        labels: int64 ``[S]``, the next token of the same document, NO_LABEL where there is none.
        document_lengths: tokens of each document.
    """

    tokens: Tensor
    labels: Tensor
    document_lengths: tuple[int, ...]


@dataclass(frozen=True)
class Corpus:
    """Documents end to end.

    Attributes:
        stream: uint8, every byte of every document.
        borders: cumulative document lengths, 0 first.
    """

    stream: Tensor
    borders: tuple[int, ...]

    @classmethod
    def from_standard_library(cls, seed: int) -> Corpus:
        """All ``*.py`` of this interpreter's standard library but its tests, in a seeded order."""
        root = Path(sysconfig.get_path("stdlib"))
        left_out = {"site-packages", "test", "tests", "idle_test"}
        paths = [
            path
            for path in sorted(root.rglob("*.py"))
            if left_out.isdisjoint(path.relative_to(root).parts)
        ]
        random.Random(seed).shuffle(paths)
        documents = [path.read_bytes().replace(b"\0", b"") + b"\0" for path in paths]
        stream = torch.frombuffer(bytearray(b"".join(documents)), dtype=torch.uint8)
        return cls(stream, tuple(accumulate(map(len, documents), initial=0)))

    @property
    def num_documents(self) -> int:
        """Files in the corpus."""
        return len(self.borders) - 1

    @cached_property
    def unigram_entropy(self) -> float:
        """Entropy of the byte frequencies in nats: the loss of a model without context."""
        shares = torch.bincount(self.stream, minlength=VOCAB_SIZE).double() / len(self.stream)
        return float(torch.special.entr(shares).sum())

    def pack(self, index: int, num_tokens: int) -> Pack:
        """The ``index``-th pack of ``num_tokens`` tokens; wraps round at the end of the corpus."""
        num_packs = len(self.stream) // num_tokens
        if num_packs == 0:
            raise ValueError(
                f"num_tokens must be at most the corpus's {len(self.stream)}, got {num_tokens}"
            )
        start = index % num_packs * num_tokens
        stop = start + num_tokens
        first = bisect_right(self.borders, start)
        inside = self.borders[first : bisect_right(self.borders, stop - 1)]
        cuts = (start, *inside, stop)
        lengths = tuple(b - a for a, b in pairwise(cuts))
        tokens = self.stream[start:stop].long()
        labels = torch.cat([tokens[1:], tokens.new_tensor([NO_LABEL])])
        ends = torch.tensor(list(accumulate(lengths))) - 1
        labels[ends] = NO_LABEL
        return Pack(tokens, labels, lengths)

    def replicas(
        self, step: int, *, num_replicas: int, per_step: int, num_tokens: int
    ) -> list[Pack]:
        """The ``per_step`` packs of a step dealt out: for each replica its own, end to end."""
        first = step * per_step
        packs = [self.pack(index, num_tokens) for index in range(first, first + per_step)]
        return deal(packs, num_replicas)


def deal(packs: list[Pack], num_replicas: int) -> list[Pack]:
    """The packs of a step dealt out: for each replica its own, end to end."""
    if len(packs) % num_replicas:
        raise ValueError(
            f"packs of a step must divide by dp {num_replicas}, got {len(packs)}: give more packs"
            " or a larger cp"
        )
    share, replicas = len(packs) // num_replicas, []
    for first in range(0, len(packs), share):
        mine = packs[first : first + share]
        tokens, labels = (torch.cat(parts) for parts in zip(*((p.tokens, p.labels) for p in mine)))
        lengths = tuple(length for pack in mine for length in pack.document_lengths)
        replicas.append(Pack(tokens, labels, lengths))
    return replicas
