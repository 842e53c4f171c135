"""llama.cpp's own converter takes every tensor of our files, and its runtime says the same.

    pytest tests/checkpoints/test_llama_cpp.py --llama-cpp CHECKOUT

The converter needs transformers; the runtime is the package llama-cpp-python, of a build that knows
MiniMax-01, without which that part is skipped. The tokenizer is one of bytes that is made here.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from lasp.hybrid import HybridModel, Residuals, pack_batch
from tests.checkpoints.files import MINIMAX, read_files

transformers = pytest.importorskip(
    "transformers", reason="needs transformers: pip install --group oracles"
)
tokenizers = pytest.importorskip("tokenizers")

VOCAB, PROMPT, NEW = 288, 5, 24
# llama.cpp takes every eighth layer for softmax, one alpha for all, and beta 1.
CONFIG = replace(
    MINIMAX, num_layers=8, pattern="7:1", vocab_size=VOCAB, residuals=Residuals.deepnorm(8)
)
# Its list of tokenizers is one of hashes, in which ours is not.
CONVERTER = """
import runpy, sys
sys.path[:0] = [sys.argv[1], sys.argv[1] + "/gguf-py"]
from conversion.base import TextModel
TextModel.get_vocab_base_pre = lambda self, tokenizer: "gpt-2"
sys.argv = sys.argv[1:]
sys.argv[0] += "/convert_hf_to_gguf.py"
runpy.run_path(sys.argv[0], run_name="__main__")
"""


@pytest.fixture
def checkout(request: pytest.FixtureRequest) -> Path:
    path = request.config.getoption("--llama-cpp")
    if path is None:
        pytest.skip("needs a checkout of llama.cpp: --llama-cpp PATH")
    return Path(path)


def write_tokenizer(folder: Path) -> None:
    alphabet = sorted(tokenizers.pre_tokenizers.ByteLevel.alphabet())
    vocab = {symbol: index for index, symbol in enumerate([*alphabet, "ab"])}
    tokenizer = tokenizers.Tokenizer(tokenizers.models.BPE(vocab, [("a", "b")]))
    tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel()
    transformers.PreTrainedTokenizerFast(tokenizer_object=tokenizer).save_pretrained(folder)


def write_gguf(checkout: Path, folder: Path) -> tuple[HybridModel, Path, list[Any]]:
    """Our model, its gguf file, and the tensors that llama.cpp's reader finds there."""
    model = HybridModel(CONFIG)
    model.reset_parameters(0)
    for name, parameter in model.named_parameters():
        if "norm" in name:
            parameter.data.uniform_(0.5, 1.5)
    model.save_pretrained(folder / "files", shard_bytes=100_000)
    write_tokenizer(folder / "files")
    out = folder / "model.gguf"
    command = [sys.executable, "-c", CONVERTER, str(checkout), str(folder / "files")]
    run = subprocess.run(
        [*command, "--outtype", "f32", "--outfile", str(out)],
        env=os.environ,
        capture_output=True,
        text=True,
        check=False,
    )
    assert run.returncode == 0, run.stderr[-2000:]
    sys.path.insert(0, str(checkout / "gguf-py"))
    from gguf import GGUFReader

    return model, out, GGUFReader(out).tensors


def our_tokens(model: HybridModel) -> list[int]:
    """Greedy tokens, each from all before it."""
    tokens = list(range(40, 40 + PROMPT))
    for _ in range(NEW):
        batch = pack_batch([[len(tokens)]], dp_rank=0, num_ranks=1, order="contiguous")
        with torch.no_grad():
            logits = model(torch.tensor(tokens), batch).logits[-1]
        tokens.append(int(logits.argmax()))
    return tokens[PROMPT:]


def their_tokens(llama_cpp: Any, path: Path) -> list[int]:
    kept = llama_cpp.GGML_TYPE_F32  # keys and values; float16 by default
    options = {"n_ctx": 64, "logits_all": True, "verbose": False, "n_threads": 1}
    llama = llama_cpp.Llama(str(path), type_k=kept, type_v=kept, **options)
    llama.eval(list(range(40, 40 + PROMPT)))
    tokens = []
    for _ in range(NEW):
        tokens.append(int(llama.scores[llama.n_tokens - 1].argmax()))
        llama.eval(tokens[-1:])
    return tokens


def test_every_tensor_and_the_same_tokens(checkout: Path, tmp_path: Path) -> None:
    model, path, tensors = write_gguf(checkout, tmp_path)
    files = read_files(tmp_path / "files")
    count = sum(int(tensor.n_elements) for tensor in tensors)
    assert count == sum(tensor.numel() for tensor in files.values())
    experts = sum(".experts." in name for name in files)
    stacked = 3 * CONFIG.num_layers  # theirs have all experts of a layer
    assert len(tensors) == len(files) - experts + stacked
    assert json.loads((tmp_path / "files" / "config.json").read_text())["rotary_dim"] == 4
    llama_cpp = pytest.importorskip("llama_cpp", reason="needs llama-cpp-python to run the model")
    assert their_tokens(llama_cpp, path) == our_tokens(model.eval())
