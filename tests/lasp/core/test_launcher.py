"""Launches that go straight to the compiled kernel: what they pass on, and what they rely on."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any
from unittest.mock import patch

import pytest
import torch

pytest.importorskip("triton", reason="the kernels need triton, which has no wheel here")

from triton import knobs
from triton.backends.nvidia import driver as nvidia
from triton.compiler import CompiledKernel
from triton.tools.tensor_descriptor import TensorDescriptor

from lasp._core import launcher
from lasp._core.launcher import Launcher, Tile, aligned, encode, launcher_of

CPU = torch.device("cpu")


class Run:
    """Stands for Triton's launcher, which wraps a launch function to encode descriptors."""

    def __init__(self, signature: dict[str, str], metas: list[Any], runs: list[Any]) -> None:
        self.launch = nvidia.wrap_handle_tensordesc(
            lambda *given: runs.append(given), signature, metas
        )

    def __call__(self, *arguments: Any) -> None:
        self.launch(*arguments)


class Compiled(CompiledKernel):
    """Notes with which arguments it is run."""

    module, function, packed_metadata = None, "function", "packed"

    def __init__(self, *forms: str) -> None:
        self.runs: list[tuple[Any, ...]] = []
        self.src = SimpleNamespace(signature=dict(enumerate((*forms, "*fp32", "i32"))))
        metas = [{"form": form} for form in forms]
        self.metadata = SimpleNamespace(tensordesc_meta=metas)
        self.launcher = Run(self.src.signature, metas, self.runs)

    @property
    def run(self) -> Any:
        return self.launcher

    def launch_metadata(self, *arguments: Any) -> Any:
        return arguments


class Kernel:
    """Counts how often it is compiled or looked up."""

    def __init__(self, *forms: str) -> None:
        self.compiled, self.looked_up = Compiled(*forms), 0
        self.arg_names = (*forms, "x", "number", "stride", "BLOCK")

    def __getitem__(self, grid: tuple[int, ...]) -> Any:
        def launch(*arguments: Any, **named: Any) -> Any:
            self.looked_up += 1
            return self.compiled

        return launch


def test_later_launches_give_the_compiled_kernel_all_arguments_in_its_order() -> None:
    kernel, x = Kernel(), torch.zeros(4)
    launch = Launcher(kernel, CPU, {"num_warps": 4, "BLOCK": 16, "stride": 1})
    with patch.object(launcher, "driver") as driver:
        driver.active.get_current_stream = lambda index: 7
        launch(3, x, 5)
        launch(0, x, 5)
        launch(2, x, 6)
    assert kernel.looked_up == 1
    head = 2, 1, 1, 7, "function", "packed", None, None, None
    expected = (*head, x.data_ptr(), 6, 1, 16)
    assert kernel.compiled.runs == [expected]


def test_parameters_are_given_by_their_address() -> None:
    """Triton asks the driver about each tensor that it is given."""
    kernel, x = Kernel(), torch.nn.Parameter(torch.zeros(4))
    with patch.object(launcher, "driver") as driver:
        driver.active.get_current_stream = lambda index: 7
        for launch in (Launcher(kernel, CPU, {"BLOCK": 16, "stride": 1}), one_launch(kernel)):
            launch(3, x, 5)
            launch(3, x, 6)
    assert [run[9:] for run in kernel.compiled.runs] == [(x.data_ptr(), 6, 1, 16)] * 2


def one_launch(kernel: Kernel) -> Any:
    """:func:`lasp._core.launcher.launch` as a launcher is called."""
    return lambda programs, *arguments: launcher.launch(
        kernel, CPU, programs, *arguments, BLOCK=16, stride=1
    )


def test_profilers_see_every_launch(monkeypatch: pytest.MonkeyPatch) -> None:
    kernel, x = Kernel(), torch.zeros(4)
    launch = Launcher(kernel, CPU, {"BLOCK": 16, "stride": 1})

    def hook(metadata: Any) -> None: ...

    with patch.object(launcher, "driver") as driver:
        driver.active.get_current_stream = lambda index: 7
        launch(3, x, 5)
        monkeypatch.setattr(knobs.runtime, "launch_enter_hook", hook)
        launch(3, x, 5)
    metadata, enter, leave = kernel.compiled.runs[0][6:9]
    assert metadata == ((3, 1, 1), 7, x, 5, 1, 16)
    assert enter is hook
    assert leave is knobs.runtime.launch_exit_hook


