"""Ring self-attention in Megatron is ring.RingAttention, over any ranks."""

from __future__ import annotations

import pytest
import torch
from megatron.core.tensor_parallel import ColumnParallelLinear, RowParallelLinear
from megatron.core.transformer.attention import SelfAttention, SelfAttentionSubmodules
from megatron.core.transformer.dot_product_attention import DotProductAttention
from megatron.core.transformer.enums import AttnMaskType
from megatron.core.transformer.spec_utils import ModuleSpec, build_module
from torch import Tensor

from lasp.layout import SequenceLayout
from lasp.megatron import PackedSequence
from ring.megatron import RingCoreAttention, RingSelfAttention, ring_attention_spec
from ring.module import RingAttention
from tests.closeness import assert_equal_to_rounding
from tests.megatron.attention import (
    HEAD_DIM,
    HEADS,
    HIDDEN,
    KV_HEADS,
    attention_on_rank,
    config,
)
from tests.megatron.cpu import initialize
from tests.ranks import run_on_ranks

pytestmark = pytest.mark.megatron

LENGTHS = (13, 1, 0, 20, 6)
ROTARY = {"rotary_dim": 4, "rope_base": 100.0}


def plain(dtype: torch.dtype = torch.float64) -> RingAttention:
    torch.manual_seed(3)
    return RingAttention(HIDDEN, HEADS, KV_HEADS, HEAD_DIM, dtype=dtype, **ROTARY)


def megatron_names(values: dict[str, Tensor]) -> dict[str, Tensor]:
    """Megatron lays q, k and v out group by group: the query heads of a key head, k, v."""
    q, k, v = (
        values[f"{name}_proj.weight"].unflatten(0, (KV_HEADS, -1)) for name in ("q", "k", "v")
    )
    return {
        "linear_qkv.weight": torch.cat((q, k, v), dim=1).flatten(0, 1),
        "linear_proj.weight": values["o_proj.weight"],
    }


def plain_results(pack: Tensor, lengths: tuple[int, ...] | None) -> dict[str, Tensor]:
    module = plain(pack.dtype)
    hidden = pack.clone().requires_grad_()
    if lengths is None:
        output = module(hidden.transpose(0, 1)).transpose(0, 1)
    else:
        output = module(hidden, layout=SequenceLayout(lengths, 1)).unsqueeze(1)
    output.backward(pack.cos().view_as(output))
    grads = megatron_names({name: p.grad for name, p in module.named_parameters()})
    return {"output": output.detach(), "input": hidden.grad.view_as(output), **grads}


def check(num_ranks: int, sizes: dict[str, int], lengths, order: str = "contiguous") -> None:
    shape = (40, HIDDEN) if lengths else (16, 3, HIDDEN)
    pack = torch.randn(shape, dtype=torch.float64)
    weights = megatron_names(dict(plain().named_parameters()))
    weights = {name: weight.detach() for name, weight in weights.items()}
    expected = plain_results(pack, lengths)
    args = (ring_attention_spec(**ROTARY), sizes, lengths, order, weights, pack)
    for result in run_on_ranks(attention_on_rank, num_ranks, *args):
        assert result.keys() == expected.keys()
        for name, tensor in expected.items():
            assert_equal_to_rounding(result[name], tensor, what=name)


SPLITS = [
    (1, {}, "contiguous"),
    (2, {"tp": 2}, "contiguous"),
    pytest.param(2, {"cp": 2}, "zigzag", marks=pytest.mark.slow),
    (4, {"tp": 2, "cp": 2}, "fold"),
    pytest.param(4, {"cp": 4}, "zigzag", marks=pytest.mark.slow),
]


@pytest.mark.parametrize(("num_ranks", "sizes", "order"), SPLITS)
def test_packs_equal_the_plain_module(num_ranks, sizes, order) -> None:
    check(num_ranks, sizes, LENGTHS, order)


@pytest.mark.parametrize(("num_ranks", "sizes", "order"), SPLITS)
def test_rows_in_megatrons_order_equal_the_plain_module(num_ranks, sizes, order) -> None:
    check(num_ranks, sizes, None)


