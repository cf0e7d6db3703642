"""Attention of a ragged batch of queries over a paged KV pool (Kwon et al. 2023, "PagedAttention")."""
