"""Lightning self-attention in Megatron is lasp.LightningAttention, over any ranks."""

from __future__ import annotations

import subprocess
import sys

import pytest
import torch
from megatron.core import parallel_state
from megatron.core.packed_seq_params import PackedSeqParams
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.transformer.spec_utils import build_module
from torch import Tensor

from lasp.decay import decay_rates
from lasp.layout import SequenceLayout
from lasp.megatron import (
    LightningSelfAttention,
    PackedSequence,
    ResidualNorm,
    layout_of,
    lightning_attention_spec,
    merge_projections,
    split_projections,
)
from lasp.module import LightningAttention
from tests.closeness import assert_equal_to_rounding, assert_within_budget
from tests.megatron.attention import HEAD_DIM, HEADS, HIDDEN, LAYERS, attention_on_rank, config
from tests.megatron.cpu import initialize
from tests.ranks import run_on_ranks

pytestmark = pytest.mark.megatron

LENGTHS = (13, 1, 0, 20, 6)


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


def plain_results(pack: Tensor, lengths: tuple[int, ...] | None) -> dict[str, Tensor]:
    """Results of the plain module on one rank, under the names of Megatron's parameters."""
    module = plain(pack.dtype)
    hidden = pack.clone().requires_grad_()
    if lengths is None:  # [S, B, hidden]
        output = module(hidden.transpose(0, 1)).transpose(0, 1)
    else:
        output = module(hidden, layout=SequenceLayout(lengths, 1)).unsqueeze(1)
    output.backward(pack.cos().view_as(output))
    grads = megatron_names({name: p.grad for name, p in module.named_parameters()})
    return {"output": output.detach(), "input": hidden.grad.view_as(output), **grads}


def check(
    num_ranks: int,
    sizes: dict[str, int],
    lengths: tuple[int, ...] | None,
    order: str = "contiguous",
    **kwargs: object,
) -> None:
    shape = (40, HIDDEN) if lengths else (16, 3, HIDDEN)
    pack = torch.randn(shape, dtype=torch.float64)
    weights = megatron_names(dict(plain().named_parameters()))
    weights = {name: weight.detach() for name, weight in weights.items()}
    expected = plain_results(pack, lengths)
    spec = lightning_attention_spec()
    args = (spec, sizes, lengths, order, weights, pack)
    for result in run_on_ranks(attention_on_rank, num_ranks, *args, **kwargs):
        assert result.keys() == expected.keys()
        for name, tensor in expected.items():
            assert_equal_to_rounding(result[name], tensor, what=name)


SPLITS = [
    (1, {}, "contiguous"),
    (2, {"tp": 2}, "contiguous"),
    pytest.param(2, {"cp": 2}, "zigzag", marks=pytest.mark.slow),
    (4, {"tp": 2, "cp": 2}, "fold"),
    pytest.param(4, {"cp": 4}, "zigzag", marks=pytest.mark.slow),
    pytest.param(4, {"tp": 4}, "contiguous", marks=pytest.mark.slow),
]


@pytest.mark.parametrize(("num_ranks", "sizes", "order"), SPLITS)
def test_packs_equal_the_plain_module(num_ranks, sizes, order) -> None:
    check(num_ranks, sizes, LENGTHS, order)


@pytest.mark.parametrize(("num_ranks", "sizes", "order"), SPLITS)
def test_rows_in_megatrons_order_equal_the_plain_module(num_ranks, sizes, order) -> None:
    check(num_ranks, sizes, None)


def test_tensor_parallel_without_sequence_parallel() -> None:
    check(2, {"tp": 2}, LENGTHS, sequence_parallel=False)


def test_float32_over_ranks_within_budget() -> None:
    pack = torch.randn(40, HIDDEN)
    weights = {
        name: w.detach() for name, w in megatron_names(dict(plain().named_parameters())).items()
    }
    oracle, honest = plain_results(pack.double(), LENGTHS), plain_results(pack, LENGTHS)
    args = (lightning_attention_spec(), {"tp": 2, "cp": 2}, LENGTHS, "zigzag", weights, pack)
    result = run_on_ranks(attention_on_rank, 4, *args)[0]
    for name in oracle:
        assert_within_budget(result[name], oracle[name], honest[name], what=name)


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


def refusals() -> None:
    with pytest.raises(ValueError, match=r"config\.attention_dropout must be 0\.0"):
        build(attention_dropout=0.1)
    with pytest.raises(ValueError, match=r"config\.mtp_num_layers must be None"):
        build(mtp_num_layers=1)
    with pytest.raises(ValueError, match=r"config\.normalization must be 'RMSNorm'"):
        ResidualNorm(config(normalization="LayerNorm"), HIDDEN)
    with pytest.raises(ValueError, match="pg_collection must have \\['cp'\\]"):
        LightningSelfAttention(
            config(), None, 1, pg_collection=ProcessGroupCollection(tp=initialize().tp)
        )
    parallel_state.destroy_model_parallel()
    with pytest.raises(ValueError, match="pg_collection must be given"):
        LightningSelfAttention(config(), None, 1)
    initialize(fresh=1)
    hidden = torch.zeros(4, 1, HIDDEN, dtype=torch.float64)
    with pytest.raises(ValueError, match="inference_context must be None"):
        build()(hidden, inference_context=object())


def refusal_of_heads() -> None:
    groups = initialize(tp=2)
    with pytest.raises(ValueError, match="num_attention_heads must divide over 2"):
        LightningSelfAttention(
            config(num_attention_heads=3, num_query_groups=3), None, 1, pg_collection=groups
        )


def test_options_that_are_not_supported_are_refused() -> None:
    run_on_ranks(refusals, 1)
    run_on_ranks(refusal_of_heads, 2)


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
