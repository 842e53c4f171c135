"""What do the next tokens cost, from a context of a thousand tokens to four million?

Layers of MiniMax-Text-01's sizes. ``--parts``:

``layer``
    One lightning layer, projections and all, a token for each of some sequences: against the bytes
    of its weights and states at the bandwidth of a device copy.
``context``
    One layer of each kind by the length of the context, one sequence: lightning stays, softmax
    grows. Then sums over 16 layers, by the ratio of lightning to softmax layers.
``keys``
    Keys and values of one softmax layer, spread over all ranks: against the bytes of a rank's part.
``step``
    A step of a group of eight layers with experts, by ``model.step`` and by ``DecodeGraph``, until
    the host has the token.
``prefill``
    A prompt through that group, in chunks, see ``benchmarks.generation_prefill``.

On one GPU the calls of the first three run in a CUDA graph. That the steps are right is what
``tests/generation`` is for.

Run: torchrun --nproc-per-node 1 -m benchmarks.generation --commit $(git rev-parse HEAD)
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import partial
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from benchmarks.generation_prefill import (
    BENCHMARK,
    GROUP,
    RATIOS,
    Options,
    Setting,
    group_model,
    prefill,
)
from benchmarks.harness import Machine, Question, Row, answer, row
from benchmarks.layer_group import drawn
from benchmarks.timing import copy_bytes_per_s
from lasp.generation.attention import CachedLayer, shape_of
from lasp.generation.cache import GenerationCache, KeyMemory
from lasp.generation.files import CacheShape
from lasp.generation.partials import over_few, over_ranks
from lasp.generation.step import CacheStep, plan_step
from lasp.hybrid import HybridConfig, HybridModel
from lasp.hybrid.graphs import DecodeGraph


def attention_of(setting: Setting, kind: str) -> Any:
    """The attention layer of the model that is of this kind, alone."""
    config = replace(setting.config, pattern=kind, num_layers=1)
    model = HybridModel(config, device="meta", dtype=setting.machine.dtype)
    return drawn(model.layers[0].attention, setting.device).eval()


def filled(setting: Setting, attention: nn.Module, length: int, batch: int = 1) -> GenerationCache:
    """A cache of one layer whose slots have ``length`` random tokens, spread over the ranks."""
    ranks = dist.get_world_size()
    cache = GenerationCache(
        CacheShape((shape_of(attention),), setting.machine.dtype, ranks),
        attention,
        num_slots=batch,
        max_tokens=length + 64,
        cp_group=setting.cp_group,
        device=setting.device,
    )
    for slot in cache.add(batch):
        for rank in range(ranks):
            cache.slots[slot].add(rank, length // ranks)
    for memory in cache.layers:
        for part in memory[:2] if isinstance(memory, KeyMemory) else [memory]:
            part.normal_()
    return cache


def layer_call(
    setting: Setting, attention: nn.Module, length: int, batch: int
) -> Callable[[], Tensor]:
    """One token for each sequence through an attention layer."""
    cache = filled(setting, attention, length, batch)
    layer = CachedLayer(plan_step(cache, range(batch), [1] * batch), cache.layers[0], None)
    hidden = torch.randn(batch, setting.config.hidden_size, device=setting.device)
    return partial(layer.attend, attention, hidden.to(setting.machine.dtype))


def weight_bytes(attention: nn.Module) -> int:
    """All of a layer's weights."""
    return sum(parameter.nbytes for parameter in attention.parameters())


def key_bytes(setting: Setting, length: int) -> int:
    """Keys and values of a rank in one softmax layer."""
    heads, itemsize = setting.config.attention, setting.machine.dtype.itemsize
    return length // dist.get_world_size() * 2 * heads.num_kv_heads * heads.head_dim * itemsize


def lightning_layer(setting: Setting) -> Iterator[Row]:
    """``layer``."""
    attention = attention_of(setting, "G")
    state_bytes = attention.num_heads * attention.head_dim**2 * 4
    for batch in setting.options.batches:
        times = setting.times_ms(layer_call(setting, attention, 1024, batch))
        count, name = weight_bytes(attention), "weights at copy bandwidth"
        if batch > 1:
            count, name = count + 2 * batch * state_bytes, "weights and states at copy bandwidth"
        bound = {"bound": setting.bytes_ms(count), "bound_name": name}
        case = setting.case(batch=batch)
        yield row(BENCHMARK, case, "lightning layer", "step_ms", times, "ms", **bound)


