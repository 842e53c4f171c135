"""Launches that go straight to the compiled kernel: what they pass on, and what they rely on."""

from __future__ import annotations

import time
from collections import defaultdict
from types import SimpleNamespace
from typing import Any
from unittest.mock import patch

import pytest
import torch
from torch import Tensor

pytest.importorskip("triton", reason="the kernels need triton, which has no wheel here")

from triton import knobs
from triton.backends.nvidia import driver as nvidia
from triton.compiler import CompiledKernel
from triton.tools.tensor_descriptor import TensorDescriptor

from lasp import LightningOptions, SequenceLayout, lightning_attention, lightning_decode
from lasp._core import launcher
from lasp._core.launcher import Launcher, Tile, aligned, encode, launcher_of
from lasp.layers.norm_gate import norm_gate
from lasp.lightning.triton import schedule
from tests.lasp.cases import bits_equal
from tests.lasp.layers.test_heads import heads_with
from tests.lasp.lightning.test_kernels import DEVICE, small_blocks

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


def specialization(x: Any) -> Any:
    """What Triton compiles for, of an argument that differs between calls."""
    if isinstance(x, Tensor):
        return x.dtype, x.data_ptr() % 16
    if type(x) is tuple:
        return x[0].dtype, x[1].block, x[0].data_ptr() % 16
    return type(x)


def test_calls_of_a_launcher_differ_in_nothing_that_is_compiled() -> None:
    """Calls draw any layouts, states, strides, addresses, dtypes and directions."""
    seen: dict[Launcher, set[tuple[Any, ...]]] = defaultdict(set)

    def note(self: Launcher, programs: int, *arguments: Any) -> None:
        seen[self].add(tuple(specialization(x) for x in arguments))

    rates = torch.tensor([0.0, 0.25, 8.0])
    with patch.object(Launcher, "__call__", note), small_blocks():
        for dtype in (torch.float32, torch.bfloat16):
            for key_dim, value_dim in ((32, 32), (5, 33)):
                for lengths in ((75,), (0, 31, 4, 40), (4, 30, 41)):
                    for offset in (0, 1):
                        for states in (False, True):
                            call(lengths, key_dim, value_dim, dtype, offset, states, rates)
    assert len(seen) > 20
    assert all(len(cases) == 1 for cases in seen.values())


def call(
    lengths: tuple[int, ...],
    key_dim: int,
    value_dim: int,
    dtype: torch.dtype,
    offset: int,
    with_states: bool,
    rates: Tensor,
) -> None:
    """Every kernel of the package; tensors begin ``offset`` elements into memory."""

    def made(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
        size = torch.Size(shape).numel()
        return torch.zeros(size + offset, dtype=dtype)[offset:].view(shape).requires_grad_()

    x, gate, weight = (made(*shape, dtype=dtype) for shape in ((7, 48), (7, 48), (48,)))
    fused = made(7, 4, 3 * key_dim, dtype=dtype)
    parts = heads_with("triton", LightningOptions())(fused)
    torch.autograd.grad(parts, fused, [made(*part.shape, dtype=dtype).detach() for part in parts])
    y = norm_gate(x, gate, weight, eps=1e-6, impl="triton")
    torch.autograd.grad(y, (x, gate, weight), made(7, 48, dtype=dtype).detach())

    tokens, heads = sum(lengths), len(rates)
    q, k = (made(tokens, heads, key_dim, dtype=dtype) for _ in range(2))
    v = made(tokens, heads, value_dim, dtype=dtype)
    state = made(len(lengths), heads, key_dim, value_dim) if with_states else None
    layout = SequenceLayout(lengths, 1)
    output, final = lightning_attention(
        q, k, v, rates, layout=layout, impl="triton", initial_state=state,
        output_final_state=with_states,
    )  # fmt: skip
    results = [output] if final is None else [output, final]
    leaves = [q, k, v] if state is None else [q, k, v, state]
    grads = [made(*x.shape, dtype=x.dtype) for x in results]
    torch.autograd.grad(results, leaves, [x.detach() for x in grads])
    if state is not None:
        rows = [x.detach()[: len(lengths), None] for x in (q, k, v)]
        for in_place in (False, True):
            lightning_decode(*rows, rates, state.detach(), in_place=in_place, impl="triton")


@pytest.mark.parametrize("device", [DEVICE])
def test_an_unaligned_input_after_an_aligned_one_gives_the_same_bits(device: str) -> None:
    memory = torch.randn(3, 40 * 2 * 64 + 1, device=device).bfloat16()
    rates = torch.tensor([0.1, 0.0])
    shifted = [x[1:].view(40, 2, 64) for x in memory]
    assert all(x.data_ptr() % 16 for x in shifted[:1])
    results = [
        lightning_attention(*inputs, rates, impl="triton")
        for inputs in ([x.clone() for x in shifted], shifted)
    ]
    assert bits_equal(*results)


def test_a_warm_call_plans_nothing_however_many_documents_there_are() -> None:
    layout = SequenceLayout((1,) * 100_000, 1)
    q, k, v = (torch.zeros(100_000, 1, 1, requires_grad=True) for _ in range(3))
    rates = torch.zeros(1)

    def both() -> None:
        result = lightning_attention(
            q, k, v, rates, layout=layout, impl="triton", output_final_state=False
        ).output
        torch.autograd.grad(result, (q, k, v), do)

    do, taken = torch.zeros(100_000, 1, 1), []
    with patch.object(Launcher, "__call__", lambda *_: None):
        both()
        unplanned = dict.fromkeys(("_plan_forward", "_plan_backward", "_context"))
        with patch.multiple(schedule, **unplanned):
            for _ in range(20):
                start = time.perf_counter()
                both()
                taken.append(time.perf_counter() - start)
    assert min(taken) < 2e-3  # of the host, both directions
