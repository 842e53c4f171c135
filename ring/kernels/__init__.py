"""Triton kernels, imported where one is launched."""
