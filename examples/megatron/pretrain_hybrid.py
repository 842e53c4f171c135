"""Pretrain the hybrid as Megatron's GPTModel on the Python standard library's sources.

    torchrun --standalone --nproc-per-node 8 examples/megatron/pretrain_hybrid.py \
        --tp 2 --cp 2 --ep 2 --etp 2 --pp 2 --vpp 2 --out runs/megatron

Megatron's DistributedDataParallel, optimizer (distributed or not), pipeline schedules and
checkpoints; our layers, packs and expert parallelism. A GPU a rank, without TransformerEngine and
Apex. The loss curve does not depend on tp, cp, pp, vpp, ep, etp, dp, recompute or the distributed
optimizer; ``--resume`` goes on from the newest checkpoint, also under other ones of these (but
``--distributed-optimizer``, which has a state of its own).
"""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any, Literal, NamedTuple

import torch
import torch.distributed as dist
import tyro
from megatron.core import parallel_state, tensor_parallel
from megatron.core.pipeline_parallel import get_forward_backward_func
from torch import Tensor

sys.path.append(str(Path(__file__).parent.parent))
from hybrid_gpt import build_model, build_optimizer, load, newest_step, save
from hybrid_training.corpus import NO_LABEL, Corpus

from lasp.hybrid import pack_batch
from lasp.launch import init_distributed
from lasp.megatron import PackedSequence, shard_batch
from lasp.sequence.layout import Order

# Options that a resumed run may change: all others decide the curve, or the optimizer's state.
NOT_THE_CURVE = (
    *("tp", "cp", "pp", "vpp", "ep", "etp", "recompute", "order"),
    *("out", "save_every", "resume", "stop_after"),
)


@dataclass(frozen=True)
class Options:
    """Flags of the run.

    Attributes:
        steps: optimizer steps of the schedule.
        tp: tensor parallel ranks, with sequence parallelism.
        cp: context parallel ranks; dp is what is left of the ranks.
        pp: pipeline stages.
        vpp: virtual stages of each, interleaved.
        ep: ranks over which the experts are dealt out.
        etp: ranks over which each expert is split.
        distributed_optimizer: split the optimizer's state over the data parallel ranks.
        recompute: activations in the backward; selective is core attention and experts.
        order: how a pack's tokens are laid over the cp ranks.
        micro_batches: of a step.
        packs: packs of a micro-batch, split over dp.
        pack_tokens: tokens of a pack.
        capacity_factor: of the experts; negative for dropless.
        learning_rate: peak of the schedule.
        dtype: of parameters and activations; bfloat16 has float32 gradients and master weights.
        seed: of the weights and of the order of the corpus.
        out: folder of metrics and checkpoints.
        save_every: steps between checkpoints, of which one is at the end; 0: none.
        resume: go on from the newest checkpoint in ``out``.
        stop_after: end this invocation after that step of the schedule, as a crash would.
    """

    steps: int = 270
    tp: int = 1
    cp: int = 1
    pp: int = 1
    vpp: int | None = None
    ep: int = 1
    etp: int = 1
    distributed_optimizer: bool = True
    recompute: Literal["none", "selective", "full"] = "none"
    order: Order = "zigzag"
    micro_batches: int = 2
    packs: int = 2
    pack_tokens: int = 2048
    capacity_factor: float = 1.5
    learning_rate: float = 6e-3
    dtype: Literal["float32", "bfloat16"] = "float32"
    seed: int = 0
    out: Path = Path("runs/megatron")
    save_every: int = 100
    resume: bool = False
    stop_after: int | None = None


class MicroBatch(NamedTuple):
    """One micro-batch on this rank, each tensor ``[1, S / cp]``, and the pack they are of."""

    tokens: Tensor
    labels: Tensor
    loss_mask: Tensor
    position_ids: Tensor
    packed: PackedSequence


def micro_batch(options: Options, corpus: Corpus, index: int, device: torch.device) -> MicroBatch:
    """The ``index``-th micro-batch of the run; its text does not depend on the ranks."""
    dp_rank = parallel_state.get_data_parallel_rank()
    packs = corpus.replicas(
        index,
        num_replicas=parallel_state.get_data_parallel_world_size(),
        per_step=options.packs,
        num_tokens=options.pack_tokens,
    )
    packed = PackedSequence.of(
        pack_batch(
            [pack.document_lengths for pack in packs],
            dp_rank=dp_rank,
            num_ranks=options.cp,
            tp_size=options.tp,
            order=options.order,
            group=parallel_state.get_tensor_and_data_parallel_group(with_context_parallel=True),
        )
    )
    mine = packs[dp_rank]
    batch = {
        "tokens": mine.tokens,
        "labels": mine.labels.clamp(min=0),
        "loss_mask": (mine.labels != NO_LABEL).float(),
    }
    local = shard_batch(
        {name: values.unsqueeze(0) for name, values in batch.items()},
        packed,
        cp_rank=parallel_state.get_context_parallel_rank(),
    )
    return MicroBatch(**{name: x.to(device) for name, x in local.items()}, packed=packed)


