"""The static sizes of attention over a paged pool: what a backend is chosen and configured by."""

from dataclasses import dataclass

import jax.numpy as jnp


@dataclass(frozen=True)
class AttentionShape:
    """dtype is that of the queries, kv_dtype what keys and values are kept as ("float8_e4m3fn", or dtype again)."""

    num_heads: int  # H
    num_kv_heads: int  # Hkv
    head_dim: int  # D
    page_size: int  # P
    dtype: str
    kv_dtype: str

    @property
    def group(self) -> int:
        """Query heads that share a KV head."""
        return self.num_heads // self.num_kv_heads

    @property
    def kv_itemsize(self) -> int:
        """Bytes of one number of a key or value."""
        return jnp.dtype(self.kv_dtype).itemsize
