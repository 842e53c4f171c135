"""Train a vision encoder, a projector and a hybrid model end to end, as in MiniMax-VL-01.

    pip install transformers
    python examples/06_vision.py
    torchrun --standalone --nproc-per-node 2 examples/06_vision.py --cp 2

A small CLIP encoder of transformers, with random weights, turns the image of a digit into 16
tokens. They stand anywhere among the text tokens of a document, and a pack holds many documents.
The model answers which digit the image shows. A rank border may cut an image: both ranks then
encode it, and each uses the features of its own tokens. No image and no feature is sent.

``--shuffle-images`` evaluates each document with another's image too: accuracy falls to 10 %.
"""

from __future__ import annotations

import time
from dataclasses import dataclass
from typing import Literal

import torch
import torch.distributed as dist
import tyro
from hybrid_training.digits import EVAL_PACKS, EVAL_SEED, IMAGE, PATCHES, VOCAB_SIZE, draw_pack
from torch import Tensor, nn
from transformers import CLIPVisionConfig, CLIPVisionModel

from lasp.hybrid import (
    AttentionConfig,
    HybridConfig,
    HybridModel,
    HybridOutput,
    PackedBatch,
    next_token_loss,
    pack_batch,
    reduce_gradients,
)
from lasp.launch import init_distributed
from lasp.sequence.layout import Order
from moe_parallel import ExpertTopology, MoEConfig, ParallelGroups


@dataclass(frozen=True)
class Options:
    """Flags of the run.

    Attributes:
        steps: optimizer steps.
        cp: context parallel ranks; dp is what is left of the ranks.
        order: how a pack's tokens are laid over the cp ranks.
        documents: of a pack, each with one image; a step takes one pack for each dp rank.
        shuffle_images: evaluate each document with the image of another too.
        learning_rate: peak of the schedule.
        dtype: of parameters and activations.
        seed: of the weights and of the data.
    """

    steps: int = 300
    cp: int = 1
    order: Order = "zigzag"
    documents: int = 32
    shuffle_images: bool = False
    learning_rate: float = 4e-3
    dtype: Literal["float32", "float64"] = "float32"
    seed: int = 0


