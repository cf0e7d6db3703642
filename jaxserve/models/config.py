"""What a decoder is, as frozen static data: the only description of a model that traced code sees.

In: nothing (families build these from a checkpoint's config.json through `hf_config`). Out: `ModelConfig`, hashable,
so that it can be a static argument of a jitted step.
"""

from dataclasses import dataclass
from typing import Literal, get_args

from pallas_kernels.paged_attention.shape import AttentionShape

RopeKind = Literal["default", "linear", "dynamic", "llama3", "yarn"]
HiddenAct = Literal["silu", "gelu", "gelu_pytorch_tanh", "gelu_new", "relu"]

ROPE_KINDS: tuple[str, ...] = get_args(RopeKind)
HIDDEN_ACTS: tuple[str, ...] = get_args(HiddenAct)


@dataclass(frozen=True, kw_only=True)
class RopeConfig:
    """Rotary position embedding (Su et al. 2021) and how it is stretched; `rope.py` gives each kind its formula.

    kind                 default; linear (positions / factor); dynamic (NTK-aware base); llama3; yarn (Peng et al. 2023)
    theta                base of the geometric series of wavelengths
    factor               how many times longer than `original_max_position_embeddings` the context became
    original_max_position_embeddings   tokens of context the model was trained on before stretching
    low/high_freq_factor llama3 only: wavelengths longer than original/low are divided by factor, shorter than
                         original/high are kept, those between are blended
    attention_factor     yarn only: cos and sin are multiplied by this
    beta_fast, beta_slow yarn only: rotations within the original context between which frequencies are blended
    truncate             yarn only: round the blended range outwards to whole dimensions
    """

    kind: RopeKind = "default"
    theta: float = 10_000.0
    factor: float = 1.0
    original_max_position_embeddings: int
    low_freq_factor: float = 1.0
    high_freq_factor: float = 4.0
    attention_factor: float = 1.0
    beta_fast: float = 32.0
    beta_slow: float = 1.0
    truncate: bool = True


@dataclass(frozen=True, kw_only=True)
class ModelConfig:
    """One decoder-only transformer. Query head h reads the keys and values of kv head h // query_group."""

    architecture: str  # the key of its family in the registry, e.g. "LlamaForCausalLM"
    vocab_size: int
    hidden_size: int
    num_layers: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    intermediate_size: int
    norm_eps: float
    hidden_act: HiddenAct
    rope: RopeConfig
    windows: tuple[int, ...]  # per layer: tokens a query sees, itself included; 0 = all of them
    qkv_bias: bool
    output_bias: bool  # on the attention output projection
    mlp_bias: bool
    qk_norm: bool  # RMS norm over head_dim of every query and key head, before rope
    tie_word_embeddings: bool
    max_position_embeddings: int
    eos_token_ids: tuple[int, ...]
    bos_token_id: int | None

    @property
    def query_group(self) -> int:
        """Query heads that share one kv head."""
        return self.num_heads // self.num_kv_heads

    def attention_shape(self, page_size: int, dtype: str, kv_dtype: str) -> AttentionShape:
        """What attention kernels are chosen by; see AttentionShape for the dtypes."""
        return AttentionShape(
            num_heads=self.num_heads,
            num_kv_heads=self.num_kv_heads,
            head_dim=self.head_dim,
            page_size=page_size,
            dtype=dtype,
            kv_dtype=kv_dtype,
        )
