"""One attention layer of Megatron on ranks, its results put together again."""

from __future__ import annotations

from typing import Any

import torch
from megatron.core.packed_seq_params import PackedSeqParams
from megatron.core.transformer.spec_utils import ModuleSpec, build_module
from megatron.core.transformer.transformer_config import TransformerConfig
from torch import Tensor

from lasp.layout import SequenceLayout
from lasp.megatron import PackedSequence
from tests.megatron.cpu import gathered, initialize, summed

HIDDEN, HEADS, KV_HEADS, HEAD_DIM, LAYERS = 10, 4, 2, 6, 5


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
    return TransformerConfig(**(chosen | options))


def parallel_config(sizes: dict[str, int], **options: Any) -> TransformerConfig:
    tp = sizes.get("tp", 1)
    return config(
        tensor_model_parallel_size=tp,
        context_parallel_size=sizes.get("cp", 1),
        pipeline_model_parallel_size=sizes.get("pp", 1),
        expert_model_parallel_size=sizes.get("ep", 1),
        expert_tensor_parallel_size=sizes.get("etp", 1),
        sequence_parallel=tp > 1,
        **options,
    )


# Which dim of a parameter is cut over tp; others are whole on every rank.
CUT = {"in_proj": 0, "out_norm": 0, "out_proj": 1, "linear_qkv": 0, "linear_proj": 1}


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


def attention_on_rank(
    spec: ModuleSpec,
    sizes: dict[str, int],
    lengths: tuple[int, ...] | None,
    order: str,
    weights: dict[str, Tensor],
    pack: Tensor,
    device: str = "cpu",
    sequence_parallel: bool = True,
) -> dict[str, Tensor]:
    """Output, input gradient and parameter gradients for the loss sum(output * cos(pack)).

    ``pack`` is [S, hidden]; with ``lengths`` None it is [S, B, hidden], a batch of B rows.
    """
    groups = initialize(device, **sizes)
    options = parallel_config(sizes)
    options.sequence_parallel = sequence_parallel and sizes.get("tp", 1) > 1
    dtype = pack.dtype
    options.params_dtype = dtype
    module = build_module(spec, config=options, layer_number=3, pg_collection=groups).to(device)
    load(module, weights, groups.tp)
    packed = None
    if lengths is None:
        layout = SequenceLayout((len(pack),), groups.cp.size(), "zigzag")
    else:
        layout = SequenceLayout(lengths, groups.cp.size(), order)
        packed = PackedSequence(layout=layout)
        pack = pack.unsqueeze(1)

    def cut(x: Tensor) -> Tensor:
        local = layout.shard(x, groups.cp.rank())
        return (
            local.chunk(groups.tp.size())[groups.tp.rank()] if options.sequence_parallel else local
        )

    hidden = cut(pack).to(device).requires_grad_()
    output, bias = module(hidden, packed_seq_params=packed)
    assert bias is None
    output.backward(cut(pack.cos()).to(device))

    def join(x: Tensor) -> Tensor:
        local = torch.cat(gathered(x, groups.tp)) if options.sequence_parallel else x
        return layout.unshard(gathered(local, groups.cp)).cpu()

    grad = hidden.grad
    return {
        "output": join(output.detach()),
        "input": join(grad),
        **whole_gradients(module, groups),
    }


__all__ = ["PackedSeqParams", "attention_on_rank", "config", "load", "parallel_config"]
