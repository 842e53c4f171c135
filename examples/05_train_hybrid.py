"""Train a small hybrid language model on the Python standard library's sources.

    torchrun --standalone --nproc-per-node 4 examples/05_train_hybrid.py --cp 2 --ep 2 --etp 2

8 layers of MiniMax's shape (7 lightning, 1 softmax), 8 experts top-2 in every layer; ``--model
ling`` and ``--model sala`` train those of Ling-2.5 and of MiniCPM-SALA. NCCL when there is a GPU a
rank, else gloo. Writes metrics.jsonl, loss.png and checkpoints to ``--out``; ``--resume`` goes on
from the newest checkpoint there, also with other parallel sizes or another number of ranks.

MiniMax-01's recipe for long contexts in small, from 32 to 4096 tokens (docs/long-context.md)::

    torchrun ... examples/05_train_hybrid.py --base-context 32 --packs 2 --pack-tokens 4096 ...
"""

from __future__ import annotations

import time
from dataclasses import asdict, dataclass
from datetime import timedelta
from pathlib import Path
from typing import Any, Literal

import torch
import torch.distributed as dist
import tyro
from hybrid_training.checkpoint import Checkpointer
from hybrid_training.corpus import NO_LABEL, Corpus, Pack, deal
from hybrid_training.endings import ASKED_TO_STOP, Ending
from hybrid_training.model import Name, small_hybrid
from hybrid_training.optimizer import Trainer
from hybrid_training.report import Report
from hybrid_training.sample import sample
from hybrid_training.stages import Recipe, set_rope_base

from lasp.hybrid import (
    HybridModel,
    HybridOutput,
    PackedBatch,
    next_token_loss,
    pack_batch,
    reduce_gradients,
)
from lasp.launch import init_distributed
from lasp.sequence.layout import Order
from moe_parallel import ExpertTopology, distribute_experts, update_expert_bias

PROMPT = b"def main("
# Options that a resumed run may change: all others decide what the loss curve is.
NOT_THE_CURVE = (
    *(
        "cp",
        "ep",
        "etp",
        "order",
        "impl",
        "out",
        "save_every",
        "resume",
        "resume_if_any",
        "timeout_s",
        "stop_after",
        "sample_tokens",
    ),
)


@dataclass(frozen=True)
class Options:
    """Flags of the run.

    Attributes:
        model: whose layers, in small.
        steps: optimizer steps.
        cp: context parallel ranks; dp is what is left of the ranks.
        ep: ranks over which the experts are dealt out.
        etp: ranks over which each expert is split.
        order: how a pack's tokens are laid over the cp ranks.
        packs: packs a step, split over dp.
        pack_tokens: tokens of a pack.
        base_context: if not 0, extend contexts in stages, by ``hybrid_training.stages``: packs have
            so many tokens in the first stage, 16, 64 and 128 times as many in the others;
            ``packs x pack_tokens`` are those of a step.
        capacity_factor: of the experts; negative for dropless.
        drop_policy: which tokens a full expert drops.
        learning_rate: peak of the schedule.
        dtype: of parameters and activations; bfloat16 is autocast's, over float32 parameters.
        impl: who computes lightning attention; triton needs a GPU, auto takes it there.
        seed: of the weights and of the order of the corpus.
        out: folder of metrics, plot and checkpoints.
        save_every: steps between checkpoints.
        resume: go on from the newest checkpoint in ``out``.
        resume_if_any: go on if there is one, else start: for ``torchrun --max-restarts``.
        timeout_s: seconds after which a rank that does not answer ends the others.
        stop_after: end this invocation after that step of the schedule, as a crash would.
        sample_tokens: bytes to sample at the end.
    """

    model: Name = "minimax"
    steps: int = 270
    cp: int = 2
    ep: int = 2
    etp: int = 2
    order: Order = "zigzag"
    packs: int = 2
    pack_tokens: int = 2048
    base_context: int = 0
    capacity_factor: float = 1.5
    drop_policy: Literal["position", "probability"] = "position"
    learning_rate: float = 6e-3
    dtype: Literal["float32", "float64", "bfloat16"] = "float32"
    impl: Literal["auto", "eager", "triton"] = "auto"
    seed: int = 0
    out: Path = Path("runs/hybrid")
    save_every: int = 100
    resume: bool = False
    resume_if_any: bool = False
    timeout_s: int = 600
    stop_after: int | None = None
    sample_tokens: int = 160


