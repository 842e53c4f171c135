"""How many tokens fit on a GPU? The memory of a training step, by a formula.

    1.05 (states + gathered + kept layers tokens + (all - kept + 6 hidden) tokens + head)

States are master, gradient and two moments of every parameter, 16 bytes, sharded over all ranks.
Gathered are two layers in 16 bits, a gradient of one layer in 16 and in 32, and what stands outside
the layers. ``kept`` and ``all`` are bytes a token that a layer keeps by its policy and by ``none``;
the layer that is in its backward holds all, and gradients of the size of six times its input. The
head holds 2048 logits. The factor is for buffers of communication and the allocator.

Run: python -m benchmarks.train_memory
"""

from __future__ import annotations

from typing import NamedTuple

from benchmarks.harness import markdown
from benchmarks.layer_group import layer_group
from lasp.hybrid import MINIMAX_TEXT_01, RING_MINI_LINEAR_2_0, HybridConfig, HybridModel
from moe_parallel import ExpertTopology

HEAD_TOKENS = 2048
MOST_BYTES = 135e9  # of 141 GB


class Plan(NamedTuple):
    """A run: a model on some GPUs at one context.

    Attributes:
        name: of the model.
        config: its shape.
        topology: the sizes; packs are cut over cp, and dp packs are trained on at once.
        context: tokens of a pack.
        activations: the policy, ``none``, or ``softmax_outputs`` or ``full`` with or without
            ``offload``.
    """

    name: str
    config: HybridConfig
    topology: ExpertTopology
    context: int
    activations: str

    @property
    def tokens(self) -> int:
        """Tokens that a rank holds."""
        return self.context // self.topology.cp


def kept_bytes(config: HybridConfig, kind: str, policy: str) -> int:
    """Bytes a token that a layer with experts keeps in 16 bits, on a GPU with all kernels.

    With ``none`` it keeps inputs and outputs of norms and of residuals; for lightning attention its
    projection before and after the activation, the result, the gate and their product; for softmax
    attention queries, keys, values and the result; rows of experts, their first product and their
    results.
    """
    heads, moe, hidden = config.attention, config.moe, config.hidden_size
    if moe is None or heads.latent is not None:
        raise ValueError(
            "config must have experts and no latent attention: others keep other things"
        )
    inner, kv = heads.num_heads * heads.head_dim, heads.num_kv_heads * heads.head_dim
    if policy == "none":
        attention = 9 * inner if kind == "G" else 2 * inner + 2 * kv
        experts = moe.top_k * 2 * (hidden + moe.ffn_size) + 2 * (moe.shared_ffn_size or 0)
        return 2 * (4 * hidden + attention + experts)
    names = set(policy.split("+"))
    if not names <= {"softmax_outputs", "full", "offload"}:
        raise ValueError(f"policy must be 'none', 'softmax_outputs' or 'full', got {policy!r}")
    inputs = 0 if "offload" in names else 2 * hidden
    if "softmax_outputs" in names and kind == "*":
        return 2 * inputs + 2 * inner + 4 * heads.num_heads
    return inputs


def train_bytes(plan: Plan) -> dict[str, float]:
    """The memory of the fullest GPU by what takes it; ``total`` is their sum with the factor."""
    config, ranks = plan.config, plan.topology.world_size
    model = HybridModel(config, device="meta")
    experts = sum(p.numel() for _, p in model.expert_parameters())
    dense = sum(p.numel() for _, p in model.dense_parameters())
    outside = 2 * config.vocab_size * config.hidden_size
    layer = (experts / plan.topology.ep + dense - outside) / config.num_layers
    kept = sum(kept_bytes(config, kind, plan.activations) for kind in config.kinds)
    most = max(
        kept_bytes(config, kind, "none") - kept_bytes(config, kind, plan.activations)
        for kind in config.kinds
    )
    parts = {
        "states": 16 * (experts + dense) / ranks,
        "gathered": (2 * 2 + 2 + 4) * layer + 2 * outside,
        "kept": float(kept * plan.tokens),
        "backward": float((most + 6 * 2 * config.hidden_size) * plan.tokens),
        "head": 6.0 * HEAD_TOKENS * config.vocab_size + 4 * outside / 2,
    }
    return parts | {"total": 1.05 * sum(parts.values())}


def plans() -> list[Plan]:
    """Stages of 8K to 1M tokens on 2, 16 and 256 GPUs, each by the policy that computes least."""
    group = layer_group(vocab_size=200_064)
    found = []
    for name, config, ranks, ep, sizes in (
        ("layer group, 5.8 B", group, 2, 2, ((8192, 1), (131072, 2), (524288, 2), (1048576, 2))),
        (
            "Ring-mini-linear-2.0, 16.4 B", RING_MINI_LINEAR_2_0, 16, 16,
            ((8192, 1), (131072, 4), (524288, 16), (1048576, 16)),
        ),
        (
            "MiniMax-Text-01, 456 B", MINIMAX_TEXT_01, 256, 32,
            ((8192, 1), (131072, 16), (524288, 64), (1048576, 128)),
        ),
    ):  # fmt: skip
        for context, cp in sizes:
            topology = ExpertTopology(ranks, cp=cp, ep=ep)
            choices = [
                Plan(name, config, topology, context, policy)
                for policy in ("none", "softmax_outputs", "softmax_outputs+offload")
            ]
            fit = (plan for plan in choices if train_bytes(plan)["total"] < MOST_BYTES)
            found.append(next(fit, choices[-1]))
    return found


def table() -> list[str]:
    """The plans as a table of a document."""
    head = ["model", "GPUs", "context", "cp", "dp", "ep", "edp", "tokens a GPU", "activations"]
    head += ["states", "gathered", "kept", "backward", "head", "total, GB"]
    body = []
    for plan in plans():
        at, parts = plan.topology, train_bytes(plan)
        cells = [plan.name, at.world_size, f"{plan.context:,}", at.cp, at.dp, at.ep, at.edp]
        cells += [f"{plan.tokens:,}", f"`{plan.activations}`"]
        cells += [f"{size / 1e9:.1f}" for size in parts.values()]
        body.append([str(cell) for cell in cells])
    return markdown(head, body, left=(0, 8))


if __name__ == "__main__":
    print("\n".join(table()))
