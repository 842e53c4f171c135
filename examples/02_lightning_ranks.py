"""Lightning attention over ranks: only d x d states cross, whatever the length.

torchrun --standalone --nproc-per-node 4 examples/02_lightning_ranks.py
"""

import torch
import torch.distributed as dist

from lasp import SequenceLayout, decay_rates, lightning_attention

HEADS, DIM = 4, 32

use_gpu = torch.cuda.device_count() >= dist.get_node_local_rank(0) + 1 and torch.cuda.is_available()
dist.init_process_group("nccl" if use_gpu else "gloo")
rank, num_ranks = dist.get_rank(), dist.get_world_size()
device = torch.device("cuda", dist.get_node_local_rank()) if use_gpu else torch.device("cpu")
if use_gpu:
    torch.cuda.set_device(device)

torch.manual_seed(0)  # the same pack on every rank, for the comparison below
lengths = (1000, 3, 0, 700, 345)
pack = [torch.randn(sum(lengths), HEADS, DIM, dtype=torch.float64).to(device) for _ in range(3)]
rates = decay_rates(HEADS, layer_index=3, num_layers=8).to(device)
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
