"""Lightning attention over a sequence cut across ranks."""

from lasp.attention import LightningOutput, lightning_attention
from lasp.decay import decay_rates
from lasp.decode import lightning_decode
from lasp.layout import SequenceLayout
from lasp.module import LightningAttention

__all__ = [
    "LightningAttention",
    "LightningOutput",
    "SequenceLayout",
    "decay_rates",
    "lightning_attention",
    "lightning_decode",
]
