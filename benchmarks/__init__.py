"""Measurements; one module a question."""
