"""FlashAttention-4 on NVIDIA Hopper GPUs, from the package flash-attn-4 (extra ``fa4``)."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from importlib import import_module
from importlib.metadata import PackageNotFoundError, version
from typing import Any

import torch
from torch import Tensor

from ring.blocks.flash import FlashBlock, as_wide_as, one_width
from ring.blocks.interface import QKV, Operands, Segments
from ring.blocks.merge import Partial
from ring.planner.window import Window

VERSION = "4.0.0b36"  # a beta: what we call is not its public interface
# Head dims that were compared with the oracle on an H200. At 72 dq was wrong; 96 has its kernel.
HEAD_DIMS = (64, 128, 192, 256)


class Fa4Block(FlashBlock):
    """FlashAttention-4: the fastest kernel; it compiles once a configuration, for any shapes.

    One varlen call takes all fragments of a rank. It takes what :class:`FlashBlock` takes, on
    compute capability 9.0. Keys of 192 and values of 128, with as many key heads as query heads,
    run as they are; other widths are padded with zeros to one of ``HEAD_DIMS``. dq, dk and dv are
    bit-reproducible under ``torch.use_deterministic_algorithms(True)`` only.

    Args:
        dlse: gradient of the lse of the rows, for a backward; None: none.
    """

    name = "fa4"
    in_place = True

    def __init__(self, dlse: Tensor | None = None) -> None:
        self._dlse = dlse

    def with_dlse(self, dlse: Tensor) -> Fa4Block:
        """The kernel takes it: no second call."""
        return Fa4Block(dlse)

    def obstacle(self, operands: Operands) -> str | None:
        """Return the obstacle of :class:`FlashBlock`, or name the GPU or the package it needs."""
        if (obstacle := super().obstacle(operands)) is not None:
            return obstacle
        if torch.cuda.get_device_capability(operands.device) != (9, 0):
            return "needs compute capability 9.0 (Hopper)"
        return _missing()

    def forward(self, qkv: QKV, *, window: Window, scale: float) -> Partial:
        """Run one kernel call, whatever the shape."""
        output, lse = _forward(*(x[None] for x in _widths(qkv)), **_options(window, scale))
        return Partial(as_wide_as(qkv.v, output[0]), lse[0].T)

    def backward(
        self, doutput: Tensor, merged: Partial, qkv: QKV, *, window: Window, scale: float
    ) -> QKV:
        """Run one kernel call, whatever the shape."""
        return self._dense_backward(doutput, merged, qkv, _options(window, scale))

    def forward_varlen(self, qkv: QKV, segments: Segments, *, scale: float) -> Partial:
        """Run one varlen call for all segments, a dense one for one segment."""
        if len(segments.borders) == 2:
            return self.forward(qkv, window=segments.window, scale=scale)
        options = _options(segments.window, scale) | _lengths(segments)
        output, lse = _forward(*_widths(qkv), **options)
        return Partial(as_wide_as(qkv.v, output), lse.T)

    def backward_varlen(
        self, doutput: Tensor, merged: Partial, qkv: QKV, segments: Segments, *, scale: float
    ) -> QKV:
        """Run one varlen call for all segments, a dense one for one segment."""
        options = _options(segments.window, scale)
        return self._backward(doutput, merged, qkv, segments, options)

    def forward_to(self, out: Partial, qkv: QKV, segments: Segments, *, scale: float) -> None:
        """Run one call that writes the output where it belongs; padded widths are copied."""
        if not _fit(qkv):
            super().forward_to(out, qkv, segments, scale=scale)
            return
        options, output, (q, k, v) = _options(segments.window, scale), out.output, qkv
        if len(segments.borders) == 2:
            lse = _forward(q[None], k[None], v[None], out=output[None], **options)[1][0]
        else:
            options |= _lengths(segments)
            lse = _forward(q, k, v, out=output, **options)[1]
        out.lse.copy_(lse.T)

    def backward_to(
        self,
        out: QKV,
        doutput: Tensor,
        merged: Partial,
        qkv: QKV,
        segments: Segments,
        *,
        scale: float,
    ) -> None:
        """Run one call that writes the gradients where they belong; padded widths are copied."""
        if not _fit(qkv):
            super().backward_to(out, doutput, merged, qkv, segments, scale=scale)
            return
        options = _options(segments.window, scale) | dict(zip(("dq", "dk", "dv"), out))
        self._backward(doutput, merged, qkv, segments, options)

    def _backward(
        self,
        doutput: Tensor,
        merged: Partial,
        qkv: QKV,
        segments: Segments,
        options: dict[str, Any],
    ) -> QKV:
        if len(segments.borders) == 2:
            return self._dense_backward(doutput, merged, qkv, options)
        tensors = (*_widths(qkv, merged.output, doutput), merged.lse.T.contiguous())
        dlse = None if self._dlse is None else self._dlse.T
        gradients = _backward(*tensors, dlse=dlse, **options, **_lengths(segments))
        return QKV(*map(as_wide_as, qkv, gradients))

    def _dense_backward(
        self, doutput: Tensor, merged: Partial, qkv: QKV, options: dict[str, Any]
    ) -> QKV:
        tensors = (*_widths(qkv, merged.output, doutput), merged.lse.T.contiguous())
        dlse = None if self._dlse is None else self._dlse.T[None]
        options = {name: x[None] if isinstance(x, Tensor) else x for name, x in options.items()}
        gradients = _backward(*(x[None] for x in tensors), dlse=dlse, **options)
        return QKV(*(as_wide_as(x, dx[0]) for x, dx in zip(qkv, gradients)))


@cache
def _missing() -> str | None:
    """Say what is not installed; looked up once, where a GPU could run it."""
    try:
        found = version("flash-attn-4")
        if found != VERSION:
            return f"needs flash-attn-4 {VERSION}, and {found} is installed"
        import_module("flash_attn.cute.interface")
    except PackageNotFoundError:
        return f"needs flash-attn-4 {VERSION}: pip install 'lasp-plus[fa4]'"
    except ImportError as error:
        return f"needs what flash-attn-4 imports ({error}): pip install 'lasp-plus[fa4]'"
    return None


@cache
def _kernels() -> tuple[Callable[..., Any], Callable[..., Any]]:
    interface = import_module("flash_attn.cute.interface")
    return interface._flash_attn_fwd, interface._flash_attn_bwd


def _forward(q: Tensor, k: Tensor, v: Tensor, **options: Any) -> tuple[Tensor, Tensor]:
    """Output, and lse with the rows last."""
    if q.is_cuda and q.device.index != torch.cuda.current_device():
        with torch.cuda.device_of(q):
            return _forward(q, k, v, **options)
    output, lse, *_ = _kernels()[0](q, k, v, return_lse=True, **options)
    return output, lse


def _backward(*tensors: Tensor, **options: Any) -> tuple[Tensor, ...]:
    """Gradients to q, k and v; tensors are q, k, v, output, its gradient, and lse rows last."""
    if tensors[0].is_cuda and tensors[0].device.index != torch.cuda.current_device():
        with torch.cuda.device_of(tensors[0]):
            return _backward(*tensors, **options)
    deterministic = torch.are_deterministic_algorithms_enabled()
    dq, dk, dv, *_ = _kernels()[1](*tensors, deterministic=deterministic, **options)
    return dq, dk, dv


def _options(window: Window, scale: float) -> dict[str, Any]:
    left, right = window
    return {
        "softmax_scale": scale,
        "window_size_left": left if left >= 0 else None,
        "window_size_right": right if right >= 0 else None,
    }


def _lengths(segments: Segments) -> dict[str, Any]:
    names = ("cu_seqlens_q", "cu_seqlens_k", "max_seqlen_q", "max_seqlen_k")
    return dict(zip(names, segments.lengths))


def _fit(qkv: QKV) -> bool:
    """Whether the kernels take these widths: two of them only without grouped heads."""
    (_, heads, head_dim), value_dim = qkv.q.shape, qkv.v.shape[-1]
    if head_dim == value_dim:
        return head_dim in HEAD_DIMS
    return (head_dim, value_dim) == (192, 128) and heads == qkv.k.shape[1]


def _widths(qkv: QKV, *outputs: Tensor) -> tuple[Tensor, ...]:
    """The tensors as the kernels take them."""
    tensors = (*qkv, *outputs)
    return tensors if _fit(qkv) else one_width(*tensors, widths=HEAD_DIMS)
