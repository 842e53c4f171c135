"""Ring attention as Megatron-Core layer parts: :mod:`lasp.megatron.ring` by the package's name."""

from lasp.megatron.ring import RingSelfAttention, ring_attention_spec
from lasp.megatron.ring_core import RingCoreAttention

__all__ = ["RingCoreAttention", "RingSelfAttention", "ring_attention_spec"]