def core_in_megatrons_attention(core: type, mask: str) -> list[Tensor]:
    """Megatron's SelfAttention around a core attention, on one rank."""
    groups = initialize()
    torch.manual_seed(4)
    spec = ModuleSpec(
        module=SelfAttention,
        submodules=SelfAttentionSubmodules(ColumnParallelLinear, core, RowParallelLinear),
        params={"attn_mask_type": AttnMaskType[mask]},
    )
    module = build_module(spec, config=config(), layer_number=1, pg_collection=groups)
    hidden = torch.randn(12, 2, HIDDEN, dtype=torch.float64, requires_grad=True)
    angles = torch.randn(12, 1, 1, HEAD_DIM // 2, dtype=torch.float64).repeat(1, 1, 1, 2)
    causal = torch.ones(1, 1, 12, 12, dtype=torch.bool).triu(1)
    attention_mask = causal if mask == "causal" else None
    output, _ = module(hidden, attention_mask, rotary_pos_emb=angles)
    leaves = [hidden, *module.parameters()]
    return [output.detach(), *torch.autograd.grad((output * hidden.detach()).sum(), leaves)]


@pytest.mark.parametrize("mask", ["causal", "no_mask"])
def test_core_attention_is_megatrons_on_one_rank(mask: str) -> None:
    (ours,) = run_on_ranks(core_in_megatrons_attention, 1, RingCoreAttention, mask)
    (theirs,) = run_on_ranks(core_in_megatrons_attention, 1, DotProductAttention, mask)
    for actual, expected in zip(ours, theirs, strict=True):
        # Megatron's softmax is float32 inside.
        assert_equal_to_rounding(actual, expected, tolerance=16 * torch.finfo(torch.float32).eps)


def build_core(mask: AttnMaskType = AttnMaskType.causal, **options: object) -> RingCoreAttention:
    return RingCoreAttention(config(**options), 1, mask, "self", pg_collection=initialize())


def refusals_of_core() -> None:
    with pytest.raises(ValueError, match=r"config\.attention_dropout must be 0\.0"):
        build_core(attention_dropout=0.1)
    with pytest.raises(ValueError, match=r"config\.window_size must be None"):
        build_core(window_size=(4, 0))
    with pytest.raises(ValueError, match="attn_mask_type must be one of"):
        build_core(AttnMaskType.padding)
    with pytest.raises(ValueError, match="must be self-attention"):
        RingCoreAttention(config(), 1, AttnMaskType.causal, "cross", pg_collection=initialize())
    core, x = build_core(), torch.zeros(4, 1, HEADS, HEAD_DIM)
    with pytest.raises(ValueError, match="attention_bias must be None"):
        core(x, x, x, attention_bias=x)


def refusals_of_self_attention() -> None:
    groups = initialize()

    def build(spec: ModuleSpec | None = None, **options: object) -> RingSelfAttention:
        spec = spec or ring_attention_spec(**ROTARY)
        return build_module(spec, config=config(**options), layer_number=1, pg_collection=groups)

    with pytest.raises(ValueError, match=r"config\.rotary_interleaved must be False"):
        build(rotary_interleaved=True)
    with pytest.raises(ValueError, match="rotary_dim must be even"):
        build(ring_attention_spec(rotary_dim=3))
    module, hidden = build(), torch.zeros(4, 1, HIDDEN, dtype=torch.float64)
    with pytest.raises(ValueError, match="rotary_pos_emb must be None"):
        module(hidden, rotary_pos_emb=torch.zeros(4, 1, 1, 4))
    with pytest.raises(ValueError, match="inference_context must be None"):
        module(hidden, inference_context=object())
    packed = PackedSequence(layout=SequenceLayout((4,), 2))
    with pytest.raises(ValueError, match="layout must be for the 1 context-parallel"):
        module(hidden, packed_seq_params=packed)


def refusal_of_heads() -> None:
    groups = initialize(tp=2)
    options = config(num_query_groups=1, tensor_model_parallel_size=1)
    with pytest.raises(ValueError, match="must divide over 2"):
        build_module(
            ring_attention_spec(**ROTARY), config=options, layer_number=1, pg_collection=groups
        )


def test_options_that_are_not_supported_are_refused() -> None:
    run_on_ranks(refusals_of_core, 1)
    run_on_ranks(refusals_of_self_attention, 1)
    run_on_ranks(refusal_of_heads, 2)
