"""The head and the loss in one: the numbers of the plain form, and never all logits."""

from __future__ import annotations

from dataclasses import replace
from functools import partial
from typing import Any
from unittest.mock import patch

import pytest
import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.fsdp import MixedPrecisionPolicy
from torch.nn import functional as F
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from lasp.hybrid import (
    HybridModel,
    VocabularyConfig,
    linear_cross_entropy,
    next_in_document,
    next_token_loss,
    pack_batch,
)
from lasp.hybrid import head as head_module
from moe_parallel import ExpertTopology, apply_fsdp
from tests.closeness import assert_equal_to_rounding, assert_within_budget
from tests.ranks import run_on_ranks
from tests.test_hybrid import groups_of
from tests.test_training import CONFIG, VOCAB

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
T, HIDDEN, V = 300, 48, 130


def inputs(dtype: torch.dtype, device: str = "cpu") -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    hidden = torch.randn(T, HIDDEN, generator=generator)
    weight = torch.randn(V, HIDDEN, generator=generator) / 4
    labels = torch.randint(V, (T,), generator=generator)
    labels[::7] = -100
    return hidden.to(device, dtype), weight.to(device, dtype), labels.to(device)


def plain(hidden: Tensor, weight: Tensor, labels: Tensor) -> Tensor:
    wide = torch.promote_types(hidden.dtype, torch.float32)
    return F.cross_entropy((hidden @ weight.T).to(wide), labels, reduction="sum")


def results(form: Any, hidden: Tensor, weight: Tensor, labels: Tensor) -> list[Tensor]:
    """Loss and gradients of a share of it."""
    hidden, weight = (x.detach().clone().requires_grad_() for x in (hidden, weight))
    loss = form(hidden, weight, labels) / T
    return [loss.detach(), *torch.autograd.grad(loss, (hidden, weight))]


def check_within_budget(dtype: torch.dtype, device: str, impl: str) -> None:
    ours = partial(linear_cross_entropy, impl=impl)
    given = inputs(dtype, device)
    exact = results(plain, *(x.double() for x in given[:2]), given[2])
    honest, actual = results(plain, *given), results(ours, *given)
    for what, *three in zip(("loss", "dhidden", "dweight"), actual, exact, honest):
        assert_within_budget(*three, what=what)


@pytest.mark.parametrize("chunk", [4, 128])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_loss_and_gradients_are_within_the_budget(chunk: int, dtype: torch.dtype) -> None:
    with patch.object(head_module, "chunk_tokens", lambda _: chunk):
        check_within_budget(dtype, DEVICE, "eager")


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_liger_is_within_the_budget(dtype: torch.dtype) -> None:
    pytest.importorskip("liger_kernel")
    check_within_budget(dtype, "cuda", "liger")


def test_in_float64_it_is_the_plain_form() -> None:
    given = inputs(torch.float64)
    with patch.object(head_module, "chunk_tokens", lambda _: 7):
        actual = results(linear_cross_entropy, *given)
    for mine, theirs in zip(actual, results(plain, *given)):
        assert_equal_to_rounding(mine, theirs, tolerance=1e-13)


def test_a_loss_of_no_targets_is_zero_and_has_no_gradients() -> None:
    hidden, weight, labels = inputs(torch.float32)
    for found in results(linear_cross_entropy, hidden, weight, torch.full_like(labels, -100)):
        assert not found.any()
    for found in results(linear_cross_entropy, hidden[:0], weight, labels[:0]):
        assert not found.any()


class Largest(TorchDispatchMode):
    """The most elements of any tensor that is made."""

    elements = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        sizes = [x.numel() for x in tree_leaves(result) if isinstance(x, Tensor)]
        self.elements = max([self.elements, *sizes])
        return result


@pytest.mark.parametrize("float32_head", [False, True])
def test_a_model_with_labels_never_holds_all_logits(float32_head: bool) -> None:
    tokens = 3 * 64 + 5
    vocabulary = VocabularyConfig(float32_head=float32_head)
    model = HybridModel(replace(CONFIG, vocab_size=1000, vocabulary=vocabulary))
    batch = pack_batch([[tokens]], dp_rank=0, num_ranks=1, order="contiguous")
    pack = torch.arange(tokens)
    found = {}
    with patch.object(head_module, "chunk_tokens", lambda _: 64):
        for labels in (pack, None):
            with Largest() as largest:
                output = model(pack, batch, labels=labels)
                (output.logits.sum() if labels is None else output.loss).backward()
            found[labels is None] = largest.elements
    assert found == {False: 64 * 1000, True: tokens * 1000}