class VisionLanguageModel(nn.Module):
    """The encoder, the projector of two layers and the decoder, the same on every rank."""

    def __init__(self, groups: ParallelGroups, dtype: torch.dtype, seed: int) -> None:
        super().__init__()
        torch.manual_seed(seed)
        config = HybridConfig(
            num_layers=4,
            vocab_size=VOCAB_SIZE,
            attention=AttentionConfig(num_heads=4, num_kv_heads=2, head_dim=16, rotary_dim=8),
            moe=MoEConfig(hidden_size=64, ffn_size=64, num_experts=4, top_k=2),
            pattern="3:1",
        )
        encoder = CLIPVisionConfig(
            hidden_size=64,
            intermediate_size=128,
            num_hidden_layers=2,
            num_attention_heads=4,
            image_size=16,
            patch_size=4,
        )
        self.encoder = CLIPVisionModel(encoder).to(dtype=dtype)
        self.projector = nn.Sequential(nn.Linear(64, 64), nn.GELU(), nn.Linear(64, 64)).to(dtype)
        self.decoder = HybridModel(config, groups=groups, dtype=dtype)
        self.decoder.reset_parameters(seed)

    def forward(
        self, tokens: Tensor, patches: Tensor, images: Tensor, batch: PackedBatch
    ) -> HybridOutput:
        """Logits of this rank's tokens.

        Args:
            tokens: int64 ``[T]``.
            patches: int64 ``[T]``, which patch of the pack stands there, counted over all its
                images; not read where ``tokens`` is not ``IMAGE``.
            images: ``[documents, 3, 16, 16]`` of the whole pack.
            batch: layout of the pack.
        """
        rows = (tokens == IMAGE).nonzero().squeeze(1)
        mine, image = (patches[rows] // PATCHES).unique(return_inverse=True)
        seen = images[mine] if len(mine) else images[:1]  # the encoder refuses an empty batch
        encoded = self.encoder(pixel_values=seen).last_hidden_state[:, 1:]  # no class token
        features = self.projector(encoded)[image, patches[rows] % PATCHES]
        embeds = self.decoder.embedding(tokens).index_copy(0, rows, features)
        output: HybridOutput = self.decoder(None, batch, inputs_embeds=embeds)
        return output

    @torch.no_grad()
    def reduce_gradients(self) -> None:
        """Sum gradients over the ranks: each has those of its own tokens."""
        reduce_gradients(self.decoder)
        vision = (*self.encoder.parameters(), *self.projector.parameters())
        grads = [parameter.grad for parameter in vision if parameter.grad is not None]
        flat = torch.cat([grad.flatten() for grad in grads])
        dist.all_reduce(flat)
        for grad, total in zip(grads, flat.split([grad.numel() for grad in grads])):
            grad.copy_(total.view_as(grad))


class Job:
    """The model and data of one run on one rank."""

    def __init__(self, options: Options, device: torch.device) -> None:
        self.options, self.device = options, device
        self.topology = ExpertTopology(dist.get_world_size(), cp=options.cp)
        at = self.topology.dense_coordinates(dist.get_rank())
        self.dp_rank, self.cp_rank = at.dp, at.cp
        self.dtype = torch.float64 if options.dtype == "float64" else torch.float32
        groups = self.topology.build_groups()
        self.model = VisionLanguageModel(groups, self.dtype, options.seed).to(device)

    def loss_and_right(self, seeds: list[int], *, shuffle: bool) -> tuple[Tensor, Tensor]:
        """Loss, as this rank's share, and right answers on one pack for each dp rank."""
        options = self.options
        packs = [draw_pack(options.documents, seed) for seed in seeds]
        pack, lengths = packs[self.dp_rank], [pack.lengths for pack in packs]
        batch = pack_batch(lengths, dp_rank=self.dp_rank, num_ranks=options.cp, order=options.order)
        tokens, labels, patches = (
            batch.layout.shard(x, self.cp_rank).to(self.device)
            for x in (pack.tokens, pack.labels, (pack.tokens == IMAGE).cumsum(0) - 1)
        )
        images = pack.images.roll(int(shuffle), 0).to(self.device, self.dtype)
        output = self.model(tokens, patches, images, batch)
        loss = next_token_loss(output.logits, labels, options.documents * len(packs))
        return loss + output.aux_loss, (output.logits.argmax(1) == labels).sum()

    def train_step(self, step: int) -> float:
        """Leave the gradients of one step, summed over the ranks; returns its loss."""
        dp = self.topology.dp
        self.model.zero_grad()
        loss, _ = self.loss_and_right([step * dp + replica for replica in range(dp)], shuffle=False)
        loss.backward()
        self.model.reduce_gradients()
        dist.all_reduce(total := loss.detach().double())
        return total.item()

    @torch.no_grad()
    def accuracy(self, *, shuffle: bool) -> float:
        """The share of right answers on packs that no step has."""
        dp = self.topology.dp
        self.model.eval()
        right = torch.zeros((), dtype=torch.int64, device=self.device)
        for index in range(EVAL_PACKS):
            seeds = [EVAL_SEED + index * dp + replica for replica in range(dp)]
            right += self.loss_and_right(seeds, shuffle=shuffle)[1]
        dist.all_reduce(right)
        return right.item() / (EVAL_PACKS * self.options.documents * dp)


def main(options: Options, device: torch.device) -> None:
    torch.set_num_threads(1)
    job, start = Job(options, device), time.perf_counter()
    optimizer = torch.optim.AdamW(job.model.parameters(), lr=options.learning_rate)
    schedule = torch.optim.lr_scheduler.OneCycleLR(
        optimizer, options.learning_rate, total_steps=options.steps, pct_start=0.1
    )
    for step in range(options.steps):
        loss = job.train_step(step)
        nn.utils.clip_grad_norm_(job.model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        if dist.get_rank() == 0 and (step % 25 == 0 or step + 1 == options.steps):
            seconds = time.perf_counter() - start
            print(f"step {step:4d}  loss {loss:.4f}  {seconds:.0f} s", flush=True)
    for shuffle in (False, True) if options.shuffle_images else (False,):
        accuracy, whose = job.accuracy(shuffle=shuffle), "others'" if shuffle else "their own"
        if dist.get_rank() == 0:
            print(f"accuracy with {whose} images: {accuracy:.1%} (chance 10 %)")


if __name__ == "__main__":
    main(tyro.cli(Options), init_distributed())
    dist.destroy_process_group()  # after the model is gone: its groups would outlive this
