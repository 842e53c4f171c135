"""FlashAttention-2 on NVIDIA GPUs, as PyTorch ships it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import pad

from lasp._core.cache import tensor_cache
from lasp._core.dtypes import wide_dtype
from lasp._core.host_constants import to_device
from ring.blocks.interface import QKV, Block, Operands, Segments
from ring.blocks.merge import Partial
from ring.planner.window import CAUSAL, EVERYTHING, Window

aten = torch.ops.aten


class FlashBlock(Block):
    """FlashAttention-2, dense and varlen: one varlen call covers all fragments of a rank.

    It takes one head dim: narrower values, or keys, are padded with zeros, which changes nothing.
    dq is bit-reproducible under ``torch.use_deterministic_algorithms(True)`` only.
    """

    name = "flash"
    max_head_dim = 256

    def obstacle(self, operands: Operands) -> str | None:
        """Name the device, dtype or head dim that the kernels refuse."""
        device, dtype, *head_dims, _ = operands
        if device.type != "cuda" or torch.version.cuda is None:
            return "needs tensors on an NVIDIA GPU"
        if torch.cuda.get_device_capability(device) < (8, 0):
            return "needs compute capability 8.0 or above"
        if dtype not in (torch.bfloat16, torch.float16):
            return "needs bfloat16 or float16"
        if any(dim % 8 or dim > self.max_head_dim for dim in head_dims):
            return f"needs head dims that 8 divides, {self.max_head_dim} at most"
        return None

    def forward(self, qkv: QKV, *, window: Window, scale: float) -> Partial:
        """Run one kernel call; two for windows that the kernels do not know, see :func:`_split`."""
        if halves := _split(qkv, window):
            top, rest = (
                self.forward(qkv._replace(q=qkv.q[rows]), window=seen, scale=scale)
                for rows, seen in halves
            )
            return Partial(*(torch.cat(pair) for pair in zip(top, rest)))
        lengths = (None, None, len(qkv.q), len(qkv.k))
        output, lse, *_ = aten._flash_attention_forward(
            *(x[None] for x in one_width(*qkv)),
            *(*lengths, 0.0, window == CAUSAL, False),
            **_options(window, scale),
        )
        return Partial(as_wide_as(qkv.v, output[0]), lse[0].T)

    def backward(
        self, doutput: Tensor, merged: Partial, qkv: QKV, *, window: Window, scale: float
    ) -> QKV:
        """Run one kernel call; two where :meth:`forward` does, whose dk and dv are added."""
        if halves := _split(qkv, window):
            (dq, *top), (rest_dq, *rest) = (
                self.backward(
                    doutput[rows], Partial(*(x[rows] for x in merged)),
                    qkv._replace(q=qkv.q[rows]), window=seen, scale=scale,
                )
                for rows, seen in halves
            )  # fmt: skip
            return QKV(
                torch.cat((dq, rest_dq)),
                *(a.to(wide_dtype(a.dtype)) + b for a, b in zip(top, rest)),
            )
        tensors = (*one_width(doutput, *qkv, merged.output), merged.lse.T.contiguous())
        lengths = (None, None, len(qkv.q), len(qkv.k))
        gradients = aten._flash_attention_backward(
            *(x[None] for x in tensors),
            *(*lengths, 0.0, window == CAUSAL, *_no_dropout(qkv.q.device)),
            **_options(window, scale),
        )
        return QKV(*(as_wide_as(x, dx[0]) for x, dx in zip(qkv, gradients)))

    def forward_varlen(self, qkv: QKV, segments: Segments, *, scale: float) -> Partial:
        """Run one varlen call for all segments."""
        output, lse, *_ = aten._flash_attention_forward(
            *one_width(*qkv),
            *(*segments.lengths, 0.0, segments.window == CAUSAL, False),
            **_options(segments.window, scale),
        )
        return Partial(as_wide_as(qkv.v, output), lse.T)

    def backward_varlen(
        self, doutput: Tensor, merged: Partial, qkv: QKV, segments: Segments, *, scale: float
    ) -> QKV:
        """Run one varlen call for all segments."""
        tensors = (*one_width(doutput, *qkv, merged.output), merged.lse.T.contiguous())
        rest = (*segments.lengths, 0.0, segments.window == CAUSAL, *_no_dropout(qkv.q.device))
        options = _options(segments.window, scale)
        gradients = aten._flash_attention_backward(*tensors, *rest, **options)
        return QKV(*map(as_wide_as, qkv, gradients))


def _split(qkv: QKV, window: Window) -> tuple[tuple[slice, Window], ...]:
    """First and last rows with windows of their own; nothing where one call will do.

    The kernels take a limit of as many keys as there are, or more, for none, and make one of no
    limit where the other side has one. With more rows than keys the first rows stand further before
    the last key than that: those that see all keys, or not all, are a call of their own.
    """
    rows, keys = len(qkv.q), len(qkv.k)
    if rows > keys and window.left >= 0 and window.right < 0:
        whole = rows - keys + window.left + 1
        return (slice(whole), EVERYTHING), (slice(whole, None), window)
    if window.left < 0 and window.right >= keys:
        ragged = rows - window.right  # the last of them sees all keys, and no other does
        return (slice(ragged), CAUSAL), (slice(ragged, None), EVERYTHING)
    return ()


def _options(window: Window, scale: float) -> dict[str, Any]:
    """Keywords of a call; no mask and a causal one are told by ``is_causal`` alone."""
    if window in (EVERYTHING, CAUSAL):
        return {"scale": scale}
    return {"scale": scale, "window_size_left": window.left, "window_size_right": window.right}


def one_width(*tensors: Tensor, widths: Sequence[int] = ()) -> tuple[Tensor, ...]:
    """The tensors with zeros behind, up to the widest last dim: copies, where they differ.

    With ``widths``, in ascending order, up to the first of them that has room for the widest.
    """
    found = [x.shape[-1] for x in tensors]
    width = max(found)
    width = next((wide for wide in widths if wide >= width), width)
    if min(found) == width:
        return tensors
    return tuple(x if x.shape[-1] == width else pad(x, (0, width - x.shape[-1])) for x in tensors)


def as_wide_as(like: Tensor, x: Tensor) -> Tensor:
    """What :func:`one_width` was given, out of a result for it."""
    return x if x.shape[-1] == like.shape[-1] else x[..., : like.shape[-1]]


@tensor_cache(maxsize=64)  # devices
def _no_dropout(device: torch.device) -> tuple[Tensor, Tensor]:
    """The two random-state arguments of a flash backward, which only dropout reads; kept."""
    with torch.inference_mode(False):  # kept, and used in training too
        state = to_device(torch.zeros(2, dtype=torch.uint64, device="cpu"), device)
        return state, torch.empty(0, device=device)
