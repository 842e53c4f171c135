"""Ring attention on one screen: keys and values travel round, each rank merges what it sees.

python examples/07_ring_in_sixty_lines.py   # 4 processes on the CPU; torch alone

Rank r holds tokens [r T, (r + 1) T). Causal, so the keys of later ranks pass by unseen (-)::

    keys of rank, by step    0  1  2  3
    rank 0 attends to        0  -  -  -
    rank 1                   1  0  -  -
    rank 3                   3  2  1  0
"""

import tempfile

import torch
import torch.distributed as dist

P, T, H, D = 4, 16, 2, 8  # ranks, tokens a rank, heads, head dim


def attend(q, k, v, seen):
    """Attention ``[T, H, D]`` over some keys, and the log-sum-exp ``[T, H]`` of their scores."""
    scores_HTS = torch.einsum("thd,shd->hts", q, k) / D**0.5
    scores_HTS = scores_HTS.masked_fill(~seen, float("-inf"))
    return torch.einsum("hts,shd->thd", scores_HTS.softmax(-1), v), scores_HTS.logsumexp(-1).T


def merge(a, lse_a, b, lse_b):
    """Attention over two sets of keys: each weighs by its share of the sum of exp(score)."""
    lse = torch.logaddexp(lse_a, lse_b)
    return (lse_a - lse).exp()[..., None] * a + (lse_b - lse).exp()[..., None] * b, lse


def shift(x, hop):
    """Send ``x`` to the rank ``hop`` further round the ring; return what comes from behind."""
    rank, received = dist.get_rank(), torch.empty_like(x)
    send = dist.P2POp(dist.isend, x.contiguous(), (rank + hop) % P)
    receive = dist.P2POp(dist.irecv, received, (rank - hop) % P)
    for work in dist.batch_isend_irecv([send, receive]):
        work.wait()
    return received


class SendToNext(torch.autograd.Function):
    """Keys and values go one rank on; their gradients come one rank back."""

    forward = staticmethod(lambda ctx, kv: shift(kv, 1))
    backward = staticmethod(lambda ctx, dkv: shift(dkv, -1))


def ring_attention(q, k, v):
    """Causal attention of this rank's tokens to those of all ranks."""
    everything = torch.ones(T, T, dtype=torch.bool)
    output, lse = attend(q, k, v, everything.tril())
    kv = torch.stack((k, v))
    for step in range(1, P):
        kv = SendToNext.apply(kv)  # now that of rank - step
        if step <= dist.get_rank():
            output, lse = merge(output, lse, *attend(q, *kv, everything))
    return output + 0 * kv.sum()  # every rank takes part in every step of the backward


def main(rank, store):
    """Compare with dense attention over the whole sequence, forward and backward."""
    dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=P)
    torch.manual_seed(0)
    whole = [torch.randn(P * T, H, D, dtype=torch.float64, requires_grad=True) for _ in "qkv"]
    dense, _ = attend(*whole, torch.ones(P * T, P * T, dtype=torch.bool).tril())
    expected = (dense, *torch.autograd.grad(dense.square().sum(), whole))

    mine = slice(rank * T, (rank + 1) * T)
    qkv = [x[mine].detach().requires_grad_() for x in whole]
    output = ring_attention(*qkv)
    actual = (output, *torch.autograd.grad(output.square().sum(), qkv))
    error = torch.stack([(a - b[mine]).abs().max() for a, b in zip(actual, expected)]).max()
    dist.all_reduce(error.detach_(), dist.ReduceOp.MAX)
    if rank == 0:
        print(f"output, dq, dk, dv: largest difference from dense attention {error:.1e}")
    dist.destroy_process_group()


if __name__ == "__main__":
    with tempfile.TemporaryDirectory() as folder:
        torch.multiprocessing.start_processes(main, (f"{folder}/store",), P, start_method="fork")
