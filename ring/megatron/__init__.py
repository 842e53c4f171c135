"""Ring attention as Megatron-Core layer parts: :mod:`lasp.megatron.ring` by the package's name."""

from lasp.megatron.ring import RingSelfAttention, ring_attention_spec
from lasp.megatron.ring_core import RingCoreAttention
from lasp.megatron.ring_latent import RingLatentSelfAttention, ring_latent_attention_spec

__all__ = [
    "RingCoreAttention",
    "RingLatentSelfAttention",
    "RingSelfAttention",
    "ring_attention_spec",
    "ring_latent_attention_spec",
]
