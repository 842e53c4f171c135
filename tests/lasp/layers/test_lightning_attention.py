from __future__ import annotations

import copy
from importlib.util import find_spec

import pytest
import torch
import torch.distributed as dist
from torch import Tensor

from lasp._core.impl import Impl
from lasp.layers.lightning_attention import LightningAttention
from lasp.lightning.decay import decay_rates
from lasp.lightning.reference import recurrent_lightning_attention
from lasp.sequence.layout import Order, SequenceLayout
from tests.closeness import assert_equal_to_rounding, assert_within_budget
from tests.lasp.cases import ORDERS
from tests.ranks import run_on_ranks

HIDDEN, HEADS, DIM = 10, 3, 4


def make_module(**kwargs: object) -> LightningAttention:
    torch.manual_seed(1)
    module = LightningAttention(HIDDEN, HEADS, DIM, 2, 6, dtype=torch.float64, **kwargs)
    torch.nn.init.normal_(module.norm.weight)
    return module


def by_the_paper(module: LightningAttention, hidden: Tensor, borders: tuple[int, ...]) -> Tensor:
    """The layer of transformers' modeling_minimax.py, on the recurrence."""
    qkv = torch.nn.functional.silu(hidden @ module.qkv_proj.weight.T)
    qkv = qkv.reshape(len(hidden), HEADS, 3 * DIM)
    q, k, v = qkv[..., :DIM], qkv[..., DIM : 2 * DIM], qkv[..., 2 * DIM :]
    rates = decay_rates(HEADS, 2, 6)
    output, _ = recurrent_lightning_attention(q, k, v, rates, cu_seqlens=borders)
    flat = output.reshape(len(hidden), HEADS * DIM)
    norm = flat * torch.rsqrt(flat.square().mean(-1, keepdim=True) + 1e-6) * module.norm.weight
    gate = torch.sigmoid(hidden @ module.output_gate.weight.T)
    return (gate * norm) @ module.out_proj.weight.T


def results_of(output: Tensor, module: LightningAttention, hidden: Tensor) -> list[Tensor]:
    torch.manual_seed(2)
    weight = torch.randn(output.shape).to(output)
    leaves = [hidden, *module.parameters()]
    return [output.detach(), *torch.autograd.grad((output * weight).sum(), leaves)]


def test_is_the_layer_of_minimax() -> None:
    module = make_module()
    layout = SequenceLayout((70, 0, 5, 30), 1)
    hidden = torch.randn(105, HIDDEN, dtype=torch.float64, requires_grad=True)
    actual = results_of(module(hidden, layout=layout), module, hidden)
    expected = results_of(by_the_paper(module, hidden, layout.borders), module, hidden)
    for a, e in zip(actual, expected, strict=True):
        assert_equal_to_rounding(a, e)


def test_parameters_have_the_names_and_shapes_of_minimax() -> None:
    shapes = {name: tuple(x.shape) for name, x in make_module().state_dict().items()}
    assert shapes == {
        "qkv_proj.weight": (3 * HEADS * DIM, HIDDEN),
        "output_gate.weight": (HEADS * DIM, HIDDEN),
        "norm.weight": (HEADS * DIM,),
        "out_proj.weight": (HIDDEN, HEADS * DIM),
    }


def test_batched_rows_equal_documents() -> None:
    module = make_module()
    hidden = torch.randn(3, 20, HIDDEN, dtype=torch.float64)
    packed = module(hidden.flatten(0, 1), layout=SequenceLayout((20, 20, 20), 1))
    assert_equal_to_rounding(module(hidden).flatten(0, 1), packed)


def test_generation_equals_the_whole_sequence() -> None:
    """A prompt, two drafted tokens of which one is accepted, then one by one in place."""
    module = make_module()
    hidden = torch.randn(3, 40, HIDDEN, dtype=torch.float64)
    expected = module(hidden)
    output, state = module.prefill(hidden[:, :36])
    assert_equal_to_rounding(output, expected[:, :36])
    drafted = hidden[:, 36:38].clone()
    drafted[:, 1] = 1.0
    assert_equal_to_rounding(module.step(drafted, state).output[:, 0], expected[:, 36])
    for token in range(36, 40):
        output, new_state = module.step(hidden[:, token : token + 1], state, in_place=True)
        assert new_state is state
        assert_equal_to_rounding(output[:, 0], expected[:, token])


def test_prompts_beside_single_tokens_continue_from_their_states() -> None:
    module = make_module()
    hidden = torch.randn(20, HIDDEN, dtype=torch.float64)
    expected = module(hidden, layout=SequenceLayout((9, 11), 1))
    _, state = module.prefill(hidden[[*range(8), *range(9, 13)]], layout=SequenceLayout((8, 4), 1))
    output, state = module.prefill(
        hidden[[8, *range(13, 19)]], layout=SequenceLayout((1, 6), 1), initial_state=state
    )
    assert_equal_to_rounding(output, expected[[8, *range(13, 19)]])
    assert_equal_to_rounding(module.step(hidden[None, 19:], state[1:]).output[0], expected[19:])


