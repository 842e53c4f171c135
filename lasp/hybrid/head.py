"""The head and the cross entropy in one, so that logits of all tokens never exist.

Logits are made and used some thousand tokens at a time, and the gradients with them, in the
forward: the backward only scales. ``torch.nn.functional.linear_cross_entropy`` does the same from
torch 2.13, but adds up the loss and the gradient of the weight in bfloat16.
"""

from __future__ import annotations

from functools import cache
from importlib.util import find_spec
from typing import Any, Literal, get_args

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from lasp._core.autocast import autocast_inputs
from lasp._core.derivatives import Reference, refuse_second_derivatives, refuse_transforms
from lasp._core.dtypes import wide_dtype

LossImpl = Literal["auto", "eager", "liger"]
CHUNK_TOKENS, CHUNK_LOGITS = 2048, 2**24  # at a time, whichever is more: 64 MiB in float32
IGNORED = -100
_REFERENCE = Reference("linear_cross_entropy", "torch.nn.functional.cross_entropy of the logits")


def linear_cross_entropy(
    hidden: Tensor, weight: Tensor, labels: Tensor, *, impl: LossImpl = "auto"
) -> Tensor:
    """``cross_entropy(hidden weight^T, labels, reduction="sum")``, a scalar in nats.

    Args:
        hidden: ``[T, hidden]``, any float dtype; under autocast it and the weight are cast.
        weight: ``[V, hidden]``.
        labels: int64 ``[T]``, -100 where there is no target.
        impl: ``eager``, plain torch; ``liger``, the kernels of liger-kernel for NVIDIA GPUs, in
            16 bits or float32 (``pip install 'lasp-plus[liger]'``), which wait for the number of
            targets; ``auto``, ``liger`` where it is installed and can run: not while a CUDA graph
            is captured.

    Returns:
        The sum over this rank's targets, in float32 (float64 of float64 inputs). Products are of
        the dtype of ``hidden``, with logits rounded to it by ``liger`` and on CPUs; all else is in
        float32 or better.

    Gradients: to ``hidden`` and ``weight``, once; made in the forward, where they are needed.
    Memory beside them: ``[2048, V]`` logits, or 2^24 with a small V; by ``liger`` about as many
    elements as ``hidden``; and the gradient of the weight in float32.

    Raises:
        ValueError: naming the argument.
    """
    hidden, weight = autocast_inputs(hidden, weight)
    if hidden.dim() != 2 or weight.dim() != 2 or hidden.shape[1] != weight.shape[1]:
        raise ValueError(
            f"hidden must be [T, hidden] and weight [V, hidden], got {list(hidden.shape)} and"
            f" {list(weight.shape)}"
        )
    if labels.shape != hidden.shape[:1] or labels.dtype != torch.int64:
        raise ValueError(
            f"labels must be int64 of shape [{hidden.shape[0]}], one a token, got {labels.dtype} of"
            f" {list(labels.shape)}: shard them as the tokens"
        )
    if weight.dtype != hidden.dtype:
        weight = weight.to(hidden.dtype)
    refuse_transforms(_REFERENCE, hidden, weight)
    if _chosen(impl, hidden) == "eager":
        loss: Tensor = _Chunked.apply(hidden, weight, labels)  # type: ignore[no-untyped-call]
        return loss
    return _by_liger(hidden, weight, labels)


class Head(nn.Linear):
    """The head of a model: logits, or with labels their summed cross entropy."""

    def forward(self, hidden: Tensor, labels: Tensor | None = None) -> Tensor:
        """``[T, V]`` logits, or with ``labels`` the scalar of :func:`linear_cross_entropy`."""
        if labels is None:
            return super().forward(hidden)
        return linear_cross_entropy(hidden, self.weight, labels)


def scored_by(
    head: nn.Module | None, embedding_VM: Tensor, normed: Tensor, labels: Tensor | None
) -> Tensor:
    """Logits, or with ``labels`` their loss, by the head, or by the embedding's weight if tied."""
    if head is not None:
        scored: Tensor = head(normed) if labels is None else head(normed, labels)
        return scored
    weight = embedding_VM.to(normed.dtype)
    return (
        F.linear(normed, weight) if labels is None else linear_cross_entropy(normed, weight, labels)
    )


def check_next_labels(
    labels: Tensor | None, next_tokens: Tensor | None, next_labels: Tensor | None
) -> None:
    """Raise ValueError unless there are next labels just where there are labels and next tokens."""
    if (next_labels is None) != (labels is None or next_tokens is None):
        raise ValueError(
            "next_labels must be given with labels and next_tokens, and only then, got"
            f" {'None' if next_labels is None else 'a tensor'}: pass"
            " lasp.hybrid.next_in_document of the labels, pad_value=-100"
        )


