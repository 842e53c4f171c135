"""What share of the rate of a matrix product do whole attention layers of the named models reach?

One layer of each kind at full width, projections, norms, rotation and gate included, over one
document, forward and backward. The bound is the time of its floating-point operations at the rate
of a product of two matrices of 8192 x 8192: projections, 2 a weight and token; a state of a
lightning layer, 4 head_dim^2 a token and head; softmax under a causal mask, key and value dims for
each token before. A backward has twice as many, of softmax 2.5 times.

Run: python -m benchmarks.hybrid_layers --commit $(git rev-parse HEAD)
"""

from __future__ import annotations

import copy
from collections.abc import Iterator
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn

from benchmarks.harness import Machine, Options, Question, Row, answer, check, draw, results, row
from benchmarks.lightning_length import flops_per_s
from benchmarks.timing import measure_ms, passes
from lasp.hybrid import NAMED_CONFIGS, DenseConfig, HybridConfig
from lasp.hybrid.layer import HybridLayer
from moe_parallel import ParallelGroups

MODELS = ("minimax-text-01", "ling-2.5-1t", "ring-flash-linear-2.0", "minicpm-sala")
CHECKED_TOKENS = 512


@dataclass(kw_only=True)
class Sizes(Options):
    """Options; ``tokens`` of the document, ``only`` models of this name."""

    tokens: int = 32768
    only: str = ""


def attention_of(config: HybridConfig, kind: str, machine: Machine) -> nn.Module:
    """The attention of a layer in the middle of the model, without what comes behind it."""
    index = config.num_layers // 2
    alone = replace(
        config,
        num_layers=index + 1,
        num_decay_layers=config.num_layers,
        pattern=kind * (index + 1),
        moe=None,
        dense=DenseConfig(config.hidden_size, 1),
        residuals=config.residuals_or_deepnorm,
    )
    groups = ParallelGroups(*[None] * len(ParallelGroups._fields))
    layer = HybridLayer(alone, index, groups=groups, device=machine.device, dtype=machine.dtype)
    return layer.attention


def flops(config: HybridConfig, kind: str, module: nn.Module, tokens: int) -> tuple[float, float]:
    """Floating-point operations, forward and backward."""
    weights = sum(p.numel() for p in module.parameters() if p.dim() == 2)
    heads, head_dim = config.attention.num_heads, config.attention.head_dim
    projected, latent = 2.0 * weights * tokens, config.attention.latent
    if kind == "G":
        mixed = 4.0 * tokens * heads * head_dim**2
        return projected + mixed, 2 * (projected + mixed)
    dims = 2 * head_dim
    if latent is not None:
        dims = latent.qk_nope_head_dim + latent.qk_rope_head_dim + latent.v_head_dim
    mixed = 1.0 * tokens**2 * heads * dims
    return projected + mixed, 2 * projected + 2.5 * mixed


def checked(module: nn.Module, hidden: Tensor, name: str) -> None:
    """Against the same module in float64 on the host, over few tokens."""
    few = hidden[:CHECKED_TOKENS].detach()
    grad = few.sin()
    exactly = copy.deepcopy(module).to("cpu", torch.float64)
    exact = results(exactly, [few.double().cpu()], [grad.double().cpu()])
    check(name, results(module, [few], [grad]), exact, limit=3e-2)


def rows(options: Sizes, machine: Machine) -> Iterator[Row]:
    """Rows of every kind of layer, after its check."""
    rate = flops_per_s()
    for name in MODELS:
        config = NAMED_CONFIGS[name]
        for kind, what in (("G", "lightning"), ("*", "softmax")):
            if options.only not in name:
                continue
            module = attention_of(config, kind, machine)
            (hidden,) = draw(machine, (options.tokens, config.hidden_size))
            checked(module, hidden, f"{name} {what}")
            leaves = [hidden.requires_grad_(), *module.parameters()]
            (grad,) = draw(machine, tuple(hidden.shape))
            calls = passes(lambda x, *_, of=module: of(x), leaves, grad)
            case = {"model": name, "layer": what, "tokens": options.tokens}
            for (metric, call), count in zip(
                calls.items(), flops(config, kind, module, options.tokens)
            ):
                yield row(
                    "hybrid_layers", case, "lasp", metric, measure_ms(call), "ms",
                    bound=count / rate * 1e3, bound_name="operations at the rate of a product",
                    samples=None,
                )  # fmt: skip


QUESTION = Question("hybrid_layers", Sizes, rows)

if __name__ == "__main__":
    answer(QUESTION, __doc__)
