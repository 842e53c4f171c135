"""Train a small hybrid model in one process, save it, and let it write.

python examples/00_quick_start.py

8 layers of MiniMax's shape (7 lightning, 1 softmax) with 8 experts learn bytes of the Python
standard library's sources, for about three minutes on a CPU core. The weights are saved as
released files, which the library's commands read::

    python -m lasp.generate runs/quick "def main(" --temperature 0.7
    python -m lasp.checkpoints convert runs/quick runs/plain --to plain
"""

from __future__ import annotations

import time
from dataclasses import dataclass
from pathlib import Path

import torch
import tyro
from hybrid_training.corpus import NO_LABEL, Corpus
from hybrid_training.model import small_hybrid

from lasp.hybrid import HybridModel, Sampling, pack_batch
from moe_parallel import clip_grad_norm_, parameter_groups


@dataclass(frozen=True)
class Options:
    """Flags: optimizer steps, tokens of a step, and the folder to write, a new one."""

    steps: int = 300
    tokens: int = 2048
    out: Path = Path("runs/quick")


def main(options: Options) -> None:
    torch.set_num_threads(1)  # products this small lose by threads
    device = "cuda" if torch.cuda.is_available() else "cpu"
    if options.out.exists():
        raise SystemExit(f"--out must not be there yet: remove {options.out}, or name another")
    options.out.parent.mkdir(parents=True, exist_ok=True)
    corpus = Corpus.from_standard_library(seed=0)
    model = HybridModel(small_hybrid(capacity_factor=-1), device=device, dtype=torch.float32)
    model.reset_parameters(seed=0)
    optimizer = torch.optim.AdamW(parameter_groups(model), lr=1.0, betas=(0.9, 0.95))
    print(f"loss of a model that knows how often each byte comes: {corpus.unigram_entropy:.2f}")

    losses, start = [], time.perf_counter()
    for step in range(options.steps):
        # Eight pieces from all over the corpus, documents end to end, cut anywhere.
        pieces = [corpus.pack(997 * (8 * step + i), options.tokens // 8) for i in range(8)]
        tokens, labels = (
            torch.cat([getattr(piece, name) for piece in pieces]).to(device)
            for name in ("tokens", "labels")
        )
        lengths = [length for piece in pieces for length in piece.document_lengths]
        batch = pack_batch([lengths], dp_rank=0, num_ranks=1, order="contiguous")
        output = model(tokens, batch, labels=labels)
        loss = output.loss / (labels != NO_LABEL).sum()
        (loss + output.aux_loss).backward()
        clip_grad_norm_(model, 1.0, model.groups)
        for group in optimizer.param_groups:  # up in 20 steps, then down to nothing
            group["lr"] = 6e-3 * min((step + 1) / 20, 1 - step / options.steps)
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
        if (step + 1) % 20 == 0 or step + 1 == options.steps:
            mean = sum(losses[-20:]) / len(losses[-20:])
            print(f"step {step + 1}: mean loss {mean:.3f}, {time.perf_counter() - start:.0f} s")

    model.save_pretrained(options.out)
    prompt = list(b"def main(")
    text = model.generate([prompt], max_new_tokens=120, sampling=Sampling(temperature=0.5, seed=0))
    print(f"saved in {options.out}\n\n" + bytes(prompt + text.tokens[0]).decode(errors="replace"))


if __name__ == "__main__":
    main(tyro.cli(Options))
