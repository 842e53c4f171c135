"""Layers around lightning attention."""
