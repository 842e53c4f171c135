"""Megatron-Core on CPU ranks, for tests only: what it takes to run without a GPU.

``run_on_cpu()`` replaces, in this process:

    torch.cuda.current_device      where Megatron makes its buffers: the CPU
    torch.cuda's RNG calls         Megatron's tracker saves and restores the CPU generator
    torch.cuda.synchronize         before a checkpoint is written: nothing to wait for
    get_pos_emb_on_this_cp_rank    the same slices, without pinned memory and a copy to the GPU

Nothing here is imported by the library; on a GPU none of it is needed.
"""

from __future__ import annotations

import torch
import torch.distributed as dist
from megatron.core import parallel_state
from megatron.core.models.common.embeddings import rope_utils, rotary_pos_embedding
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.tensor_parallel import random as megatron_random


def run_on_cpu() -> None:
    cpu = torch.device("cpu")
    torch.cuda.current_device = lambda: cpu
    torch.cuda.synchronize = lambda *_: None
    torch.cuda.manual_seed = torch.manual_seed
    torch.cuda.get_rng_state = lambda *_, **__: torch.get_rng_state()
    megatron_random._get_cuda_rng_state = lambda *_, **__: torch.get_rng_state()
    megatron_random._set_cuda_rng_state = lambda state, *_, **__: torch.set_rng_state(state)
    for module in (rope_utils, rotary_pos_embedding):
        module.get_pos_emb_on_this_cp_rank = _rows_of_this_rank


def _rows_of_this_rank(pos_emb: torch.Tensor, dim: int, group: dist.ProcessGroup) -> torch.Tensor:
    chunks = pos_emb.chunk(2 * group.size(), dim)
    return torch.cat((chunks[group.rank()], chunks[2 * group.size() - 1 - group.rank()]), dim)


_parallel: dict[str, int] | None = None


def initialize(device: str = "cpu", **sizes: int) -> ProcessGroupCollection:
    """Megatron's parallel state of these sizes (tp, cp, pp, vpp, ep, etp), kept while they stay.

    Communicators of a former call are left to die with the pool.
    """
    global _parallel
    if device == "cpu":
        run_on_cpu()
    if _parallel != sizes:
        parallel_state.destroy_model_parallel()
        parallel_state.initialize_model_parallel(
            tensor_model_parallel_size=sizes.get("tp", 1),
            pipeline_model_parallel_size=sizes.get("pp", 1),
            virtual_pipeline_model_parallel_size=sizes.get("vpp"),
            context_parallel_size=sizes.get("cp", 1),
            expert_model_parallel_size=sizes.get("ep", 1),
            expert_tensor_parallel_size=sizes.get("etp", 1),
        )
        _parallel = dict(sizes)
    megatron_random.model_parallel_cuda_manual_seed(1)
    return ProcessGroupCollection.use_mpu_process_groups()


def summed(x: torch.Tensor, group: dist.ProcessGroup) -> torch.Tensor:
    x = x.clone()
    dist.all_reduce(x, group=group)
    return x


def gathered(x: torch.Tensor, group: dist.ProcessGroup) -> list[torch.Tensor]:
    parts = [torch.empty_like(x) for _ in range(group.size())]
    dist.all_gather(parts, x.contiguous(), group=group)
    return parts
