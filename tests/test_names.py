"""A name that is not offered is refused where it is given, not in the first call."""

from __future__ import annotations

from collections.abc import Callable

import pytest

from lasp import LightningAttention
from lasp.hybrid import AttentionConfig, HybridConfig
from moe_parallel import MoEConfig
from ring import RingAttention

MOE = MoEConfig(16, 8, 4, 2)
MADE: dict[str, Callable[[str], object]] = {
    "block": lambda name: RingAttention(16, 2, 1, 8, rotary_dim=0, block=name),
    "exchange": lambda name: LightningAttention(16, 2, 8, 0, 2, exchange=name),
    "impl": lambda name: LightningAttention(16, 2, 8, 0, 2, impl=name),
    "variant": lambda name: LightningAttention(16, 2, 8, 0, 2, decay=name),
    "lightning_impl": lambda name: HybridConfig(
        2, 8, AttentionConfig(2, 1, 8, 8), MOE, lightning_impl=name
    ),
    "impl of experts": lambda name: MoEConfig(16, 8, 4, 2, impl=name),
    "gemm": lambda name: MoEConfig(16, 8, 4, 2, gemm=name),
    "drop_policy": lambda name: MoEConfig(16, 8, 4, 2, drop_policy=name),
}


@pytest.mark.parametrize("argument", MADE)
def test_an_unknown_name_is_refused_at_construction(argument: str) -> None:
    message = f"{argument.partition(' ')[0]} must be one of .*, got 'bogus'"
    with pytest.raises(ValueError, match=message):
        MADE[argument]("bogus")
