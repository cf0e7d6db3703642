"""A GGUF file in Hugging Face terms: path in; config dicts, tokenizer metadata and named weights out.

Architectures: llama (Llama, Mistral, SmolLM2 and whatever else shares that block), qwen2, qwen3. What changes the
model's arithmetic and is not implemented is refused by name. Two conventions of GGUF files are undone here:

- For "llama" the rows of q_proj and k_proj are stored so that rotated pairs lie side by side; Hugging Face keeps the
  two halves of a head apart. `read` puts them back. qwen2 and qwen3 are stored as Hugging Face has them.
- Llama 3's frequency scaling is stored as the divisors it yields (`rope_freqs.weight`), not as its parameters.
  They become `rope_scaling` again if Llama 3's published parameters reproduce them.
"""

import math
import os
from dataclasses import replace
from pathlib import Path
from typing import Any, NoReturn

import numpy as np

from jaxserve.errors import CorruptFileError, UnsupportedModelError, WeightMismatchError
from jaxserve.loading.gguf import GGUFFile, TensorInfo, shown, to_array
from jaxserve.loading.gguf_names import EMBEDDING, OUTPUT, Q_BIAS, ROPE_FREQS, UP_BIAS, hf_name, rotated_projection
from jaxserve.loading.gguf_quant import TYPE_BY_NAME
from jaxserve.models.config import RopeConfig
from jaxserve.models.rope import inverse_frequencies

# general.architecture -> (class in transformers, model_type)
ARCHITECTURES = {
    "llama": ("LlamaForCausalLM", "llama"),
    "qwen2": ("Qwen2ForCausalLM", "qwen2"),
    "qwen3": ("Qwen3ForCausalLM", "qwen3"),
}

# settings that change the arithmetic, and the values at which they change nothing
_NEUTRAL: dict[str, tuple[Any, ...]] = {
    "expert_count": (0,),
    "attention.causal": (True,),
    "attention.clamp_kqv": (0.0,),
    "attention.scale": (0.0,),
    "attn_logit_softcapping": (0.0,),
    "final_logit_softcapping": (0.0,),
    "embedding_scale": (0.0, 1.0),
    "residual_scale": (0.0, 1.0),
    "logit_scale": (0.0, 1.0),
    "use_parallel_residual": (False,),
    "rope.scaling.alpha": (0.0,),
    "rope.scaling.yarn_log_multiplier": (0.0,),
    "rope.scaling.yarn_ext_factor": (1.0,),
    "rope.scaling.yarn_attn_factor": (1.0,),
}

