"""Forward-mode AD and torch.func through every operator: right, or an error that says a way out."""

from __future__ import annotations

from collections.abc import Callable
from importlib.util import find_spec
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor
from torch.autograd import forward_ad

from lasp import LightningAttention, LightningOptions, lightning_attention, lightning_decode
from lasp.layers.norm_gate import norm_gate, sum_over_ranks
from moe_parallel import ExpertParallelMoE, MoEConfig
from moe_parallel.dispatch.permute import permute, row_order, unpermute
from moe_parallel.experts.experts import Experts
from moe_parallel.pipeline.pipeline import local_pipeline
from moe_parallel.router.top_k import choose
from ring import RingAttention, ring_attention
from tests.closeness import assert_equal_to_rounding
from tests.lasp.layers.test_heads import heads_with

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"  # where kernels are not interpreted
NEEDS_TRITON = pytest.mark.skipif(find_spec("triton") is None, reason="it has no wheel here")
RATES = torch.tensor([0.1, 0.2])


class Case(NamedTuple):
    """Maps ``[5, 2, 4]`` to a tensor.

    Attributes:
        function: of one tensor.
        refused: what the error names: the operator and the way out; None if there is a derivative.
        dtype: of the tensor.
    """

    function: Callable[[Tensor], Tensor]
    refused: tuple[str, str] | None
    dtype: torch.dtype = torch.float32


def state(like: Tensor) -> Tensor:
    return torch.ones(5, 2, 4, 4, dtype=like.dtype, device=like.device)


def attend(impl: str) -> Callable[[Tensor], Tensor]:
    return lambda x: lightning_attention(x, x.detach(), x.detach(), RATES, impl=impl).output


def attend_by_rates(impl: str) -> Callable[[Tensor], Tensor]:
    return lambda x: lightning_attention(*[x.detach()] * 3, x[0, :, 0].abs(), impl=impl).output


def decode_by_rates(x: Tensor, impl: str) -> Tensor:
    q = x.detach()[:, None]
    return lightning_decode(q, q, q, x[0, :, 0].abs(), state(x), impl=impl).output


def decode(x: Tensor, **options: Any) -> Tensor:
    q, k = x[:, None], torch.ones_like(x)[:, None]
    return lightning_decode(q, k, k, RATES, state(x), **options).output


def norm(x: Tensor, impl: str) -> Tensor:
    return norm_gate(
        x.flatten(1), torch.ones_like(x.flatten(1)), x.new_ones(8), eps=1e-5, impl=impl
    )


def heads(x: Tensor, impl: str) -> Tensor:
    return torch.cat(heads_with(impl, LightningOptions())(x.repeat(1, 1, 3)), dim=-1)


def layer(module: torch.nn.Module, *args: Any, **kwargs: Any) -> Callable[[Tensor], Tensor]:
    def function(x: Tensor) -> Tensor:
        result = module(x.flatten(1), *args, **kwargs)
        return result if isinstance(result, Tensor) else result.output

    return function


def experts() -> Experts:
    module = Experts(8, 6, 2, device=DEVICE)
    module.reset_parameters(0)
    return module


def by_weights(module: Experts) -> Callable[[Tensor], Tensor]:
    """Experts that multiply rows by weights, as where tokens cross to a rank once."""
    pipeline = local_pipeline((2, 3))

    def function(x: Tensor) -> Tensor:
        pipeline.dispatch.weights = x[:, 0, :1]
        return module(torch.ones(5, 8, device=x.device), pipeline, num_rows=5)

    return function


def rows(x: Tensor) -> tuple[Tensor, Any]:
    experts = torch.arange(5, device=x.device)[:, None] % 2
    return x.flatten(1), row_order(experts, None, 5, 2)