def loss_function(loss_mask: Tensor, losses: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Sum of the losses of this rank's targets, how many these are, and both for the report.

    With ``calculate_per_token_loss`` Megatron's DDP only sums gradients, over dp x cp, and
    ``finalize_model_grads`` divides them by the targets of all ranks and micro-batches.
    """
    total, count = (losses * loss_mask).sum(), loss_mask.sum()
    return total, count.int(), torch.stack([total.detach().double(), count.double()])


def forward_step(batches: Iterator[MicroBatch], model: Any) -> tuple[Tensor, Any]:
    """One micro-batch through one (virtual) stage, as Megatron's schedules call it."""
    tokens, labels, loss_mask, position_ids, packed = next(batches)
    output = model(tokens, position_ids, None, labels=labels, packed_seq_params=packed)
    return output, partial(loss_function, loss_mask)


def forward_backward(
    options: Options, corpus: Corpus, step: int, chunks: list[Any], device: torch.device
) -> float:
    """Gradients of one step's micro-batches, reduced; returns the mean loss of all targets."""
    first = step * options.micro_batches
    batches = [
        micro_batch(options, corpus, first + index, device)
        for index in range(options.micro_batches)
    ]
    for chunk in chunks:
        chunk.zero_grad_buffer()
    on_last_stage = get_forward_backward_func()(
        forward_step_func=forward_step,
        data_iterator=[iter(batches) for _ in chunks],
        model=chunks,
        num_microbatches=len(batches),
        seq_length=batches[0].packed.layout.num_tokens,
        micro_batch_size=1,
        forward_only=False,
    )
    totals = torch.zeros(2, dtype=torch.float64, device=device)
    for of_micro_batch in on_last_stage:
        totals += of_micro_batch
    dist.all_reduce(totals)  # over tp too, whose ranks have equal ones: the ratio stays
    total, count = totals.tolist()
    return total / count


def start_run(options: Options) -> int:
    """Begin a run in ``out``, or go on from its newest checkpoint; returns the next step.

    Raises:
        ValueError: if there is nothing to resume, something in the way, or other options.
    """
    newest, record = newest_step(options.out), options.out / "options.json"
    if (newest is not None) != options.resume:
        raise ValueError(
            f"out must hold checkpoints with --resume and none without, got {options.out} whose"
            f" newest step is {newest}: name another folder, or change --resume"
        )
    curve = {name: value for name, value in asdict(options).items() if name not in NOT_THE_CURVE}
    if newest is not None:
        for name, saved in json.loads(record.read_text()).items():
            if curve[name] != saved:
                raise ValueError(
                    f"{name} must be {saved!r} as in the run to resume, got {curve[name]!r}: give"
                    " the same, or name another folder"
                )
    if dist.get_rank() == 0:
        options.out.mkdir(parents=True, exist_ok=True)
        if newest is None:  # else other ranks may be reading it
            record.write_text(json.dumps(curve, indent=1))
        metrics = options.out / "metrics.jsonl"
        lines = metrics.read_text().splitlines() if metrics.exists() else []
        # Steps after the checkpoint are done again.
        kept = [line for line in lines if json.loads(line)["step"] < (newest or 0)]
        metrics.write_text("".join(f"{line}\n" for line in kept))
    return newest or 0


def train(options: Options, device: torch.device) -> list[dict[str, float]]:
    """Train in Megatron's parallel state; returns the metrics of the steps, equal on all ranks."""
    first_step = start_run(options)
    tensor_parallel.model_parallel_cuda_manual_seed(options.seed)
    chunks = build_model(options, device)
    optimizer, scheduler = build_optimizer(options, chunks)
    if options.resume:
        load(options.out, first_step, chunks, optimizer, scheduler)
    corpus = Corpus.from_standard_library(options.seed)
    rows, last_step = [], min(options.steps, options.stop_after or options.steps)
    for step in range(first_step, last_step):
        start = time.perf_counter()
        optimizer.zero_grad()
        loss = forward_backward(options, corpus, step, chunks, device)
        scheduler.step(increment=1)
        _, grad_norm, _ = optimizer.step()
        seconds = time.perf_counter() - start
        tokens = options.micro_batches * options.packs * options.pack_tokens
        row = {"step": step, "loss": loss, "grad_norm": grad_norm, "tokens_per_s": tokens / seconds}
        rows.append(row)
        report(row, options.out)
        done = step + 1
        if options.save_every and (done % options.save_every == 0 or done == last_step):
            save(options.out, done, chunks, optimizer)
    return rows


def report(row: dict[str, float], out: Path) -> None:
    """A line on the terminal and in ``metrics.jsonl``."""
    if dist.get_rank() == 0:
        print(*(f"{name} {value:.6g}" for name, value in row.items()), sep="  ", flush=True)
        with (out / "metrics.jsonl").open("a") as file:
            file.write(json.dumps(row) + "\n")


def main(options: Options) -> None:
    device = init_distributed()
    if device.type != "cuda":
        raise ValueError("every rank must have a GPU: Megatron-Core trains on nothing else")
    parallel_state.initialize_model_parallel(
        tensor_model_parallel_size=options.tp,
        context_parallel_size=options.cp,
        pipeline_model_parallel_size=options.pp,
        virtual_pipeline_model_parallel_size=options.vpp,
        expert_model_parallel_size=options.ep,
        expert_tensor_parallel_size=options.etp,
    )
    train(options, device)
    parallel_state.destroy_model_parallel()
    dist.destroy_process_group()


if __name__ == "__main__":  # a checkpoint is written by processes that import this file again
    main(tyro.cli(Options))
