"""Activations times a weight kept in 8 or 4 bits."""