LIGHTNING = ("lightning_attention", "recurrent_lightning_attention")
RING = ("ring_attention", "dense_attention")
MOE = ("ExpertParallelMoE", "reference_moe")
EAGER = "impl='eager'"
CASES = {
    "ring_attention": Case(lambda x: ring_attention(x, x.detach(), x.detach()).output, RING),
    "lse": Case(lambda x: ring_attention(x.detach(), x, x.detach()).lse, RING),
    "RingAttention": Case(layer(RingAttention(8, 2, 1, 4, rotary_dim=2, device=DEVICE)), RING),
    "lightning_attention": Case(attend("eager"), LIGHTNING),
    "lightning_attention of a state": Case(
        lambda x: (
            lightning_attention(
                *[x.detach()] * 3,
                RATES,
                initial_state=x[0, :, :, None].expand(1, 2, 4, 4),
                impl="eager",
            ).output
        ),
        LIGHTNING,
    ),
    "lightning_attention of its rates": Case(attend_by_rates("eager"), LIGHTNING),
    "lightning_attention triton of its rates": Case(attend_by_rates("triton"), LIGHTNING),
    "lightning_attention triton": Case(attend("triton"), LIGHTNING),
    "LightningAttention": Case(
        layer(LightningAttention(8, 2, 4, 0, 2, impl="eager", device=DEVICE)), LIGHTNING
    ),
    "decode": Case(decode, None, torch.float64),
    "decode in place": Case(lambda x: decode(x, in_place=True), None, torch.float64),
    "decode triton": Case(lambda x: decode(x, impl="triton"), ("lightning_decode", EAGER)),
    "decode triton in place": Case(
        lambda x: decode(x, in_place=True, impl="triton"), ("lightning_decode", EAGER)
    ),
    "decode of its rates": Case(
        lambda x: decode_by_rates(x, "eager"), ("lightning_decode", LIGHTNING[1])
    ),
    "decode triton of its rates": Case(
        lambda x: decode_by_rates(x, "triton"), ("lightning_decode", EAGER)
    ),
    "norm_gate": Case(lambda x: norm(x, "eager"), None, torch.float64),
    "norm_gate triton": Case(lambda x: norm(x, "triton"), ("norm_gate", EAGER)),
    "norm_gate over ranks": Case(
        lambda x: sum_over_ranks(x, object()), ("norm_gate", "tp_group=None")
    ),
    "heads": Case(lambda x: heads(x, "auto"), None, torch.float64),
    "heads triton": Case(lambda x: heads(x, "triton"), ("heads_of", EAGER)),
    "router": Case(
        lambda x: choose(x.flatten(1), torch.eye(8).to(x), 2).weights, None, torch.float64
    ),
    "router triton": Case(
        lambda x: choose(x.flatten(1), torch.eye(8).to(x), 2, "triton").weights, ("router", EAGER)
    ),
    "permute": Case(lambda x: permute(*rows(x)), MOE),
    "unpermute": Case(lambda x: unpermute(rows(x)[0], x.new_ones(5, 1), rows(x)[1]), MOE),
    "experts": Case(layer(experts(), local_pipeline((2, 3)), num_rows=5), MOE),
    "experts by weights": Case(by_weights(experts()), MOE),
    "ExpertParallelMoE": Case(
        layer(ExpertParallelMoE(MoEConfig(8, 6, 4, 2, impl="eager"), device=DEVICE)), MOE
    ),
}
# Decoding and rates take no tensors that require gradients.
WITHOUT_LEAVES = ("decode", "rates")


def parameters(*without: str) -> list[Any]:
    """The names of all cases but those that have one of these words."""
    return [
        pytest.param(name, marks=NEEDS_TRITON if "triton" in name else ())
        for name in CASES
        if not any(word in name for word in without)
    ]


def by_dual_tensor(function: Callable[[Tensor], Tensor], x: Tensor, tangent: Tensor) -> Tensor:
    with forward_ad.dual_level():
        return forward_ad.unpack_dual(function(forward_ad.make_dual(x, tangent))).tangent


