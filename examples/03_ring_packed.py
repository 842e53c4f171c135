"""Softmax attention over ranks on the same packed tokens: only the needed keys and values move.

torchrun --standalone --nproc-per-node 4 examples/03_ring_packed.py
"""

import torch
import torch.distributed as dist

from lasp import SequenceLayout
from lasp.launch import init_distributed
from lasp.sequence.planner import layout_costs
from ring import ring_attention

QUERY_HEADS, KV_HEADS, DIM = 8, 2, 32

device = init_distributed()
rank, num_ranks = dist.get_rank(), dist.get_world_size()
torch.set_grad_enabled(False)  # results over ranks would hold their groups for a backward

torch.manual_seed(0)  # the same pack on every rank, for the comparison below
lengths = (1500, 20, 20, 300, 208)
heads = (QUERY_HEADS, KV_HEADS, KV_HEADS)
pack = [torch.randn(sum(lengths), h, DIM).to(device) for h in heads]
whole = ring_attention(*pack, layout=SequenceLayout(lengths, 1)).output

for cost in layout_costs(lengths, num_ranks):  # the best order first
    layout = cost.layout
    q, k, v = (layout.shard(x, rank) for x in pack)
    mine = ring_attention(q, k, v, layout=layout, cp_group=dist.group.WORLD).output
    error = (mine - layout.shard(whole, rank)).abs().max()
    dist.all_reduce(error, dist.ReduceOp.MAX)
    if rank == 0:
        works = [layout.work(r) for r in range(num_ranks)]
        print(
            f"{layout.order}: busiest rank {max(works) * num_ranks / sum(works):.2f} x the mean,"
            f" largest difference from one rank {error:.1e}"
        )
dist.destroy_process_group()
