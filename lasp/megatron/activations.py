"""What hybrid layers of Megatron keep for their backward, by the names of ``lasp.hybrid``.

Megatron has options for ``none`` (no ``recompute_granularity``) and ``full``, and none for the
policies here: the attention half of a layer is computed again without its attention, whose
operator's results are kept, and the MLP half whole, by Megatron's own checkpoint.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from megatron.core import tensor_parallel
from megatron.core.transformer.transformer_config import TransformerConfig
from torch import Tensor, nn

from lasp._core.impl import chosen_impl
from lasp.hybrid.activations import kept_operators, recomputed
from lasp.megatron.lightning import LightningSelfAttention

POLICIES = ("none", "softmax_outputs", "attention_outputs")
_INSTEAD = {
    "full": "set config.recompute_granularity 'full'",
    "expert_inputs": "set recompute_granularity 'selective' and recompute_modules ['moe']",
    "offload": "leave it out: Megatron's offloading does not know these layers",
}


class KeptActivations:
    """Runs the halves of a layer so that they keep what a policy says.

    Args:
        config: Megatron's.
        policy: ``none``; ``softmax_outputs``: the input of each half, and output and log-sum-exp of
            softmax attention; ``attention_outputs``: output and states of lightning attention too,
            whose kernels must be Triton's.

    Raises:
        ValueError: for another policy, one beside ``recompute_granularity``, and one whose operator
            the layer does not have.
    """

    def __init__(self, config: TransformerConfig, policy: str) -> None:
        if policy not in POLICIES:
            unknown = "'none' keeps all that the backward reads"
            raise ValueError(
                f"activations must be one of {POLICIES} for hybrid layers of Megatron, got"
                f" {policy!r}: {_INSTEAD.get(policy, unknown)}"
            )
        if policy != "none" and config.recompute_granularity is not None:
            raise ValueError(
                f"config.recompute_granularity must be None with activations {policy!r}, got"
                f" {config.recompute_granularity!r}, which would compute layers again once more"
            )
        self.policy, self._dtype = policy, config.params_dtype

    def through_attention(
        self, function: Callable[..., Tensor], attention: nn.Module, hidden: Tensor
    ) -> Tensor:
        """``function(hidden)``, the half around ``attention``."""
        if self.policy == "none":
            return function(hidden)
        lightning = isinstance(attention, LightningSelfAttention)
        if lightning and self.policy == "attention_outputs":
            _check_operator(attention.impl, hidden)
        operators = kept_operators({self.policy}, lightning=lightning)
        kept: Tensor = recomputed(function, operators, hidden)
        return kept

    def through_mlp(self, function: Callable[..., Tensor], hidden: Tensor) -> Tensor:
        """``function(hidden)``, the half around experts or a dense MLP."""
        if self.policy == "none":
            return function(hidden)
        # Reentrant: its first forward has no gradients, by which losses are counted once.
        kept: Tensor = tensor_parallel.checkpoint(function, False, hidden)
        return kept


def _check_operator(impl: Any, hidden: Tensor) -> None:
    if chosen_impl(impl, hidden.device, hidden.dtype) == "eager":
        raise ValueError(
            "activations 'attention_outputs' needs lightning attention as an operator of torch, got"
            f" plain torch for {hidden.dtype} on {hidden.device}: use lightning_impl='triton', or"
            " 'softmax_outputs'"
        )
    import lasp.lightning.triton.torch_ops  # noqa: F401  (defines the operator)