def losses_on_rank(change: dict[str, Any], policy: bool) -> None:
    """By labels, and of logits: the same loss and gradients."""
    topology = ExpertTopology(2, cp=2, ep=2)
    batch = pack_batch([[9, 7]], dp_rank=0, num_ranks=2, order="zigzag")
    tokens = batch.layout.shard(torch.arange(16) * 5 % VOCAB, dist.get_rank())
    cp_group = groups_of(topology).cp
    after = partial(next_in_document, layout=batch.layout, cp_group=cp_group)
    labels, found = after(tokens, pad_value=-100), []
    for fused in (True, False):
        model = HybridModel(
            replace(CONFIG, **change), groups=groups_of(topology), dtype=torch.float64
        )
        model.reset_parameters(0)
        if policy:
            apply_fsdp(model, topology, blocks=model.layers, mp_policy=MixedPrecisionPolicy())
        more: dict[str, Any] = {"next_tokens": after(tokens, pad_value=0)}
        with_mtp = "mtp_loss_weight" in change
        more = more if with_mtp else {}
        if fused:
            more["labels"] = labels
            if with_mtp:
                more["next_labels"] = after(labels, pad_value=-100)
        output = model(tokens, batch, **more)
        if fused:
            loss = output.loss / 14
            loss = loss + 0.3 * output.mtp_loss / 14 if with_mtp else loss
        else:
            loss = next_token_loss(output.logits, labels, 14)
            if with_mtp:
                next_labels = after(labels, pad_value=-100)
                loss = loss + 0.3 * next_token_loss(output.mtp_logits, next_labels, 14)
        (loss + output.aux_loss).backward()
        grads = {n: p.grad.full_tensor() if policy else p.grad for n, p in model.named_parameters()}
        found.append({"loss": loss.detach(), **{n: g for n, g in grads.items() if g is not None}})
    assert found[0].keys() == found[1].keys()
    for name, tensor in found[1].items():
        assert_equal_to_rounding(found[0][name], tensor, what=name)


@pytest.mark.parametrize(
    ("change", "policy"),
    [
        ({"mtp_loss_weight": 0.3}, False),
        ({"vocabulary": VocabularyConfig(tied=True, logit_scale=0.5)}, False),
        ({"vocabulary": VocabularyConfig(tied=True)}, True),
        ({"vocabulary": VocabularyConfig(float32_head=True)}, True),
    ],
)
def test_the_loss_by_labels_is_that_of_logits(change: dict[str, Any], policy: bool) -> None:
    run_on_ranks(losses_on_rank, 2, change, policy)


def test_autocast_gives_the_products_its_dtype() -> None:
    hidden, weight, labels = inputs(torch.float32)
    rounded = [x.bfloat16() for x in (hidden, weight)]
    with torch.autocast("cpu", torch.bfloat16):
        loss = linear_cross_entropy(hidden, weight, labels)
    assert torch.equal(loss, linear_cross_entropy(*rounded, labels))


def test_bad_arguments_raise() -> None:
    hidden, weight, labels = inputs(torch.float32)
    for message, arguments, named in (
        ("weight .V, hidden.", (hidden, weight[:, 1:], labels), {}),
        ("labels must be int64", (hidden, weight, labels[1:]), {}),
        ("impl must be one of", (hidden, weight, labels), {"impl": "torch"}),
        ("impl must be 'eager' or 'auto'", (hidden, weight, labels), {"impl": "liger"}),
    ):
        with pytest.raises(ValueError, match=message):
            linear_cross_entropy(*arguments, **named)
    batch = pack_batch([[4]], dp_rank=0, num_ranks=1, order="contiguous")
    with pytest.raises(ValueError, match="next_labels must be given with labels"):
        HybridModel(CONFIG)(torch.arange(4), batch, next_labels=torch.arange(4))
