"""The memory of a plan, and the document that has the plans."""

from __future__ import annotations

from pathlib import Path

import pytest

from benchmarks.layer_group import layer_group
from benchmarks.train_memory import Plan, kept_bytes, table, train_bytes
from moe_parallel import ExpertTopology

DOCUMENT = Path(__file__).parents[2] / "docs" / "long-context.md"


def test_the_document_has_the_table() -> None:
    assert "\n".join(table()) in DOCUMENT.read_text()


def test_kept_bytes_of_the_layer_group() -> None:
    """At hidden size 2048, where every width is a multiple of it: 23 and 16.25 inputs."""
    config, size = layer_group(), 2 * 2048
    assert kept_bytes(config, "G", "none") == 23 * size
    assert kept_bytes(config, "*", "none") == 16.25 * size
    assert kept_bytes(config, "G", "softmax_outputs") == kept_bytes(config, "*", "full") == size
    assert kept_bytes(config, "*", "softmax_outputs") == 3 * size + 4 * 16
    assert kept_bytes(config, "*", "softmax_outputs+offload") == size + 4 * 16
    assert kept_bytes(config, "G", "full+offload") == 0
    with pytest.raises(ValueError, match="policy must be 'none'"):
        kept_bytes(config, "G", "expert_inputs")


def test_what_grows_with_what() -> None:
    config, topology = layer_group(), ExpertTopology(2, cp=2, ep=2)
    short, long = (
        train_bytes(Plan("group", config, topology, context, "full")) for context in (2**17, 2**18)
    )
    for part in ("kept", "backward"):
        assert long[part] == 2 * short[part]
    for part in ("states", "gathered", "head"):
        assert long[part] == short[part]
    assert short["states"] == 16 * (4_831_838_208 + 161_005_568) / 2
    assert short["total"] == pytest.approx(1.05 * (sum(short.values()) - short["total"]))