@pytest.mark.skipif(find_spec("triton") is None, reason="it has no wheel here")
@pytest.mark.parametrize("batched", [False, True])
def test_kernels_within_budget(batched: bool) -> None:
    device = "cuda" if torch.cuda.is_available() else "cpu"
    hidden = torch.randn(2, 30, HIDDEN, device=device)
    layout = None if batched else SequenceLayout((20, 0, 40), 1)
    shape = hidden.shape if batched else (60, HIDDEN)

    def run(impl: Impl, dtype: torch.dtype) -> list[Tensor]:
        module = make_module(impl=impl).to(device=device, dtype=dtype)
        x = hidden.view(shape).to(dtype).requires_grad_()
        results = results_of(module(x, layout=layout), module, x)
        if batched:
            results += module.step(x[:, :2], module.prefill(x).final_state)
        return results

    kernels, honest = run("triton", torch.float32), run("eager", torch.float32)
    for actual, fair, exact in zip(kernels, honest, run("eager", torch.float64), strict=True):
        assert_within_budget(actual.detach(), exact.detach(), fair.detach())


def results_on_rank(
    module: LightningAttention, layout: SequenceLayout, pack: Tensor
) -> list[Tensor]:
    """Output, input gradient and parameter gradients summed over ranks."""
    rank = dist.get_rank()
    hidden = layout.shard(pack, rank, pad_value=3.0).clone().requires_grad_()
    output = module(hidden, layout=layout, cp_group=dist.group.WORLD)
    output.backward(layout.shard(pack.sin(), rank))
    for parameter in module.parameters():
        dist.all_reduce(parameter.grad)
    assert hidden.grad is not None
    return [output.detach(), hidden.grad, *(p.grad for p in module.parameters())]


def check_two_ranks_equal_one(
    module: LightningAttention, lengths: tuple[int, ...], order: Order
) -> None:
    pack = torch.randn(sum(lengths), HIDDEN, dtype=torch.float64)
    (single,) = run_on_ranks(results_on_rank, 1, module, SequenceLayout(lengths, 1), pack)
    layout = SequenceLayout(lengths, 2, order)
    results = run_on_ranks(results_on_rank, 2, module, layout, pack)
    for index, expected in enumerate(single):
        parts = [result[index] for result in results]
        actual = layout.unshard(parts) if index < 2 else parts[0]
        assert_equal_to_rounding(actual, expected)


@pytest.mark.parametrize("order", ORDERS)
def test_ranks_equal_one_rank(order: Order) -> None:
    check_two_ranks_equal_one(make_module(), (90, 1, 40), order)


def test_rates_stay_float32_on_the_cpu() -> None:
    expected = decay_rates(HEADS, 2, 6)
    module = make_module().to(torch.bfloat16)
    assert module.qkv_proj.weight.dtype == torch.bfloat16
    assert torch.equal(module.rates, expected)
    assert torch.equal(copy.deepcopy(module).half().rates, expected)
    assert module(torch.randn(5, HIDDEN, dtype=torch.bfloat16)).dtype == torch.bfloat16
    with torch.device("meta"):
        meta = make_module()
    assert meta.qkv_proj.weight.is_meta
    assert torch.equal(meta.rates, expected)
    assert torch.equal(meta.to_empty(device="cpu").bfloat16().rates, expected)


def test_a_module_first_run_in_inference_mode_can_train() -> None:
    module, x = make_module(decay="retnet"), torch.randn(5, HIDDEN, dtype=torch.float64)
    with torch.inference_mode():
        module(x)
    module(x).sum().backward()
    assert all(p.grad is not None for p in module.parameters())


def test_norm_is_computed_in_float32() -> None:
    module = make_module().to(torch.bfloat16)
    x = (torch.randn(7, HEADS * DIM) * 100).bfloat16()
    gate = torch.randn_like(x)
    exact = x.double()
    exact = exact * torch.rsqrt(exact.square().mean(-1, keepdim=True) + 1e-6)
    exact = exact * module.norm.weight.double() * torch.sigmoid(gate.double())
    actual = module.norm(x, gate, impl="eager")
    assert ((actual.double() - exact).abs() <= exact.abs() * 2**-8).all()


def test_decay_variant_and_bad_input() -> None:
    module = make_module(decay="retnet")
    assert torch.equal(module.rates, decay_rates(HEADS, 2, 6, "retnet"))
    for shape in ((5,), (5, HIDDEN + 1), (1, 1, 5, HIDDEN)):
        with pytest.raises(ValueError, match="hidden"):
            module(torch.randn(shape, dtype=torch.float64))
    with pytest.raises(ValueError, match="new tokens"):
        module.step(torch.randn(5, HIDDEN), torch.zeros(5, HEADS, DIM, DIM))