# the parameters of every Llama 3.1, 3.2 and 3.3 checkpoint; only the factor differs among them
_LLAMA3_ROPE = {"low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 8192}


class GGUFCheckpoint:
    """A GGUF model file as a Hugging Face checkpoint.

    hf_config          what config.json would hold
    generation_config  what generation_config.json would hold: eos_token_id (list), bos_token_id, pad_token_id
    tokenizer_source   the file's metadata, for `jaxserve.text.gguf_tokenizer`

    Raises what `GGUFFile` raises, `CorruptFileError` for missing or senseless metadata, and `UnsupportedModelError`
    for an architecture or a setting that is not implemented.
    """

    def __init__(self, path: str | os.PathLike[str]):
        self.path = Path(path)
        self._file = GGUFFile(self.path)
        self._rotated_pairs_adjacent = self._file.metadata.get("general.architecture") == "llama"
        settings = _Settings(self._file)
        self.hf_config: dict[str, Any] = settings.config()
        self.generation_config: dict[str, Any] = settings.generation_config()
        self.tokenizer_source: dict[str, Any] = self._file.metadata
        self._tensors: dict[str, TensorInfo] = {}
        for info in self._file.tensors.values():
            if info.name == ROPE_FREQS:
                continue
            name = hf_name(info.name)
            if name in self._tensors:
                raise WeightMismatchError(
                    f"{self.path}: tensors {shown(self._tensors[name].name)} and {shown(info.name)} are both {name}"
                )
            self._tensors[name] = info

    def names(self) -> list[str]:
        """Every tensor by its Hugging Face name, in file order; one without such a name keeps its GGUF name."""
        return list(self._tensors)

    def shape(self, name: str) -> tuple[int, ...]:
        """Shape of tensor `name` in the Hugging Face layout, [out, in] for a projection."""
        return self._info(name).shape

    def nbytes(self, name: str) -> int:
        """Bytes that tensor `name` takes in the file."""
        return self._info(name).nbytes

    def read(self, name: str) -> np.ndarray:
        """Tensor `name` in the Hugging Face layout, a new array: float32, float16 and bfloat16 as stored,
        quantised types as float32. Raises `WeightMismatchError` if there is no such tensor or its rows are not
        whole heads.
        """
        info = self._info(name)
        raw = self._file.raw(info.name)
        projection = rotated_projection(info.name) if self._rotated_pairs_adjacent else None
        if projection:
            # rows are reordered while they are still packed: the temporary copy is the stored size, not float32
            raw = raw.reshape(info.shape[0], -1)[self._row_order(info, projection)].reshape(-1)
        return to_array(raw, TYPE_BY_NAME[info.type], dtype=None).reshape(info.shape)

    def _info(self, name: str) -> TensorInfo:
        if name not in self._tensors:
            raise WeightMismatchError(f"{self.path}: there is no tensor {shown(name)}")
        return self._tensors[name]

    def _row_order(self, info: TensorInfo, projection: str) -> np.ndarray:
        """i64[rows]: the stored row that belongs at each row of the Hugging Face layout."""
        heads = self.hf_config["num_attention_heads" if projection == "q" else "num_key_value_heads"]
        rows = info.shape[0]
        if rows != heads * self.hf_config["head_dim"]:
            raise WeightMismatchError(
                f"{self.path}: tensor {shown(info.name)} has {rows} rows, not {heads} heads"
                f" of {self.hf_config['head_dim']}"
            )
        return np.arange(rows).reshape(heads, -1, 2).swapaxes(1, 2).reshape(-1)


def llama3_divisors(theta: float, head_dim: int, scaling: dict[str, Any]) -> np.ndarray:
    """f32[head_dim / 2]: what Llama 3 divides each RoPE frequency by, from its `rope_scaling` parameters."""
    parameters = {key: value for key, value in scaling.items() if key != "rope_type"}
    scaled = RopeConfig(kind="llama3", theta=theta, **parameters)
    plain = replace(scaled, kind="default")
    with np.errstate(all="ignore"):  # a file can state any theta
        return inverse_frequencies(plain, head_dim, 0)[0] / inverse_frequencies(scaled, head_dim, 0)[0]


class _Settings:
    """The `{architecture}.*` metadata of one file, read with checks."""

    def __init__(self, file: GGUFFile):
        self.file = file
        self.metadata = file.metadata
        arch = self.metadata.get("general.architecture")
        if not isinstance(arch, str):
            self.corrupt(f"general.architecture={_brief(arch)} is not a string")
        self.arch: str = arch
        if self.arch not in ARCHITECTURES:
            self.unsupported(
                f"architecture {shown(self.arch)} is not supported (supported: {', '.join(ARCHITECTURES)})"
            )

    def config(self) -> dict[str, Any]:
        for key, neutral in _NEUTRAL.items():
            value = self.metadata.get(f"{self.arch}.{key}", neutral[0])
            if not (np.isscalar(value) and value in neutral):
                self.unsupported(f"{self.arch}.{key}={_brief(value)} is not supported")
        tensors = self.file.tensors
        if EMBEDDING not in tensors:
            self.corrupt(f"there is no tensor {EMBEDDING}")
        hidden = self.integer("embedding_length")
        heads = self.integer("attention.head_count")
        head_dim = self.integer("attention.key_length", hidden // heads)
        if self.integer("attention.value_length", head_dim) != head_dim:
            self.unsupported(f"{self.arch}.attention.value_length differs from the key length {head_dim}")
        if self.integer("rope.dimension_count", head_dim) != head_dim:
            self.unsupported(f"{self.arch}.rope.dimension_count differs from the head size {head_dim}")
        architecture, model_type = ARCHITECTURES[self.arch]
        window = self.integer("attention.sliding_window", 0, low=0) or None
        if window and self.arch == "llama":
            # Hugging Face's Llama has no window; the same block with one is its Mistral
            architecture, model_type = "MistralForCausalLM", "mistral"
        theta = self.number("rope.freq_base", 10000.0)
        config = {
            "architectures": [architecture],
            "model_type": model_type,
            "vocab_size": tensors[EMBEDDING].shape[0],
            "hidden_size": hidden,
            "intermediate_size": self.integer("feed_forward_length"),
            "num_hidden_layers": self.integer("block_count"),
            "num_attention_heads": heads,
            "num_key_value_heads": self.integer("attention.head_count_kv", heads),
            "head_dim": head_dim,
            "hidden_act": "silu",
            "rms_norm_eps": self.number("attention.layer_norm_rms_epsilon"),
            "max_position_embeddings": self.integer("context_length"),
            "rope_theta": theta,
            "rope_scaling": self.rope_scaling(theta, head_dim),
            "sliding_window": window,
            "attention_bias": Q_BIAS in tensors,
            "mlp_bias": UP_BIAS in tensors,
            "tie_word_embeddings": OUTPUT not in tensors,
            "bos_token_id": self.token_id("bos"),
            "eos_token_id": self.token_id("eos"),
            "pad_token_id": self.token_id("padding"),
        }
        if window and self.arch != "llama":
            config["use_sliding_window"] = True
        return config

    def generation_config(self) -> dict[str, Any]:
        """The ids the file itself names as ends: of the sequence, of a turn, of a message. None is guessed."""
        ends = [self.token_id(name) for name in ("eos", "eot", "eom")]
        config: dict[str, Any] = {"eos_token_id": list(dict.fromkeys(end for end in ends if end is not None))}
        for name, key in (("bos_token_id", "bos"), ("pad_token_id", "padding")):
            if (token := self.token_id(key)) is not None:
                config[name] = token
        return config

    def rope_scaling(self, theta: float, head_dim: int) -> dict[str, Any] | None:
        """`rope_scaling` of config.json: None, linear, yarn (Peng et al. 2023) or llama3."""
        kind = self.metadata.get(f"{self.arch}.rope.scaling.type", "none")
        if not isinstance(kind, str):
            self.corrupt(f"{self.arch}.rope.scaling.type={_brief(kind)} is not a string")
        factor_key = "rope.scaling.factor"
        if f"{self.arch}.rope.scale_linear" in self.metadata:  # how files written before 2024 state it
            kind, factor_key = "linear", "rope.scale_linear"
        attention = self.number("rope.scaling.attn_factor", 1.0)
        if attention != 1.0 and kind != "yarn":
            self.unsupported(f"{self.arch}.rope.scaling.attn_factor={attention} without yarn is not supported")
        if ROPE_FREQS in self.file.tensors:
            if kind != "none":
                self.unsupported(f"tensor {ROPE_FREQS} beside RoPE scaling {_brief(kind)} is not supported")
            return self.llama3_scaling(theta, head_dim)
        if kind == "none":
            return None
        factor = self.number(factor_key, 1.0)
        if kind == "linear":
            return {"rope_type": "linear", "factor": factor} if factor != 1.0 else None
        if kind != "yarn":
            self.unsupported(
                f"{self.arch}.rope.scaling.type={_brief(kind)} is not supported (supported: none, linear, yarn)"
            )
        scaling: dict[str, Any] = {"rope_type": "yarn", "factor": factor}
        if f"{self.arch}.rope.scaling.original_context_length" in self.metadata:
            scaling["original_max_position_embeddings"] = self.integer("rope.scaling.original_context_length")
        for name in ("beta_fast", "beta_slow"):
            if f"{self.arch}.rope.scaling.yarn_{name}" in self.metadata:
                scaling[name] = self.number(f"rope.scaling.yarn_{name}")
        if attention != 1.0:
            # GGUF's factor multiplies YaRN's own temperature, Hugging Face's replaces it
            scaling["attention_factor"] = attention * (0.1 * math.log(factor) + 1.0)
        return scaling

    def llama3_scaling(self, theta: float, head_dim: int) -> dict[str, Any] | None:
        stored = self.file.read(ROPE_FREQS)
        if stored.shape != (head_dim // 2,):
            self.corrupt(f"tensor {ROPE_FREQS} has shape {stored.shape}, not ({head_dim // 2},)")
        if np.all(stored == 1.0):
            return None
        scaling: dict[str, Any] = {"rope_type": "llama3", "factor": float(stored.max()), **_LLAMA3_ROPE}
        known = bool(np.all(stored >= 1.0)) and math.isfinite(scaling["factor"])
        if not known or not np.allclose(stored, llama3_divisors(theta, head_dim, scaling), rtol=1e-4, atol=0):
            self.unsupported(f"tensor {ROPE_FREQS} holds other frequencies than Llama 3's {_LLAMA3_ROPE}")
        return scaling

    def integer(self, key: str, default: int | None = None, low: int = 1) -> int:
        value = self.metadata.get(f"{self.arch}.{key}", default)
        if isinstance(value, np.ndarray) and value.size and np.all(value == value[0]):
            value = value[0].item()  # one value a layer, all alike
        if isinstance(value, np.ndarray):
            self.unsupported(f"{self.arch}.{key} differs among the layers, which is not supported")
        if value is None:
            self.corrupt(f"metadata {self.arch}.{key} is missing")
        if type(value) is not int or not low <= value < 1 << 31:
            self.corrupt(f"{self.arch}.{key}={_brief(value)} is not an integer in {low}..{(1 << 31) - 1}")
        return value

    def number(self, key: str, default: float | None = None) -> float:
        value = self.metadata.get(f"{self.arch}.{key}", default)
        if value is None:
            self.corrupt(f"metadata {self.arch}.{key} is missing")
        # stored as float32: the shortest decimal that means the same is what config.json said (1e-05, not 9.99e-06)
        with np.errstate(over="ignore"):
            number = float(str(np.float32(value))) if type(value) in (int, float) else 0.0
        if not 0 < number < math.inf:
            self.corrupt(f"{self.arch}.{key}={_brief(value)} is not a positive float32")
        return number

    def token_id(self, name: str) -> int | None:
        key = f"tokenizer.ggml.{name}_token_id"
        value = self.metadata.get(key)
        rows = self.file.tensors[EMBEDDING].shape[0]
        if value is not None and not (type(value) is int and 0 <= value < rows):
            self.corrupt(f"{key}={_brief(value)} is not a token id in 0..{rows - 1}")
        return value

    def corrupt(self, what: str) -> NoReturn:
        raise CorruptFileError(f"{self.file.path}: {what}")

    def unsupported(self, what: str) -> NoReturn:
        raise UnsupportedModelError(f"{self.file.path}: {what}")


def _brief(value: Any) -> str:
    return shown(str(value)) if isinstance(value, str | int | float) else f"({type(value).__name__})"
