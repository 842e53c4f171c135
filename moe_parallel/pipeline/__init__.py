"""Communication under the products of the experts."""
