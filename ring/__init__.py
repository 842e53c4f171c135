"""Exact softmax attention over a packed sequence cut across ranks."""
