"""Without megatron-core these modules are skipped, unread: they import it at their top."""

from __future__ import annotations

import multiprocessing
from collections.abc import Iterator
from importlib.util import find_spec
from pathlib import Path

import pytest

from tests.ranks import IMPORTED

MISSING = find_spec("megatron") is None or find_spec("megatron.core") is None

if not MISSING:
    multiprocessing.set_forkserver_preload([*IMPORTED, "lasp.megatron"])


class Unread(pytest.Module):
    def collect(self) -> Iterator[pytest.Item]:
        pytest.skip(
            "needs megatron-core: pip install 'lasp-plus[megatron]'", allow_module_level=True
        )


def pytest_pycollect_makemodule(
    module_path: Path, parent: pytest.Collector
) -> pytest.Module | None:
    return Unread.from_parent(parent, path=module_path) if MISSING else None
