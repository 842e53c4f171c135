"""Lightning attention over ranks: only d x d states cross, whatever the length.

torchrun --standalone --nproc-per-node 4 examples/02_lightning_ranks.py
"""

import torch
import torch.distributed as dist

from lasp import SequenceLayout, decay_rates, lightning_attention
from lasp.launch import init_distributed

HEADS, DIM = 4, 32

device = init_distributed()
rank, num_ranks = dist.get_rank(), dist.get_world_size()
torch.set_grad_enabled(False)  # results over ranks would hold their groups for a backward

torch.manual_seed(0)  # the same pack on every rank, for the comparison below
lengths = (1000, 3, 0, 700, 345)
pack = [torch.randn(sum(lengths), HEADS, DIM, dtype=torch.float64).to(device) for _ in range(3)]
rates = decay_rates(HEADS, layer_index=3, num_layers=8)
whole = lightning_attention(*pack, rates, layout=SequenceLayout(lengths, 1)).output

for order in ("contiguous", "zigzag", "fold"):
    layout = SequenceLayout(lengths, num_ranks, order)
    q, k, v = (layout.shard(x, rank) for x in pack)
    mine = lightning_attention(q, k, v, rates, layout=layout, cp_group=dist.group.WORLD).output
    error = (mine - layout.shard(whole, rank)).abs().max()
    dist.all_reduce(error, dist.ReduceOp.MAX)
    if rank == 0:
        print(f"{order}: {num_ranks} ranks, largest difference from one rank {error:.1e}")
dist.destroy_process_group()