class Job:
    """The model and data of one run on one rank."""

    def __init__(self, options: Options, device: torch.device, ending: Ending) -> None:
        self.options, self.device, self.ending = options, device, ending
        self.topology = ExpertTopology(
            dist.get_world_size(), cp=options.cp, ep=options.ep, etp=options.etp
        )
        at = self.topology.dense_coordinates(dist.get_rank())
        self.dp_rank, self.cp_rank = at.dp, at.cp
        self.corpus = Corpus.from_standard_library(options.seed)
        self.recipe: Recipe | None = None
        if options.base_context and options.model != "minimax":
            raise ValueError(
                f"model must be 'minimax' with base_context, got {options.model!r}: the recipe sets"
                " the base of softmax layers, and lightning layers of others rotate too"
            )
        if options.base_context:
            tokens = options.packs * options.pack_tokens
            self.recipe = Recipe(options.base_context, options.steps, tokens, options.seed)
        self.model = HybridModel(
            small_hybrid(
                options.capacity_factor,
                drop_policy=options.drop_policy,
                impl=options.impl,
                name=options.model,
            ),
            groups=self.topology.build_groups(timedelta(seconds=options.timeout_s)),
            device=device,
            dtype=torch.float64 if options.dtype == "float64" else torch.float32,
        )
        self.model.reset_parameters(options.seed)
        distribute_experts(self.model, self.topology)  # for checkpoints

    def forward_backward(self, step: int) -> dict[str, Any]:
        """Gradients of one step's batch, reduced; returns its metrics, equal on every rank."""
        options = self.options
        packs = self.packs(step)
        mine, batch = packs[self.dp_rank], self.batch(packs)
        layout = batch.layout
        tokens = layout.shard(mine.tokens, self.cp_rank).to(self.device)
        labels = layout.shard(mine.labels, self.cp_rank, pad_value=NO_LABEL).to(self.device)
        num_targets = sum(int((pack.labels != NO_LABEL).sum()) for pack in packs)
        enabled = options.dtype == "bfloat16"
        with torch.autocast(self.device.type, torch.bfloat16, enabled=enabled):
            output: HybridOutput = self.model(tokens, batch)
            loss = next_token_loss(output.logits, labels, num_targets)
        (loss + output.aux_loss).backward()
        reduce_gradients(self.model)
        whole_loss, whole_aux_loss = self.ending.gather(step, loss, output.aux_loss)
        return {
            "step": step,
            "loss": whole_loss,
            "aux_loss": whole_aux_loss,
            "tokens": options.packs * options.pack_tokens,
            **self.balance(output),
        }

    def packs(self, step: int) -> list[Pack]:
        """What the replicas train on in a step, the same whatever the ranks."""
        options, dp = self.options, self.topology.dp
        if self.recipe is not None:
            set_rope_base(self.model, self.recipe.stage_at(step)[0].rope_base)
            return deal(self.recipe.packs(self.corpus, step), dp)
        return self.corpus.replicas(
            step, num_replicas=dp, per_step=options.packs, num_tokens=options.pack_tokens
        )

    def batch(self, packs: list[Pack]) -> PackedBatch:
        """Layout of this replica's pack among those of all."""
        return pack_batch(
            [pack.document_lengths for pack in packs],
            dp_rank=self.dp_rank,
            num_ranks=self.options.cp,
            order=self.options.order,
            group=self.model.groups.token,
        )

    @torch.no_grad()
    def long_loss(self) -> float:
        """The loss on a pack of the longest context that no step has, without drops."""
        assert self.recipe is not None
        packs = [self.recipe.long_pack(self.corpus)] * self.topology.dp
        batch, pack = self.batch(packs), packs[0]
        tokens, labels = (
            batch.layout.shard(x, self.cp_rank, pad_value=pad).to(self.device)
            for x, pad in ((pack.tokens, 0), (pack.labels, NO_LABEL))
        )
        self.model.eval()
        num_targets = self.topology.dp * int((pack.labels != NO_LABEL).sum())
        loss = next_token_loss(self.model(tokens, batch).logits, labels, num_targets).double()
        self.model.train()
        dist.all_reduce(loss)
        return loss.item()

    def balance(self, output: HybridOutput) -> dict[str, float]:
        """How evenly experts were met, over all layers that have some."""
        if not output.stats:
            return {"expert_imbalance": 1.0, "dropped_share": 0.0}
        assigned = torch.stack([stats.assigned for stats in output.stats]).double()
        dropped = torch.stack([stats.dropped for stats in output.stats]).double()
        return {
            "expert_imbalance": (assigned.amax(1) / assigned.mean(1)).mean().item(),
            "dropped_share": (dropped.sum() / assigned.sum()).item(),
        }


