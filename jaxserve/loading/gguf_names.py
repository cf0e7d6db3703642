"""GGUF tensor names in, Hugging Face parameter names out, for the architectures that jaxserve reads from GGUF.

`rope_freqs.weight` is not a parameter: it is derived from the RoPE settings (see `gguf_checkpoint`), so it has no name
here. A name that is not in these tables stays as it is, so that the strict weight rules refuse it by name.
"""

import re

ROPE_FREQS = "rope_freqs.weight"
EMBEDDING = "token_embd.weight"
OUTPUT = "output.weight"
Q_BIAS = "blk.0.attn_q.bias"
UP_BIAS = "blk.0.ffn_up.bias"

_GLOBAL = {"token_embd": "model.embed_tokens", "output_norm": "model.norm", "output": "lm_head"}
_LAYER = {
    "attn_norm": "input_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "attn_q_norm": "self_attn.q_norm",
    "attn_k_norm": "self_attn.k_norm",
    "ffn_norm": "post_attention_layernorm",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}
_LAYER_NAME = re.compile(r"blk\.(0|[1-9][0-9]*)\.([a-z_]+)\.(weight|bias)")
_GLOBAL_NAME = re.compile(r"([a-z_]+)\.(weight|bias)")


def hf_name(gguf_name: str) -> str:
    """The Hugging Face name of a GGUF tensor, or the name unchanged if it has none."""
    if (layer := _LAYER_NAME.fullmatch(gguf_name)) and layer[2] in _LAYER:
        return f"model.layers.{layer[1]}.{_LAYER[layer[2]]}.{layer[3]}"
    if (other := _GLOBAL_NAME.fullmatch(gguf_name)) and other[1] in _GLOBAL:
        return f"{_GLOBAL[other[1]]}.{other[2]}"
    return gguf_name


def rotated_projection(gguf_name: str) -> str | None:
    """ "q" or "k" if the tensor is a query or key projection (weight or bias), whose rows RoPE rotates, else None."""
    layer = _LAYER_NAME.fullmatch(gguf_name)
    return {"attn_q": "q", "attn_k": "k"}.get(layer[2]) if layer else None
