"""The forward pass of every Llama-like decoder: tokens of one step in, hidden states and the updated KV pool out.

Layers are unrolled in Python, each with its own weight arrays: a scan would copy every layer's weights each step. The
pool stays whole and a layer is a page offset into it, because a slice of it would be a copy.
T tokens, L layers, N pages a layer, P slots a page, K kv heads, E head_dim, D hidden_size, V vocab_size.
"""

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp

from jaxserve.models.blocks import attention_block, gated_mlp, linear, rms_norm
from jaxserve.models.config import ModelConfig
from jaxserve.models.params import DecoderParams, LayerParams
from jaxserve.models.rope import rope_table
from pallas_kernels.dispatch import Kernels
from pallas_kernels.storage import KVPool


def forward(
    params: DecoderParams[jax.Array],
    config: ModelConfig,
    kernels: Kernels,
    *,
    token_ids: jax.Array,  # i32[T]
    positions: jax.Array,  # i32[T] position of each token in its sequence
    kv_slots: jax.Array,  # i32[T] page * P + offset within one layer; padding tokens point into page 0
    attention: Any,  # the plan kernels.prepare_attention made for this step, the same for every layer
    kv: KVPool[jax.Array],  # [L*N, P, K, E]; layer l owns pages l*N .. (l+1)*N - 1
    max_model_len: int,  # static; only dynamic rope depends on it
) -> tuple[jax.Array, KVPool[jax.Array]]:
    """(hidden [T, D] after the final norm, kv). The pool comes in donated: use the returned one."""
    assert kv.k.shape[0] % config.num_layers == 0, (kv.k.shape, config.num_layers)
    num_pages = kv.k.shape[0] // config.num_layers
    with jax.named_scope("embed"):
        x = jnp.take(params.embed, token_ids, axis=0, mode="clip")  # ids are valid: clip only spares the NaN fill
    with jax.named_scope("rope"):
        cos, sin = rope_table(config.rope, config.head_dim, positions, max_model_len)
    for index, (layer, window) in enumerate(zip(params.layers, config.windows, strict=True)):
        offset = jnp.int32(index * num_pages)
        x, kv = _layer(
            layer, x, cos, sin, kv_slots, attention, kv, offset, config=config, kernels=kernels, window=window
        )
    with jax.named_scope("final_norm"):
        return rms_norm(x, params.final_norm, config.norm_eps), kv


def logits(params: DecoderParams[jax.Array], config: ModelConfig, hidden: jax.Array) -> jax.Array:
    """f32[..., V] of hidden [..., D]; products of narrower types accumulate and stay in float32."""
    with jax.named_scope("lm_head"):
        head = params.embed if config.tie_word_embeddings else params.lm_head
        return linear(hidden, head, contract=1, out_dtype=jnp.float32)


@partial(jax.jit, static_argnames=("config", "kernels", "window"))
def _layer(
    layer: LayerParams[jax.Array],
    x: jax.Array,
    cos: jax.Array,
    sin: jax.Array,
    kv_slots: jax.Array,
    attention: Any,
    kv: KVPool[jax.Array],
    page_offset: jax.Array,
    *,
    config: ModelConfig,
    kernels: Kernels,
    window: int,
) -> tuple[jax.Array, KVPool[jax.Array]]:
    """One layer. Jitted so that all layers share one trace: tracing a step then costs the same for any depth."""
    with jax.named_scope("attention"):
        normed = rms_norm(x, layer.attn_norm, config.norm_eps)
        mixed, kv = attention_block(
            layer, config, kernels, normed, cos, sin, kv_slots, attention, kv, page_offset=page_offset, window=window
        )
        x = x + mixed
    with jax.named_scope("mlp"):
        return x + gated_mlp(layer, config, rms_norm(x, layer.mlp_norm, config.norm_eps)), kv
