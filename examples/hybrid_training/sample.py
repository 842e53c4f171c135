"""Sample text from a hybrid model whose tokens and experts are spread over ranks."""

from __future__ import annotations

import torch
import torch.distributed as dist

from hybrid_training.corpus import END_OF_DOCUMENT
from lasp.hybrid import HybridModel, pack_batch


@torch.no_grad()
def sample(
    model: HybridModel,
    prompt: bytes,
    *,
    num_tokens: int,
    dp_rank: int,
    dp: int,
    temperature: float,
    seed: int,
) -> bytes:
    """Continue ``prompt`` by up to ``num_tokens`` bytes; all ranks call it and get the same.

    The whole text runs through the model for every new token, cut over the cp ranks like a training
    batch; every data-parallel replica runs the same text. Rank 0 draws, for all.
    """
    device = model.embedding.weight.device
    cp_group = model.groups.cp
    cp_size = 1 if cp_group is None else cp_group.size()
    cp_rank = 0 if cp_group is None else cp_group.rank()
    generator = torch.Generator().manual_seed(seed)
    text = list(prompt)
    was_training = model.training
    model.eval()
    for _ in range(num_tokens):
        lengths = [[len(text)]] * dp
        batch = pack_batch(lengths, dp_rank=dp_rank, num_ranks=cp_size, order="contiguous")
        tokens = batch.layout.shard(torch.tensor(text, device=device), cp_rank)
        logits = model(tokens, batch).logits.float()
        owner, row = divmod(len(text) - 1, batch.layout.num_local_tokens)
        last = logits[row].contiguous() if cp_rank == owner else torch.empty_like(logits[0])
        if cp_group is not None:
            dist.broadcast(last, group=cp_group, group_src=owner)
        drawn = torch.multinomial((last.cpu() / temperature).softmax(0), 1, generator=generator)
        token = drawn.to(device)
        dist.broadcast(token, src=0)
        if int(token) == END_OF_DOCUMENT:
            break
        text.append(int(token))
    model.train(was_training)
    return bytes(text)
