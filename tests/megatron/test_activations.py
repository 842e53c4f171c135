"""What hybrid layers keep by a policy: attention runs once, the rest twice; what is refused."""

from __future__ import annotations

from collections import Counter
from unittest import mock

import pytest
import torch

from lasp.hybrid import pack_batch
from lasp.megatron import PackedSequence
from moe_parallel.router.route import Router
from ring import passes
from tests.megatron.attention import HIDDEN
from tests.megatron.block import LAYERS, build_block
from tests.megatron.cpu import initialize
from tests.ranks import refusal, run_on_ranks

pytestmark = pytest.mark.megatron

FULL = {
    "recompute_granularity": "full",
    "recompute_method": "uniform",
    "recompute_num_layers": 1,
}


def calls_on_rank(options: dict[str, str]) -> Counter[str]:
    """How often softmax attention and routers run in a forward and backward."""
    calls: Counter[str] = Counter()
    forward, route = passes.forward, Router.forward

    def counted(*args, **kwargs):
        calls["softmax"] += 1
        return forward(*args, **kwargs)

    def routed(*args, **kwargs):
        calls["routers"] += 1
        return route(*args, **kwargs)

    block = build_block({}, initialize(), **options)
    batch = pack_batch([[5, 3]], dp_rank=0, num_ranks=1, order="contiguous")
    hidden = torch.randn(8, 1, HIDDEN, dtype=torch.float64, requires_grad=True)
    with (
        mock.patch.object(passes, "forward", counted),
        mock.patch.object(Router, "forward", routed),
    ):
        output = block(hidden, attention_mask=None, packed_seq_params=PackedSequence.of(batch))
        output.sum().backward()
    return calls


@pytest.mark.parametrize(
    ("options", "softmax", "routers"),
    [({}, 1, 1), (FULL, 2, 2), ({"activations": "softmax_outputs"}, 1, 2)],
    ids=["none", "full", "softmax_outputs"],
)
def test_what_is_kept_is_not_computed_again(options, softmax, routers) -> None:
    (calls,) = run_on_ranks(calls_on_rank, 1, options)
    assert calls == {"softmax": softmax * LAYERS // 2, "routers": routers * LAYERS}


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"activations": "half"}, "activations must be one of .* got 'half'"),
        ({"activations": "full"}, "set config.recompute_granularity 'full'"),
        ({"activations": "expert_inputs"}, "recompute_modules \\['moe'\\]"),
        ({"activations": "softmax_outputs"} | FULL, "recompute_granularity must be None"),
        ({"activations": "attention_outputs"}, "use lightning_impl='triton'"),
    ],
)
def test_policies_that_cannot_be_kept_raise(options, message) -> None:
    import re

    (said,) = run_on_ranks(refusal, 1, calls_on_rank, options)
    assert re.search(message, said)
