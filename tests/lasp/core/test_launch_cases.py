"""Which calls share a compiled kernel; test_launcher has what it is given."""

from __future__ import annotations

from typing import Any
from unittest.mock import Mock, patch

import pytest
import torch

pytest.importorskip("triton")

from lasp._core import launcher


def test_addresses_that_are_not_aligned_are_another_case() -> None:
    """A kernel that is compiled for aligned addresses reads others wrongly."""
    x = torch.zeros(64)
    cases: list[Any] = []

    def launcher_of(kernel: object, device: torch.device, case: Any) -> Mock:
        cases.append(case)
        return Mock()

    with patch.object(launcher, "launcher_of", launcher_of):
        for some in (x, x[16:], x[1:]):
            launcher.launch(None, x.device, 1, some)
    assert cases[0] == cases[1] != cases[2]
