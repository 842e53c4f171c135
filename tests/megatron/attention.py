"""An attention part of Megatron on ranks against the plain module on one."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from itertools import accumulate
from typing import Any, NamedTuple

import torch
from megatron.core.packed_seq_params import PackedSeqParams
from megatron.core.transformer.spec_utils import ModuleSpec, build_module
from megatron.core.transformer.transformer_config import MLATransformerConfig, TransformerConfig
from torch import Tensor

from lasp.layers.lightning_attention import LightningAttention
from lasp.layers.options import LightningOptions
from lasp.megatron import PackedSequence, lightning_attention_spec, merge_projections
from lasp.sequence.layout import SequenceLayout
from ring.megatron import ring_attention_spec
from ring.module import RingAttention
from tests.closeness import assert_equal_to_rounding, assert_within_budget
from tests.megatron.cpu import gathered, initialize, summed
from tests.ranks import run_on_ranks

HIDDEN, HEADS, KV_HEADS, HEAD_DIM, LAYERS = 10, 4, 2, 6, 5
LENGTHS = (13, 1, 0, 20, 6)
ROTARY = {"rotary_dim": 4, "rope_base": 100.0}


def config(**options: Any) -> TransformerConfig:
    """float64 on the CPU, no dropout, no biases."""
    chosen = {
        "num_layers": LAYERS,
        "hidden_size": HIDDEN,
        "num_attention_heads": HEADS,
        "num_query_groups": KV_HEADS,
        "kv_channels": HEAD_DIM,
        "ffn_hidden_size": 8,
        "attention_dropout": 0.0,
        "hidden_dropout": 0.0,
        "add_bias_linear": False,
        "normalization": "RMSNorm",
        "gated_linear_unit": True,
        "activation_func": torch.nn.functional.silu,
        "bias_activation_fusion": False,
        "masked_softmax_fusion": False,
        "bias_dropout_fusion": False,
        "gradient_accumulation_fusion": False,
        "use_cpu_initialization": True,
        "params_dtype": torch.float64,
    }
    kind = MLATransformerConfig if "kv_lora_rank" in options else TransformerConfig
    return kind(**(chosen | options))


def parallel_config(sizes: dict[str, int], **options: Any) -> TransformerConfig:
    tp = sizes.get("tp", 1)
    parallel = {
        "tensor_model_parallel_size": tp,
        "context_parallel_size": sizes.get("cp", 1),
        "pipeline_model_parallel_size": sizes.get("pp", 1),
        "expert_model_parallel_size": sizes.get("ep", 1),
        "expert_tensor_parallel_size": sizes.get("etp", 1),
        "sequence_parallel": tp > 1,
    }
    return config(**(parallel | options))


# Which dim of a parameter is cut over tp; others are whole on every rank.
CUT = {
    "linear_fc1": 1,
    "linear_fc2": 1,
    "in_proj": 0,
    "out_norm": 0,
    "out_proj": 1,
    "linear_qkv": 0,
    "linear_proj": 1,
    "linear_q_proj": 0,
    "linear_q_down_proj": 0,
    "linear_q_up_proj": 0,
    "linear_kv_down_proj": 0,
    "linear_kv_up_proj": 0,
}


def load(module: torch.nn.Module, weights: dict[str, Tensor], tp_group: Any) -> None:
    """Give each rank its part of the whole weights."""
    for name, parameter in module.named_parameters():
        whole = weights[name]
        dim = CUT.get(name.split(".")[0])
        part = whole if dim is None else whole.chunk(tp_group.size(), dim)[tp_group.rank()]
        assert part.shape == parameter.shape, name
        parameter.data.copy_(part)


def whole_gradients(module: torch.nn.Module, groups: Any) -> dict[str, Tensor]:
    """Gradients summed over cp and joined over tp: what Megatron's DDP makes of them."""
    grads = {}
    for name, parameter in module.named_parameters():
        grad = summed(parameter.grad, groups.cp)
        dim = CUT.get(name.split(".")[0])
        if dim is not None:
            grad = torch.cat(gathered(grad, groups.tp), dim)
        elif getattr(parameter, "sequence_parallel", False):
            grad = summed(grad, groups.tp)
        grads[name] = grad.cpu()
    return grads


