"""Options of Megatron that no layer is handed: read where they can be seen, or refused."""

from __future__ import annotations

import re
import sys
from types import SimpleNamespace
from typing import Any
from unittest import mock

import pytest
import torch
from megatron.core.transformer.spec_utils import build_module

from lasp.megatron import lightning_attention_spec, minimax_layer_spec, order_of_rows
from lasp.megatron.ring import check_positions
from ring.megatron import ring_attention_spec
from tests.megatron.attention import HEAD_DIM, HEADS, parallel_config
from tests.megatron.block import OPTIONS
from tests.megatron.cpu import initialize
from tests.megatron.refused_parts import core
from tests.ranks import refusal, run_on_ranks

pytestmark = pytest.mark.megatron

ROTARY_DIM = 2


def ring_with(where: str, options: dict[str, Any], rotary_dim: int = ROTARY_DIM) -> None:
    """Build ring self-attention where the config or the training loop has these options."""
    config, groups, arguments = parallel_config({}), initialize(), SimpleNamespace()
    for name, value in options.items():
        setattr(config if where == "config" else arguments, name, value)
    training = SimpleNamespace(_GLOBAL_ARGS=arguments)
    spec = ring_attention_spec(rotary_dim=rotary_dim, rope_base=100.0)
    with mock.patch.dict(sys.modules, {"megatron.training.global_vars": training}):
        build_module(spec, config=config, layer_number=1, pg_collection=groups)


OTHER_POSITIONS = {
    "position_embedding_type": "learned_absolute",
    "rotary_base": 500_000,
    "rotary_percent": 0.5,
    "rotary_seq_len_interpolation_factor": 2,
    "use_rope_scaling": True,
}


@pytest.mark.parametrize("where", ["config", "training argument"])
@pytest.mark.parametrize("name", OTHER_POSITIONS)
def test_other_positions_are_refused(where: str, name: str) -> None:
    (message,) = run_on_ranks(refusal, 1, ring_with, where, {name: OTHER_POSITIONS[name]})
    assert re.search(rf"{where}.{name} must be .*got {OTHER_POSITIONS[name]!r}", message)


@pytest.mark.parametrize("where", ["config", "training argument"])
def test_the_same_positions_and_megatrons_defaults_are_taken(where: str) -> None:
    own = {"rotary_base": 100, "rotary_percent": ROTARY_DIM / HEAD_DIM}
    defaults = {"rotary_base": 10_000, "rotary_percent": 1.0, "use_rope_scaling": False}
    for options in (own, defaults):
        run_on_ranks(ring_with, 1, where, options | {"position_embedding_type": "none"})
    run_on_ranks(ring_with, 1, where, OTHER_POSITIONS, 0)  # it rotates nothing: Megatron's affair


CUTS_OF_LOADERS = [
    ({"sft": True, "dataloader_inter_document_masking": False}, "document_zigzag"),
    ({"sft": True, "dataloader_inter_document_masking": True}, "document_zigzag"),
    ({"sft": False, "dataloader_inter_document_masking": True}, "row_zigzag"),
    ({"sft": False}, None),
]


def cuts_of_static_specs() -> list[tuple[str | None, ...]]:
    """What a layer of ``minimax_layer_spec`` and its attention are built with."""
    groups, config = initialize(), parallel_config({}, **OPTIONS, kv_channels=64)
    found = []
    for arguments, _ in CUTS_OF_LOADERS:
        training = SimpleNamespace(_GLOBAL_ARGS=SimpleNamespace(**arguments))
        with mock.patch.dict(sys.modules, {"megatron.training.global_vars": training}):
            layer = build_module(
                minimax_layer_spec, config=config, layer_number=1, pg_collection=groups
            )
        found.append((layer.packed_cut, layer.self_attention.packed_cut))
    return found


def test_static_specs_take_the_cut_of_megatrons_training_loop() -> None:
    (found,) = run_on_ranks(cuts_of_static_specs, 1)
    assert found == [(cut, cut) for _, cut in CUTS_OF_LOADERS]


def test_rows_are_in_the_order_of_the_config() -> None:
    def order(**options: str) -> str:
        return order_of_rows(SimpleNamespace(**options), "a part")

    assert order() == order(linear_cp_layout="zigzag", attention_cp_layout="zigzag") == "zigzag"
    contiguous = {"linear_cp_layout": "contiguous", "attention_cp_layout": "contiguous"}
    assert order(**contiguous) == order(cp_partition_mode="contiguous") == "contiguous"
    for other in ("zigzag", "striped"):
        with pytest.raises(ValueError, match=rf"attention_cp_layout must be .* '{other}': our"):
            order(**(contiguous | {"attention_cp_layout": other}))


def test_a_mask_of_documents_in_rows_is_refused() -> None:
    """No layer reads ``attention_mask``: documents would see each other."""
    for asked in (False, True):
        training = SimpleNamespace(_GLOBAL_ARGS=SimpleNamespace(reset_attention_mask=asked))
        with mock.patch.dict(sys.modules, {"megatron.training.global_vars": training}):
            if not asked:
                assert order_of_rows(SimpleNamespace(), "a part") == "zigzag"
                continue
            with pytest.raises(ValueError, match="reset_attention_mask must be False for a part"):
                order_of_rows(SimpleNamespace(), "a part")


def test_positions_that_restart_in_rows_are_refused() -> None:
    """Ring self-attention rotates a row by its rows; the documents of packs restart anyway."""
    packs = ({"sft": True}, {"dataloader_inter_document_masking": True})
    config = SimpleNamespace(kv_channels=64)
    for arguments in ({}, *packs):
        training = SimpleNamespace(
            _GLOBAL_ARGS=SimpleNamespace(reset_position_ids=True, **arguments)
        )
        with mock.patch.dict(sys.modules, {"megatron.training.global_vars": training}):
            check_positions(config, 0, 1e4)  # it rotates nothing
            if arguments:
                check_positions(config, 32, 1e4)
                continue
            with pytest.raises(ValueError, match="reset_position_ids must be False with ring"):
                check_positions(config, 32, 1e4)


def contiguous_rows_on_rank() -> None:
    """Megatron's RoPE would rotate them as zigzag; and each part refuses layers of two orders."""
    groups, config = initialize(cp=2), parallel_config({"cp": 2})
    config.linear_cp_layout = config.attention_cp_layout = "contiguous"
    tokens = torch.zeros(4, 1, HEADS, HEAD_DIM)
    with pytest.raises(ValueError, match="positions_of_layout must be True for contiguous rows"):
        core(config, groups)(tokens, tokens, tokens)
    config.attention_cp_layout = "zigzag"
    for spec in (lightning_attention_spec(), ring_attention_spec(rotary_dim=4)):
        with pytest.raises(ValueError, match=r"linear_cp_layout and config\.attention_cp_layout"):
            build_module(spec, config=config, layer_number=1, pg_collection=groups)


def test_contiguous_rows_with_megatrons_rope_are_refused() -> None:
    run_on_ranks(contiguous_rows_on_rank, 2)
