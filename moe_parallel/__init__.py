"""Mixture-of-experts layers over EP x ETP ranks."""
