"""A prompt through a group of eight layers of MiniMax-Text-01's sizes, in chunks, over ranks.

The bound is what the forward asks for (``benchmarks.model_flops``), shared by the ranks, at the
rate of a product of 8192 x 8192 matrices in the same process. Shares are those of the first rank's
time between events around the parts of each layer. Sums over 16 layers, by the ratio of lightning
to softmax layers, are made of these times. The prompt is read once, after two chunks that warm up.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import pairwise
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import nn

from benchmarks.harness import Machine, RankOptions, Row, row
from benchmarks.layer_group import quick_model
from benchmarks.lightning_length import flops_per_s
from benchmarks.model_flops import step_flops
from benchmarks.timing import Timed, graph_ms, samples_ms
from lasp.hybrid import MINIMAX_TEXT_01, HybridConfig, HybridModel, Residuals
from moe_parallel import ExpertTopology

BENCHMARK = "generation"
RATIOS = {
    "all lightning": (16, 0),
    "15:1": (15, 1),
    "7:1": (14, 2),
    "3:1": (12, 4),
    "all softmax": (0, 16),
}
GROUP = replace(
    MINIMAX_TEXT_01,
    num_layers=8,
    vocab_size=1024,
    residuals=Residuals.deepnorm(80),
    num_decay_layers=80,
)


@dataclass(kw_only=True)
class Options(RankOptions):
    """Options; lengths in tokens, of all ranks together."""

    parts: tuple[str, ...] = ("layer", "context")
    batches: tuple[int, ...] = (1, 8, 32)
    contexts: tuple[int, ...] = (1024, 16384, 131072, 1048576, 4194304)
    prompts: tuple[int, ...] = (32768, 131072, 1048576)
    chunk_tokens: int = 65536
    seconds: float = 20.0


class Setting(NamedTuple):
    """What all parts share: the model's shape, this run's options, and the rate of copies."""

    config: HybridConfig
    options: Options
    machine: Machine
    bytes_per_s: float

    @property
    def cp_group(self) -> dist.ProcessGroup | None:
        """All ranks, if they are several."""
        return dist.group.WORLD if dist.get_world_size() > 1 else None

    @property
    def device(self) -> torch.device:
        """The device of this rank."""
        if self.machine.device == "cuda":
            return torch.device("cuda", torch.cuda.current_device())
        return torch.device("cpu")

    def case(self, **more: Any) -> dict[str, Any]:
        """The case of a row."""
        heads = self.config.attention
        sizes = {"hidden": self.config.hidden_size, "heads": heads.num_heads}
        return sizes | {"ranks": dist.get_world_size()} | more

    def times_ms(self, call: Callable[[], Any]) -> Sequence[float]:
        """Times of a call in a CUDA graph; over ranks, or on a CPU, of calls as they are."""
        if self.machine.device == "cuda" and self.cp_group is None:
            return graph_ms(call)
        return samples_ms({"call": Timed(call)}, self.machine)["call"]

    def bytes_ms(self, count: int) -> float:
        """The time of so many bytes at the bandwidth of a copy."""
        return count / self.bytes_per_s * 1e3


def group_model(setting: Setting) -> HybridModel:
    """The layer group, its experts dealt out over the ranks."""
    ranks = dist.get_world_size()
    groups = ExpertTopology(ranks, cp=ranks, ep=ranks).build_groups()
    return quick_model(setting.config, setting.machine.device, setting.machine.dtype, groups).eval()


class Clock:
    """Times of the parts of each layer, by events on the device that hooks of modules record."""

    def __init__(self, model: HybridModel, *, on_gpu: bool) -> None:
        self._on_gpu = on_gpu
        self._marks: list[tuple[str, Any]] = []
        for kind, layer in zip(model.config.kinds, model.decoder_layers()):
            attention = "lightning attention" if kind == "G" else "softmax attention"
            self._begins(layer.attention_norm, attention)
            self._begins(layer.moe_norm, "experts")
            layer.register_forward_hook(lambda *_: self.mark("rest"))

    def _begins(self, module: nn.Module, part: str) -> None:
        module.register_forward_pre_hook(lambda *_: self.mark(part))

    def mark(self, part: str) -> None:
        """From here on the time is that of ``part``."""
        event: Any = time.perf_counter()
        if self._on_gpu:
            event = torch.cuda.Event(enable_timing=True)
            event.record()
        self._marks.append((part, event))

    def seconds(self) -> dict[str, float]:
        """Time of each part since the last call of this."""
        self.mark("end")
        if self._on_gpu:
            torch.cuda.synchronize()
        found: dict[str, float] = {}
        for (part, begin), (_, end) in pairwise(self._marks):
            took = begin.elapsed_time(end) / 1e3 if self._on_gpu else end - begin
            found[part] = found.get(part, 0.0) + took
        self._marks = []
        return found


def prefill(setting: Setting) -> Iterator[Row]:
    """Rows of each prompt: time, shares, and sums by ratio."""
    model, chunk = group_model(setting), setting.options.chunk_tokens
    on_gpu = setting.machine.device == "cuda"
    rate, clock = flops_per_s() if on_gpu else 1e9, Clock(model, on_gpu=on_gpu)
    read(setting, model, clock, min(2 * chunk, setting.options.prompts[-1]))  # warms up
    for length in setting.options.prompts:
        spent = read(setting, model, clock, length)
        total, flops = sum(spent.values()), step_flops(setting.config, (length,))
        asked = (flops.weights + flops.lightning) / 3 + flops.softmax / 3.5
        bound = asked / dist.get_world_size() / rate * 1e3
        case = setting.case(prompt=length, chunk=chunk, layers=8)
        more = {"bound": bound, "bound_name": "operations at the rate of a product"}
        yield row(BENCHMARK, case, "prefill", "prefill_ms", total * 1e3, "ms", **more)
        for part, took in spent.items():
            yield row(BENCHMARK, case, f"prefill {part}", "share", took / total, "1")
        for ratio, summed in by_ratio(setting.config.kinds, spent).items():
            more = {"ratio": ratio, "layers": 16}
            yield row(BENCHMARK, case | more, "sum of layers", "prefill_ms", summed * 1e3, "ms")


def read(setting: Setting, model: HybridModel, clock: Clock, length: int) -> dict[str, float]:
    """Seconds of each part while a prompt of ``length`` tokens is read."""
    cache = model.new_cache(num_slots=1, max_tokens=length)
    slots, prompt = cache.add(), torch.randint(setting.config.vocab_size, (length,))
    dist.broadcast(sent := prompt.to(setting.device), src=0)
    prompt = sent.cpu()
    clock.seconds()
    for part in prompt.split(setting.options.chunk_tokens):
        clock.mark("rest")
        model.step(cache, slots, [part])
    return clock.seconds()


def by_ratio(kinds: str, spent: dict[str, float]) -> dict[str, float]:
    """Seconds of 16 layers with experts for each ratio, of the times of the group's parts."""
    lightning = spent.get("lightning attention", 0.0) / max(1, kinds.count("G"))
    softmax = spent.get("softmax attention", 0.0) / max(1, kinds.count("*"))
    experts = 16 * spent["experts"] / len(kinds)
    return {
        name: some * lightning + others * softmax + experts
        for name, (some, others) in RATIOS.items()
    }
