"""Packs of documents that each hold the image of a digit and ask which one it is."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

# The digits 0 to 9: five rows of three pixels, the bits of one octal digit a row.
GLYPHS = ["75557", "26227", "71747", "71717", "55711", "74717", "74757", "71111", "75757", "75717"]
SCALE, SHIFTS = 2, 2
IMAGE_SIZE, PATCHES = 16, 16  # patches of 4 x 4 pixels
# Tokens 0 to 9 are the answers; then come the place of a patch, the question, and other words.
IMAGE, QUESTION, FIRST_WORD, VOCAB_SIZE = 10, 11, 12, 32
NO_LABEL = -100
EVAL_PACKS, EVAL_SEED = 16, 1 << 32  # packs of training have the seeds 0, 1, ...


class Pack(NamedTuple):
    """Documents end to end; a document is words, an image, words and the question.

    Attributes:
        tokens: int64 ``[S]``, ``IMAGE`` where a patch stands.
        labels: int64 ``[S]``, the digit at each question, else ``NO_LABEL``.
        images: float32 ``[documents, 3, 16, 16]``.
        lengths: tokens of each document.
    """

    tokens: Tensor
    labels: Tensor
    images: Tensor
    lengths: list[int]


def draw_digits(digits: Tensor, generator: torch.Generator) -> Tensor:
    """Images of ``digits``, each shifted, of some contrast and under noise."""
    bits = torch.tensor([[int(row, 8) for row in glyph] for glyph in GLYPHS])
    glyphs = ((bits[..., None] >> torch.tensor([2, 1, 0])) & 1).float()  # [10, 5, 3]
    glyphs = glyphs.repeat_interleave(SCALE, 1).repeat_interleave(SCALE, 2)
    height, width = glyphs.shape[1:]
    images = 0.2 * torch.randn(len(digits), IMAGE_SIZE, IMAGE_SIZE, generator=generator)
    shifts = torch.randint(1, 1 + SHIFTS, (len(digits), 2), generator=generator)
    contrasts = 0.8 + 0.4 * torch.rand(len(digits), generator=generator)
    for image, digit, (top, left), contrast in zip(images, digits, shifts.tolist(), contrasts):
        image[top : top + height, left : left + width] += contrast * glyphs[digit]
    return images[:, None].expand(-1, 3, -1, -1)


def draw_pack(documents: int, seed: int) -> Pack:
    """A pack that every order can lay over 1, 2, 4, 8 or 16 ranks: its tokens divide by 32."""
    generator = torch.Generator().manual_seed(seed)
    digits = torch.randint(10, (documents,), generator=generator)
    words = torch.randint(12, (documents, 2), generator=generator)  # before and after the image
    words[-1, 0] += -(int(words.sum()) + documents * (PATCHES + 1)) % 32
    pieces = []
    for before, after in words.tolist():
        text = torch.randint(FIRST_WORD, VOCAB_SIZE, (before + after,), generator=generator)
        image, question = torch.full((PATCHES,), IMAGE), torch.tensor([QUESTION])
        pieces.append(torch.cat([text[:before], image, text[before:], question]))
    tokens = torch.cat(pieces)
    labels = torch.full_like(tokens, NO_LABEL)
    labels[tokens == QUESTION] = digits
    return Pack(tokens, labels, draw_digits(digits, generator), [len(piece) for piece in pieces])
