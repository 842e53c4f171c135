"""Megatron-Core on CPU ranks, for tests only: what it takes to run without a GPU.

``run_on_cpu()`` replaces, in this process and for good:

    torch.cuda.current_device      where Megatron makes its buffers: the CPU
    torch.cuda's RNG calls         Megatron's tracker saves and restores the CPU generator
    torch.cuda.synchronize         before a checkpoint is written: nothing to wait for
    torch.cuda.current_stream      of which gradient reductions ask the events to wait for: none
    get_pos_emb_on_this_cp_rank    the same slices, without pinned memory and a copy to the GPU
    multi_latent_attention.HAVE_TE 0.16 takes a stand-in for TransformerEngine's classes

``train_on_cpu()`` rewrites, within its block, what Megatron's optimizer, schedules and loss write
out: device "cuda" is the CPU, float32 is float64 where the tensors are, ``Tensor.type()`` names
float tensors as those of a GPU.

Nothing here is imported by the library; on a GPU none of it is needed.
"""

from __future__ import annotations

import gc
import multiprocessing
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
import torch.distributed as dist
from megatron.core import parallel_state
from megatron.core.dist_checkpointing.strategies import filesystem_async
from megatron.core.models.common.embeddings import (
    rope_utils,
    rotary_pos_embedding,
    yarn_rotary_pos_embedding,
)
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.tensor_parallel import random as megatron_random
from megatron.core.transformer import multi_latent_attention
from torch.overrides import TorchFunctionMode


def run_on_cpu() -> None:
    cpu = torch.device("cpu")
    torch.cuda.current_device = lambda: cpu
    torch.cuda.synchronize = lambda *_: None
    torch.cuda.current_stream = lambda *_: None
    torch.cuda.manual_seed = torch.manual_seed
    torch.cuda.get_rng_state = lambda *_, **__: torch.get_rng_state()
    megatron_random._get_cuda_rng_state = lambda *_, **__: torch.get_rng_state()
    megatron_random._set_cuda_rng_state = lambda state, *_, **__: torch.set_rng_state(state)
    if not isinstance(multi_latent_attention.TELinear, type):
        multi_latent_attention.HAVE_TE = False
    for module in (rope_utils, rotary_pos_embedding, yarn_rotary_pos_embedding):
        module.get_pos_emb_on_this_cp_rank = _rows_of_this_rank


def _rows_of_this_rank(pos_emb: torch.Tensor, dim: int, group: dist.ProcessGroup) -> torch.Tensor:
    chunks = pos_emb.chunk(2 * group.size(), dim)
    return torch.cat((chunks[group.rank()], chunks[2 * group.size() - 1 - group.rank()]), dim)


class _TrainOnCpu(TorchFunctionMode):
    def __torch_function__(
        self, function: Callable, types: Any, args: tuple = (), kwargs: dict | None = None
    ) -> Any:
        kwargs = dict(kwargs or {})
        if str(kwargs.get("device")).startswith("cuda"):
            kwargs["device"] = "cpu"
            if kwargs.get("dtype") is torch.float32:  # scales and norms, of float64 gradients
                kwargs["dtype"] = torch.float64
        if function is torch.Tensor.type and len(args) == 1 and not kwargs:
            name = "Float" if args[0].dtype == torch.float64 else args[0].type().split(".")[1][:-6]
            return f"torch.cuda.{name}Tensor"
        if function is torch.Tensor.cuda:
            return args[0]
        if function is torch.Tensor.float and args[0].dtype == torch.float64:
            return args[0]
        if function is torch.Tensor.__rtruediv__ and not args[0].is_floating_point():
            args = (args[0].double(), *args[1:])  # one over the number of targets
        return function(*args, **kwargs)


def train_on_cpu() -> TorchFunctionMode:
    """Context of Megatron's training loop on float64 parameters."""
    run_on_cpu()
    return _TrainOnCpu()


@contextmanager
def checkpoints_from_ranks() -> Iterator[None]:
    """Megatron writes from processes of its own: a rank, a daemon, may have them in this block.

    The one it keeps ends with the block; else it would outlive the ranks.
    """
    multiprocessing.current_process()._config["daemon"] = False
    yield
    filesystem_async._results_queue = None


_parallel: dict[str, int] | None = None
_groups: set[dist.ProcessGroup] = set()


def initialize(device: str = "cpu", **sizes: int) -> ProcessGroupCollection:
    """Megatron's parallel state of these sizes (tp, cp, pp, vpp, ep, etp), kept while they stay."""
    global _parallel
    if device == "cpu":
        run_on_cpu()
    if _parallel != sizes:
        _destroy_groups()
        others = _all_groups()
        parallel_state.initialize_model_parallel(
            tensor_model_parallel_size=sizes.get("tp", 1),
            pipeline_model_parallel_size=sizes.get("pp", 1),
            virtual_pipeline_model_parallel_size=sizes.get("vpp"),
            context_parallel_size=sizes.get("cp", 1),
            expert_model_parallel_size=sizes.get("ep", 1),
            expert_tensor_parallel_size=sizes.get("etp", 1),
        )
        _groups.update(_all_groups() - others)
        _parallel = dict(sizes)
    megatron_random.model_parallel_cuda_manual_seed(1)
    return ProcessGroupCollection.use_mpu_process_groups()


def _all_groups() -> set[dist.ProcessGroup]:
    return set(dist.distributed_c10d._world.pg_map)


def _destroy_groups() -> None:
    """Destroys the groups of the former parallel state: each keeps polling threads."""
    parallel_state.destroy_model_parallel()
    for group in _groups & _all_groups():
        dist.destroy_process_group(group)
    _groups.clear()
    gc.collect()  # the models that hold them


def summed(x: torch.Tensor, group: dist.ProcessGroup) -> torch.Tensor:
    x = x.clone()
    dist.all_reduce(x, group=group)
    return x


def gathered(x: torch.Tensor, group: dist.ProcessGroup) -> list[torch.Tensor]:
    parts = [torch.empty_like(x) for _ in range(group.size())]
    dist.all_gather(parts, x.contiguous(), group=group)
    return parts
