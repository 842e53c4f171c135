"""What a layout is made from: equal definitions are equal layouts."""

from __future__ import annotations

import pickle

import pytest
import torch

from lasp.sequence.layout import SequenceLayout
from tests.lasp.sequence.test_layout import ORDERS


def test_from_cu_seqlens() -> None:
    layout = SequenceLayout.from_cu_seqlens(torch.tensor([0, 4, 4, 9]), 3)
    assert layout == SequenceLayout((4, 0, 5), 3)
    padded = torch.tensor([0, 6, 6, 18])
    layout = SequenceLayout.from_cu_seqlens([0, 4, 4, 9], 3, "document_zigzag", padded)
    assert layout == SequenceLayout((4, 0, 5), 3, "document_zigzag", (6, 0, 12))


def test_a_layout_is_made_again_from_what_a_compiled_graph_holds_of_it() -> None:
    for padded in (None, (6, 4, 0)):
        for order in ORDERS[: 3 if padded else 4]:
            layout = SequenceLayout((5, 3, 0), 2, order, padded)
            again = SequenceLayout.from_lengths_tensor(layout.lengths_tensor, 2, order)
            assert again == layout
            assert SequenceLayout(*layout.definition) == layout


def test_equal_layouts_are_equal_however_their_padding_is_given() -> None:
    assert SequenceLayout((5, 3), 2, "zigzag", (5, 3)) == SequenceLayout((5, 3), 2, "zigzag")
    padded = SequenceLayout((5, 3), 2, "document_zigzag", [8, 4])  # type: ignore[arg-type]
    assert padded == SequenceLayout((5, 3), 2, "document_zigzag")
    assert padded != SequenceLayout((5, 3), 2, "document_zigzag", (8, 8))
    assert padded.lengths_tensor.tolist() == [[5, 3], [8, 4]]


def test_equal_layouts_hash_equal_and_pickle_without_their_caches() -> None:
    layout = SequenceLayout([5, 3], 2, "fold")  # type: ignore[arg-type]
    layout.position_ids(0)
    copy = pickle.loads(pickle.dumps(layout))
    assert copy == layout
    assert hash(copy) == hash(SequenceLayout((5, 3), 2, "fold"))
    assert copy.runs(1) == layout.runs(1)
    assert copy.lengths_tensor.tolist() == [5, 3]
    padded = SequenceLayout((5, 3), 2, "document_zigzag")
    assert pickle.loads(pickle.dumps(padded)) == padded
    with pytest.raises(AttributeError):
        layout.order = "zigzag"  # type: ignore[misc]
