"""Which modules own parameters, and which of them are called as modules.

Wrappers gather a module's own parameters in a hook before its forward: Megatron's
``overlap_param_gather``, FSDP. A parameter that is used without a call of its owner is used as it
was before the gather, and nothing raises.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from torch import nn


@contextmanager
def calls_of_owners(model: nn.Module) -> Iterator[dict[str, int]]:
    """Within the block counts, by name, the calls of each module that owns parameters."""
    owners = {
        name: module
        for name, module in model.named_modules()
        if next(module.parameters(recurse=False), None) is not None
    }
    calls = dict.fromkeys(owners, 0)

    def count(name: str) -> None:
        calls[name] += 1

    handles = [
        module.register_forward_pre_hook(lambda *_, name=name: count(name))
        for name, module in owners.items()
    ]
    try:
        yield calls
    finally:
        for handle in handles:
            handle.remove()
