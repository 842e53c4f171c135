"""The Megatron parts as a test of refusals builds them, and what a row of it says."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from megatron.core.transformer.enums import AttnMaskType
from megatron.core.transformer.spec_utils import build_module
from megatron.core.transformer.transformer_config import TransformerConfig

from lasp.megatron import (
    ResidualNorm,
    hybrid_block_spec,
    hybrid_layer_spec,
    hybrid_of,
    lightning_attention_spec,
)
from moe_parallel.megatron import expert_parallel_moe_spec
from ring.megatron import RingCoreAttention, ring_attention_spec
from tests.megatron.attention import HIDDEN
from tests.megatron.block import HYBRID as LIKE
from tests.megatron.block import LING, LING_OPTIONS_OF_CONFIG
from tests.megatron.block import OPTIONS as HYBRID
from tests.megatron.test_moe_parallel import OPTIONS as EXPERTS

RANKS = 2


def lightning(config: TransformerConfig, groups: Any, **arguments: Any) -> torch.nn.Module:
    spec = lightning_attention_spec(**arguments)
    return build_module(spec, config=config, layer_number=1, pg_collection=groups)


def core(config: TransformerConfig, groups: Any, **arguments: Any) -> torch.nn.Module:
    chosen = {"attn_mask_type": AttnMaskType.causal, "attention_type": "self"} | arguments
    return RingCoreAttention(config, 1, **chosen, pg_collection=groups)


def ring(config: TransformerConfig, groups: Any, **arguments: Any) -> torch.nn.Module:
    spec = ring_attention_spec(**({"rotary_dim": 4} | arguments))
    return build_module(spec, config=config, layer_number=1, pg_collection=groups)


def experts(config: TransformerConfig, groups: Any) -> torch.nn.Module:
    return build_module(expert_parallel_moe_spec(), config=config, pg_collection=groups)


def hybrid(config: TransformerConfig, groups: Any, **fields: Any) -> torch.nn.Module:
    spec = hybrid_layer_spec(replace(LIKE, **fields))
    return build_module(spec, config=config, layer_number=1, pg_collection=groups)


def block(config: TransformerConfig, groups: Any, **fields: Any) -> Any:
    return hybrid_block_spec(config, replace(LIKE, **fields))


def ling(config: TransformerConfig, groups: Any) -> Any:
    return hybrid_block_spec(config, LING)


def derived(config: TransformerConfig, groups: Any) -> Any:
    return hybrid_of(config, LIKE)


def norm(config: TransformerConfig, groups: Any) -> torch.nn.Module:
    return ResidualNorm(config, HIDDEN)


BASE = {experts: EXPERTS, hybrid: HYBRID, block: HYBRID, derived: HYBRID}
BASE[ling] = HYBRID | LING_OPTIONS_OF_CONFIG


@dataclass
class Row:
    """A part that is refused: when built, or, with ``passed``, when called.

    Attributes:
        build: the part.
        options: of the config.
        arguments: of ``build``.
        passed: arguments of the call.
        names: what the message must have, a regular expression; by default the option.
        sizes: of the parallel state.
        without: this group of the collection; ``all``: no collection and no parallel state.
    """

    build: Callable[..., Any]
    options: dict[str, Any] = field(default_factory=dict)
    arguments: dict[str, Any] = field(default_factory=dict)
    passed: dict[str, Any] = field(default_factory=dict)
    names: str = ""
    sizes: dict[str, int] = field(default_factory=lambda: {"cp": RANKS})
    without: str = ""

    def __post_init__(self) -> None:
        if not self.names:
            (name,) = self.options or self.arguments or self.passed
            self.names = rf"config\.{name} must" if self.options else f"{name} must"

    def __str__(self) -> str:
        named = "-".join([*self.options, *self.arguments, *self.passed, self.without])
        return f"{self.build.__name__}-{named.strip('-')}"


def options(build: Callable[..., Any], **values: Any) -> list[Row]:
    return [Row(build, {name: value}) for name, value in values.items()]


def calls(build: Callable[..., Any], **values: Any) -> list[Row]:
    return [Row(build, passed={name: value}) for name, value in values.items()]
