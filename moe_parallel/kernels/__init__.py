"""Triton kernels around the experts' matrix products. They import nothing but triton."""
