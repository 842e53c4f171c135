"""The description of the attention layers of a hybrid decoder."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from lasp._core.checks import (
    check_flags,
    check_part,
    check_sizes,
    check_sizes_or_none,
)
from lasp._core.rotary import RopeScaling, check_even, check_rotary_dim, check_rotation


@dataclass(frozen=True)
class LatentConfig:
    """Softmax layers that are multi-head latent attention, see :class:`ring.MultiLatentAttention`.

    Attributes:
        kv_lora_rank: elements of the latent of a token.
        qk_nope_head_dim: dims of a head's own part of queries and keys.
        qk_rope_head_dim: dims of the rotated part that all heads share.
        v_head_dim: dims of a value.
        q_lora_rank: width to which queries are compressed; None: they are not.
        rope_interleaved: whether pairs of the rotation are neighbours.

    Raises:
        ValueError: naming the field.
    """

    kv_lora_rank: int
    qk_nope_head_dim: int
    qk_rope_head_dim: int
    v_head_dim: int
    q_lora_rank: int | None = None
    rope_interleaved: bool = False

    def __post_init__(self) -> None:
        check_flags(rope_interleaved=self.rope_interleaved)
        sizes = {n: getattr(self, n) for n in ("kv_lora_rank", "qk_nope_head_dim", "v_head_dim")}
        check_sizes(**sizes)
        check_sizes_or_none(q_lora_rank=self.q_lora_rank)
        check_even("qk_rope_head_dim", self.qk_rope_head_dim)


@dataclass(frozen=True)
class AttentionConfig:
    """Heads of both kinds of attention, and the rest of the softmax layers.

    Attributes:
        num_heads: of both; lightning layers have as many keys and values.
        num_kv_heads: keys and values of softmax layers; ``num_heads`` with ``latent``.
        head_dim: of both; with ``latent`` it is that of lightning layers alone.
        rotary_dim: dims of each head that softmax layers rotate; 0: no positions;
            ``latent.qk_rope_head_dim`` with ``latent``. ``LightningOptions`` has that of lightning
            layers.
        rope_base: of that rotation.
        qk_norm: whether softmax layers have an RMSNorm over each head of queries and of keys;
            False with ``latent``.
        gated: whether softmax layers have a sigmoid gate on their output.
        latent: makes softmax layers latent attention.
        dense_len: from this length of a document on the softmax layers of the model are
            block-sparse, which is not here (MiniCPM-SALA: 8192): such documents are refused. None:
            they are dense at any length.
        rope_scaling: of the rotation, for contexts longer than those of training; None: none.

    Raises:
        ValueError: naming the field; for one that ``latent`` does not have, too.
    """

    num_heads: int
    num_kv_heads: int
    head_dim: int
    rotary_dim: int
    rope_base: float = 10_000.0
    qk_norm: bool = False
    gated: bool = False
    latent: LatentConfig | None = None
    dense_len: int | None = None
    rope_scaling: RopeScaling | None = None

    def __post_init__(self) -> None:
        check_sizes(
            num_heads=self.num_heads, num_kv_heads=self.num_kv_heads, head_dim=self.head_dim
        )
        check_flags(qk_norm=self.qk_norm, gated=self.gated)
        check_rotation(self.rope_base, self.rope_scaling)
        check_sizes_or_none(dense_len=self.dense_len)
        check_part("latent", self.latent, LatentConfig, optional=True)
        if self.latent is None:
            check_rotary_dim(self.rotary_dim, self.head_dim)
            return
        wanted = {
            "num_kv_heads": self.num_heads,
            "rotary_dim": self.latent.qk_rope_head_dim,
            "qk_norm": False,
        }
        for name, value in wanted.items():
            if getattr(self, name) != value:
                raise ValueError(
                    f"{name} must be {value} with latent attention, got {getattr(self, name)}:"
                    " heads have keys and a norm of their own, and rotate qk_rope_head_dim dims"
                )

    def check_documents(self, lengths: Sequence[int]) -> None:
        """See :func:`check_dense`."""
        check_dense(self.dense_len, lengths)


def check_dense(dense_len: int | None, lengths: Sequence[int]) -> None:
    """Raise ValueError unless softmax layers are dense for documents of these lengths."""
    if dense_len is not None and max(lengths, default=0) >= dense_len:
        raise ValueError(
            f"attention.dense_len must be None or above {max(lengths)} tokens, the longest"
            f" document, got {dense_len}: from there on softmax layers of this model choose blocks"
            " of keys, which is not here; shorten the documents, or set None for another model that"
            " is dense at any length"
        )
