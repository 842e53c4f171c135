"""Lightning self-attention in Megatron is lasp.LightningAttention, over any ranks."""

from __future__ import annotations

import subprocess
import sys

import pytest
import torch
from megatron.core.packed_seq_params import PackedSeqParams
from megatron.core.transformer.spec_utils import build_module
from torch import Tensor

from lasp.decay import decay_rates
from lasp.layout import SequenceLayout
from lasp.megatron import (
    LightningSelfAttention,
    PackedSequence,
    layout_of,
    lightning_attention_spec,
    merge_projections,
    split_projections,
)
from lasp.module import LightningAttention
from tests.megatron.attention import (
    HEAD_DIM,
    HEADS,
    HIDDEN,
    LAYERS,
    LENGTHS,
    SPLITS,
    Case,
    config,
)
from tests.megatron.cpu import initialize
from tests.ranks import run_on_ranks

pytestmark = pytest.mark.megatron


def plain(dtype: torch.dtype = torch.float64) -> LightningAttention:
    torch.manual_seed(3)
    module = LightningAttention(HIDDEN, HEADS, HEAD_DIM, 2, LAYERS, dtype=torch.float64)
    torch.nn.init.normal_(module.norm.weight)
    return module.to(dtype)


def megatron_names(values: dict[str, Tensor]) -> dict[str, Tensor]:
    return {
        "in_proj.weight": merge_projections(
            values["qkv_proj.weight"], values["output_gate.weight"], HEADS
        ),
        "out_norm.weight": values["norm.weight"],
        "out_proj.weight": values["out_proj.weight"],
    }


CASE = Case(lightning_attention_spec(), plain, megatron_names)
ALL_SPLITS = [*SPLITS, pytest.param(4, {"tp": 4}, "contiguous", marks=pytest.mark.slow)]


@pytest.mark.parametrize(("num_ranks", "sizes", "order"), ALL_SPLITS)
def test_packs_equal_the_plain_module(num_ranks, sizes, order) -> None:
    CASE.check(num_ranks, sizes, LENGTHS, order)


@pytest.mark.parametrize(("num_ranks", "sizes", "order"), ALL_SPLITS)
def test_rows_in_megatrons_order_equal_the_plain_module(num_ranks, sizes, order) -> None:
    CASE.check(num_ranks, sizes, None)


def test_tensor_parallel_without_sequence_parallel() -> None:
    CASE.check(2, {"tp": 2}, LENGTHS, sequence_parallel=False)


def test_float32_over_ranks_within_budget() -> None:
    CASE.check_float32(4, {"tp": 2, "cp": 2}, "zigzag")


def test_kernels_and_exchange_are_picked_by_spec() -> None:
    pytest.importorskip("triton", reason="the kernels need triton")
    spec = lightning_attention_spec(impl="triton", exchange="sliced")
    CASE._replace(spec=spec).check_float32(2, {"cp": 2}, "zigzag")


def test_projections_merge_and_split() -> None:
    qkv, gate = torch.randn(3 * HEADS * HEAD_DIM, HIDDEN), torch.randn(HEADS * HEAD_DIM, HIDDEN)
    for actual, expected in zip(
        split_projections(merge_projections(qkv, gate, HEADS), HEADS), (qkv, gate), strict=True
    ):
        assert torch.equal(actual, expected)


def test_packed_sequence_is_what_megatron_expects() -> None:
    packed = PackedSequence(layout=SequenceLayout((5, 0, 4), 2, "zigzag"))
    assert isinstance(packed, PackedSeqParams)
    assert packed.qkv_format == "thd"
    assert packed.cu_seqlens_q.tolist() == [0, 5, 5, 9, 12]  # the padding is a document
    assert packed.max_seqlen_q == 5
    with pytest.raises(ValueError, match="layout must be a SequenceLayout"):
        PackedSequence()


def test_megatrons_own_batches() -> None:
    rows = layout_of(None, 8, 2)
    assert (rows.document_lengths, rows.order) == ((16,), "zigzag")
    assert layout_of(None, 8, 2) is rows  # its device tensors are made once
    borders = torch.tensor([0, 3, 8], dtype=torch.int32)
    theirs = PackedSeqParams(qkv_format="thd", cu_seqlens_q=borders, cu_seqlens_kv=borders)
    assert layout_of(theirs, 8, 1).document_lengths == (3, 5)
    theirs.cu_seqlens_q_padded = torch.tensor([0, 4, 8], dtype=torch.int32)
    assert layout_of(theirs, 8, 1).document_lengths == (4, 4)
    with pytest.raises(ValueError, match="must be a PackedSequence with context parallelism"):
        layout_of(theirs, 8, 2)


def build(**options: object) -> LightningSelfAttention:
    return build_module(
        lightning_attention_spec(),
        config=config(**options),
        layer_number=3,
        pg_collection=initialize(),
    )


def rates_of_a_cast_module() -> list[Tensor]:
    module = build()
    return [module.rates, module.bfloat16().rates, module.out_norm.weight]


def test_rates_are_those_of_the_global_layer_and_stay_float32() -> None:
    ((rates, cast, weight),) = run_on_ranks(rates_of_a_cast_module, 1)
    assert torch.equal(rates, decay_rates(HEADS, 2, LAYERS))
    assert torch.equal(cast, rates)
    assert weight.dtype == torch.bfloat16


def test_other_versions_are_refused() -> None:
    code = (
        "import megatron.core\n"
        "megatron.core.__version__ = '0.15.3'\n"
        "try:\n    import lasp.megatron\n"
        "except ImportError as error:\n    print(error)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert "must be >= 0.16 and < 0.20, got 0.15.3" in done.stdout
