"""Attention in Megatron is lasp.LightningAttention and ring.RingAttention, over any ranks."""

from __future__ import annotations

from functools import partial
from typing import Any

import pytest
import torch
from megatron.core.transformer.spec_utils import build_module

from lasp.layers.options import LightningOptions
from lasp.megatron import lightning_attention_spec
from tests.megatron.attention import (
    LENGTHS,
    LIGHTNING,
    LING,
    RING,
    Case,
    lightning_names,
    parallel_config,
    plain_lightning,
)
from tests.megatron.cpu import initialize
from tests.ranks import run_on_ranks

pytestmark = pytest.mark.megatron

SPLITS = [
    (1, {}, "contiguous"),
    (2, {"tp": 2}, "contiguous"),
    pytest.param(2, {"cp": 2}, "zigzag", marks=pytest.mark.slow),
    (4, {"tp": 2, "cp": 2}, "fold"),
    pytest.param(4, {"cp": 4}, "zigzag", marks=pytest.mark.slow),
]
BOTH = pytest.mark.parametrize("case", [LIGHTNING, RING], ids=["lightning", "ring"])


@BOTH
@pytest.mark.parametrize(("num_ranks", "sizes", "order"), SPLITS)
def test_packs_equal_the_plain_module(case: Case, num_ranks: int, sizes: Any, order: str) -> None:
    case.check(num_ranks, sizes, LENGTHS, order)


@BOTH
@pytest.mark.parametrize(("num_ranks", "sizes", "order"), SPLITS)
def test_rows_in_megatrons_order_equal_the_plain_module(
    case: Case, num_ranks: int, sizes: Any, order: str
) -> None:
    case.check(num_ranks, sizes, None, "zigzag")


@BOTH
def test_rows_in_contiguous_order_equal_the_plain_module(case: Case) -> None:
    """As ``linear_cp_layout`` and ``attention_cp_layout`` of the config say."""
    case.check(2, {"cp": 2}, None, "contiguous")


@pytest.mark.slow
@pytest.mark.parametrize("lengths", [LENGTHS, None], ids=["pack", "rows"])
def test_more_tensor_parallel_ranks_than_key_heads(lengths: tuple[int, ...] | None) -> None:
    """Lightning attention has a key head a head; ring self-attention refuses it."""
    LIGHTNING.check(4, {"tp": 4}, lengths, "zigzag")


@BOTH
def test_tensor_parallel_without_sequence_parallel(case: Case) -> None:
    case.check(2, {"tp": 2}, LENGTHS, sequence_parallel=False)


@BOTH
def test_float32_over_ranks_within_budget(case: Case) -> None:
    case.check_float32(4, {"tp": 2, "cp": 2}, "zigzag")


@pytest.mark.parametrize(
    ("num_ranks", "sizes", "lengths"),
    [(4, {"tp": 2, "cp": 2}, LENGTHS), (2, {"tp": 2}, None)],
)
def test_lings_layer_over_ranks(num_ranks: int, sizes: Any, lengths: Any) -> None:
    """Norms of heads and of groups of heads, a rotation, no activation, another scale."""
    LING.check(num_ranks, sizes, lengths, "zigzag")
    LING.check(num_ranks, sizes, lengths, "zigzag", sequence_parallel=False)


@pytest.mark.parametrize(
    "options",
    [LightningOptions(gate="silu"), LightningOptions(gate_first=True, norm_groups=4)],
    ids=["a SiLU gate over all heads", "a gate under the norm of heads"],
)
def test_other_gates_over_ranks(options: LightningOptions) -> None:
    spec = lightning_attention_spec(options=options, decay=torch.tensor([0.5, 0.1, 0.2, 0.0]))
    plain = partial(plain_lightning, options=options, decay=torch.tensor([0.5, 0.1, 0.2, 0.0]))
    Case(spec, plain, lightning_names).check(2, {"tp": 2}, LENGTHS)


def build(options: LightningOptions, **sizes: int) -> None:
    build_module(
        lightning_attention_spec(options=options),
        config=parallel_config(sizes),
        layer_number=1,
        pg_collection=initialize(**sizes),
    )


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (LightningOptions(norm_groups=1, out_bias=True), "options.out_bias must be False"),
        (LightningOptions(gate="none"), "options.gate must be 'sigmoid' or 'silu'"),
        (LightningOptions(rotary_dim=8), "rotary_dim must be even and in"),
    ],
)
def test_options_that_are_refused(options: LightningOptions, message: str) -> None:
    with pytest.raises(RuntimeError, match=message):
        run_on_ranks(build, 1, options)
