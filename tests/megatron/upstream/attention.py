"""Upstream's tests of self-attention with our attentions."""

from __future__ import annotations

import functools
import sys
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest import mock

import torch

from tests.megatron.upstream.checkout import Check, supported, upstream


def attention_checks() -> Iterator[Check]:
    splits = [(4, False, 1), (4, True, 1), (2, False, 2), (2, True, 2), (1, False, 4)]
    splits += [(2, True, 1), (1, False, 2)]  # for two GPUs
    for part in ("lightning", "ring", "ring self-attention"):
        for tp, sp, cp in splits:
            for packed in (False, True):
                name = f"_test_parallel_attention_correctness[{part}, tp {tp}, sp {sp}, cp {cp}"
                yield Check(
                    name + (", packed]" if packed else "]"),
                    tp * cp,
                    parallel_attention,
                    (part, tp, sp, cp, packed),
                )
    for suite in ("", "Padded"):
        suite = f"TestParallelAttentionWithPacked{suite}Sequence"
        tests = ["test_gpu_forward"] + ["test_checkpointed_gpu_forward"] * ("Padded" not in suite)
        for part in ("ring", "ring self-attention"):
            for test in tests:
                yield Check(f"{suite}.{test}[{part}]", 1, packed_attention, (part, suite, test))
        yield Check(f"{suite}[lightning]", 1, packed_attention, (), "asserts the shape of a bias")


def attention_spec(part: str) -> Any:
    """Spec of a self-attention of ours, or of Megatron's with our core attention.

    Upstream's packs are zigzag in every document, as PackedSeqParams does not say.
    """
    from megatron.core.transformer.spec_utils import ModuleSpec

    from lasp.megatron import lightning_attention_spec
    from ring.megatron import RingCoreAttention, ring_attention_spec
    from tests.megatron.test_gpt import layer_spec

    cut = {"packed_cut": "document_zigzag"}
    if part == "lightning":
        return lightning_attention_spec(**cut)
    if part == "ring self-attention":
        return ring_attention_spec(rotary_dim=16, **cut)
    spec = layer_spec(part).submodules.self_attention
    spec.submodules.core_attention = ModuleSpec(RingCoreAttention, params=cut)
    return spec


def parallel_attention(
    folder: str, device: str, part: str, tp: int, sp: bool, cp: int, packed: bool
) -> None:
    """The layer under tp, sp and cp is that on one rank: output, bias and input gradient."""
    module = upstream("transformer.test_attention")
    from megatron.core.transformer.transformer_block import TransformerBlockSubmodules

    from lasp.megatron import ResidualNorm
    from tests.megatron.test_gpt import layer_spec

    layer = layer_spec("lightning")
    layer.submodules.self_attention = attention_spec(part)
    values = {"add_bias_linear": False} if part == "lightning" else {}
    config = supported(module.TransformerConfig, device, **values)(
        num_layers=1,
        hidden_size=128,
        num_attention_heads=4,
        normalization="RMSNorm",
        bf16=True,
        params_dtype=torch.bfloat16,
        hidden_dropout=0.0,
        attention_dropout=0.0,
    )
    # The test makes arguments of a training loop, and our parts read the positions there.
    arguments = [sys.argv[0], "--position-embedding-type", "none"]
    with mock.patch.object(sys, "argv", arguments):
        module._test_parallel_attention_correctness(
            config,
            TransformerBlockSubmodules([layer], layer_norm=ResidualNorm),
            Path(folder),
            atol=1e-2,
            rtol=1e-2,
            tp=tp,
            sp=sp,
            cp=cp,
            seed=123,
            sequence_length=256,
            sequence_packing=packed,
        )


def packed_attention(folder: str, device: str, part: str, suite: str, test: str) -> None:
    """Packs, padded too, through a layer on one rank."""
    module = upstream("transformer.test_attention_packed_seq")
    spec = attention_spec(part)
    layer = SimpleNamespace(self_attention=SimpleNamespace(submodules=spec.submodules))
    params = {k: v for k, v in spec.params.items() if k != "attn_mask_type"}
    config = supported(module.TransformerConfig, device, attention_dropout=0.0)
    with ExitStack() as stack:
        for name, value in (
            ("SelfAttention", functools.partial(spec.module, **params)),
            ("get_gpt_layer_with_transformer_engine_submodules", lambda: layer),
            ("TransformerConfig", config),
        ):
            stack.enter_context(mock.patch.object(module, name, value))
        instance = getattr(module, suite)()
        instance.setup_method(None)
        getattr(instance, test)()
        instance.teardown_method(None)
