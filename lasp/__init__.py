"""Lightning attention over a sequence cut across ranks."""

from lasp.layout import SequenceLayout

__all__ = ["SequenceLayout"]