def megatrons_pack(layout: SequenceLayout) -> PackedSeqParams:
    """As Megatron's loaders make it: the lengths of the whole pack, and padded where it is."""
    real, padded = (
        torch.tensor((0, *accumulate(lengths)), dtype=torch.int32)
        for lengths in (layout.document_lengths, layout.padded_lengths or layout.document_lengths)
    )
    named = {"cu_seqlens_q": real, "cu_seqlens_kv": real}
    if layout.padded_lengths is not None:
        named |= {"cu_seqlens_q_padded": padded, "cu_seqlens_kv_padded": padded}
    longest = int(padded.diff().max())
    return PackedSeqParams(qkv_format="thd", max_seqlen_q=longest, max_seqlen_kv=longest, **named)


def attention_on_rank(
    spec: ModuleSpec,
    sizes: dict[str, int],
    lengths: tuple[int, ...] | None,
    order: str,
    weights: dict[str, Tensor],
    pack: Tensor,
    device: str = "cpu",
    sequence_parallel: bool = True,
    megatrons: bool = False,
    configured: dict[str, Any] | None = None,
) -> dict[str, Tensor]:
    """Output, input gradient and parameter gradients for the loss sum(output * cos(pack)).

    ``pack`` is [S, hidden]; with ``lengths`` None it is [S, B, hidden], a batch of B rows in
    ``order``. With ``megatrons`` the part gets Megatron's own PackedSeqParams. Padding is sevens.
    ``configured`` are options of the config.
    """
    groups = initialize(device, **sizes)
    sequence_parallel = sequence_parallel and sizes.get("tp", 1) > 1
    options = parallel_config(
        sizes,
        sequence_parallel=sequence_parallel,
        params_dtype=pack.dtype,
        **(configured or {}),
    )
    if lengths is None:
        options.linear_cp_layout = options.attention_cp_layout = order  # as Megatron's main
    module = build_module(spec, config=options, layer_number=3, pg_collection=groups).to(device)
    load(module, weights, groups.tp)
    packed = None
    if lengths is None:
        layout = SequenceLayout((len(pack),), groups.cp.size(), order)
    else:
        layout = SequenceLayout(lengths, groups.cp.size(), order)
        packed = megatrons_pack(layout) if megatrons else PackedSequence(layout=layout)
        pack = pack.unsqueeze(1)

    def cut(x: Tensor, padding: float = 0.0) -> Tensor:
        local = layout.shard(x, groups.cp.rank(), pad_value=padding)
        return local.chunk(groups.tp.size())[groups.tp.rank()] if sequence_parallel else local

    hidden = cut(pack, padding=7.0).to(device).requires_grad_()
    output, bias = module(hidden, packed_seq_params=packed)
    assert bias is None
    output.backward(cut(pack.cos()).to(device))

    def join(x: Tensor) -> Tensor:
        local = torch.cat(gathered(x, groups.tp)) if sequence_parallel else x
        return layout.unshard(gathered(local, groups.cp)).cpu()

    return {
        "output": join(output.detach()),
        "input": join(hidden.grad),
        **whole_gradients(module, groups),
    }


