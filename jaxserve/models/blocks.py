"""The parts a decoder layer is made of: activations and weights in, activations out, all functional.

Activations keep the parameters' dtype; norms, rope and softmax compute in float32. T tokens of any number of sequences
lie side by side; only the attention kernels know which token belongs to whom.
"""

from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp

from jaxserve.models.config import ModelConfig
from jaxserve.models.params import LayerParams
from pallas_kernels.dispatch import Kernels
from pallas_kernels.quant_matmul.api import quant_matmul
from pallas_kernels.quant_matmul.weight import QuantWeight
from pallas_kernels.storage import KVPool

ACTIVATIONS: dict[str, Callable[[jax.Array], jax.Array]] = {
    "silu": jax.nn.silu,
    "gelu": partial(jax.nn.gelu, approximate=False),
    "gelu_pytorch_tanh": partial(jax.nn.gelu, approximate=True),
    "gelu_new": partial(jax.nn.gelu, approximate=True),
    "relu": jax.nn.relu,
}


def rms_norm(x: jax.Array, weight: jax.Array, eps: float) -> jax.Array:
    """x [..., D] scaled to unit root mean square, times weight [D] (Zhang and Sennrich 2019)."""
    wide = x.astype(jnp.float32)
    scale = jax.lax.rsqrt(jnp.mean(wide * wide, axis=-1, keepdims=True) + eps)
    return (wide * scale * weight.astype(jnp.float32)).astype(x.dtype)


def linear(
    x: jax.Array, weight: jax.Array | QuantWeight[jax.Array], *, contract: int = 0, out_dtype: Any = None
) -> jax.Array:
    """x [..., D] times weight, whose axis `contract` is D: [..., the other axes of weight] in `out_dtype` or x's dtype.

    The only function that multiplies by a weight, so the only one that knows quantised ones; D is the first axis of
    those. float32 asks for HIGHEST precision, because a GPU would otherwise round both operands to TF32.
    """
    if isinstance(weight, QuantWeight):
        out = quant_matmul(x.reshape(-1, x.shape[-1]), weight, out_dtype=out_dtype)
        return out.reshape(x.shape[:-1] + weight.shape[1:])
    precision = jax.lax.Precision.HIGHEST if x.dtype == jnp.float32 else jax.lax.Precision.DEFAULT
    axes = (((x.ndim - 1,), (contract,)), ((), ()))
    return jax.lax.dot_general(x, weight, axes, precision=precision, preferred_element_type=out_dtype or x.dtype)


def attention_block(
    layer: LayerParams[jax.Array],
    config: ModelConfig,
    kernels: Kernels,
    x: jax.Array,  # [T, D], normed
    cos: jax.Array,  # f32[T, E/2]
    sin: jax.Array,  # f32[T, E/2]
    kv_slots: jax.Array,  # i32[T]
    attention: Any,
    kv: KVPool[jax.Array],
    *,
    page_offset: jax.Array,  # i32[]
    window: int,
) -> tuple[jax.Array, KVPool[jax.Array]]:
    """(output [T, D], kv): writes this step's keys and values, then attends over the pool."""
    tokens, group, head_dim = x.shape[0], config.query_group, config.head_dim
    with jax.named_scope("qkv"):
        qkv = linear(x, layer.qkv)  # [T, K, G+2, E]
        if config.qkv_bias:
            qkv = qkv + layer.qkv_bias
        if config.qk_norm:
            q = rms_norm(qkv[:, :, :group], layer.q_norm, config.norm_eps)
            k = rms_norm(qkv[:, :, group : group + 1], layer.k_norm, config.norm_eps)
            qkv = jnp.concatenate([q, k, qkv[:, :, group + 1 :]], axis=2)
    with jax.named_scope("update_kv"):
        q, kv = kernels.update_kv(kv, qkv, cos, sin, kv_slots, page_offset=page_offset)
    with jax.named_scope("attend"):
        mixed = kernels.attend(
            q, kv, attention, page_offset=page_offset, scale=head_dim**-0.5, window=window, soft_cap=0.0
        )
    with jax.named_scope("attn_out"):
        out = linear(mixed.reshape(tokens, config.num_heads * head_dim), layer.attn_out)
        if config.output_bias:
            out = out + layer.attn_out_bias
    return out, kv


def gated_mlp(layer: LayerParams[jax.Array], config: ModelConfig, x: jax.Array) -> jax.Array:
    """down(act(gate(x)) * up(x)) of x [T, D] (Shazeer 2020)."""
    gate_up = linear(x, layer.gate_up)  # [T, 2, F]
    if config.mlp_bias:
        gate_up = gate_up + layer.gate_up_bias
    out = linear(ACTIVATIONS[config.hidden_act](gate_up[:, 0]) * gate_up[:, 1], layer.down)
    return out + layer.down_bias if config.mlp_bias else out
