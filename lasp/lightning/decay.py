"""Decay rates of lightning attention heads: every published formula under its own name.

The state of head h shrinks by exp(-rate_h) a token. Formulas differ between vendors in the slope of
a head and in how much slower deeper layers decay, and a model run with another's formula is wrong
without any error, so the variant is explicit:

===============  ==============================================================================
minimax          ``2^(-8(h+1)/H) * (1 - l/(L-1+1e-5) + 1e-5)``, any H.
                 transformers 5.23, ``models/minimax/modeling_minimax.py``, ``get_slope_rate``
alibi            ALiBi slopes (for H not a power of two: those of the closest power below, then
                 every second one of twice that) ``* (1 - l/(L-1) + 1e-5)``.
                 vLLM ``MiniMaxText01``; the TransNormer example of OpenNLPLab/lightning-attention
bailing          ALiBi slopes ``* (1 - (l-1)/(L-1) + 1e-5)``: Ring-linear-2.0, Ling-2.5, Ring-2.5.
                 inclusionAI's ``modeling_bailing_moe_v2_5.py``; AReaL, sglang-jax
bailing_clamped  ALiBi slopes ``* (1 - max(l-1, 0)/(L-1) + 1e-5)``: the same but in layer 0.
                 mlx-lm ``models/bailing_moe_linear.py``
sala             ALiBi slopes in every layer: MiniCPM-SALA, arXiv:2602.11761.
                 openbmb's model files; OminiX-MLX ``minicpm-sala-mlx``
linear           ``(8h/H) * (1 - l/L)``: head 0 never decays.
                 TransNormerLLM, arXiv:2307.14995; ``fla.ops.lightning_attn``
retnet           ``-log(1 - 2^(-5-h))`` in every layer.
                 RetNet, arXiv:2307.08621; ``fla.ops.retention``
===============  ==============================================================================

Warning: Ling and Ring run with three offsets of the layer. The vendor's own files count l from 0
and subtract 1 (``bailing``: layer 0 decays a little faster than its slopes say). mlx-lm 0.32
subtracts 1 but not from layer 0 for Ring-linear-2.0 (``bailing_clamped``). It subtracts nothing for
Ling-2.5, as vLLM and mcore-bridge (``alibi``: the last layer hardly decays). Take the one that the
weights were trained with; for released weights that is the vendor's.
"""

from __future__ import annotations

from math import inf
from typing import Literal, get_args

import torch
from torch import Tensor

from lasp._core.cache import tensor_cache
from lasp._core.checks import check_sizes
from lasp._core.host_constants import to_device

# A state that decays faster is gone after one token, in float64 too. Not more than that: a rate
# times a number of tokens is to stay finite, for 0 * infinity is NaN.
FASTEST = 2.0**14

Variant = Literal["minimax", "alibi", "bailing", "bailing_clamped", "sala", "linear", "retnet"]


def decay_rates(
    num_heads: int,
    layer_index: int,
    num_layers: int,
    variant: Variant | Tensor = "minimax",
    *,
    tp_rank: int = 0,
    tp_size: int = 1,
) -> Tensor:
    """Decay rate of each head of one layer, computed in fp64 and rounded once.

    Args:
        num_heads: H, the heads of the whole layer, over all tensor-parallel ranks.
        layer_index: l, counted from 0 over *all* layers of the model, softmax layers and earlier
            pipeline stages included.
        num_layers: L, all layers of the model.
        variant: the formula, see the module; or the rates ``[num_heads]`` of this layer themselves,
            finite and >= 0, of any float dtype, of which the slice is taken.
        tp_rank: which slice of the heads to return; rates follow the global head index.
        tp_size: number of slices; must divide ``num_heads``.

    Returns:
        float32 ``[num_heads / tp_size]``, >= 0, on the CPU whatever the default device: the
        operator reads rates on the host.

    Raises:
        ValueError: naming the argument that is out of range.
    """
    check_sizes(num_heads=num_heads, num_layers=num_layers, tp_size=tp_size)
    if layer_index not in range(num_layers):
        raise ValueError(
            f"layer_index must be in [0, {num_layers}), got {layer_index!r}: count from 0 over all"
            " layers of the model"
        )
    if num_heads % tp_size or tp_rank not in range(tp_size):
        raise ValueError(
            f"tp_size must divide num_heads and tp_rank be in [0, tp_size), got tp_size {tp_size},"
            f" tp_rank {tp_rank}, num_heads {num_heads}: pass the heads of the whole layer"
        )
    if isinstance(variant, Tensor):
        rates = _given(variant, num_heads)
    else:
        check_variant(variant, "variant")
        rates = _formula(num_heads, layer_index, num_layers, variant)
    heads = num_heads // tp_size
    return rates[tp_rank * heads : (tp_rank + 1) * heads].to(torch.float32)


