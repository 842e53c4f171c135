"""Packs whose documents are padded: every result is that of the documents alone.

Padding holds NaN in q, k and v, so that none of it can reach a document unnoticed.
"""

from __future__ import annotations

import pytest
from torch import Tensor

from lasp import SequenceLayout
from tests.lasp.cases import Case, attend_on_rank, check_against_oracle, gather
from tests.lasp.layers.test_lightning_attention import check_two_ranks_equal_one, make_module
from tests.ranks import run_on_ranks

# Shorter than 2P pieces, without a token, of whole pieces, longer than chunks.
PACKS = ((0, 1, 2, 3, 0, 5, 1, 0), (16, 8, 24), (70, 0, 1, 131, 2), (1,))
NAN = float("nan")
CASE = Case((), 1, "document_zigzag", pad_value=NAN)


def longer(lengths: tuple[int, ...], multiple: int) -> tuple[int, ...]:
    """Each padded to another multiple than the layout would take, one of them by far."""
    return tuple(
        (length // multiple + 1 + 3 * (n == 1)) * multiple for n, length in enumerate(lengths)
    )


def cases_for(num_ranks: int) -> list[Case]:
    case = CASE._replace(num_ranks=num_ranks)
    by_document = [case._replace(lengths=lengths) for lengths in PACKS]
    explicit = [
        case._replace(lengths=lengths, padded=longer(lengths, 2 * num_ranks)) for lengths in PACKS
    ]
    other_orders = [
        case._replace(lengths=(0, 1, 13, 70, 2), padded=(3, 1, 20, 71, 9), order=order)
        for order in ("contiguous", "zigzag", "fold")
    ]
    exchanges = [
        case._replace(lengths=PACKS[2], exchange=exchange, with_states=exchange != "scan")
        for exchange in ("sliced", "scan", "auto")
    ]
    fast = case._replace(lengths=(200, 0, 53, 90), exchange="one_hop", rates=(7.0, 9.0))
    return [*by_document, *explicit, *other_orders, *exchanges, fast]


@pytest.mark.parametrize("num_ranks", [1, 2, 4])
def test_every_result_and_gradient_equals_the_oracle(num_ranks: int) -> None:
    """Eager, over every exchange, with default and given padding."""
    cases = cases_for(num_ranks)
    check_against_oracle(cases, run_on_ranks(attend_on_rank, num_ranks, cases))


def kernels_on_rank(cases: list[Case]) -> list[list[Tensor]]:
    from tests.lasp.lightning.test_kernels import small_blocks

    with small_blocks():
        return attend_on_rank(cases)


@pytest.mark.parametrize("num_ranks", [1, 2])
def test_kernels_within_budget(num_ranks: int) -> None:
    pytest.importorskip("triton", reason="the kernels need triton, which has no wheel here")
    from tests.lasp.lightning.test_kernels import CASE, check

    case = CASE._replace(num_ranks=num_ranks, order="document_zigzag", pad_value=NAN)
    cases = [
        case._replace(lengths=(0, 1, 33, 2, 0, 16, 40)),
        case._replace(lengths=(30, 5, 0), padded=(40, 24, 8), with_states=False),
        case._replace(lengths=(30, 5, 0), padded=(35, 20, 1), order="contiguous"),
    ]
    results = run_on_ranks(kernels_on_rank, num_ranks, cases)
    for index, case in enumerate(cases):
        check(case, gather(case, [result[index] for result in results]))


def test_no_state_leaves_or_enters_padding() -> None:
    """A document of one token is in one run: nothing crosses, however far its padding goes."""
    layout = SequenceLayout((1, 1, 0, 1), 4, "document_zigzag")
    assert layout.num_tokens == 24
    assert not any(link.continues for link in layout.run_links)


def test_the_layer_over_ranks_equals_the_layer_on_one() -> None:
    check_two_ranks_equal_one(make_module(), (30, 1, 0, 2, 17), "document_zigzag")
