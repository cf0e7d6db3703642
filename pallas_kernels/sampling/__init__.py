"""Picks tokens from logits: arg-max and top-k, sort-free top-k/top-p/min-p filters, penalties, a seeded draw."""
