"""What the layers of a hybrid model keep for their backward, by the name of a policy.

A layer keeps its input and what the policy names; the backward computes the rest again, with the
same bits where the kernels give the same bits twice. It is torch's checkpointing: a layer, or each
half of it, is one region, and the results that an attention half keeps are found by the names of
their operators, ``torch.ops.ring.attention`` and ``torch.ops.lasp.attention``.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.autograd.graph import save_on_cpu
from torch.utils.checkpoint import checkpoint, create_selective_checkpoint_contexts

from lasp._core.checks import check_part
from lasp._core.impl import chosen_impl
from lasp.hybrid.layer import HybridLayer
from lasp.hybrid.model import HybridModel
from lasp.layers.lightning_attention import LightningAttention

POLICIES = (
    "none", "full", "softmax_outputs", "attention_outputs", "expert_inputs", "offload",
)  # fmt: skip
Function = Callable[..., Any]
_REPLACED = ("forward", "through_attention")  # methods of layers, one by any policy


def keep_activations(model: HybridModel, policy: str, *, dtype: torch.dtype | None = None) -> None:
    """Have the layers of ``model`` keep what ``policy`` says; call it before any wrapper.

    Args:
        model: of plain layers, on the device that it is trained on.
        policy: one of these, or some of the others joined by ``+``:

            - ``none``: all that the backward reads;
            - ``full``: the layer's input, nothing else;
            - ``softmax_outputs``: the input, and output and log-sum-exp of softmax attention, which
              is not computed again, nor its communication;
            - ``attention_outputs``: those, and output and states of lightning attention, whose
              kernels must be Triton's (``impl="triton"``);
            - ``expert_inputs``: the input of each half, rows as they came to the experts and their
              results: nothing is routed or sent again. Experts make their first product again;
            - ``offload``: what is kept of inputs lies in the host's memory, copied there and back
              while nothing else runs on the device's current stream.
        dtype: the layers compute in, under autocast and mixed precision; None: that of the model.

    Raises:
        ValueError: for names that are unknown or exclude each other, for one of which the model has
            no such layer, and where a policy is in force already.
    """
    check_part("model", model, HybridModel)
    check_part("dtype", dtype, torch.dtype, optional=True)
    names = _checked(policy)
    if names == {"none"}:
        return
    layers = list(_layers(model))
    _check_layers(names, layers, dtype)
    store = _offloaded if "offload" in names else recomputed
    for layer in layers:
        lightning = isinstance(layer.attention, LightningAttention)
        operators = kept_operators(names, lightning=lightning)
        keeps_rows = "expert_inputs" in names and layer.moe is not None
        if not operators and not keeps_rows:
            _replace(layer, "forward", partial(store, layer.forward, []))
            continue
        _replace(layer, "through_attention", partial(store, layer.through_attention, operators))
        if keeps_rows:
            assert layer.moe is not None
            layer.moe.experts.recomputes = True
        else:
            _replace(layer, "through_mlp", partial(store, layer.through_mlp, []))


def _layers(model: HybridModel) -> Iterator[HybridLayer]:
    yield from model.decoder_layers()
    if model.mtp is not None:
        yield model.mtp.layer


def _replace(layer: HybridLayer, name: str, function: Function) -> None:
    object.__setattr__(layer, name, function)  # of this layer, not of its class


def recomputed(function: Function, operators: list[Any], *inputs: Any) -> Any:
    """``function(*inputs)``, of which inputs and results of ``operators`` are kept."""
    # Nothing here draws random numbers: their states need not be kept.
    more: dict[str, Any] = {}
    if operators:
        more["context_fn"] = partial(create_selective_checkpoint_contexts, operators)
    return checkpoint(function, *inputs, use_reentrant=False, preserve_rng_state=False, **more)


def _offloaded(function: Function, operators: list[Any], hidden: Tensor, *inputs: Any) -> Any:
    # The hooks of the checkpoint lie inside: what reaches these is the input of the region alone.
    with save_on_cpu(pin_memory=hidden.is_cuda):
        return recomputed(function, operators, hidden, *inputs)


def kept_operators(names: set[str], *, lightning: bool) -> list[Any]:
    """Operators of an attention half whose results the policies keep."""
    if lightning:
        return [torch.ops.lasp.attention.default] if "attention_outputs" in names else []
    if not names & {"softmax_outputs", "attention_outputs"}:
        return []
    return [torch.ops.ring.attention.default, torch.ops.ring.latent_attention.default]


def _checked(policy: str) -> set[str]:
    names = str(policy).split("+")
    if not set(names) <= set(POLICIES):
        raise ValueError(
            f"policy must be names of {POLICIES}, joined by '+', got {policy!r}: 'full' keeps least"
        )
    if len(names) != len(set(names)):
        raise ValueError(f"policy must name each policy once, got {policy!r}: drop one of them")
    if "none" in names and len(names) > 1:
        raise ValueError(
            f"policy must not join 'none' to others, got {policy!r}: 'none' keeps everything on"
            " the device"
        )
    if "full" in names and not set(names) <= {"full", "offload"}:
        raise ValueError(
            f"policy must not join 'full' to what keeps more, got {policy!r}: leave 'full' out"
        )
    if names == ["offload"]:
        raise ValueError("policy must say what is kept, got 'offload' alone: 'full+offload', say")
    return set(names)


def _check_layers(names: set[str], layers: list[HybridLayer], dtype: torch.dtype | None) -> None:
    if any(not isinstance(x, HybridLayer) or _replaced(x) for x in layers):
        raise ValueError(
            "model must have plain layers, got some in wrappers or with a policy: call this once,"
            " before any wrapper, and leave checkpoints of your own out"
        )
    lightning = [x.attention for x in layers if isinstance(x.attention, LightningAttention)]
    has = {
        "softmax_outputs": len(lightning) < len(layers),
        "expert_inputs": any(layer.moe is not None for layer in layers),
    }
    for name, there in has.items():
        if name in names and not there:
            raise ValueError(
                f"policy must name what the model has, got {name!r} for a model without such"
                " layers: leave it out"
            )
    if "attention_outputs" not in names:
        return
    for attention in lightning:
        weight = attention.qkv_proj.weight
        if chosen_impl(attention.impl, weight.device, dtype or weight.dtype) == "eager":
            raise ValueError(
                f"policy 'attention_outputs' needs lightning attention as an operator of torch, got"
                f" plain torch for {dtype or weight.dtype} on {weight.device}: use"
                " lightning_impl='triton', or 'softmax_outputs'"
            )
        import lasp.lightning.triton.torch_ops  # noqa: F401  (defines the operator)


def offloads(model: HybridModel) -> bool:
    """Whether a policy of ``model`` keeps inputs in the host's memory."""
    changed = (vars(layer).get(name) for layer in _layers(model) for name in _REPLACED)
    return any(getattr(function, "func", None) is _offloaded for function in changed)


def _replaced(layer: HybridLayer) -> bool:
    return not vars(layer).keys().isdisjoint(_REPLACED)
