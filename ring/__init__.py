"""Exact softmax attention over a packed sequence cut across ranks."""

from ring.attention import RingOutput, ring_attention
from ring.latent_attention import ring_latent_attention
from ring.latent_module import MultiLatentAttention
from ring.module import RingAttention

__all__ = [
    "MultiLatentAttention",
    "RingAttention",
    "RingOutput",
    "ring_attention",
    "ring_latent_attention",
]
