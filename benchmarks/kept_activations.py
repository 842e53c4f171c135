"""What does a layer keep for its backward, by the policy of its activations?

Bytes a token of a lightning and of a softmax layer with experts, and the time of forward and
backward beside it. Counted are storages that were made in the forward and are alive after it, on
the device, but for the output, which is the next layer's input.

Run: python -m benchmarks.kept_activations --commit $(git rev-parse HEAD)
"""

from __future__ import annotations

import gc
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from benchmarks.harness import Machine, Options, Question, Row, answer, draw, row
from benchmarks.layer_group import layer_group, quick_model
from benchmarks.timing import measure_ms
from lasp.hybrid import PackedBatch, keep_activations, pack_batch

POLICIES = (
    "none",
    "expert_inputs",
    "attention_outputs+expert_inputs",
    "attention_outputs",
    "softmax_outputs",
    "full",
    "full+offload",
)


@dataclass(kw_only=True)
class Sizes(Options):
    """Options: tokens of the document, and the width of the model."""

    tokens: int = 16384
    hidden_size: int = 2048
    num_experts: int = 32


class _Made(TorchDispatchMode):
    """Notes the storages of all results on a device."""

    def __init__(self, device: str) -> None:
        super().__init__()
        self.device, self.made = device, dict[int, tuple[StorageWeakRef, int]]()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        for x in tree_leaves(result):
            if isinstance(x, Tensor) and x.device.type == self.device:
                storage = x.untyped_storage()
                self.made[storage._cdata] = (StorageWeakRef(storage), storage.nbytes())
        return result


def kept_bytes(layer: Callable[..., Any], like: Tensor, batch: PackedBatch) -> int:
    """Bytes that ``layer`` keeps for its backward, its input among them if it keeps that."""
    owned = {like.untyped_storage()._cdata}
    with _Made(like.device.type) as mode:
        output = layer(like.clone().requires_grad_(), batch)
    gc.collect()  # what interpreted kernels leave in cycles
    owned |= {x.untyped_storage()._cdata for x in tree_leaves(tuple(output)) if _is_tensor(x)}
    if isinstance(layer, torch.nn.Module):
        owned |= {x.untyped_storage()._cdata for x in layer.parameters()}
    return sum(
        size for key, (ref, size) in mode.made.items() if key not in owned and not ref.expired()
    )


def _is_tensor(x: object) -> bool:
    return isinstance(x, Tensor)


def rows(options: Sizes, machine: Machine) -> Iterator[Row]:
    """Rows of every policy and kind of layer."""
    config = layer_group(hidden_size=options.hidden_size, num_experts=options.num_experts)
    batch = pack_batch([[options.tokens]], dp_rank=0, num_ranks=1, order="contiguous")
    for pattern, what in (("G", "lightning"), ("*", "softmax")):
        for policy in POLICIES:
            if what == "lightning" and policy == "softmax_outputs":
                continue  # it has none: as full
            alone = replace(
                config, num_layers=1, num_decay_layers=8, pattern=pattern,
                residuals=config.residuals_or_deepnorm, lightning_impl=machine.impl,
            )  # fmt: skip
            model = quick_model(alone, machine.device, machine.dtype)
            keep_activations(model, policy)
            (layer,) = model.decoder_layers()
            hidden, grad = draw(machine, *[(options.tokens, config.hidden_size)] * 2)
            hidden.requires_grad_()

            def both(layer: Any = layer, hidden: Tensor = hidden, grad: Tensor = grad) -> None:
                torch.autograd.backward(layer(hidden, batch).hidden, grad)

            both()  # what is kept once for all calls is there after it
            kept = kept_bytes(layer, hidden.detach(), batch) / options.tokens
            case = {"layer": what, "policy": policy, "tokens": options.tokens}
            case["hidden_size"] = config.hidden_size
            yield row("kept_activations", case, "lasp", "kept", kept, "bytes a token")
            yield row(
                "kept_activations", case, "lasp", "both_ms", measure_ms(both), "ms", samples=None
            )


QUESTION = Question("kept_activations", Sizes, rows)

if __name__ == "__main__":
    answer(QUESTION, __doc__)
