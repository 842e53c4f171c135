"""How long does a state take from one program to the next, through memory?

A chain of programs, each on a multiprocessor of its own: every one waits for the flag of the one
before, reads the state it left, decays it and adds its own, writes that and sets its flag. This is
what one pass over a sequence would do once for every segment ("look-back"). Such a pass cannot be
faster than a hop times the segments of a head. Two passes read keys and values twice instead.

``hop_us`` is the time of a chain over its length. ``tokens`` is how long segments would have to be
for the chain to be as fast as a second reading of keys and values by all heads.

Run: python -m benchmarks.state_hop --commit $(git rev-parse HEAD)
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial

import torch
import triton
import triton.language as tl
from torch import Tensor

from benchmarks.harness import Machine, Options, Question, Row, answer, row
from benchmarks.timing import copy_bytes_per_s, graph_ms

NAME, OURS = "state_hop", "chain of states"
HEADS = (1, 2, 8)


@dataclass(kw_only=True)
class Sizes(Options):
    """Options: programs of a chain, and the head dim of a state."""

    programs: int = 128
    head_dim: int = 128


@triton.jit
def chain_kernel(
    states,  # [heads, programs, SIZE] float32
    flags,  # [heads, programs] int32
    start,  # flags of this call are above it
    programs,
    SIZE: tl.constexpr,
):
    """One program a state: wait for the one before, add to it, pass it on."""
    row = tl.program_id(0) % programs + tl.program_id(1) * programs
    place = states + row * SIZE + tl.arange(0, SIZE)
    first = tl.program_id(0) == 0
    ticket = tl.load(start)
    if not first:
        while tl.atomic_add(flags + row - 1, 0, sem="acquire", scope="gpu") <= ticket:
            pass
    before = tl.load(place - SIZE, mask=not first, other=0.0, cache_modifier=".cg")
    tl.store(place, before * 0.5 + 1.0)
    tl.debug_barrier()
    tl.atomic_xchg(flags + row, ticket + 1, sem="release", scope="gpu")


def chain(states: Tensor, flags: Tensor, start: Tensor) -> None:
    """One call: the state of every program, and the next ticket."""
    heads, programs, size = states.shape
    chain_kernel[(programs, heads)](states, flags, start, programs, SIZE=size, num_warps=16)
    start += 1


def rows(sizes: Sizes, machine: Machine) -> Iterator[Row]:
    """A row for each number of heads whose chains run beside each other."""
    size, bandwidth = sizes.head_dim**2, copy_bytes_per_s()
    for heads in HEADS:
        programs = max(2, min(sizes.programs, 128 // heads))
        states = torch.zeros(heads, programs, size, device=machine.device)
        flags = torch.zeros(heads, programs, dtype=torch.int32, device=machine.device)
        start = torch.zeros(1, dtype=torch.int32, device=machine.device)
        chain(states, flags, start)
        expected = 2 - 0.5 ** torch.arange(programs, device=machine.device)
        torch.testing.assert_close(states[:, :, 0], expected.expand(heads, -1))
        facts = {"heads": heads, "programs": programs, "head_dim": sizes.head_dim}
        hop_us = [1e3 * ms / programs for ms in graph_ms(partial(chain, states, flags, start))]
        yield row(NAME, facts, OURS, "hop_us", hop_us, "us")
        token_bytes = 2 * 2 * sizes.head_dim * heads  # keys and values in bfloat16
        tokens = hop_us[1] * 1e-6 * bandwidth / token_bytes
        yield row(NAME, facts, OURS, "tokens", tokens, "tokens")


QUESTION = Question(NAME, Sizes, rows)

if __name__ == "__main__":
    answer(QUESTION, __doc__)