def main(options: Options, device: torch.device, ending: Ending) -> None:
    torch.set_num_threads(1)
    job = Job(options, device, ending)
    trainer = Trainer(
        job.model, learning_rate=options.learning_rate, warmup=20, steps=options.steps
    )
    checkpointer = Checkpointer(options.out)
    curve = {name: value for name, value in asdict(options).items() if name not in NOT_THE_CURVE}
    resume = None if options.resume_if_any else options.resume
    first_step = checkpointer.start(trainer, curve, resume=resume)
    report = None
    if dist.get_rank() == 0:
        options.out.mkdir(parents=True, exist_ok=True)
        report = Report(options.out, first_step=first_step, steps=options.steps, log_every=10)
        size = sum(parameter.numel() for parameter in job.model.parameters())
        report.console.print(
            f"{dist.get_world_size()} ranks ({dist.get_backend()}), dp {job.topology.dp}"
            f" cp {options.cp} | edp {job.topology.edp} ep {options.ep} etp {options.etp},"
            f" {size:,} parameters, {job.corpus.num_documents} documents,"
            f" unigram entropy {job.corpus.unigram_entropy:.3f} nats",
            soft_wrap=True,
        )
    last_step = min(options.steps, options.stop_after or options.steps)
    for step in range(first_step, last_step):
        ending.doing, start = f"step {step}", time.perf_counter()
        row = job.forward_backward(step)
        row["grad_norm"] = trainer.step(step).item()
        if options.model == "ling":
            update_expert_bias(job.model)
        row["tokens_per_s"] = row["tokens"] / (time.perf_counter() - start)
        if job.recipe is not None and step + 1 in job.recipe.ends:
            row["long_loss"] = job.long_loss()
        if report is not None:
            report.step(row)
        if (step + 1) % options.save_every == 0 or step + 1 == last_step or ending.stopping:
            ending.doing = f"checkpoint of step {step + 1}"
            checkpointer.save(trainer, step + 1)
        if ending.stopping:
            if report is not None:
                report.console.print(f"stopped by SIGTERM after step {step}: go on with --resume")
            raise SystemExit(ASKED_TO_STOP)
    ending.doing = "generation"
    text = sample(
        job.model,
        PROMPT,
        num_tokens=options.sample_tokens,
        temperature=0.7,
        seed=options.seed,
    )
    if report is not None:
        report.close(text.decode(errors="replace"), job.corpus.unigram_entropy)


if __name__ == "__main__":
    flags = tyro.cli(Options)
    here = init_distributed(timeout=timedelta(seconds=flags.timeout_s))
    with Ending() as ending:
        main(flags, here, ending)
    dist.destroy_process_group()  # after the model is gone: its groups would outlive this
