"""Positions that Megatron's options ask for against those that our softmax attention rotates by."""

from __future__ import annotations

from megatron.core.transformer.transformer_config import TransformerConfig

from lasp.megatron.checks import training_argument


def check_positions(config: TransformerConfig, rotary_dim: int, rope_base: float) -> None:
    """Raise ValueError if an option asks for other positions than RoPE of these sizes.

    GPTModel and HybridModel take ``position_embedding_type`` and ``rotary_*`` as arguments, which
    no layer sees. They are looked for where they can be: in the config (Megatron-Bridge's has them)
    and among the arguments of Megatron's training loop. What still is Megatron's default was not
    asked for. Positions that restart in rows are refused; in packs ours restart too.

    Args:
        config: Megatron's.
        rotary_dim: rotated dims of each head; 0, and positions are Megatron's affair.
        rope_base: of the wavelengths.
    """
    if not rotary_dim:
        return
    packs = any(map(training_argument, ("sft", "dataloader_inter_document_masking")))
    if training_argument("reset_position_ids") and not packs:
        raise ValueError(
            "Megatron's training argument reset_position_ids must be False with ring"
            " self-attention, got True: a row is one document; for documents whose positions"
            " restart take packs, as of --dataloader-inter-document-masking or --sft"
        )
    own = {
        "position_embedding_type": ("none", "none"),
        "rotary_base": (rope_base, 10_000),
        "rotary_percent": (rotary_dim / config.kv_channels, 1.0),
        "rotary_seq_len_interpolation_factor": (None, None),
        "seq_len_interpolation_factor": (None, None),
        "use_rope_scaling": (False, False),
        "rope_scaling": (False, False),
    }
    for name, (value, unsaid) in own.items():
        asked, where = getattr(config, name, None), "config."
        if asked is None:
            asked, where = training_argument(name), "Megatron's training argument "
        if asked is not None and asked not in (value, unsaid):
            raise ValueError(
                f"{where}{name} must be {value!r} with ring self-attention, which rotates"
                f" {rotary_dim} of {config.kv_channels} dims with base {rope_base:g} by itself, got"
                f" {asked!r}: set {value!r}, or give rotary_dim and rope_base to the spec"
            )
