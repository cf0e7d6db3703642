"""The sizes of one engine, and the shapes of the state that follows from them; allocates nothing."""

from dataclasses import dataclass

import jax
import jax.numpy as jnp

from jaxserve.batch import SlotState
from jaxserve.models.config import ModelConfig
from jaxserve.quant.scheme import Quantisation
from pallas_kernels.dispatch import Kernels
from pallas_kernels.storage import FLOAT8, KVPool, storage_dtype


@dataclass(frozen=True)
class Dimensions:
    """Every size and choice the programs depend on, resolved: no "auto", no None."""

    model: ModelConfig
    kernels: Kernels
    quantisation: Quantisation
    dtype: str
    kv_dtype: str  # dtype again, or float8_e4m3fn
    platform: str
    num_pages: int  # N, the waste page included
    page_size: int  # P
    max_num_seqs: int  # S
    max_model_len: int
    max_logprobs: int

    @property
    def pages_per_slot(self) -> int:
        """M."""
        return -(-self.max_model_len // self.page_size)

    @property
    def page_bytes(self) -> int:
        """Bytes of one page of all layers, keys and values."""
        model = self.model
        per_head = model.head_dim * jnp.dtype(self.kv_dtype).itemsize + self._scales_per_head * 4
        return model.num_layers * 2 * model.num_kv_heads * per_head * self.page_size

    @property
    def _scales_per_head(self) -> int:
        return 1 if self.kv_dtype == jnp.dtype(FLOAT8).name else 0

    @property
    def bitmask_words(self) -> int:
        return -(-self.model.vocab_size // 32)

    def kv_shapes(self) -> KVPool[jax.ShapeDtypeStruct]:
        model = self.model
        slots, heads = (model.num_layers * self.num_pages, self.page_size), model.num_kv_heads
        pool = jax.ShapeDtypeStruct((*slots, heads, model.head_dim), storage_dtype(self.kv_dtype, self.platform))
        scale = jax.ShapeDtypeStruct((*slots, heads * self._scales_per_head), jnp.float32)
        return KVPool(k=pool, v=pool, k_scale=scale, v_scale=scale)

    def slot_shapes(self) -> SlotState[jax.ShapeDtypeStruct]:
        slots, vocab = self.max_num_seqs, self.model.vocab_size
        return SlotState(
            last_token=jax.ShapeDtypeStruct((slots,), jnp.int32),
            page_table=jax.ShapeDtypeStruct((slots, self.pages_per_slot), jnp.int32),
            token_counts=jax.ShapeDtypeStruct((slots, vocab), jnp.int32),
            logit_bias=jax.ShapeDtypeStruct((slots, vocab), jnp.float32),
        )
