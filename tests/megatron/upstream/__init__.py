"""Megatron-LM's own unit tests, run with our parts in the place of Megatron's.

    git clone --branch core_v0.19.0 https://github.com/NVIDIA/Megatron-LM
    python -m tests.megatron.upstream Megatron-LM                  # CPU ranks over gloo
    python -m tests.megatron.upstream Megatron-LM --device cuda    # NCCL, a GPU a rank

The checkout's ``megatron`` is imported, not an installed one; nothing of it is copied. Its tests
are functions and classes called here directly, without its conftest, which downloads data. In a
test module the names of Megatron's classes are bound to ours, and those options to other values
that the test takes as they come and our parts refuse (dropout, GELU experts, balancing in each
sequence).
"""