def contexts(setting: Setting) -> Iterator[Row]:
    """``context``."""
    medians: dict[tuple[str, int], float] = {}
    for kind, name in (("G", "lightning layer"), ("*", "softmax layer")):
        attention = attention_of(setting, kind)
        for length in setting.options.contexts:
            times = setting.times_ms(layer_call(setting, attention, length, 1))
            count = weight_bytes(attention) + (key_bytes(setting, length) if kind == "*" else 0)
            bound = {"bound": setting.bytes_ms(count), "bound_name": "bytes at copy bandwidth"}
            case = setting.case(context=length)
            found = row(BENCHMARK, case, name, "step_ms", times, "ms", **bound)
            medians[kind, length] = found["p50"]
            yield found
    for length in setting.options.contexts:
        for ratio, (lightning, softmax) in RATIOS.items():
            total = lightning * medians["G", length] + softmax * medians["*", length]
            case = setting.case(context=length, ratio=ratio, layers=16)
            yield row(BENCHMARK, case, "sum of layers", "step_ms", total, "ms")


def over_keys(q: Tensor, memory: KeyMemory, plan: CacheStep) -> Any:
    """One token's attention over the keys of all ranks."""
    return over_ranks(over_few(q, memory, plan, q.shape[-1] ** -0.5, "auto"), plan.cache.cp_group)


def keys(setting: Setting) -> Iterator[Row]:
    """``keys``."""
    attention, heads = attention_of(setting, "*"), setting.config.attention
    for length in setting.options.contexts:
        cache = filled(setting, attention, length)
        q = torch.randn(1, heads.num_heads, heads.head_dim, device=setting.device)
        q = q.to(setting.machine.dtype)
        times = setting.times_ms(partial(over_keys, q, cache.layers[0], plan_step(cache, [0], [1])))
        bound = setting.bytes_ms(key_bytes(setting, length))
        more = {"bound": bound, "bound_name": "a rank's keys at copy bandwidth"}
        case = setting.case(context=length)
        yield row(BENCHMARK, case, "keys of a softmax layer", "step_ms", times, "ms", **more)
        del cache


def steps(setting: Setting) -> Iterator[Row]:
    """``step``."""
    model, context = group_model(setting), min(setting.options.contexts)
    for batch in setting.options.batches:
        cache = model.new_cache(num_slots=batch, max_tokens=context + 4096)
        slots = cache.add(batch)
        model.step(cache, slots, torch.randint(setting.config.vocab_size, (batch, context)))
        ids = torch.zeros(batch, 1, dtype=torch.int64, device=setting.device)
        calls: dict[str, Callable[[], Tensor]] = {}
        calls["model.step"] = partial(model.step, cache, slots, ids)
        if setting.cp_group is None:
            calls["DecodeGraph"] = partial(DecodeGraph(model, cache, batch).step, slots, ids)
        for name, call in calls.items():
            times = [wall_ms(call) for _ in range(30)][10:]
            case = setting.case(batch=batch, context=context, layers=8)
            yield row(BENCHMARK, case, name, "wall_step_ms", sorted(times), "ms")
        del calls, cache


def wall_ms(call: Callable[[], Tensor]) -> float:
    """Milliseconds until the host has the best token."""
    start = time.perf_counter()
    call().argmax(-1).tolist()
    return (time.perf_counter() - start) * 1e3


PARTS = {
    "layer": lightning_layer,
    "context": contexts,
    "keys": keys,
    "step": steps,
    "prefill": prefill,
}


def rows(options: Options, machine: Machine, config: HybridConfig = GROUP) -> Iterator[Row]:
    """Rows of the parts that are asked for."""
    bandwidth = copy_bytes_per_s() if machine.device == "cuda" else 1e9
    setting = Setting(config, options, machine, bandwidth)
    for part in options.parts:
        with torch.no_grad():
            yield from PARTS[part](setting)


QUESTION = Question(BENCHMARK, Options, rows)

if __name__ == "__main__":
    answer(QUESTION, __doc__)
