"""Bad input raises a ValueError that names the argument, on every rank, before any exchange."""

from __future__ import annotations

import pytest
import torch
import torch.distributed as dist

from lasp.lightning.validation import check_layout
from lasp.sequence.layout import SequenceLayout
from ring import RingAttention, ring_attention
from ring.blocks.registry import BLOCKS
from ring.planner.schedule import plan_ring
from tests.ranks import run_on_ranks

LAYOUT = SequenceLayout((5, 7), 2)  # 6 tokens a rank; the border cuts the second document
GOOD = {"q": ((6, 4, 8), "float32"), "k": ((6, 2, 8), "float32"), "v": ((6, 2, 8), "float32")}

# What differs from a good call -> what the message must say.
TABLE = {
    "q of two dims": ({"q": ((6, 32), "float32")}, "q must be"),
    "q of five dims": ({"q": ((1, 1, 6, 4, 8), "float32")}, "q must be"),
    "q packed, k in rows": ({"k": ((1, 6, 2, 8), "float32")}, "q must be"),
    "v of other heads": ({"v": ((6, 1, 8), "float32")}, "v like k but for the last dim"),
    "v without a width": ({"v": ((6, 2, 0), "float32")}, "q, k and v must not be empty"),
    "values of another width on cpu_flash": (
        {"v": ((6, 2, 4), "float32"), "block": "cpu_flash"},
        "block 'cpu_flash' needs values as wide as keys",
    ),
    "k and v of other tokens": (
        {"k": ((5, 2, 8), "float32"), "v": ((5, 2, 8), "float32")},
        "q and k must have the same rows, tokens and head dim",
    ),
    "another head dim": (
        {"q": ((6, 4, 4), "float32")},
        "q and k must have the same rows, tokens and head dim",
    ),
    "no tokens": (
        dict.fromkeys("qkv", ((0, 2, 8), "float32")),
        "q, k and v must not be empty",
    ),
    "no heads": ({"q": ((6, 0, 8), "float32")}, "q, k and v must not be empty"),
    "heads that do not divide": ({"q": ((6, 5, 8), "float32")}, "heads of k must divide"),
    "more key heads than heads": ({"q": ((6, 1, 8), "float32")}, "heads of k must divide"),
    "integers": (dict.fromkeys("qkv", ((6, 2, 8), "int64")), "q must be float16, bfloat16"),
    "two dtypes": ({"k": ((6, 2, 8), "float64")}, "one dtype"),
    **{
        f"fp8 on {block}": (
            dict.fromkeys("qkv", ((6, 2, 8), "float8_e4m3fn")) | {"block": block},
            "q must be float16, bfloat16, float32 or float64, got torch.float8_e4m3fn",
        )
        for block in ("auto", *BLOCKS)
    },
    "two devices": ({"v": ((6, 2, 8), "float32", "meta")}, "on one device"),
    "no SequenceLayout": ({"layout": (5, 7)}, "layout must be a SequenceLayout, got (5, 7)"),
    "no layout": ({"layout": None}, "layout must be for the 2 ranks of cp_group, got num_ranks 1"),
    "layout for other ranks": ({"layout": SequenceLayout((5, 7), 3)}, "layout must be for the 2"),
    "layout, but no group": ({"cp_group": None}, "layout must be for the 1"),
    "layout of another length": (
        {"layout": SequenceLayout((5, 9), 2)},
        "layout must hold the 6 tokens a rank of q (6, 4, 8), got 7",
    ),
    "rows under two documents": (
        dict.fromkeys("qkv", ((2, 6, 2, 8), "float32")),
        "layout must hold one document",
    ),
    "scale that is not finite": ({"scale": float("nan")}, "scale must be finite, got nan"),
    "sinks of other heads": ({"sinks": torch.zeros(2)}, "sinks must be floating, [4] as the heads"),
    "sinks that are integers": ({"sinks": torch.zeros(4).int()}, "sinks must be floating"),
    "sinks elsewhere": ({"sinks": torch.zeros(4, device="meta")}, "sinks must be floating"),
    "unknown block": ({"block": "fast"}, "block must be one of"),
    "block of another device": ({"block": "cudnn"}, "block 'cudnn' needs tensors on an NVIDIA"),
}