def _chosen(impl: LossImpl, hidden: Tensor) -> LossImpl:
    if impl not in get_args(LossImpl):
        raise ValueError(f"impl must be one of {get_args(LossImpl)}, got {impl!r}: use 'auto'")
    runs = hidden.is_cuda and torch.version.hip is None and hidden.dtype != torch.float64
    if impl == "auto":
        liger = runs and _has_liger() and not torch.cuda.is_current_stream_capturing()
        return "liger" if liger else "eager"
    if impl == "liger" and not (runs and _has_liger()):
        raise ValueError(
            f"impl must be 'eager' or 'auto' for {hidden.dtype} on {hidden.device}, got 'liger':"
            " it needs pip install 'lasp-plus[liger]', an NVIDIA GPU and no float64"
        )
    return impl


@cache
def _has_liger() -> bool:
    return find_spec("liger_kernel") is not None


def _by_liger(hidden: Tensor, weight: Tensor, labels: Tensor) -> Tensor:
    from liger_kernel.transformers.functional import liger_fused_linear_cross_entropy

    loss: Tensor = liger_fused_linear_cross_entropy(
        hidden, weight, labels, ignore_index=IGNORED, reduction="sum", accum_dtype=torch.float32
    )
    return loss


def chunk_tokens(vocab_size: int) -> int:
    """Tokens whose logits exist at a time: more of a small vocabulary, whose products are short."""
    return max(CHUNK_TOKENS, CHUNK_LOGITS // vocab_size)


class _Chunked(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, hidden_TM: Tensor, weight_VM: Tensor, labels_T: Tensor) -> Tensor:
        wide = wide_dtype(hidden_TM.dtype)
        loss = hidden_TM.new_zeros((), dtype=wide)
        dhidden_TM = torch.empty_like(hidden_TM) if ctx.needs_input_grad[0] else None
        dweight_VM = None
        if ctx.needs_input_grad[1]:
            dweight_VM = torch.zeros_like(weight_VM, dtype=wide)
        chunk = chunk_tokens(len(weight_VM))
        for start in range(0, hidden_TM.shape[0], chunk):
            rows = slice(start, start + chunk)
            x_CM, target_C1 = hidden_TM[rows], labels_T[rows].unsqueeze(1)
            is_target_C1 = target_C1 != IGNORED
            target_C1 = target_C1.masked_fill(~is_target_C1, 0)
            logits_CV = _product(x_CM, weight_VM, wide)
            logits_CV -= logits_CV.amax(1, keepdim=True)
            chosen_C1 = logits_CV.gather(1, target_C1)
            sums_C1 = logits_CV.exp_().sum(1, keepdim=True)
            loss += (sums_C1.log() - chosen_C1).masked_fill(~is_target_C1, 0).sum()
            if dhidden_TM is None and dweight_VM is None:
                continue
            logits_CV *= is_target_C1 / sums_C1
            logits_CV.scatter_add_(1, target_C1, -is_target_C1.to(wide))
            dlogits_CV = logits_CV.to(hidden_TM.dtype)
            if dhidden_TM is not None:
                torch.mm(dlogits_CV, weight_VM, out=dhidden_TM[rows])
            if dweight_VM is not None:
                _add_product(dweight_VM, dlogits_CV, x_CM)
        dweight = None if dweight_VM is None else dweight_VM.to(weight_VM.dtype)
        ctx.save_for_backward(dhidden_TM, dweight)
        return loss

    @staticmethod
    @refuse_second_derivatives(_REFERENCE)
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        return *(x if x is None else (x * grad).to(x.dtype) for x in ctx.saved_tensors), None


def _product(x_CM: Tensor, weight_VM: Tensor, wide: torch.dtype) -> Tensor:
    """Logits in the wide dtype; on CUDA the product's own sums, elsewhere rounded before."""
    if x_CM.is_cuda and x_CM.dtype != wide:
        return torch.mm(x_CM, weight_VM.T, out_dtype=wide)
    return (x_CM @ weight_VM.T).to(wide)


def _add_product(total_VM: Tensor, dlogits_CV: Tensor, x_CM: Tensor) -> None:
    """``total += dlogits^T x``, added up in the dtype of ``total``."""
    if x_CM.is_cuda and x_CM.dtype != total_VM.dtype:
        dtype = total_VM.dtype
        torch.addmm(total_VM, dlogits_CV.T, x_CM, out_dtype=dtype, out=total_VM)
    else:
        total_VM.addmm_(dlogits_CV.T.to(total_VM.dtype), x_CM.to(total_VM.dtype))
