"""Exact softmax attention over a packed sequence cut across ranks."""

from ring.attention import RingOutput, ring_attention
from ring.module import RingAttention

__all__ = ["RingAttention", "RingOutput", "ring_attention"]
