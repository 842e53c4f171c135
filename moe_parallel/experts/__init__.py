"""The experts of one rank."""
