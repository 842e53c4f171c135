"""Experts over EP x ETP ranks, with one router decision for all ranks.

torchrun --standalone --nproc-per-node 4 examples/04_moe.py
"""

import torch
import torch.distributed as dist

from lasp.launch import init_distributed
from moe_parallel import ExpertParallelMoE, ExpertTopology, MoEConfig


def main(device: torch.device) -> None:
    rank, num_ranks = dist.get_rank(), dist.get_world_size()

    etp = 2 if num_ranks % 2 == 0 else 1
    topology = ExpertTopology(num_ranks, ep=num_ranks // etp, etp=etp)
    config = MoEConfig(hidden_size=64, ffn_size=128, num_experts=8, top_k=2, capacity_factor=1.25)
    layer = ExpertParallelMoE(config, groups=topology.build_groups().experts, device=device)

    torch.manual_seed(rank)
    hidden = torch.randn(512, 64, device=device, requires_grad=True)
    output, aux_loss, stats = layer(hidden)
    (output.square().mean() + aux_loss).backward()
    if rank == 0:
        print(f"ep {topology.ep} x etp {topology.etp}, experts on this rank {8 // topology.ep}")
        print("assignments of each expert over all ranks:", stats.assigned.tolist())
        print("dropped for capacity:", stats.dropped.tolist())


main(init_distributed())
dist.destroy_process_group()  # after the layer is gone: its groups would outlive this
