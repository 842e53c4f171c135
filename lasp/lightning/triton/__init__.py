"""The Triton implementation; imported only where it is chosen."""
