"""The benchmarks of ring attention run, at sizes that say nothing about speed."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from benchmarks import (
    report,
    ring_cases,
    ring_host,
    ring_kinds,
    ring_length,
    ring_packed,
    ring_peers,
)
from benchmarks.harness import Machine
from lasp import SequenceLayout
from ring.reference import dense_attention
from tests.closeness import assert_equal_to_rounding
from tests.ranks import run_on_ranks
from tests.ring.cases import random_tensors

MACHINE = Machine("cpu", torch.float16, 1)
SHAPE = {"heads": 4, "kv_heads": 2, "head_dim": 8}


def length_rows() -> list[dict[str, Any]]:
    cases = ring_length.cases(ring_length.Options(commit="c", tokens=(12, 24), **SHAPE))
    ring_cases.check(cases, MACHINE)
    return [row for case in cases for row in ring_length.measure(case, MACHINE)]


def packed_rows() -> list[dict[str, Any]]:
    options = ring_packed.Options(commit="c", tokens=96, documents=("A", "C", "equal"), **SHAPE)
    cases = ring_packed.cases(options)
    ring_cases.check(cases, MACHINE)
    return [row for case in cases for row in ring_packed.measure(case, MACHINE)]


def by_case(rows: list[dict[str, Any]], *names: str) -> dict[tuple, dict[tuple, dict[str, Any]]]:
    found: dict[tuple, dict[tuple, dict[str, Any]]] = {}
    for row in rows:
        assert row["p20"] is None or row["p20"] <= row["p50"] <= row["p80"]
        key = tuple(row["case"][name] for name in names)
        found.setdefault(key, {})[row["impl"], row["metric"]] = row
    return found


def test_ring_length() -> None:
    rows = run_on_ranks(length_rows, 2)[0]
    found = by_case(rows, "tokens", "causal")
    assert list(found) == [(12, True), (24, True), (24, False)]
    for (tokens, causal), case in found.items():
        for metric in ("forward_ms", "both_ms"):
            alone = case[ring_length.ALONE, metric]
            assert alone["bound"] is None
            assert case["ring", metric]["bound"] == 2 * alone["p50"]
        # Rank 0 needs all of rank 1, whose tokens lie before the second half of its own.
        received = tokens * 2 * 2 * 8 * 2
        assert case["ring", "forward_bytes"]["p50"] == received
        # Rank 1, causal: half as many keys and values, and float32 gradients of all its own.
        assert case["ring", "backward_bytes"]["p50"] == received * ((0.5 if causal else 1) + 2)
    peers = {ring_peers.ZIGZAG, ring_peers.LLAMA3} if ring_peers.obstacle() is None else set()
    assert {impl for impl, _ in found[24, True]} == {ring_length.ALONE, "ring"} | peers


def test_ring_packed() -> None:
    rows = run_on_ranks(packed_rows, 2)[0]
    found = by_case(rows, "documents", "order", "planned")
    planned = {documents: order for documents, order, best in found if best}
    assert planned["equal"] == "contiguous"
    assert set(planned) == {"A", "C", "equal"}
    for (documents, order, _), case in found.items():
        values = {metric: case["ring", metric]["p50"] for _, metric in case if _ == "ring"}
        assert values["forward_bytes"] == values["needed_bytes"]
        if (documents, order) == ("equal", "contiguous"):
            assert values["needed_bytes"] == values["backward_bytes"] == 0
        assert values["balance"] >= 1
        assert 0 < values["tile_fill"] <= 1
        whole = case[ring_packed.WHOLE, "both_ms"]["p50"]
        assert case["ring", "both_ms"]["bound"] == whole / 2


def kinds_rows() -> list[dict[str, Any]]:
    options = ring_kinds.Options(
        commit="c", tokens=256, heads=2, kv_heads=1, head_dim=8, latent=(6, 4), window=20
    )
    return list(ring_kinds.rows(options, Machine("cpu", torch.float32, 1)))


def test_ring_kinds() -> None:
    found = by_case(run_on_ranks(kinds_rows, 2)[0], "kind")
    assert [kind for (kind,) in found] == list(ring_kinds.KINDS)
    for (kind,), case in found.items():
        whole = case[ring_kinds.WHOLE, "both_ms"]
        assert whole["bound"] is None  # no kernel here
        assert case["ring", "both_ms"]["bound"] == whole["p50"] / 2
        assert ((ring_kinds.REPEATABLE, "both_ms") in case) == (kind != "latent")
        received = case["ring", "forward_bytes"]["p50"]
        # A window's keys, or of 256 latents all; 8 and 8 elements, or 10, of 4 bytes.
        assert received == {"window": 20 * 16 * 4, "latent": 256 * 10 * 4}.get(kind, received)


def test_ring_host() -> None:
    options = ring_host.Options(commit="c", device="cpu", tokens=8, heads=2, head_dim=8)
    rows = list(ring_host.rows(options, Machine("cpu", torch.float32)))
    metrics, ours = ("forward_host_us", "backward_host_us"), "ring cpu_flash"
    assert [(row["case"]["documents"], row["metric"], row["impl"]) for row in rows] == [
        (documents, metric, impl)
        for documents, impls in ((1, (ring_host.SDPA, ours)), (4, (ours,)))
        for metric in metrics
        for impl in impls
    ]
    names = [row["bound_name"] for row in rows]
    assert names == [None, ring_host.SDPA, None, ring_host.SDPA, None, None]


def test_tile_fill_counts_scores() -> None:
    layout = SequenceLayout((256 + 130,), 2)  # 193 each; rank 1 has a rectangle of 193 x 193
    assert ring_packed.tile_fill(layout, 0, True) == (193 * 194 // 2, 3 * 128**2)
    used, held = ring_packed.tile_fill(layout, 1, True)
    assert (used, held) == (193 * 194 // 2 + 193**2, (3 + 4) * 128**2)


def test_rows_make_a_table() -> None:
    facts = {"device": "GPU", "num_devices": 2, "nccl": "2", "torch": "2", "triton": "3"}
    facts |= {"driver": "1", "date": "2026-01-01", "commit": "0" * 40, "command": "c"}
    rows = [row | facts for row in run_on_ranks(length_rows, 2)[0]]
    text = report.table(rows)
    assert "| ring | 24 | True |" in text
    assert f"2 x {ring_length.ALONE}" in text


@pytest.mark.parametrize("causal", [True, False])
def test_what_stands_in_for_flash_attn_is_attention(causal: bool) -> None:
    """On CPUs; the rows are the last of their documents' keys, as llama3 calls it."""
    q, k, v, do = random_tensors(17, 4, 2, 8, torch.float64)
    cu_k = torch.tensor([0, 9, 17], dtype=torch.int32)
    cu_q = torch.tensor([0, 3, 11], dtype=torch.int32)
    rows = torch.cat([torch.arange(6, 9), torch.arange(9, 17)])
    leaves = [x.requires_grad_() for x in (q, k, v)]
    exact, lse = dense_attention(*leaves, cu_seqlens=(0, 9, 17), causal=causal, scale=0.3)
    expected = torch.autograd.grad(exact[rows], leaves, do[rows])
    q, k, v = (x.detach() for x in (q, k, v))
    lengths = (cu_q, cu_k, 8, 9)
    output, lse_HT, *_ = ring_peers.varlen_forward(q[rows], k, v, *lengths, 0.0, 0.3, causal)
    assert_equal_to_rounding(output, exact[rows])
    assert_equal_to_rounding(lse_HT.T, lse[rows], tolerance=1e-6)
    grads: list[Tensor] = [torch.empty_like(x) for x in (q[rows], k, v)]
    ring_peers.varlen_backward(
        *(do[rows], q[rows], k, v, output, lse[rows].T.detach()), *grads, *lengths, 0.0, 0.3, causal
    )
    for actual, true in zip(grads, (expected[0][rows], *expected[1:])):
        assert_equal_to_rounding(actual, true)
