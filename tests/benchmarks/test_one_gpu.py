"""The benchmarks of one GPU run, interpreted, at sizes that say nothing about speed."""

from __future__ import annotations

import importlib
from typing import Any

import pytest
import torch

pytest.importorskip("triton", reason="the kernels need triton, which has no wheel here")

from dataclasses import replace

from benchmarks import (
    host_time,
    hybrid_layers,
    lightning_decode,
    lightning_kernels,
    lightning_layer,
    lightning_length,
)
from benchmarks.harness import Machine, Options
from lasp.hybrid import NAMED_CONFIGS, DenseConfig, HybridConfig, LatentConfig

# Triton's interpreter has no product of bf16.
MACHINE = Machine("cpu", torch.float16)


@pytest.fixture
def rows_of(monkeypatch):
    """Runs a benchmark without clocks and without a device, in the cases that are given."""

    def once(call, *_):
        call()
        return 1.0, 2.0, 3.0

    monkeypatch.setattr(torch.Tensor, "cuda", lambda tensor: tensor)
    monkeypatch.setattr(torch, "compile", lambda function, **_: function)

    def run(name: str, options: Any, **cases: Any) -> dict[tuple[str, ...], dict[str, Any]]:
        module = importlib.import_module(f"benchmarks.{name}")
        fakes = {"measure_ms": once, "graph_ms": once, "call_ms": lambda call: once(call)[0]}
        fakes |= {"copy_bytes_per_s": lambda: 1e12, "flops_per_s": lambda: 1e12}
        fakes |= {"host_us": lambda call, **_: list(once(call)), "extra_bytes": lambda *_: 2**20}
        fakes |= {"installed": lambda *_: None, **cases}
        for what, fake in fakes.items():
            if hasattr(module, what):
                monkeypatch.setattr(module, what, fake)
        found = {}
        for row in module.rows(options, MACHINE):
            assert row["benchmark"] == name
            assert row["unit"] in ("share", "MiB") or row["bound"] > 0
            found[(row["impl"], *map(str, row["case"].values()), row["metric"])] = row
        return found

    return run


def test_kernels(rows_of) -> None:
    cases = [lightning_kernels.Case(2, 96), lightning_kernels.Case(1, 96, documents=3)]
    options = lightning_kernels.Choice(commit="c", heads=2)
    found = rows_of("lightning_kernels", options, our_cases=lambda: cases)
    case = ("lasp triton", "2", "96", "0", "1", "128", "80", "bfloat16")
    metrics = ("forward_ms", "backward_ms", "forward_graph_ms", "both_graph_ms", "extra_memory")
    assert list(found) == [(*case, metric) for metric in metrics]
    tensor_ms = 2 * 96 * 128 * 2 / 1e12 * 1e3
    bounds = [row["bound"] for row in found.values()]
    assert bounds == [pytest.approx(n * tensor_ms) for n in (4, 7, 4, 11)] + [None]


def test_length(rows_of) -> None:
    options = lightning_length.Sweep(commit="c", lengths=(64, 128), heads=1, head_dim=64)
    for name in ("lasp triton", "lightning attention 1"):
        options.only = name
        found = rows_of("lightning_length", options)
        assert [(key[0], key[1], key[-1]) for key in found] == [
            (name, tokens, metric)
            for tokens in ("64", "128")
            for metric in ("forward_ms", "backward_ms", "extra_mib")
        ]


def test_decode(rows_of) -> None:
    cases = [lightning_decode.Case(1, heads=2), lightning_decode.Case(2, heads=2)]
    found = rows_of("lightning_decode", Options(commit="c"), CASES=cases)
    assert [(key[0], key[1], key[-1]) for key in found] == [
        ("lasp triton", "1", "step_ms"),
        ("lasp triton", "1", "host_us"),
        ("lasp triton", "1", "graph_step_ms"),
        ("lasp triton", "2", "step_ms"),
        ("lasp eager", "1", "step_ms"),
        ("lasp eager", "1", "host_us"),
        ("lasp eager", "2", "step_ms"),
    ]
    # One step reads and writes a state, and reads or writes q, k, v and o.
    moved_ms = (2 * 2 * 128 * 128 * 4 + 4 * 2 * 128 * 2) / 1e12 * 1e3
    bounds = {key[1]: row["bound"] for key, row in found.items() if key[-1] == "step_ms"}
    assert bounds == {"1": pytest.approx(2.0 + moved_ms), "2": pytest.approx(2 * moved_ms)}


def test_host_time(rows_of) -> None:
    cases = {"CASES": [host_time.Case(32, 2, 32)], "STEPS": [host_time.Case(1, 2, 32)]}
    cases |= {"PACKS": host_time.Case(32, 2, 32), "NUM_PACKS": 3}
    clocks = {"once_us": lambda call: (call(), 2.0)[1]}
    clocks |= {"first_seconds": lambda _: {"forward": 4.0, "backward": 5.0}}
    found = rows_of("host_time", Options(commit="c"), **cases, **clocks)
    metrics = ("forward_host_us", "backward_host_us", "forward_call_us")
    implementations = ("lasp triton", "torch scaled_dot_product_attention")
    expected = [(impl, metric) for impl in implementations for metric in metrics]
    expected += [
        ("lasp triton", metric)
        for metric in (
            "step_host_us", "new_pack_host_us", "new_pack_layer_host_us", "compiled_share",
            "first_forward_s", "first_backward_s",
        )
    ]  # fmt: skip
    assert [(key[0], key[-1]) for key in found] == expected


def test_layer(rows_of) -> None:
    found = rows_of("lightning_layer", Options(commit="c"), SHAPES=[(2, 16), (1, 16)])
    keys = [(key[0], key[1], key[2], key[-1]) for key in found]
    assert keys == [
        (impl, op, heads, metric)
        for impl in ("lasp triton", "torch eager", "torch compile")
        for op in lightning_layer.OPS
        for heads in (("2",) if impl == "torch compile" else ("2", "1"))
        for metric in ("forward_ms", "backward_ms")
    ]
    assert {row["bound_name"] for row in found.values()} == {"bytes at copy bandwidth"}


def small(config: HybridConfig) -> HybridConfig:
    """The options of a named model at sizes that say nothing."""
    heads = replace(
        config.attention, num_heads=2, num_kv_heads=1, head_dim=16, rotary_dim=8, latent=None
    )
    if config.attention.latent is not None:
        latent = LatentConfig(8, 8, 8, 16, q_lora_rank=8, rope_interleaved=True)
        heads = replace(heads, num_kv_heads=2, latent=latent)
    lightning = replace(
        config.lightning, rotary_dim=min(config.lightning.rotary_dim, 8), norm_groups=1
    )
    return replace(config, attention=heads, moe=None, dense=DenseConfig(8, 4), lightning=lightning)


def test_hybrid_layers(rows_of) -> None:
    models = {name: small(NAMED_CONFIGS[name]) for name in hybrid_layers.MODELS}
    cases = {"NAMED_CONFIGS": models, "CHECKED_TOKENS": 16}
    options = hybrid_layers.Sizes(commit="c", tokens=32)
    found = rows_of("hybrid_layers", options, **cases)
    assert [key[1:3] + key[-1:] for key in found] == [
        (name, layer, metric)
        for name in models
        for layer in ("lightning", "softmax")
        for metric in ("forward_ms", "backward_ms")
    ]
