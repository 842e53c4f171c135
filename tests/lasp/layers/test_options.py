"""Lightning layers of other models: each option against equations, Ling's against mlx-lm."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch
from torch import Tensor

from lasp.layers.lightning_attention import LightningAttention
from lasp.layers.options import LightningOptions
from lasp.lightning.decay import decay_rates
from lasp.sequence.layout import SequenceLayout
from tests.closeness import assert_equal_to_rounding, assert_within_budget
from tests.hybrid_reference import reference_lightning
from tests.lasp.layers.test_lightning_attention import check_two_ranks_equal_one

HIDDEN, HEADS, DIM = 10, 4, 6
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"  # where there is one, kernels run there
LING = LightningOptions(
    activation="none", qk_norm=True, rotary_dim=4, scale=None, norm_groups=2, rope_base=600.0
)
CASES = {
    "ling": LING,
    "sala": LightningOptions(activation="none", qk_norm=True, rotary_dim=DIM, scale=None),
    "silu with a norm of heads": LightningOptions(qk_norm=True, norm_eps=1e-2),
    "silu gate under the norm": LightningOptions(gate="silu", gate_first=True, norm_groups=4),
    "silu gate, biases": LightningOptions(
        gate="silu", qkv_bias=True, gate_bias=True, out_bias=True, scale=0.3
    ),
    "no gate, rotation alone": LightningOptions(gate="none", rotary_dim=2),
    "sigmoid gate under the norm": LightningOptions(gate_first=True),
}


def make_module(options: LightningOptions, **kwargs: object) -> LightningAttention:
    torch.manual_seed(1)
    module = LightningAttention(
        HIDDEN, HEADS, DIM, 2, 6, decay="bailing", options=options, dtype=torch.float64, **kwargs
    )
    for parameter in module.parameters():
        torch.nn.init.normal_(parameter)
    return module


def results(output: Tensor, module: LightningAttention, hidden: Tensor) -> list[Tensor]:
    weight = torch.linspace(-1, 1, output.numel()).to(output).sin().view(output.shape)
    leaves = [hidden, *module.parameters()]
    return [output.detach(), *torch.autograd.grad((output * weight).sum(), leaves)]


@pytest.mark.parametrize("options", CASES.values(), ids=CASES.keys())
def test_every_option_is_its_equation(options: LightningOptions) -> None:
    module, lengths = make_module(options), (23, 0, 5, 12)
    hidden = torch.randn(40, HIDDEN, dtype=torch.float64, requires_grad=True)
    actual = results(module(hidden, layout=SequenceLayout(lengths, 1)), module, hidden)
    rates = decay_rates(HEADS, 2, 6, "bailing")
    output = reference_lightning(options, dict(module.named_parameters()), hidden, rates, lengths)
    for a, e in zip(actual, results(output, module, hidden), strict=True):
        assert_equal_to_rounding(a, e)


def test_ranks_equal_one_rank() -> None:
    """Positions of the rotation are those within the document, wherever it is cut."""
    check_two_ranks_equal_one(make_module(LING), (30, 1, 17), "zigzag")


def test_generation_rotates_by_given_positions() -> None:
    module = make_module(LING)
    hidden = torch.randn(2, 12, HIDDEN, dtype=torch.float64)
    expected = module(hidden)
    output, state = module.prefill(hidden[:, :5])
    assert_equal_to_rounding(output, expected[:, :5])
    output, state = module.prefill(
        hidden[:, 5:9], initial_state=state, position_ids=torch.arange(5, 9)
    )
    assert_equal_to_rounding(output, expected[:, 5:9])
    output, state = module.step(hidden[:, 9:11], state, position_ids=torch.arange(9, 11))
    assert_equal_to_rounding(output, expected[:, 9:11])
    last = torch.full((2, 1), 11)
    assert_equal_to_rounding(
        module.step(hidden[:, 11:], state, position_ids=last).output, expected[:, 11:]
    )
    for call in (
        lambda: module.step(hidden[:, 11:], state),
        lambda: module.prefill(hidden, initial_state=state),
    ):
        with pytest.raises(ValueError, match="position_ids must be given with a state"):
            call()


def test_kernels_within_budget() -> None:
    pytest.importorskip("triton", reason="it has no wheel here")
    hidden, layout = torch.randn(30, HIDDEN, device=DEVICE), SequenceLayout((20, 10), 1)

    def run(impl: str, dtype: torch.dtype) -> list[Tensor]:
        module = make_module(LING, impl=impl).to(DEVICE, dtype)
        x = hidden.to(dtype).requires_grad_()
        return results(module(x, layout=layout), module, x)

    kernels, honest = run("triton", torch.float32), run("eager", torch.float32)
    for actual, fair, exact in zip(kernels, honest, run("eager", torch.float64), strict=True):
        assert_within_budget(actual, exact, fair)


def test_the_layer_is_one_graph() -> None:
    torch._dynamo.reset()
    pytest.importorskip("triton", reason="it has no wheel here")
    module = make_module(LING, impl="triton").to(DEVICE, torch.float32)
    compiled = torch.compile(module, backend="eager", fullgraph=True)
    hidden = torch.randn(12, HIDDEN, device=DEVICE)
    for lengths in ((12,), (5, 7)):
        layout = SequenceLayout(lengths, 1)
        assert_equal_to_rounding(
            compiled(hidden, layout=layout), module(hidden, layout=layout), tolerance=1e-6
        )


def test_positions_that_do_not_fit_are_refused() -> None:
    module, rows = make_module(LING), torch.randn(2, 5, HIDDEN, dtype=torch.float64)
    for hidden, positions in ((rows[0], torch.zeros(1, 5)), (rows, torch.zeros(1, 5))):
        with pytest.raises(ValueError, match=r"position_ids must be .*5.*, got shape \(1, 5\)"):
            module(hidden, position_ids=positions.long())


def mlx_layer(module: LightningAttention, hidden: Tensor) -> Tensor:
    """The same layer by mlx-lm, with the weights of ``module`` in its order of rows."""
    core = pytest.importorskip("mlx.core", reason="needs mlx-lm: pip install --group oracles")
    ling = pytest.importorskip("mlx_lm.models.bailing_moe_linear")
    options = SimpleNamespace(
        hidden_size=HEADS * DIM, num_attention_heads=HEADS, num_hidden_layers=6,
        num_key_value_heads=HEADS, use_qk_norm=True, use_qkv_bias=False, use_bias=False,
        group_norm_size=2, rms_norm_eps=1e-6, partial_rotary_factor=4 / DIM, rope_theta=600.0,
        rope_traditional=False, rope_scaling=None, max_position_embeddings=4096,
    )  # fmt: skip
    layer = ling.LinearAttention(options, layer_idx=2)
    p = dict(module.state_dict())
    by_part = p["qkv_proj.weight"].unflatten(0, (HEADS, 3, DIM)).transpose(0, 1).flatten(0, 2)
    names = {
        "query_key_value.weight": by_part,
        "dense.weight": p["out_proj.weight"],
        "g_proj.weight": p["output_gate.weight"],
        "g_norm.weight": p["norm.weight"],
        "query_layernorm.weight": p["q_norm.weight"],
        "key_layernorm.weight": p["k_norm.weight"],
    }
    layer.load_weights([(name, core.array(w.float().numpy())) for name, w in names.items()])
    with core.stream(core.cpu):
        output = layer(core.array(hidden[None].float().numpy()))
        core.eval(output)
    return torch.tensor(output.tolist())[0]


def test_ling_is_the_layer_of_mlx() -> None:
    """In layer 2, where two of the three offsets in circulation agree: it subtracts 1."""
    torch.manual_seed(1)
    module = LightningAttention(HEADS * DIM, HEADS, DIM, 2, 6, decay="bailing", options=LING)
    for name in ("norm", "q_norm", "k_norm"):
        torch.nn.init.normal_(getattr(module, name).weight)
    hidden = torch.randn(25, HEADS * DIM)
    expected = mlx_layer(module, hidden)
    with torch.no_grad():
        assert_equal_to_rounding(module(hidden), expected, tolerance=5e-6)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"rope_base": 0, "rotary_dim": 4}, "rope_base must be a finite number > 0, got 0"),
        ({"norm_eps": -1.0}, "norm_eps must be a finite number > 0, got -1"),
        ({"norm_groups": 0}, "norm_groups must be an integer >= 1, got 0"),
        ({"norm_groups": 3}, "norm_groups must divide 4 heads, got 3"),
        ({"rotary_dim": 8}, "rotary_dim must be even and in .0, 6."),
        ({"gate": "none", "gate_first": True}, "gate_first and gate_bias need a gate"),
    ],
)
def test_bad_options(fields: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make_module(LightningOptions(**fields))


def test_groups_of_the_norm_are_whole_on_a_rank() -> None:
    LightningOptions(norm_groups=4).check_heads(8, 4, tp_size=2)
    with pytest.raises(ValueError, match=r"norm_groups must be 1 or divide over 4 .* got 2"):
        LightningOptions(norm_groups=2).check_heads(8, 4, tp_size=4)
