"""Decoding in place, of sequences whose states lie in slots of one tensor."""

from __future__ import annotations

import pytest
import torch

from lasp import lightning_decode
from tests.lasp.lightning.test_decode import DEVICE, IMPLS, KERNELS, RATES, make_inputs


@pytest.mark.parametrize(("impl", "dtype"), [IMPLS[0], KERNELS])
def test_slots_say_which_state_a_sequence_has_and_padding_has_none(
    impl: str, dtype: torch.dtype
) -> None:
    inputs, slots = make_inputs(3, 2, 16, 33, dtype), torch.tensor([4, -1, 1], device=DEVICE)
    states = torch.randn(5, 3, 16, 33, dtype=inputs.state.dtype, device=DEVICE)
    before, rows = states.clone(), [0, 2]
    some = [x[rows] for x in inputs[:3]]
    expected = lightning_decode(*some, RATES, states[[4, 1]], impl=impl)
    output, _ = lightning_decode(*inputs[:3], RATES, states, in_place=True, slots=slots, impl=impl)
    assert torch.equal(output[rows], expected.output)
    assert torch.equal(states[[4, 1]], expected.final_state)
    assert torch.equal(states[[0, 2, 3]], before[[0, 2, 3]])
    for wrong, told in (({"in_place": False}, "in_place=True"), ({"slots": slots[:2]}, "int64")):
        how = {"in_place": True, "slots": slots} | wrong
        with pytest.raises(ValueError, match=f"slots .*{told}"):
            lightning_decode(*inputs[:3], RATES, states, impl=impl, **how)