def check_variant(variant: object, name: str) -> None:
    """Raise ValueError unless ``variant``, the argument ``name``, is a formula of this module."""
    if variant not in get_args(Variant):
        raise ValueError(
            f"{name} must be one of {get_args(Variant)}, got {variant!r}: see lasp.lightning.decay"
        )


def _given(rates: Tensor, num_heads: int) -> Tensor:
    """Rates that a caller brings, on the CPU in float64."""
    if rates.shape != (num_heads,) or not rates.is_floating_point():
        raise ValueError(
            f"variant must be a formula or the float rates of all {num_heads} heads, got a tensor"
            f" {tuple(rates.shape)} of {rates.dtype}"
        )
    host = rates.detach().to("cpu", torch.float64)
    check_rates(tuple(host.tolist()))
    return host


def _formula(num_heads: int, layer_index: int, num_layers: int, variant: Variant) -> Tensor:
    """Rates of all heads in float64."""
    head = torch.arange(num_heads, dtype=torch.float64, device="cpu")
    last = num_layers - 1
    if variant == "minimax":
        slope: Tensor = 2.0 ** (-8.0 * (head + 1) / num_heads)
        return slope * (1 - layer_index / (last + 1e-5) + 1e-5)
    if variant == "linear":
        return 8.0 * head / num_heads * (1 - layer_index / num_layers)
    if variant == "retnet":
        return -torch.log1p(-(2.0 ** (-5 - head)))
    counted = {
        "alibi": layer_index,
        "bailing": layer_index - 1,
        "bailing_clamped": max(layer_index - 1, 0),
    }
    factor = 1.0 if variant == "sala" else 1 - counted[variant] / max(last, 1) + 1e-5
    return _alibi_slopes(num_heads) * factor


def rates_on(rates: Tensor, device: torch.device, dtype: torch.dtype) -> Tensor:
    """The rates on ``device``, without waiting for it.

    From the CPU they are checked, copied once and remembered by value; on the device of a GPU they
    are taken as they are.
    """
    if rates.device == device and device.type != "cpu":
        return rates.to(dtype).contiguous()  # kernels read them one after the other
    return rates_by_value(tuple(rates.tolist()), device, dtype)


@tensor_cache(maxsize=1024)  # one entry a layer
def rates_by_value(values: tuple[float, ...], device: torch.device, dtype: torch.dtype) -> Tensor:
    """The rates as a tensor that every call with these values shares, none above ``FASTEST``."""
    check_rates(values)
    with torch.inference_mode(False):  # else a model first run in inference mode could not train
        rates = torch.tensor(values, dtype=torch.float64, device="cpu").clamp(max=FASTEST)
        return to_device(rates.to(dtype), device, wait=True)


def check_rates(values: tuple[float, ...]) -> tuple[float, ...]:
    """The rates; raise ValueError unless they are finite numbers >= 0."""
    if not all(0 <= rate < inf for rate in values):
        raise ValueError(
            f"rates must be finite and >= 0 (the state decays by exp(-rate)), got {values}: see"
            " decay_rates"
        )
    return values


def _alibi_slopes(num_heads: int) -> Tensor:
    """``2^(-8(h+1)/H)`` for a power of two, else the closest power below and then a half step."""
    power = 2 ** (num_heads.bit_length() - 1)

    def slopes(count: int) -> Tensor:
        head = torch.arange(1, count + 1, dtype=torch.float64, device="cpu")
        return 2.0 ** (-8.0 * head / count)

    return torch.cat([slopes(power), slopes(2 * power)[0::2][: num_heads - power]])
