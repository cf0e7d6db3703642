"""The parameters of a decoder: their types, and the table that says what each one is and is made of.

In: a `ModelConfig`. Out: `DecoderParams` with `ParamSpec` leaves. The layout is the one the step wants: contracted axis
first, q/k/v and gate/up fused so that each is one product, and every axis that tensor parallelism splits whole.
V vocab_size, D hidden_size, H heads, K kv heads, G = H / K, E head_dim, F intermediate_size.
"""

from dataclasses import replace
from typing import Generic, TypeVar

import flax.struct

from jaxserve.models.config import ModelConfig
from jaxserve.models.spec import ABSENT, ParamSpec, Source

Leaf = TypeVar("Leaf")  # jax.Array in a model, ParamSpec in its table, jax.ShapeDtypeStruct in its shapes


@flax.struct.dataclass
class LayerParams(Generic[Leaf]):
    """One layer. What a model lacks has shape [0]."""

    attn_norm: Leaf  # [D]
    qkv: Leaf  # [D, K, G+2, E]: for each kv head its G query heads, its key, its value
    qkv_bias: Leaf  # [K, G+2, E]
    q_norm: Leaf  # [E]
    k_norm: Leaf  # [E]
    attn_out: Leaf  # [H*E, D]
    attn_out_bias: Leaf  # [D]
    mlp_norm: Leaf  # [D]
    gate_up: Leaf  # [D, 2, F]
    gate_up_bias: Leaf  # [2, F]
    down: Leaf  # [F, D]
    down_bias: Leaf  # [D]


@flax.struct.dataclass
class DecoderParams(Generic[Leaf]):
    """A whole model."""

    embed: Leaf  # [V, D]
    layers: tuple[LayerParams[Leaf], ...]
    final_norm: Leaf  # [D]
    lm_head: Leaf  # [V, D]; [0] where `embed` serves as the head


def decoder_spec(config: ModelConfig) -> DecoderParams[ParamSpec]:
    """The table of a Llama-like decoder, tensors named as Hugging Face names them."""
    table = (config.vocab_size, config.hidden_size)

    def vocab_table(name: str) -> ParamSpec:
        return ParamSpec(shape=table, axes=("vocab", "embed"), sources=(Source(name, table),), std=table[1] ** -0.5)

    return DecoderParams(
        embed=vocab_table("model.embed_tokens.weight"),
        layers=tuple(layer_spec(config, f"model.layers.{layer}.") for layer in range(config.num_layers)),
        final_norm=_norm("model.norm.weight", config.hidden_size, "embed"),
        lm_head=ABSENT if config.tie_word_embeddings else replace(vocab_table("lm_head.weight"), contracted=1),
    )


def layer_spec(config: ModelConfig, prefix: str) -> LayerParams[ParamSpec]:
    """The table of the layer whose tensors start with `prefix`."""
    d, f = config.hidden_size, config.intermediate_size
    h, k, g, e = config.num_heads, config.num_kv_heads, config.query_group, config.head_dim
    attn, mlp = prefix + "self_attn.", prefix + "mlp."
    # (module, rows, place along the fused axis)
    qkv = (("q_proj", h * e, slice(0, g)), ("k_proj", k * e, g), ("v_proj", k * e, g + 1))
    gate_up = (("gate_proj", f, 0), ("up_proj", f, 1))
    return LayerParams(
        attn_norm=_norm(prefix + "input_layernorm.weight", d, "embed"),
        qkv=ParamSpec(
            shape=(d, k, g + 2, e),
            axes=("embed", "kv_heads", None, "head_dim"),
            sources=tuple(Source(f"{attn}{m}.weight", (rows, d), (slice(None), at)) for m, rows, at in qkv),
            transposed=True,
            contracted=0,
            std=d**-0.5,
        ),
        qkv_bias=ParamSpec(
            shape=(k, g + 2, e),
            axes=("kv_heads", None, "head_dim"),
            sources=tuple(Source(f"{attn}{m}.bias", (rows,), (slice(None), at)) for m, rows, at in qkv),
        )
        if config.qkv_bias
        else ABSENT,
        q_norm=_norm(attn + "q_norm.weight", e, "head_dim") if config.qk_norm else ABSENT,
        k_norm=_norm(attn + "k_norm.weight", e, "head_dim") if config.qk_norm else ABSENT,
        attn_out=_projection(attn + "o_proj.weight", h * e, d, ("heads", "embed")),
        attn_out_bias=_bias(attn + "o_proj.bias", d) if config.output_bias else ABSENT,
        mlp_norm=_norm(prefix + "post_attention_layernorm.weight", d, "embed"),
        gate_up=ParamSpec(
            shape=(d, 2, f),
            axes=("embed", None, "mlp"),
            sources=tuple(Source(f"{mlp}{m}.weight", (rows, d), (at,)) for m, rows, at in gate_up),
            transposed=True,
            contracted=0,
            std=d**-0.5,
        ),
        gate_up_bias=ParamSpec(
            shape=(2, f),
            axes=(None, "mlp"),
            sources=tuple(Source(f"{mlp}{m}.bias", (rows,), (at,)) for m, rows, at in gate_up),
        )
        if config.mlp_bias
        else ABSENT,
        down=_projection(mlp + "down_proj.weight", f, d, ("mlp", "embed")),
        down_bias=_bias(mlp + "down_proj.bias", d) if config.mlp_bias else ABSENT,
    )


def _norm(name: str, size: int, axis: str) -> ParamSpec:
    return ParamSpec(shape=(size,), axes=(axis,), sources=(Source(name, (size,)),), mean=1.0)


def _bias(name: str, size: int) -> ParamSpec:
    return ParamSpec(shape=(size,), axes=("embed",), sources=(Source(name, (size,)),))


def _projection(name: str, d_in: int, d_out: int, axes: tuple[str, str]) -> ParamSpec:
    return ParamSpec(
        shape=(d_in, d_out),
        axes=axes,
        sources=(Source(name, (d_out, d_in)),),
        transposed=True,
        contracted=0,
        std=d_in**-0.5,
    )
