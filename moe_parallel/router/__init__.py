"""The router decision: one for all ranks of the token group."""
