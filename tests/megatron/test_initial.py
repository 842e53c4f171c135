"""Initial values of the MoE layer in Megatron: drawn by the config, whatever the ranks."""

from __future__ import annotations

from functools import partial
from typing import Any

import pytest
import torch
from megatron.core.transformer.spec_utils import build_module
from torch import Tensor

from moe_parallel.megatron import expert_parallel_moe_spec
from tests.megatron.attention import parallel_config
from tests.megatron.cpu import initialize
from tests.megatron.test_moe_parallel import OPTIONS
from tests.ranks import run_on_ranks

pytestmark = pytest.mark.megatron


def initial_values(sizes: dict[str, int], **options: Any) -> list[Tensor]:
    groups = initialize(**sizes)
    layer = build_module(
        expert_parallel_moe_spec(init_gain=0.5),
        config=parallel_config(sizes, **OPTIONS, **options),
        pg_collection=groups,
    )
    return [parameter.detach() for parameter in layer.moe.parameters()]


def test_initial_values_do_not_depend_on_the_ranks() -> None:
    ((gate, w13, w2),) = run_on_ranks(initial_values, 1, {})
    results = run_on_ranks(initial_values, 2, {"ep": 2})
    assert all(torch.equal(result[0], gate) for result in results)
    assert torch.equal(torch.cat([result[1] for result in results]), w13)
    assert torch.equal(torch.cat([result[2] for result in results]), w2)
    assert not torch.equal(w13[0], w13[1])


def test_initial_values_are_drawn_as_the_config_says() -> None:
    """Gate and up projections by one method, down projections by the other; experts get a gain."""
    methods = {"init_method": partial(torch.nn.init.normal_, mean=0.0, std=3.0)}
    methods["output_layer_init_method"] = partial(torch.nn.init.uniform_, a=6.0, b=8.0)
    ((gate, w13, w2),) = run_on_ranks(initial_values, 1, {}, **methods)
    for values, mean, std in ((gate, 0.0, 3.0), (w13, 0.0, 1.5), (w2, 3.5, 1 / 12**0.5)):
        assert abs(values.mean() - mean) < 0.5 * std
        assert 0.7 * std < values.std() < 1.3 * std
    assert not torch.equal(w13[:, 0], w13[:, 1])
    ((_, by_std, _),) = run_on_ranks(initial_values, 1, {}, init_method_std=1.0)
    assert 0.7 * 0.5 < by_std.std() < 1.3 * 0.5