def test_one_launcher_a_case() -> None:
    kernel = Kernel()
    first = launcher_of(kernel, CPU, torch.float32, BLOCK=16, stride=1)
    assert launcher_of(kernel, CPU, torch.float32, BLOCK=16, stride=1) is first
    assert launcher_of(kernel, CPU, torch.float16, BLOCK=16, stride=1) is not first
    assert launcher_of(kernel, CPU, torch.float32, BLOCK=16, stride=2) is not first


TILE = Tile((8, 16), (16, 1), (4, 16))
FORM = "tensordesc<fp32[4, 16]>"


@pytest.fixture
def encoded(monkeypatch: pytest.MonkeyPatch) -> list[tuple[Any, ...]]:
    """What Triton is asked to encode; a map is its number in this list."""
    asked: list[tuple[Any, ...]] = []

    def make(x: TensorDescriptor, meta: Any, *_: Any) -> list[Any]:
        asked.append((x.base.data_ptr(), x.shape, x.strides, x.block_shape, x.padding, meta))
        return [f"map {len(asked)}", *x.shape, *x.strides]

    monkeypatch.setattr(nvidia, "make_tensordesc_arg", make)
    encode.cache_clear()
    return asked


def launches_of(kernel: Kernel, *calls: tuple[Any, ...]) -> list[tuple[Any, ...]]:
    """What Triton's launch function is given for each call of a launcher, but for the grid."""
    launch = Launcher(kernel, CPU, {"BLOCK": 16, "stride": 1})
    with patch.object(launcher, "driver") as driver:
        driver.active.get_current_stream = lambda index: 7
        for arguments in (calls[0], *calls):  # the first one compiles
            launch(3, *arguments)
    return [run[9:] for run in kernel.compiled.runs]


def test_a_tensor_at_a_known_address_is_not_encoded_again(encoded: list[Any]) -> None:
    x, y, z = (torch.zeros(8, 16) for _ in range(3))
    runs = launches_of(Kernel(FORM, FORM), *[((x, TILE), (y, TILE), z, 5)] * 3)
    assert [asked[0] for asked in encoded] == [x.data_ptr(), y.data_ptr()]
    assert encoded[0][1:] == (*TILE, "zero", {"form": FORM})
    maps = ("map 1", *TILE.shape, *TILE.strides, "map 2", *TILE.shape, *TILE.strides)
    assert runs == [(*maps, z.data_ptr(), 5, 1, 16)] * 3


@pytest.mark.parametrize(
    "other", [{"shape": (4, 16)}, {"strides": (32, 1)}, {"block": (2, 16)}, {}], ids=str
)
def test_maps_differ_where_what_they_follow_from_does(
    encoded: list[Any], other: dict[str, Any]
) -> None:
    """A new map is made where one alone differs: address, shape, strides, block or form."""
    x, z = torch.zeros(2, 8, 16), torch.zeros(1)
    tile = TILE._replace(**other)
    calls = (((x[0], TILE), z, 5), ((x[0 if other else 1], tile), z, 5), ((x[0], TILE), z, 5))
    runs = launches_of(Kernel(FORM), *calls)
    assert [run[0] for run in runs] == ["map 1", "map 2", "map 1"]
    assert encoded[1][1:4] == tuple(tile)
    assert encoded[1][0] == (x[0] if other else x[1]).data_ptr()
    launches_of(Kernel(FORM.replace("32", "16")), *calls)
    assert len(encoded) == 4  # another kernel may read elements of another kind


def test_a_tensor_that_a_kernel_takes_twice_is_encoded_once_where_both_are_read_alike(
    encoded: list[Any],
) -> None:
    x, z = torch.zeros(8, 16), torch.zeros(1)
    runs = launches_of(Kernel(FORM, FORM + "?", FORM), (*[(x, TILE)] * 3, z, 5))
    assert runs[0][0:15:5] == ("map 1", "map 2", "map 1")
    assert [asked[-1]["form"] for asked in encoded] == [FORM, FORM + "?"]


def test_the_maps_that_are_remembered_are_bounded(encoded: list[Any]) -> None:
    assert encode.cache_parameters()["maxsize"] == 8192


def test_only_what_does_not_begin_at_16_bytes_is_copied() -> None:
    x = torch.arange(24.0)
    assert aligned(x[4:]) is not x
    assert aligned(x[4:]).data_ptr() == x[4:].data_ptr()
    assert aligned(x[1:]).data_ptr() % 16 == 0
    assert torch.equal(aligned(x[1:]), x[1:])
