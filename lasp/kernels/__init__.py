"""Triton kernels of lightning attention; imported only when ``impl="triton"`` is asked for."""