def by_dual_leaf(function: Callable[[Tensor], Tensor], x: Tensor, tangent: Tensor) -> Tensor:
    return by_dual_tensor(function, x.clone().requires_grad_(), tangent)


def by_jvp(function: Callable[[Tensor], Tensor], x: Tensor, tangent: Tensor) -> Tensor:
    return torch.func.jvp(function, (x,), (tangent,))[1]


def by_jacfwd(function: Callable[[Tensor], Tensor], x: Tensor, tangent: Tensor) -> Tensor:
    return (torch.func.jacfwd(function)(x) * tangent).flatten(-x.ndim).sum(-1)


@pytest.mark.parametrize("mode", [by_dual_tensor, by_jvp, by_jacfwd])
@pytest.mark.parametrize("name", parameters())
def test_it_is_right_or_an_error(name: str, mode: Callable[..., Tensor]) -> None:
    check_forward_mode(name, mode)


@pytest.mark.parametrize("name", parameters(*WITHOUT_LEAVES))
def test_it_is_right_or_an_error_for_leaves(name: str) -> None:
    check_forward_mode(name, by_dual_leaf)


def check_forward_mode(name: str, mode: Callable[..., Tensor]) -> None:
    function, refused, dtype = CASES[name]
    x, tangent = torch.randn(2, 5, 2, 4, dtype=dtype, device=DEVICE)
    if refused is not None:
        operator, instead = refused
        with pytest.raises(RuntimeError, match=f"{operator}.* no forward-mode .* use .*{instead}"):
            mode(function, x, tangent)
        return
    # A difference quotient, of the fourth order, is right to about 1e-12 of the values.
    step = 2.0**-10
    near = [function(x + shift * step * tangent) for shift in (-2, -1, 1, 2)]
    expected = (near[0] - 8 * near[1] + 8 * near[2] - near[3]) / (12 * step)
    torch.testing.assert_close(mode(function, x, tangent), expected, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("name", parameters("over ranks"))
def test_a_level_without_tangents_changes_nothing(name: str) -> None:
    function, _, dtype = CASES[name]
    x = torch.randn(5, 2, 4, dtype=dtype, device=DEVICE)
    expected = function(x)
    with forward_ad.dual_level():
        assert_equal_to_rounding(function(x), expected)


def total(function: Callable[[Tensor], Tensor]) -> Callable[[Tensor], Tensor]:
    return lambda x: function(x).float().sum()


TRANSFORMS: dict[str, Callable[[Callable[[Tensor], Tensor], Tensor], Tensor]] = {
    "grad": lambda function, x: torch.func.grad(total(function))(x),
    "vjp": lambda function, x: torch.func.vjp(total(function), x)[1](x.new_ones(()).float())[0],
    "jacrev": lambda function, x: torch.func.jacrev(total(function))(x),
    "vmap": lambda function, x: torch.vmap(total(function))(x.expand(2, *x.shape))[0],
}


@pytest.mark.parametrize("transform", TRANSFORMS)
@pytest.mark.parametrize("name", parameters(*WITHOUT_LEAVES))
def test_torch_func_is_right_or_an_error(name: str, transform: str) -> None:
    function, refused, dtype = CASES[name]
    x = torch.randn(5, 2, 4, dtype=dtype, device=DEVICE)
    operators = ("ring_attention", "lse", "RingAttention", "norm_gate triton", "heads triton")
    looped = transform == "vmap" and name in (*operators, "lightning_attention triton")
    if refused is not None and not looped:  # torch calls torch.ops one by one
        message = f"{refused[0]}.* torch.func.* use torch.autograd.grad .*{refused[1]}"
        with pytest.raises(RuntimeError, match=message):
            TRANSFORMS[transform](function, x)
        return
    x.requires_grad_()
    expected = result = total(function)(x)
    if transform != "vmap":
        (expected,) = torch.autograd.grad(result, x)
    torch.testing.assert_close(TRANSFORMS[transform](function, x.detach()), expected)
