"""Checks of what callers pass, all on the host: shapes, dtypes, devices and the values of rates.

Every rank checks before the first collective, so that a wrong call raises instead of hanging.
"""

from __future__ import annotations

from array import array

import torch
import torch.distributed as dist
from torch import Tensor

from lasp._core.checks import checked_rank, checked_scale
from lasp._core.consistency import compare_first_call, digest_of, is_compared
from lasp._core.dtypes import wide_dtype
from lasp.lightning.decay import check_rates
from lasp.lightning.op_context import OpContext, Settings
from lasp.lightning.triton.tuning import MAX_HEAD_DIM
from lasp.sequence.layout import SequenceLayout
from lasp.state_exchange import Exchange, resolve_exchange
from lasp.state_exchange.choice import NAMES, parse_exchange

CPU = torch.device("cpu")
DTYPES = torch.bfloat16, torch.float16, torch.float32, torch.float64


def unserved(q: Tensor, v: Tensor) -> str:
    """The head dim that the Triton kernels do not serve; empty if they serve both."""
    dim = max(q.shape[-1], v.shape[-1])
    return "" if dim <= MAX_HEAD_DIM else f"a head dim of {dim}, above {MAX_HEAD_DIM}"


def check_exchange(exchange: Exchange) -> None:
    """Raise ValueError for a name that is not offered."""
    if exchange not in NAMES:
        parse_exchange(exchange)


def check_qkv(q: Tensor, k: Tensor, v: Tensor) -> None:
    """Raise ValueError unless q and k are [T, H, K] or [B, T, H, K] and v [.., H, V] alike."""
    shape, v_shape, dtype = q.shape, v.shape, q.dtype
    if len(shape) not in (3, 4) or 0 in shape:
        raise ValueError(
            "q must be [T, H, K] or [B, T, H, K] with at least one element, got shape"
            f" {tuple(q.shape)}: split the heads into a dim of their own, x.unflatten(-1, (H, K))"
        )
    if k.shape != shape:
        raise ValueError(
            f"k must have the shape of q, {tuple(q.shape)}, got {tuple(k.shape)}: repeat heads that"
            " several queries share, k.repeat_interleave(H // k.shape[-2], dim=-2)"
        )
    if len(v_shape) != len(shape) or v_shape[:-1] != shape[:-1] or v_shape[-1] == 0:
        raise ValueError(
            f"v must be {tuple(q.shape[:-1])} + (V,), all but the last dim as in q, got"
            f" {tuple(v.shape)}: give it the tokens and heads of q, V may differ from K"
        )
    if dtype not in DTYPES:
        raise ValueError(
            f"q must be bf16, fp16, fp32 or fp64, got {q.dtype}: convert q, k and v, for example"
            " with q.to(torch.bfloat16)"
        )
    for name, tensor in (("k", k), ("v", v)):
        if tensor.dtype != dtype:
            raise ValueError(
                f"{name} must have the dtype of q, {q.dtype}, got {tensor.dtype}: convert one with"
                " .to(dtype)"
            )
        _check_device(name, tensor, q)


def checked_context(
    q: Tensor,
    v: Tensor,
    rates: Tensor,
    initial_state: Tensor | None,
    settings: Settings,
) -> OpContext:
    """The call, of :func:`check_kinds`; raise ValueError for what does not fit ``q`` and ``v``."""
    layout, cp_group, scale, exchange, output_final_state, state_eps = settings
    values = check_rates(tuple(rates.tolist()))
    if layout is None:
        layout = SequenceLayout((q.shape[-3],), num_ranks=1)
    rank = check_layout(layout, cp_group, q)
    check_initial_state(initial_state, q, v, layout)
    values *= q.shape[0] if q.dim() == 4 else 1  # rows are heads to those below
    choices = resolve_exchange(exchange, layout, values, state_eps, q.shape[-1], v.shape[-1])
    scale = checked_scale(scale)
    return OpContext(layout, rank, cp_group, scale, choices, output_final_state, state_eps, values)


