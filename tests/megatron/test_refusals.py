"""What the Megatron parts do not support raises ValueError on every rank, before any collective.

One row of tests/megatron/refusals.py, one test.
"""

from __future__ import annotations

import re
from typing import Any
from unittest import mock

import pytest
import torch
from megatron.core import parallel_state
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.transformer.transformer_config import MLATransformerConfig

from tests.megatron.attention import HEAD_DIM, HEADS, HIDDEN, parallel_config
from tests.megatron.cpu import initialize
from tests.megatron.refusals import OTHER_RANKS, ROWS
from tests.megatron.refused_parts import BASE, RANKS, Row, core, lightning, ring
from tests.ranks import run_on_ranks

pytestmark = pytest.mark.megatron


def groups_without(name: str, groups: ProcessGroupCollection) -> ProcessGroupCollection | None:
    if name == "all":
        return None
    return ProcessGroupCollection(**{n: g for n, g in vars(groups).items() if n != name})


def build(row: Row) -> Any:
    groups = initialize(**row.sizes)
    config = parallel_config(row.sizes, **BASE.get(row.build, {}))
    for name, value in row.options.items():
        setattr(config, name, value)  # past Megatron's own checks, which come when it is made
    initialized = row.without != "all"
    with mock.patch.object(
        parallel_state, "model_parallel_is_initialized", return_value=initialized
    ):
        return row.build(config, groups_without(row.without, groups), **row.arguments)


def message_of(index: int) -> str:
    row = ROWS[index]
    if row.passed:
        module = build(row)
        shape = (4, 1, HEADS, HEAD_DIM) if row.build is core else (4, 1, HIDDEN)
        hidden = torch.zeros(shape, dtype=torch.float64)
    try:
        if row.passed:
            module(*[hidden] * (3 if row.build is core else 1), **row.passed)
        else:
            build(row)
    except ValueError as error:
        return str(error)
    return ""


@pytest.mark.parametrize("index", range(len(ROWS)), ids=[str(row) for row in ROWS])
def test_refused(index: int) -> None:
    row = ROWS[index]
    for name in row.options:
        if name not in MLATransformerConfig.__dataclass_fields__:
            pytest.skip(f"needs a megatron-core with the option {name}, to refuse it")
    for message in run_on_ranks(message_of, RANKS, index):
        assert re.search(row.names, message), message
        assert re.search(r"must .+, got .+: \w", message), (
            f"not 'must ..., got ...: way out': {message}"
        )


def not_refused(index: int) -> None:
    row = ROWS[index]
    build(Row(row.build, names="nothing", sizes=row.sizes))


def no_collective(*_: Any) -> None:
    raise AssertionError("the projection gathers tokens over tp, before the batch was looked at")


def message_with_sequence_parallelism(build: Any, projection: str) -> str:
    sizes = {"tp": RANKS}
    module = build(parallel_config(sizes), initialize(**sizes))
    getattr(module, projection).forward = no_collective
    hidden = torch.zeros(4, 1, HIDDEN, dtype=torch.float64)
    with pytest.raises(ValueError, match="layout must be for") as raised:
        module(hidden, packed_seq_params=OTHER_RANKS)
    return str(raised.value)


@pytest.mark.parametrize(
    ("part", "projection"),
    [(lightning, "in_proj"), (ring, "linear_qkv")],
    ids=["lightning", "ring"],
)
def test_batches_are_refused_before_the_gather_over_tp(part: Any, projection: str) -> None:
    run_on_ranks(message_with_sequence_parallelism, RANKS, part, projection)


def test_parts_are_built_without_what_is_refused() -> None:
    one_of_each = {(row.build, *row.sizes): index for index, row in enumerate(ROWS)}
    for index in one_of_each.values():
        run_on_ranks(not_refused, RANKS, index)
