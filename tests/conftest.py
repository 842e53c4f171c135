from __future__ import annotations

import os

# One thread a process: workers and ranks have the cores already, and threads that wait for each
# other there cost twice the time. Torch and numpy read this when they are imported.
os.environ.setdefault("OMP_NUM_THREADS", "1")

import pytest
import torch

from tests.ranks import close_pools

if not torch.cuda.is_available():
    # Kernels are interpreted, here and in rank processes; triton reads this when it is imported.
    os.environ.setdefault("TRITON_INTERPRET", "1")


NUMBERS = {2: "two", 4: "four", 8: "eight"}


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--slow", action="store_true", help="run the tests marked slow too")
    parser.addoption("--llama-cpp", help="a checkout of llama.cpp, whose converter tests run")


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    gpus = torch.cuda.device_count()
    for item in items:
        if "slow" in item.keywords and not config.getoption("--slow"):
            item.add_marker(pytest.mark.skip(reason="slow: run with --slow"))
        if "gpu" in item.keywords and gpus < 1:
            item.add_marker(pytest.mark.skip(reason="needs one CUDA device"))
        if (marker := item.get_closest_marker("multi_gpu")) is not None:
            needed = marker.args[0] if marker.args else 2
            if gpus < needed:
                reason = f"needs {NUMBERS[needed]} CUDA devices"
                item.add_marker(pytest.mark.skip(reason=reason))


@pytest.fixture(autouse=True)
def seed() -> None:
    torch.manual_seed(0)


def pytest_runtest_teardown(item: pytest.Item, nextitem: pytest.Item | None) -> None:
    """Rank pools end with their folder, in tests/megatron with their file.

    Process groups are not freed and each keeps polling threads: hundreds of them from tests long
    done would take the cores from the tests that run.
    """
    if nextitem is None:
        return  # they end with the process
    here, there = (
        i.path if "megatron" in i.path.parts else i.path.parent for i in (item, nextitem)
    )
    if here != there:
        close_pools()
