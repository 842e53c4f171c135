"""Block kernels on a GPU against the oracle: rectangles, packs, values of another width."""

from __future__ import annotations

import pytest
import torch

from ring.blocks.interface import Operands
from ring.blocks.registry import BLOCKS, resolve_block
from tests.ring.blocks.test_blocks import (
    GPU_BLOCKS,
    GPU_RECTANGLES,
    rectangle,
    rectangle_oracle,
    run_dense,
    run_side_by_side,
    run_varlen,
    skip_unless_it_serves,
)
from tests.ring.cases import (
    assert_all_equal,
    assert_all_within_budget,
    cancelling_terms,
    oracle,
    random_tensors,
)


@pytest.mark.gpu
class TestOnGpu:
    @pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
    @pytest.mark.parametrize("name", GPU_BLOCKS)
    @pytest.mark.parametrize("heads", [(8, 1), (6, 2), (5, 5)])
    @pytest.mark.parametrize(
        ("rows", "keys"), [(1, 300), (77, 1), (130, 513), (513, 130), (1100, 1600), (2048, 1024)]
    )
    def test_rectangle(self, name, dtype, heads, rows, keys) -> None:
        skip_unless_it_serves(name, 64, 64)
        tensors = rectangle(rows, keys, heads, 64, dtype)
        honest = run_dense(BLOCKS["eager"], tensors, False, "cuda")
        actual = run_dense(BLOCKS[name], tensors, False, "cuda")
        assert_all_within_budget(
            actual,
            rectangle_oracle(tensors),
            honest,
            dtype,
            terms=cancelling_terms(tensors, (keys,), causal=False),
        )

    @pytest.mark.parametrize("dims", [(192, 128), (128, 64), (64, 96)])
    @pytest.mark.parametrize("name", GPU_BLOCKS)
    def test_values_of_another_width(self, name, dims) -> None:
        skip_unless_it_serves(name, *dims)
        dtype = torch.bfloat16
        tensors = rectangle(1100, 1600, (6, 2), dims[0], dtype, dims[1])
        honest, actual = (run_dense(BLOCKS[b], tensors, False, "cuda") for b in ("eager", name))
        terms = cancelling_terms(tensors, (1600,), causal=False)
        assert_all_within_budget(actual, rectangle_oracle(tensors), honest, dtype, terms=terms)
        tensors, lengths = random_tensors(4500, 6, 2, dims[0], dtype, dims[1]), (5, 4200, 295)
        honest, actual = (
            run_varlen(BLOCKS[b], tensors, lengths, True, "cuda") for b in ("eager", name)
        )
        terms, expected = cancelling_terms(tensors, lengths, True), oracle(tensors, lengths, True)
        assert_all_within_budget(actual, expected, honest, dtype, terms=terms)

    @pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
    @pytest.mark.parametrize("name", GPU_BLOCKS)
    @pytest.mark.parametrize("causal", [True, False])
    @pytest.mark.parametrize("lengths", [(100, 1, 333, 2), (1,) * 7, (257,), (5, 4200, 7)])
    def test_varlen(self, name, dtype, causal, lengths) -> None:
        skip_unless_it_serves(name, 128, 128)
        tensors = random_tensors(sum(lengths), 6, 2, 128, dtype)
        honest = run_varlen(BLOCKS["eager"], tensors, lengths, causal, "cuda")
        actual = run_varlen(BLOCKS[name], tensors, lengths, causal, "cuda")
        assert_all_within_budget(
            actual,
            oracle(tensors, lengths, causal),
            honest,
            dtype,
            terms=cancelling_terms(tensors, lengths, causal),
        )

    @pytest.mark.parametrize("dims", [(64, 64), (128, 128), (192, 128)])
    @pytest.mark.parametrize("name", ["flash", "fa4"])
    @pytest.mark.parametrize("heads", [(8, 1), (5, 5)])
    def test_rectangles_side_by_side(self, name, heads, dims) -> None:
        skip_unless_it_serves(name, *dims)
        dtype = torch.bfloat16
        parts = [rectangle(*some, heads, dims[0], dtype, dims[1]) for some in GPU_RECTANGLES]
        both = [run_side_by_side(BLOCKS[b], parts, "cuda") for b in ("eager", name)]
        for (_, keys), part, honest, actual in zip(GPU_RECTANGLES, parts, *both, strict=True):
            terms = cancelling_terms(part, (keys,), causal=False)
            assert_all_within_budget(actual, rectangle_oracle(part), honest, dtype, terms=terms)

    def test_eager(self) -> None:
        tensors = rectangle(7, 20, (6, 2), 5, torch.float64)
        actual = run_dense(BLOCKS["eager"], tensors, False, "cuda")
        assert_all_equal(actual, rectangle_oracle(tensors))

    @pytest.mark.parametrize(
        ("dtype", "head_dim", "expected"),
        [
            (torch.bfloat16, 128, "cudnn"),
            (torch.float16, 192, "flash"),
            (torch.bfloat16, 12, "eager"),
            (torch.float32, 128, "eager"),
        ],
    )
    def test_auto(self, dtype, head_dim, expected) -> None:
        operands = Operands(torch.device("cuda"), dtype, head_dim, head_dim)
        if BLOCKS["fa4"].obstacle(operands) is None:
            expected = "fa4"
        assert resolve_block("auto", torch.device("cuda"), dtype, head_dim).name == expected
