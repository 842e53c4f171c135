"""Lightning attention over a sequence cut across ranks."""

from lasp._core.rotary import RopeScaling
from lasp.layers.lightning_attention import LightningAttention
from lasp.layers.options import LightningOptions
from lasp.lightning.attention import LightningOutput, lightning_attention
from lasp.lightning.decay import decay_rates
from lasp.lightning.decode import lightning_decode
from lasp.sequence.layout import SequenceLayout

__all__ = [
    "LightningAttention",
    "LightningOptions",
    "LightningOutput",
    "RopeScaling",
    "SequenceLayout",
    "decay_rates",
    "lightning_attention",
    "lightning_decode",
]
