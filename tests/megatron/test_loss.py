"""The loss without all logits in Megatron's GPTModel: its values, gradients, hooks and refusals."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from lasp.megatron import fused_loss
from lasp.megatron.version import VERSION
from tests.closeness import assert_equal_to_rounding
from tests.hooks import calls_of_owners
from tests.megatron import test_gpt
from tests.megatron.cpu import initialize, train_on_cpu
from tests.ranks import refusal, run_on_ranks

pytestmark = [
    pytest.mark.megatron,
    pytest.mark.skipif(VERSION < (0, 18), reason="GPTModel.forward has no output_processor"),
]


def losses_on_rank(sizes: dict[str, int]) -> tuple[list[Tensor], list[dict[str, Tensor]]]:
    """Sum and gradients by Megatron's own loss, and by ours with a mask and with labels of -100."""
    groups = initialize(**sizes)
    tokens = torch.randint(test_gpt.VOCAB, (test_gpt.ROWS, test_gpt.SEQUENCE))
    labels, mask = tokens.roll(-1, 1), (torch.arange(test_gpt.SEQUENCE) % 3 != 0).expand_as(tokens)
    ways: list[dict[str, Any]] = [
        {"labels": labels},
        {"labels": labels, "loss_mask": mask.float(), "output_processor": fused_loss},
        {"labels": labels.masked_fill(~mask, -100), "output_processor": fused_loss},
    ]
    losses, grads = [], []
    with train_on_cpu():
        model = test_gpt.build(sizes, ("lightning",), groups)
        for options in ways:
            model.zero_grad_buffer()
            with calls_of_owners(model.module) as calls:
                loss = model(tokens, tokens, None, **options)
            assert set(calls.values()) == {1}, calls
            loss = loss if loss.dim() == 0 else (loss * mask).sum()
            loss.backward()
            losses.append(loss.detach())
            named = model.module.named_parameters()
            grads.append({name: parameter.main_grad.clone() for name, parameter in named})
    return losses, grads


def test_it_is_megatrons_loss() -> None:
    ((losses, grads),) = run_on_ranks(losses_on_rank, 1, {})
    for loss, grad in zip(losses[1:], grads[1:]):
        assert_equal_to_rounding(loss, losses[0])
        for name, expected in grads[0].items():
            assert_equal_to_rounding(grad[name], expected, what=name)


def test_a_vocabulary_over_ranks_is_refused() -> None:
    for said in run_on_ranks(refusal, 2, losses_on_rank, {"tp": 2}):
        assert "tensor_model_parallel_size must be 1 for fused_loss, got 2" in said


def unlabelled_on_rank() -> None:
    groups = initialize()
    tokens = torch.zeros(1, test_gpt.SEQUENCE, dtype=torch.int64)
    with train_on_cpu():
        model = test_gpt.build({}, ("lightning",), groups)
        model(tokens, tokens, None, output_processor=fused_loss)


def test_a_call_without_labels_is_refused() -> None:
    (said,) = run_on_ranks(refusal, 1, unlabelled_on_rank)
    assert said.startswith("labels must be given with output_processor=fused_loss, got None")
