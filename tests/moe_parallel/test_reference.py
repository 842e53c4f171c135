"""The oracle against closed forms: the other tests lean on it."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from moe_parallel.reference import reference_moe
from tests.closeness import assert_equal_to_rounding


def weights(num_experts: int, hidden: int, ffn: int) -> tuple[Tensor, Tensor, Tensor]:
    return (
        torch.randn(num_experts, hidden, dtype=torch.float64),
        torch.randn(num_experts, 2, ffn, hidden, dtype=torch.float64),
        torch.randn(num_experts, hidden, ffn, dtype=torch.float64),
    )


def test_all_experts_chosen_is_the_dense_mixture() -> None:
    x = torch.randn(5, 4, dtype=torch.float64)
    gate, w13, w2 = weights(3, 4, 6)
    hidden = torch.einsum("esfm,nm->nesf", w13, x)
    hidden = F.silu(hidden[:, :, 0]) * hidden[:, :, 1]
    expected = torch.einsum("emf,nef,ne->nm", w2, hidden, (x @ gate.T).softmax(1))
    actual = reference_moe(x, gate, w13, w2, top_k=3, aux_loss_coefficient=0.5)
    assert_equal_to_rounding(actual.output, expected)
    # k = E: every f_i is 1 / E and the m_i sum to 1
    assert_equal_to_rounding(actual.aux_loss, torch.tensor(0.5, dtype=torch.float64))


def test_capacity_one_by_hand() -> None:
    # All five tokens choose expert 1, token 3 most firmly; C = ceil(0.4 * 5 / 2) = 1.
    x = torch.tensor([[1.0], [2.0], [3.0], [9.0], [4.0]], dtype=torch.float64)
    _, w13, w2 = weights(2, 1, 3)
    gate = torch.tensor([[-1.0], [1.0]], dtype=torch.float64)
    sizes = {"top_k": 1, "capacity_factor": 0.4}
    first = reference_moe(x, gate, w13, w2, drop_policy="position", **sizes)
    firmest = reference_moe(x, gate, w13, w2, drop_policy="probability", **sizes)
    assert first.kept == {(0, 1)}
    assert firmest.kept == {(3, 1)}
    assert not first.output[1:].any()
    assert first.output[0].any()


def test_equal_logits_choose_the_lower_expert() -> None:
    x = torch.ones(2, 1, dtype=torch.float64)
    _, w13, w2 = weights(4, 1, 2)
    gate = torch.tensor([[0.0], [1.0], [1.0], [1.0]], dtype=torch.float64)
    assert reference_moe(x, gate, w13, w2, top_k=2).kept == {(0, 1), (0, 2), (1, 1), (1, 2)}


def test_auxiliary_loss_by_hand() -> None:
    # Two tokens, two experts, logits (log 3, 0): both choose expert 0 with probability 3 / 4.
    x = torch.ones(2, 1, dtype=torch.float64)
    _, w13, w2 = weights(2, 1, 2)
    gate = torch.tensor([[3.0], [1.0]], dtype=torch.float64).log()
    loss = reference_moe(x, gate, w13, w2, top_k=1, aux_loss_coefficient=1.0).aux_loss
    assert loss.item() == pytest.approx(2 * 1 * 0.75, rel=1e-14)


def test_gradcheck() -> None:
    x = torch.randn(4, 3, dtype=torch.float64, requires_grad=True)
    parameters = [w.requires_grad_() for w in weights(3, 3, 2)]

    def function(*tensors: Tensor) -> tuple[Tensor, Tensor]:
        result = reference_moe(*tensors, top_k=2, capacity_factor=0.8, aux_loss_coefficient=0.3)
        return result.output, result.aux_loss

    assert torch.autograd.gradcheck(function, (x, *parameters))


def test_no_tokens() -> None:
    result = reference_moe(torch.zeros(0, 3), *(w.float() for w in weights(2, 3, 2)), top_k=1)
    assert result.output.shape == (0, 3)
    assert result.aux_loss == 0
