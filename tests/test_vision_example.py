"""Example 06: encoder, projector and hybrid model, trained end to end over packs and ranks."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest
import torch
import torch.distributed as dist

from lasp import SequenceLayout
from tests.closeness import assert_equal_to_rounding
from tests.ranks import run_on_ranks
from tests.test_examples import EXAMPLES, example

pytest.importorskip("transformers", reason="needs transformers: pip install --group oracles")
pytest.importorskip("tyro", reason="needs tyro: pip install 'lasp-plus[examples]'")


def step_on_rank(order: str, documents: int, step: int) -> tuple[float, dict[str, torch.Tensor]]:
    """Loss and summed gradients of one step in float64."""
    vision, cp = example("06_vision"), dist.get_world_size()
    options = vision.Options(cp=cp, order=order, documents=documents, dtype="float64")
    job = vision.Job(options, torch.device("cpu"))
    loss = job.train_step(step)
    parameters = job.model.named_parameters()
    return loss, {name: p.grad for name, p in parameters if p.grad is not None}


def images_of_ranks(order: str, documents: int, step: int) -> list[set[int]]:
    """The images of which each of two ranks holds tokens, in the pack of the step above."""
    digits = example("hybrid_training.digits")
    pack = digits.draw_pack(documents, step)
    layout = SequenceLayout(tuple(pack.lengths), 2, order)
    image = ((pack.tokens == digits.IMAGE).cumsum(0) - 1) // digits.PATCHES
    image[pack.tokens != digits.IMAGE] = -1
    return [set(layout.shard(image, rank).tolist()) - {-1} for rank in range(2)]


@pytest.mark.parametrize(
    ("order", "documents", "step", "where"),
    [
        ("contiguous", 6, 0, "an image on both ranks"),
        ("zigzag", 6, 0, "an image on both ranks"),
        ("contiguous", 1, 12, "a rank without images"),
    ],
)
def test_two_ranks_have_the_gradients_of_one(
    order: str, documents: int, step: int, where: str
) -> None:
    first, second = images_of_ranks(order, documents, step)
    assert first & second if where == "an image on both ranks" else not (first and second)
    ((expected_loss, expected),) = run_on_ranks(step_on_rank, 1, order, documents, step)
    for loss, gradients in run_on_ranks(step_on_rank, 2, order, documents, step):
        assert loss == pytest.approx(expected_loss, rel=1e-12)
        assert gradients.keys() == expected.keys()
        for name, gradient in gradients.items():
            if name.endswith("k_proj.bias"):  # no softmax depends on it: 0 but for rounding
                assert max(gradient.norm(), expected[name].norm()) < 1e-15
            else:
                assert_equal_to_rounding(gradient, expected[name], what=name)


@pytest.mark.slow
@pytest.mark.parametrize("cp", [1, 2])
def test_it_reads_digits_and_not_the_text_around_them(cp: int) -> None:
    command = [sys.executable, str(EXAMPLES / "06_vision.py"), "--cp", str(cp), "--shuffle-images"]
    if cp > 1:
        launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
        command = [*launcher, "--nproc-per-node", str(cp), *command[1:]]
    path = os.pathsep.join([str(EXAMPLES.parent), os.environ.get("PYTHONPATH", "")])
    env = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": path}
    done = subprocess.run(command, capture_output=True, text=True, env=env, timeout=500)
    assert done.returncode == 0, done.stdout + done.stderr
    own, others = (
        float(done.stdout.partition(f"{whose} images: ")[2].partition("%")[0])
        for whose in ("their own", "others'")
    )
    assert own >= 90.0
    assert others < 20.0  # 512 answers: chance is 10 +- 1.3