class Case(NamedTuple):
    """A part and the plain module that it must equal.

    Attributes:
        spec: of the part.
        plain: the module, of one value whatever the dtype.
        names: values of the module's parameters under the names of the part's.
        configured: options of the config that the part is built with.
    """

    spec: ModuleSpec
    plain: Callable[[torch.dtype], torch.nn.Module]
    names: Callable[[dict[str, Tensor]], dict[str, Tensor]]
    configured: dict[str, Any] = {}  # noqa: RUF012

    def weights(self) -> dict[str, Tensor]:
        parameters = self.plain(torch.float64).named_parameters()
        return self.names({name: parameter.detach() for name, parameter in parameters})

    def expected(self, pack: Tensor, lengths: tuple[int, ...] | None) -> dict[str, Tensor]:
        """What :func:`attention_on_rank` returns, of the plain module, each document alone."""
        module = self.plain(pack.dtype)
        hidden = pack.clone().requires_grad_()
        if lengths is None:  # [S, B, hidden]
            output = torch.stack([module(row) for row in hidden.unbind(1)], dim=1)
        else:
            documents = [part for part in hidden.split(lengths) if len(part)]
            output = torch.cat([module(part) for part in documents]).unsqueeze(1)
        output.backward(pack.cos().view_as(output))
        grads = self.names({name: p.grad for name, p in module.named_parameters()})
        return {"output": output.detach(), "input": hidden.grad.view_as(output), **grads}

    def check(
        self,
        num_ranks: int,
        sizes: dict[str, int],
        lengths: tuple[int, ...] | None,
        order: str = "contiguous",
        **options: Any,
    ) -> None:
        """float64 on every rank: equal to rounding."""
        shape = (sum(LENGTHS), HIDDEN) if lengths else (16, 3, HIDDEN)
        pack = torch.randn(shape, dtype=torch.float64)
        expected = self.expected(pack, lengths)
        args = (self.spec, sizes, lengths, order, self.weights(), pack)
        options |= {"configured": self.configured}
        for result in run_on_ranks(attention_on_rank, num_ranks, *args, **options):
            assert result.keys() == expected.keys()
            for name, tensor in expected.items():
                assert_equal_to_rounding(result[name], tensor, what=name)

    def check_float32(self, num_ranks: int, sizes: dict[str, int], order: str) -> None:
        """float32: errors of the size of the plain module's own."""
        pack = torch.randn(sum(LENGTHS), HIDDEN)
        oracle, honest = self.expected(pack.double(), LENGTHS), self.expected(pack, LENGTHS)
        args = (self.spec, sizes, LENGTHS, order, self.weights(), pack)
        result = run_on_ranks(attention_on_rank, num_ranks, *args)[0]
        for name in oracle:
            assert_within_budget(result[name], oracle[name], honest[name], what=name)


def plain_lightning(dtype: torch.dtype = torch.float64, **options: Any) -> LightningAttention:
    torch.manual_seed(3)
    module = LightningAttention(HIDDEN, HEADS, HEAD_DIM, 2, LAYERS, dtype=torch.float64, **options)
    for name, parameter in module.named_parameters():
        if "norm" in name:
            torch.nn.init.normal_(parameter)
    return module.to(dtype)


def lightning_names(values: dict[str, Tensor]) -> dict[str, Tensor]:
    norms = {name: values[name] for name in values if name in ("q_norm.weight", "k_norm.weight")}
    return norms | {
        "in_proj.weight": merge_projections(
            values["qkv_proj.weight"], values["output_gate.weight"], HEADS
        ),
        "out_norm.weight": values["norm.weight"],
        "out_proj.weight": values["out_proj.weight"],
    }


def plain_ring(dtype: torch.dtype = torch.float64) -> RingAttention:
    torch.manual_seed(3)
    module = RingAttention(HIDDEN, HEADS, KV_HEADS, HEAD_DIM, dtype=torch.float64, **ROTARY)
    return module.to(dtype)


def ring_names(values: dict[str, Tensor]) -> dict[str, Tensor]:
    """Megatron lays q, k and v out group by group: the query heads of a key head, k, v."""
    q, k, v = (
        values[f"{name}_proj.weight"].unflatten(0, (KV_HEADS, -1)) for name in ("q", "k", "v")
    )
    return {
        "linear_qkv.weight": torch.cat((q, k, v), dim=1).flatten(0, 1),
        "linear_proj.weight": values["o_proj.weight"],
    }


LIGHTNING = Case(lightning_attention_spec(), plain_lightning, lightning_names)
LING_OPTIONS: dict[str, Any] = {
    "decay": "bailing",
    "options": LightningOptions(
        activation="none", qk_norm=True, rotary_dim=4, rope_base=100.0, scale=None, norm_groups=2
    ),
}
LING = Case(
    lightning_attention_spec(**LING_OPTIONS),
    partial(plain_lightning, **LING_OPTIONS),
    lightning_names,
)
RING = Case(ring_attention_spec(**ROTARY), plain_ring, ring_names)
