"""Which layers of a hybrid model are softmax attention."""

from __future__ import annotations

import re


def is_softmax(pattern: str, layer_index: int) -> bool:
    """Whether layer ``layer_index``, from 0, is softmax attention: "7:1" is seven lightning first.

    Raises:
        ValueError: unless the pattern is two counts, not both zero.
    """
    match = re.fullmatch(r"(\d+):(\d+)", pattern)
    lightning, softmax = map(int, match.groups()) if match else (0, 0)
    if lightning + softmax == 0:
        raise ValueError(
            f"pattern must be 'lightning layers:softmax layers', got {pattern!r}: MiniMax-01's is"
            " '7:1'"
        )
    return layer_index % (lightning + softmax) >= lightning
