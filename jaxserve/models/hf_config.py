"""Reads a Hugging Face config.json: a plain dict goes in, a checked `ModelConfig` comes out.

Both spellings of rope are read: transformers 4 (`rope_theta` beside `rope_scaling`) and transformers 5
(`rope_parameters`). As there, a null is a missing key. A missing, mistyped or impossible value raises
`CorruptFileError`, a meaningful one that is not implemented `UnsupportedModelError`; both name the key and the value.
"""

import math
from collections.abc import Callable, Mapping
from typing import Any, cast

from jaxserve.errors import CorruptFileError, UnsupportedModelError
from jaxserve.models.config import HIDDEN_ACTS, ROPE_KINDS, HiddenAct, ModelConfig, RopeConfig, RopeKind

LARGEST_INT = 2**31 - 1  # every size must fit the int32 that positions and slots are counted in


def decoder_config(
    hf: Mapping[str, Any],
    *,
    windows: Callable[[Mapping[str, Any], int], tuple[int, ...]] | None = None,
    default_head_dim: int | None = None,
    qkv_bias: bool = False,
    output_bias: bool = False,
    mlp_bias: bool = False,
    qk_norm: bool = False,
) -> ModelConfig:
    """The keys all decoder families share; a family passes what differs.

    windows           (config, number of layers) -> window per layer; absent = full attention everywhere
    default_head_dim  where config.json names none; absent = hidden_size / num_attention_heads
    """
    vocab_size = read_int(hf, "vocab_size")
    hidden_size = read_int(hf, "hidden_size")
    num_layers = read_int(hf, "num_hidden_layers", high=10_000)
    num_heads = read_int(hf, "num_attention_heads")
    num_kv_heads = read_int(hf, "num_key_value_heads", num_heads)
    if num_heads % num_kv_heads:
        raise corrupt("num_key_value_heads", num_kv_heads, f"must divide num_attention_heads={num_heads}")
    if hf.get("head_dim") is None and default_head_dim is None and hidden_size % num_heads:
        raise corrupt("hidden_size", hidden_size, f"must be a multiple of num_attention_heads={num_heads}")
    head_dim = read_int(hf, "head_dim", default_head_dim or hidden_size // num_heads)
    if head_dim % 2:
        raise UnsupportedModelError(f"config.json: head_dim={head_dim} is odd, rotary embedding needs pairs")
    max_positions = read_int(hf, "max_position_embeddings")
    return ModelConfig(
        architecture=architecture(hf),
        vocab_size=vocab_size,
        hidden_size=hidden_size,
        num_layers=num_layers,
        num_heads=num_heads,
        num_kv_heads=num_kv_heads,
        head_dim=head_dim,
        intermediate_size=read_int(hf, "intermediate_size"),
        norm_eps=read_float(hf, "rms_norm_eps", 1e-6, 0.0, 1.0),
        hidden_act=cast(HiddenAct, read_choice(hf, "hidden_act", "silu", HIDDEN_ACTS)),
        rope=rope_config(hf, max_positions, head_dim),
        windows=windows(hf, num_layers) if windows else (0,) * num_layers,
        qkv_bias=qkv_bias,
        output_bias=output_bias,
        mlp_bias=mlp_bias,
        qk_norm=qk_norm,
        tie_word_embeddings=read_bool(hf, "tie_word_embeddings", False),
        max_position_embeddings=max_positions,
        eos_token_ids=read_token_ids(hf, "eos_token_id", vocab_size),
        bos_token_id=next(iter(read_token_ids(hf, "bos_token_id", vocab_size)), None),
    )


def architecture(hf: Mapping[str, Any]) -> str:
    """`architectures[0]`."""
    names = hf.get("architectures")
    if not isinstance(names, list) or not names or not isinstance(names[0], str):
        raise corrupt("architectures", names, "must be a list that names the model class")
    return names[0]


def rope_config(hf: Mapping[str, Any], max_positions: int, head_dim: int) -> RopeConfig:
    """Rope from `rope_parameters`, or from `rope_theta` and `rope_scaling`."""
    key = "rope_parameters" if hf.get("rope_parameters") is not None else "rope_scaling"
    scaling = hf.get(key)
    if scaling is None:
        scaling = {}
    if not isinstance(scaling, Mapping):
        raise corrupt(key, scaling, "must be an object")
    if any(isinstance(value, Mapping) for value in scaling.values()):
        raise UnsupportedModelError(f"config.json: {key}={shown(scaling)}: rope that differs by layer is not supported")
    for place in (scaling, hf):
        if read_float(place, "partial_rotary_factor", 1.0, 0.0) != 1.0:
            raise unsupported("partial_rotary_factor", place["partial_rotary_factor"], "only 1.0 (rotate whole heads)")
    kind = scaling.get("rope_type") or scaling.get("type") or "default"
    if kind not in ROPE_KINDS:
        raise unsupported(f"{key}.rope_type", kind, f"one of {', '.join(ROPE_KINDS)}")
    # theta = 1 would give every dimension the same wavelength and yarn a division by log(1)
    theta = read_float(hf, "rope_theta", 10_000.0, 1.0, open_low=True)
    theta = read_float(scaling, "rope_theta", theta, 1.0, open_low=True)
    if kind == "default":
        return RopeConfig(theta=theta, original_max_position_embeddings=max_positions)
    if kind == "dynamic" and head_dim == 2:
        raise unsupported("head_dim", head_dim, "more than 2 with dynamic rope, whose exponent is d / (d - 2)")
    factor = read_float(scaling, "factor", None, 1.0)
    original = max_positions
    if kind in ("llama3", "yarn"):
        original = read_int(scaling, "original_max_position_embeddings", max_positions)
    low = read_float(scaling, "low_freq_factor", None if kind == "llama3" else 1.0, 0.0, open_low=True)
    high = read_float(scaling, "high_freq_factor", None if kind == "llama3" else low + 1.0, 0.0, open_low=True)
    if high <= low:
        raise corrupt("high_freq_factor", high, f"must exceed low_freq_factor={low}")
    beta_fast = read_float(scaling, "beta_fast", 32.0, 0.0, open_low=True)
    beta_slow = read_float(scaling, "beta_slow", 1.0, 0.0, open_low=True)
    if beta_fast < beta_slow:
        raise corrupt("beta_fast", beta_fast, f"must not be less than beta_slow={beta_slow}")
    return RopeConfig(
        kind=cast(RopeKind, kind),
        theta=theta,
        factor=factor,
        original_max_position_embeddings=original,
        low_freq_factor=low,
        high_freq_factor=high,
        attention_factor=_yarn_attention_factor(scaling, factor) if kind == "yarn" else 1.0,
        beta_fast=beta_fast,
        beta_slow=beta_slow,
        truncate=read_bool(scaling, "truncate", True),
    )


def uniform_windows(hf: Mapping[str, Any], num_layers: int, default: int) -> tuple[int, ...]:
    """One `sliding_window` for all layers; `default` where the key is missing, none where it is null."""
    window = hf.get("sliding_window", default)
    if window is None:
        return (0,) * num_layers
    kinds = hf.get("layer_types")
    if kinds is not None and kinds != ["sliding_attention"] * num_layers:
        raise unsupported("layer_types", kinds, "sliding_attention in every layer of this family")
    return (read_int({"sliding_window": window}, "sliding_window"),) * num_layers


def upper_layer_windows(hf: Mapping[str, Any], num_layers: int) -> tuple[int, ...]:
    """Windows of the layers that `layer_types` names; without it, of layers >= `max_window_layers`."""
    window = read_int(hf, "sliding_window", 4096) if read_bool(hf, "use_sliding_window", False) else 0
    kinds = hf.get("layer_types")
    if kinds is None:
        first = read_int(hf, "max_window_layers", 28, low=0)
        return tuple(window if layer >= first else 0 for layer in range(num_layers))
    if not isinstance(kinds, list) or len(kinds) != num_layers:
        raise corrupt("layer_types", kinds, f"must list num_hidden_layers={num_layers} kinds of attention")
    for kind in kinds:
        if kind not in ("full_attention", "sliding_attention"):
            raise unsupported("layer_types", kind, "full_attention or sliding_attention")
        if kind == "sliding_attention" and not window:
            raise corrupt("layer_types", kind, "needs use_sliding_window and sliding_window")
    return tuple(window if kind == "sliding_attention" else 0 for kind in kinds)


def read_int(hf: Mapping[str, Any], key: str, default: int | None = None, low: int = 1, high: int = LARGEST_INT) -> int:
    """An integer in low..high; `default` None = the key is required."""
    value = _value(hf, key, default)
    if isinstance(value, bool) or not isinstance(value, int) or not low <= value <= high:
        raise corrupt(key, value, f"must be an integer in {low}..{high}")
    return value


def read_float(
    hf: Mapping[str, Any],
    key: str,
    default: float | None = None,
    low: float = -math.inf,
    high: float = 1e12,
    *,
    open_low: bool = False,
) -> float:
    """A finite number in low..high, `low` itself excluded if `open_low`; `default` None = the key is required."""
    value = _value(hf, key, default)
    valid = isinstance(value, int | float) and not isinstance(value, bool) and low <= value <= high
    if not valid or (open_low and value == low):
        raise corrupt(key, value, f"must be a number in {'(' if open_low else '['}{low:g}, {high:g}]")
    return float(value)


def read_bool(hf: Mapping[str, Any], key: str, default: bool) -> bool:
    """True or false."""
    value = _value(hf, key, default)
    if not isinstance(value, bool):
        raise corrupt(key, value, "must be true or false")
    return value


def read_choice(hf: Mapping[str, Any], key: str, default: str, choices: tuple[str, ...]) -> str:
    """One of `choices`; any other value is unsupported."""
    value = _value(hf, key, default)
    if value not in choices:
        raise unsupported(key, value, f"one of {', '.join(choices)}")
    return value


def read_token_ids(hf: Mapping[str, Any], key: str, vocab_size: int) -> tuple[int, ...]:
    """A token id, a list of them, or nothing."""
    value = hf.get(key)
    ids = [] if value is None else value if isinstance(value, list) else [value]
    for token in ids:
        if isinstance(token, bool) or not isinstance(token, int) or not 0 <= token < vocab_size:
            raise corrupt(key, value, f"must hold token ids below vocab_size={vocab_size}")
    return tuple(ids)


def corrupt(key: str, value: Any, why: str) -> CorruptFileError:
    return CorruptFileError(f"config.json: {key}={shown(value)} {why}")


def unsupported(key: str, value: Any, supported: str) -> UnsupportedModelError:
    return UnsupportedModelError(f"config.json: {key}={shown(value)} is not supported, only {supported}")


def shown(value: Any) -> str:
    """`repr`, cut to a length that fits an error message."""
    text = repr(value)
    return text if len(text) <= 80 else text[:77] + "..."


def _value(hf: Mapping[str, Any], key: str, default: Any) -> Any:
    value = hf.get(key)
    if value is None:
        value = default
    if value is None:
        raise CorruptFileError(f"config.json: {key} is missing")
    return value


def _yarn_attention_factor(scaling: Mapping[str, Any], factor: float) -> float:
    """Peng et al. 2023, equation 22, with the ratio of two such terms where `mscale` and `mscale_all_dim` are given."""

    def magnitude(mscale: float) -> float:
        return 0.1 * mscale * math.log(factor) + 1.0

    if scaling.get("attention_factor") is not None:
        return read_float(scaling, "attention_factor", None, 0.0, open_low=True)
    mscale, all_dim = (read_float(scaling, key, 0.0, 0.0) for key in ("mscale", "mscale_all_dim"))
    return magnitude(mscale) / magnitude(all_dim) if mscale and all_dim else magnitude(1.0)
