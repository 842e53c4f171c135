from __future__ import annotations

import math

import pytest
import torch

from lasp._core.rotary import RopeScaling
from lasp.sequence.layout import SequenceLayout
from tests.closeness import assert_equal_to_rounding, assert_within_budget
from tests.ring.cases import apply_rotary


def test_equals_the_rotation_written_out() -> None:
    x = torch.randn(4, 3, 7, dtype=torch.float64)
    positions = torch.tensor([0, 5, 1, 1_048_575])
    actual = apply_rotary(x, positions, rotary_dim=4, base=100.0)
    for t, p in enumerate(positions.tolist()):
        for i in range(2):
            angle = p * 100.0 ** (-2 * i / 4)
            a, b = x[t, :, i], x[t, :, i + 2]
            first = a * math.cos(angle) - b * math.sin(angle)
            second = b * math.cos(angle) + a * math.sin(angle)
            assert_equal_to_rounding(actual[t, :, i], first)
            assert_equal_to_rounding(actual[t, :, i + 2], second)
    assert torch.equal(actual[..., 4:], x[..., 4:])
    assert torch.equal(actual[0], x[0])  # position 0


def test_equals_the_half_split_formula_of_hugging_face() -> None:
    x, positions = torch.randn(6, 2, 8, dtype=torch.float64), torch.arange(6)
    frequencies = 1.0 / 10_000.0 ** (torch.arange(0, 8, 2, dtype=torch.float64) / 8)
    angles = torch.outer(positions.double(), frequencies)
    cos, sin = (torch.cat((f, f), -1).unsqueeze(1) for f in (angles.cos(), angles.sin()))
    turned = torch.cat((-x[..., 4:], x[..., :4]), -1)
    expected = x * cos + turned * sin
    assert_equal_to_rounding(apply_rotary(x, positions, rotary_dim=8, base=10_000.0), expected)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_positions_of_a_million_tokens_are_exact(dtype: torch.dtype) -> None:
    x = torch.randn(64, 2, 16).to(dtype)
    positions = torch.arange(2**20 - 64, 2**20)
    actual = apply_rotary(x, positions, rotary_dim=16, base=10_000_000.0)
    expected = apply_rotary(x.double(), positions, rotary_dim=16, base=10_000_000.0)
    assert actual.dtype == dtype
    assert_within_budget(actual, expected, expected.to(dtype), what="rotated")


@pytest.mark.parametrize("rotary_dim", [0, 2, 8])
def test_scores_depend_on_distance_only(rotary_dim: int) -> None:
    q, k = torch.randn(2, 1, 1, 8, dtype=torch.float64)

    def score(q_position: int, k_position: int) -> torch.Tensor:
        positions = torch.tensor([q_position, k_position])
        both = apply_rotary(torch.stack((q[0], k[0])), positions, rotary_dim=rotary_dim, base=10.0)
        return both[0] @ both[1].T

    assert_equal_to_rounding(score(1_000_003, 1_000_000), score(3, 0), tolerance=1e-8)


def test_a_batch_shares_the_positions() -> None:
    x, positions = torch.randn(3, 5, 2, 4), torch.tensor([3, 4, 0, 1, 2])
    together = apply_rotary(x, positions, rotary_dim=2, base=10.0)
    for row, alone in zip(together, x):
        assert torch.equal(row, apply_rotary(alone, positions, rotary_dim=2, base=10.0))


def test_positions_restart_with_each_document_on_every_rank() -> None:
    layout = SequenceLayout((5, 7), 2, "zigzag")
    x = torch.randn(12, 2, 4)
    parts = [
        apply_rotary(layout.shard(x, r), layout.position_ids(r), rotary_dim=4, base=10.0)
        for r in range(2)
    ]
    positions = torch.tensor([*range(5), *range(7)])
    expected = apply_rotary(x, positions, rotary_dim=4, base=10.0)
    assert torch.equal(layout.unshard(parts), expected)


def test_gradcheck() -> None:
    x = torch.randn(3, 2, 5, dtype=torch.float64, requires_grad=True)
    positions = torch.tensor([0, 1, 70_000])
    torch.autograd.gradcheck(lambda x: apply_rotary(x, positions, rotary_dim=4, base=10.0), x)


SCALINGS = [
    {"rope_type": "linear", "factor": 8.0},
    {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 4096},
    {
        "rope_type": "yarn",
        "factor": 40.0,
        "original_max_position_embeddings": 128,
        "beta_fast": 8.0,
        "beta_slow": 2.0,
        "mscale": 1.0,
        "mscale_all_dim": 0.8,
    },
    {
        "rope_type": "yarn",
        "factor": 2.5,
        "original_max_position_embeddings": 256,
        "attention_factor": 1.3,
        "truncate": False,
    },
]


@pytest.mark.parametrize("scaling", SCALINGS)
def test_scaled_as_in_transformers(scaling: dict[str, object]) -> None:
    """Its frequencies are float32."""
    utils = pytest.importorskip(
        "transformers.modeling_rope_utils", reason="needs transformers: pip install --group oracles"
    )
    from transformers import MiniMaxConfig

    config = MiniMaxConfig(
        head_dim=64, rope_parameters={"rope_theta": 600_000.0, **scaling}, hidden_size=128
    )
    expected, factor = utils.ROPE_INIT_FUNCTIONS[scaling["rope_type"]](config)
    ours = RopeScaling(**scaling)
    frequencies = 600_000.0 ** -(torch.arange(32, dtype=torch.float64) / 32)
    assert torch.allclose(ours.scaled(frequencies, 600_000.0).float(), expected, rtol=2e-6, atol=0)
    assert ours.rotated_factor == pytest.approx(factor, rel=1e-12)


def test_yarn_written_out() -> None:
    """Pairs that turn 8 times in 1000 tokens stay, those that turn twice are 4 times slower."""
    scaling = RopeScaling("yarn", 4.0, 1000, beta_fast=8.0, beta_slow=2.0)
    x, base = torch.randn(1, 1, 32, dtype=torch.float64), 1000.0
    actual = apply_rotary(x, torch.tensor([7]), rotary_dim=32, base=base, scaling=scaling)
    first = math.floor(16 * math.log(1000 / (8 * 2 * math.pi), base))
    last = math.ceil(16 * math.log(1000 / (2 * 2 * math.pi), base))
    assert 0 < first < last < 16
    for i in range(16):
        share = min(max((i - first) / (last - first), 0), 1)
        angle = 7 * base ** (-i / 16) * (share / 4 + 1 - share)
        turned = x[..., i] * math.cos(angle) - x[..., i + 16] * math.sin(angle)
        assert_equal_to_rounding(actual[..., i], turned * (0.1 * math.log(4) + 1))


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"rope_type": "linear", "factor": 0.5}, "factor must be >= 1, got 0.5"),
        ({"rope_type": "yarn", "factor": 2.0}, "original_max_position_embeddings must be given"),
        *(
            ({"rope_type": "yarn", "factor": 2.0, "original_max_position_embeddings": 9} | more, at)
            for more, at in (
                ({"mscale_all_dim": -7.0}, "mscale_all_dim must be a finite number > 0, got -7"),
                ({"beta_fast": 1.0, "beta_slow": 32.0}, "beta_fast must be at least beta_slow 32"),
            )
        ),
    ],
)
def test_other_scalings_are_refused(fields: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        RopeScaling(**fields)