def messages_of_the_table() -> dict[str, str]:
    """The error of each call; a hang or a call that works is a failure."""
    found = {}
    for name, (change, _) in TABLE.items():
        arguments = {**GOOD, "layout": LAYOUT, "cp_group": dist.group.WORLD, **change}
        tensors = []
        for tensor in "qkv":
            shape, dtype, *device = arguments.pop(tensor)
            tensors.append(
                torch.ones(shape, dtype=getattr(torch, dtype), device=(*device, "cpu")[0])
            )
        with pytest.raises(ValueError) as error:
            ring_attention(*tensors, **arguments)
        found[name] = str(error.value)
    # The group still works: nobody waits in a collective.
    dist.barrier()
    return found


def test_every_rank_raises_and_none_hangs() -> None:
    first, second = run_on_ranks(messages_of_the_table, 2, timeout_s=60)
    assert first == second
    for name, (_, part) in TABLE.items():
        assert part in first[name], f"{name}: {first[name]}"


def test_the_table_starts_from_a_good_call() -> None:
    run_on_ranks(good_call, 2)


def good_call() -> None:
    q, k, v = (torch.ones(shape) for shape, _ in GOOD.values())
    ring_attention(q, k, v, layout=LAYOUT, cp_group=dist.group.WORLD)


def outside_the_group() -> str | None:
    group = dist.new_group([1])
    if dist.get_rank() == 1:
        return None
    x = torch.ones(6, 2, 8)
    with pytest.raises(ValueError) as error:
        ring_attention(x, x, x, cp_group=group)
    return str(error.value)


def test_a_rank_outside_the_group_is_told_so() -> None:
    message, _ = run_on_ranks(outside_the_group, 2)
    assert "cp_group must be a process group that holds this rank" in message


@pytest.mark.parametrize(
    ("layout", "cp_group"),
    [(LAYOUT, -100), (LAYOUT, None), (SequenceLayout((7,), 1), None)],
)
def test_mistakes_in_the_layout_read_as_in_lasp(layout, cp_group) -> None:
    q = torch.ones(6, 4, 8)
    messages = []
    for check in (
        lambda: check_layout(layout, cp_group, q),
        lambda: ring_attention(q, q, q, layout=layout, cp_group=cp_group),
    ):
        with pytest.raises(ValueError) as error:
            check()
        messages.append(str(error.value))
    assert messages[0] == messages[1]


@pytest.mark.parametrize("rank", [-1, 2])
def test_schedule_of_a_rank_that_does_not_exist(rank: int) -> None:
    with pytest.raises(ValueError, match="rank must be in"):
        plan_ring(LAYOUT, rank, True)


@pytest.mark.parametrize(
    ("sizes", "rotary_dim", "message"),
    [
        ((12, 6, 4, 8), 4, "num_kv_heads must divide"),
        ((12, 6, 0, 8), 4, "must be an integer >= 1"),
        ((0, 6, 2, 8), 4, "must be an integer >= 1"),
        ((12, 6, 2, 8), 3, "rotary_dim must be even"),
        ((12, 6, 2, 8), 10, "rotary_dim must be even"),
        ((12, 6, 2, 8), -2, "rotary_dim must be even"),
    ],
)
def test_module_sizes(sizes: tuple[int, ...], rotary_dim: int, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        RingAttention(*sizes, rotary_dim=rotary_dim)


@pytest.mark.parametrize("shape", [(12,), (6, 11), (1, 1, 6, 12), (0, 12), (0, 6, 12)])
def test_module_hidden(shape: tuple[int, ...]) -> None:
    with pytest.raises(ValueError, match="hidden must be"):
        RingAttention(12, 6, 2, 8, rotary_dim=4)(torch.ones(shape))


def test_module_layout_of_another_length() -> None:
    with pytest.raises(ValueError, match=r"layout must hold the 6 tokens a rank of hidden \(6, 12"):
        RingAttention(12, 6, 2, 8, rotary_dim=4)(torch.ones(6, 12), layout=SequenceLayout((7,), 1))
