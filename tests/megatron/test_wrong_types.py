"""Arguments of another type are refused by name; those of specs, where layers are built of them."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch

from lasp.megatron import (
    ExpertOptions,
    PackedSequence,
    hybrid_block_spec,
    hybrid_layer_spec,
    hybrid_mtp_spec,
    hybrid_of,
    load_plain_weights,
    moe_config,
    plain_weights,
    shard_batch,
    to_megatron,
    to_plain,
)
from tests.megatron.attention import parallel_config
from tests.megatron.block import HYBRID, OPTIONS
from tests.test_wrong_types import BATCH

CONFIG, PACKED = parallel_config({}, **OPTIONS), PackedSequence.of(BATCH)
MODELS: dict[str, Any] = {"config": CONFIG, "hybrid": HYBRID}
HEADS = {"num_heads": 2, "num_kv_heads": 1}
SHARDED = {"batch": {"tokens": torch.zeros(1, 5)}, "packed": PACKED, "cp_rank": 0}
CALLS: list[tuple[Callable[..., object], dict[str, Any]]] = [
    (PackedSequence.of, {"batch": BATCH}),
    (hybrid_block_spec, MODELS),
    (hybrid_layer_spec, {"hybrid": HYBRID}),
    (hybrid_mtp_spec, MODELS),
    (hybrid_of, {"config": CONFIG, "like": HYBRID}),
    (moe_config, {"config": CONFIG, "options": ExpertOptions()}),
    (load_plain_weights, {"model": None}),
    (plain_weights, {"models": None}),
    (shard_batch, SHARDED),
    (to_megatron, {"weights": {}} | HEADS),
    (to_plain, {"weights": {}} | HEADS),
]


@pytest.mark.parametrize(("call", "good"), CALLS)
@pytest.mark.parametrize("wrong", [None, "a", 1.5, [1], True])
def test_wrong_types_are_refused_by_name(
    call: Callable[..., object], good: dict[str, Any], wrong: object
) -> None:
    extra = {"weights": {}} if call is load_plain_weights else {}
    for name in good:
        with pytest.raises(ValueError, match=rf"^(rank|{name.removesuffix('s')})"):
            call(**(extra | good | {name: wrong}))
