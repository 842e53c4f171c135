"""A hybrid model whose rows travel to experts through symmetric memory, and one over two GPUs."""

from __future__ import annotations

from dataclasses import replace
from unittest.mock import Mock, patch

import pytest

from lasp.hybrid import DenseConfig, HybridModel
from moe_parallel import SymmetricMemory
from tests.closeness import assert_equal_to_rounding
from tests.ranks import run_on_ranks
from tests.test_hybrid import assemble, config, loss_and_gradients, one_rank


def test_all_layers_with_experts_share_the_symmetric_memory() -> None:
    memory = Mock(spec=SymmetricMemory, global_ranks=[0, 1])
    chosen = replace(config(), mtp_loss_weight=0.1)
    with patch("moe_parallel.layer.make_dispatcher") as made:
        HybridModel(chosen, symmetric_memory=memory, device="meta")
    assert [call.args[2] for call in made.call_args_list] == [memory] * (chosen.num_layers + 1)
    dense = replace(chosen, moe=None, dense=DenseConfig(10, 8))
    with pytest.raises(ValueError, match="symmetric_memory must be None"):
        HybridModel(dense, symmetric_memory=memory, device="meta")


@pytest.mark.multi_gpu
@pytest.mark.parametrize("copies", [False, True])
@pytest.mark.parametrize("sizes", [{"cp": 2, "ep": 2}, {"cp": 2, "etp": 2}, {"ep": 2}])
def test_gpu_ranks_agree_with_one_cpu_rank(sizes: dict[str, int], copies: bool) -> None:
    expected = one_rank()
    how = {"device": "cuda", "copies": copies}
    results = run_on_ranks(loss_and_gradients, 2, sizes, "zigzag", backend="nccl", **how)
    actual = assemble(results)
    for name, tensor in expected.items():
        assert_equal_to_rounding(actual[name], tensor, what=name)
