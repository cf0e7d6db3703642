"""Picks tokens from logits: blocked argmax and top-k, sort-free top-k/top-p/min-p filters, a seeded draw."""
