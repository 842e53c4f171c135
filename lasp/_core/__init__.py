"""What ``lasp``, ``ring`` and ``moe_parallel`` share. It imports nothing but torch."""
