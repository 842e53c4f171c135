"""Which tokens of which documents each rank holds, and where states flow."""
