from __future__ import annotations

import torch

from lasp.lightning.reference import recurrent_lightning_attention
from tests.closeness import assert_equal_to_rounding


def random(*shape: int) -> torch.Tensor:
    return torch.randn(shape, dtype=torch.float64)


def test_is_masked_attention_with_decay() -> None:
    tokens, rates = 9, torch.tensor([0.0, 0.3, 2.0])
    q, k, v = random(tokens, 3, 4), random(tokens, 3, 4), random(tokens, 3, 5)
    state = random(1, 3, 4, 5)
    output, final = recurrent_lightning_attention(q, k, v, rates, scale=0.5, initial_state=state)
    t = torch.arange(tokens, dtype=torch.float64)
    for h, rate in enumerate(rates.double()):
        decay = torch.exp(-rate * (t[:, None] - t[None, :])).tril()
        dense = (q[:, h] @ k[:, h].T * decay) @ v[:, h]
        dense += torch.exp(-rate * (t + 1))[:, None] * (q[:, h] @ state[0, h])
        assert_equal_to_rounding(output[:, h], 0.5 * dense)
        last = torch.exp(-rate * (tokens - 1 - t))[:, None]
        expected = (k[:, h] * last).T @ v[:, h] + torch.exp(-rate * tokens) * state[0, h]
        assert_equal_to_rounding(final[0, h], expected)


def test_documents_are_independent() -> None:
    rates = torch.tensor([0.1, 0.5])
    q, k, v, states = random(7, 2, 3), random(7, 2, 3), random(7, 2, 3), random(4, 2, 3, 3)
    output, final = recurrent_lightning_attention(
        q, k, v, rates, cu_seqlens=(0, 3, 3, 4, 7), initial_state=states
    )
    for n, (start, stop) in enumerate([(0, 3), (3, 3), (3, 4), (4, 7)]):
        if start == stop:
            assert torch.equal(final[n], states[n])
            continue
        alone = recurrent_lightning_attention(
            q[start:stop], k[start:stop], v[start:stop], rates, initial_state=states[n : n + 1]
        )
        assert torch.equal(output[start:stop], alone[0])
        assert torch.equal(final[n], alone[1][0])


def test_gradcheck() -> None:
    inputs = [random(4, 2, 2), random(4, 2, 2), random(4, 2, 3), random(2, 2, 2, 3)]
    rates = torch.tensor([0.1, 0.7], dtype=torch.float64)

    def run(q, k, v, state, rates):
        return recurrent_lightning_attention(
            q, k, v, rates, cu_seqlens=(0, 3, 4), scale=0.5, initial_state=state
        )

    assert torch.autograd.gradcheck(run, [x.requires_grad_() for x in (*inputs, rates)])


def test_low_precision_keeps_an_fp32_state() -> None:
    q, k, v = (torch.randn(300, 1, 4).bfloat16() for _ in range(3))
    output, final = recurrent_lightning_attention(q, k, v, torch.zeros(1))
    assert output.dtype == torch.bfloat16
    assert final.dtype == torch.float32
    torch.testing.assert_close(final[0, 0], k[:, 0].float().T @ v[:, 0].float())
