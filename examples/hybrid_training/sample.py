"""Sample text from a hybrid model whose tokens and experts are spread over ranks."""

from __future__ import annotations

from hybrid_training.corpus import END_OF_DOCUMENT
from lasp.hybrid import HybridModel, Sampling


def sample(
    model: HybridModel, prompt: bytes, *, num_tokens: int, temperature: float, seed: int
) -> bytes:
    """Continue ``prompt`` by up to ``num_tokens`` bytes; all ranks call it and get the same."""
    found = model.generate(
        [list(prompt)],
        max_new_tokens=num_tokens,
        sampling=Sampling(temperature, seed=seed),
        stop_tokens=[END_OF_DOCUMENT],
    )
    return prompt + bytes(token for token in found.tokens[0] if token != END_OF_DOCUMENT)