def check_first_call(q: Tensor, v: Tensor, rates: Tensor, settings: Settings) -> None:
    """In the first call on a group have the ranks compare how they call, and raise if not alike."""
    layout, cp_group, scale, exchange, _, state_eps = settings
    if cp_group is None or is_compared("lightning_attention", cp_group):
        return
    values = rates.tolist()
    digest = digest_of(array("d", values)).hex()
    how = {
        "dtype": q.dtype,
        "q": list(q.shape),
        "v": list(v.shape),
        "rates": f"{min(values)} to {max(values)} (digest {digest})",
        "layout": layout and layout.summary,
        "exchange": exchange,
        "scale": float(scale),  # 1 is 1.0
        "state_eps": float(state_eps),
    }
    compare_first_call("lightning_attention", cp_group, q, how)


def check_kinds(rates: Tensor, q: Tensor, settings: Settings) -> None:
    """Raise ValueError for arguments that are no rates, layout, group or exchange of a call.

    Values, and whether they belong together, are not looked at.
    """
    if not isinstance(rates, Tensor):
        raise ValueError(f"rates must be a tensor [H], got {rates!r}: see decay_rates")
    num_heads = q.shape[-2]
    if rates.shape != (num_heads,):
        raise ValueError(
            f"rates must be [H] with H = {num_heads}, the heads of q on this rank, got shape"
            f" {tuple(rates.shape)}: under tensor parallelism slice the global vector,"
            " decay_rates(..., tp_rank=, tp_size=)"
        )
    if rates.dtype not in (torch.float32, torch.float64):
        raise ValueError(
            f"rates must be float32 or float64, got {rates.dtype}: keep them out of casts such as"
            " module.to(torch.bfloat16)"
        )
    if rates.is_meta or rates.device not in (CPU, q.device):
        raise ValueError(
            f"rates must be on the CPU, or on the device of q, {q.device}, and have values, got"
            f" {rates.device}: pass what decay_rates returns as it is"
        )
    if rates.requires_grad:
        raise ValueError("rates must not require grad, they get none: pass rates.detach()")
    layout = settings.layout
    if layout is not None and not isinstance(layout, SequenceLayout):
        raise ValueError(f"layout must be a SequenceLayout, got {layout!r}: build one from lengths")
    _check_group(settings.cp_group)
    check_exchange(settings.exchange)


def check_layout(layout: SequenceLayout, cp_group: dist.ProcessGroup | None, q: Tensor) -> int:
    """Raise ValueError unless layout, group and q belong together; this rank within the group."""
    _check_group(cp_group)
    rank = checked_rank("q", q, -3, layout, cp_group)
    if q.dim() == 4 and layout.num_documents != 1:
        raise ValueError(
            "layout must hold one document when q is [B, T, H, K], whose rows share it, got"
            f" {layout.num_documents}: pack the rows end to end as [T, H, K]"
        )
    return rank


def _check_group(cp_group: dist.ProcessGroup | None) -> None:
    if cp_group is not None and not isinstance(cp_group, dist.ProcessGroup):
        raise ValueError(
            f"cp_group must be a process group that holds this rank, got {cp_group!r}: call the"
            " operator on the members of the group only"
        )


def check_initial_state(
    initial_state: Tensor | None, q: Tensor, v: Tensor, layout: SequenceLayout
) -> None:
    """Raise ValueError unless initial_state is None or [N or B, H, K, V] in the state dtype."""
    if initial_state is None:
        return
    rows = layout.num_documents if q.dim() == 3 else q.shape[0]
    shape = (rows, q.shape[-2], q.shape[-1], v.shape[-1])
    if initial_state.shape != shape:
        raise ValueError(
            f"initial_state must be {shape}: [documents, H, K, V], or [B, H, K, V] for batched q,"
            f" got {tuple(initial_state.shape)}: one state for each, that of empty documents too"
        )
    if initial_state.dtype != wide_dtype(q.dtype):
        raise ValueError(
            f"initial_state must be {wide_dtype(q.dtype)} for q in {q.dtype}, got"
            f" {initial_state.dtype}: states are never rounded to the activation dtype"
        )
    _check_device("initial_state", initial_state, q)


def _check_device(name: str, tensor: Tensor, q: Tensor) -> None:
    if tensor.device != q.device:
        raise ValueError(
            f"{name} must be on the device of q, {q.device}, got {tensor.device}: move one with"
            " .to(device)"
        )
