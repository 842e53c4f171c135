"""What ``lasp``, ``ring`` and ``moe_parallel`` share. It needs torch; triton where kernels run."""
