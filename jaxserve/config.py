"""Every setting of the engine, validated once, where it is made. Frozen; no environment, no globals.

`EngineConfig.from_options(**options)` takes the flat names users of vLLM know and sorts them into sections.
"""

import dataclasses
import difflib
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from jaxserve.errors import ConfigError

DTYPES = ("auto", "float32", "bfloat16", "float16")
LOAD_FORMATS = ("auto", "safetensors", "gguf", "dummy")
POLICIES = ("fcfs", "priority")
QUANTIZATIONS = ("none", "int8", "fp8", "int4")
KV_DTYPES = ("auto", "fp8")
ATTENTION_BACKENDS = ("auto", "reference", "triton", "mosaic")
SAMPLING_BACKENDS = MATMUL_BACKENDS = ("auto", "reference", "triton")


@dataclass(frozen=True, kw_only=True)
class ModelOptions:
    """Which weights, in which precision.

    model            Hugging Face directory, .gguf file, or hub id; None = the embedded default model
    revision         branch, tag or commit of a hub id
    tokenizer        directory or .gguf to take the tokenizer from; None = the model's own
    chat_template    Jinja source or path that replaces the model's own
    load_format      auto | safetensors | gguf | dummy (random weights on the device, for benchmarks)
    dtype            auto = bfloat16 on GPU, float32 on CPU
    quantization     none | int8 | fp8 | int4: the weights of projections are narrowed while they are loaded
    max_model_len    longest prompt + output in tokens; None = what the model was trained for
    generation_config  auto = the checkpoint's sampling defaults apply where the caller gives none; none = never
    """

    model: str | None = None
    revision: str | None = None
    tokenizer: str | None = None
    chat_template: str | None = None
    load_format: str = "auto"
    dtype: str = "auto"
    quantization: str = "none"
    max_model_len: int | None = None
    generation_config: str = "auto"

    def __post_init__(self) -> None:
        for name in ("model", "revision", "tokenizer", "chat_template"):
            _check_text(name, getattr(self, name))
        _check_choice("load_format", self.load_format, LOAD_FORMATS)
        _check_choice("dtype", self.dtype, DTYPES)
        _check_choice("quantization", self.quantization, QUANTIZATIONS)
        _check_choice("generation_config", self.generation_config, ("auto", "none"))
        _check_int("max_model_len", self.max_model_len, 2, optional=True)


@dataclass(frozen=True, kw_only=True)
class CacheOptions:
    """The paged KV pool.

    page_size              tokens a page holds, 8..64
    memory_utilization     share of the device's memory jaxserve may use, weights and largest step included
    kv_cache_memory_bytes  pool size in bytes, instead of what the plan leaves; on CPU the default is 1 GiB
    num_pages              pool size in pages, instead of either
    kv_cache_dtype         auto = the model's dtype; fp8 = float8_e4m3fn with a scale for each token and head: half the
                           memory of 16-bit keys and values, for a loss of accuracy
    enable_prefix_caching  share pages between requests with equal prefixes
    """

    page_size: int = 16
    memory_utilization: float = 0.9
    kv_cache_memory_bytes: int | None = None
    num_pages: int | None = None
    kv_cache_dtype: str = "auto"
    enable_prefix_caching: bool = True

    def __post_init__(self) -> None:
        _check_choice("page_size", self.page_size, (8, 16, 32, 64))
        share = self.memory_utilization
        if isinstance(share, bool) or not isinstance(share, int | float) or not 0.0 < share <= 1.0:
            raise ConfigError(f"memory_utilization={share!r} must be a number in (0, 1]")
        _check_choice("kv_cache_dtype", self.kv_cache_dtype, KV_DTYPES)
        _check_choice("enable_prefix_caching", self.enable_prefix_caching, (True, False))
        _check_int("kv_cache_memory_bytes", self.kv_cache_memory_bytes, 1, optional=True)
        _check_int("num_pages", self.num_pages, 2, optional=True)
        if self.kv_cache_memory_bytes is not None and self.num_pages is not None:
            raise ConfigError(
                f"kv_cache_memory_bytes={self.kv_cache_memory_bytes} and num_pages={self.num_pages} both size the KV "
                "pool: give one"
            )


@dataclass(frozen=True, kw_only=True)
class SchedulerOptions:
    """How steps are filled.

    max_num_seqs            sequences that run at once; None = 256 on GPU, 32 on CPU
    max_num_batched_tokens  token budget of a step; None = 8192 on GPU, 512 on CPU
    scheduling_policy       fcfs | priority
    overlap                 0 = read a step's tokens before planning the next, 1 = launch the next step first
    max_logprobs            most top logprobs a request may ask for
    """

    max_num_seqs: int | None = None
    max_num_batched_tokens: int | None = None
    scheduling_policy: str = "fcfs"
    overlap: int = 1
    max_logprobs: int = 20

    def __post_init__(self) -> None:
        _check_int("max_num_seqs", self.max_num_seqs, 1, optional=True)
        _check_int("max_num_batched_tokens", self.max_num_batched_tokens, 1, optional=True)
        _check_choice("scheduling_policy", self.scheduling_policy, POLICIES)
        _check_choice("overlap", self.overlap, (0, 1))
        _check_int("max_logprobs", self.max_logprobs, 0)
        seqs, tokens = self.max_num_seqs, self.max_num_batched_tokens
        if seqs is not None and tokens is not None and tokens < seqs:
            raise ConfigError(
                f"max_num_batched_tokens={tokens} must be at least max_num_seqs={seqs}: every running sequence needs "
                "room for one token a step"
            )


@dataclass(frozen=True, kw_only=True)
class KernelOptions:
    """Which implementation of an op runs. auto chooses by device and shape, and says so; else it runs or is refused.

    attention_backend  auto | reference (plain JAX) | triton | mosaic (Hopper)
    sampling_backend   auto | reference | triton
    matmul_backend     auto | reference | triton: products with quantised weights; the others are XLA's
    """

    attention_backend: str = "auto"
    sampling_backend: str = "auto"
    matmul_backend: str = "auto"

    def __post_init__(self) -> None:
        _check_choice("attention_backend", self.attention_backend, ATTENTION_BACKENDS)
        _check_choice("sampling_backend", self.sampling_backend, SAMPLING_BACKENDS)
        _check_choice("matmul_backend", self.matmul_backend, MATMUL_BACKENDS)


@dataclass(frozen=True, kw_only=True)
class CompileOptions:
    """compilation_cache_dir  where compiled programs are kept between starts; None = the user cache directory
    compile_threads        programs compiled at once; None = one per core, at most 8
    """

    compilation_cache_dir: str | None = None
    compile_threads: int | None = None

    def __post_init__(self) -> None:
        _check_text("compilation_cache_dir", self.compilation_cache_dir)
        _check_int("compile_threads", self.compile_threads, 1, optional=True)

    @property
    def cache_dir(self) -> Path:
        if self.compilation_cache_dir is not None:
            return Path(self.compilation_cache_dir).expanduser()
        return Path.home() / ".cache" / "jaxserve" / "xla"


@dataclass(frozen=True, kw_only=True)
class EngineConfig:
    """All sections. seed: what requests without a seed of their own draw theirs from."""

    model: ModelOptions = field(default_factory=ModelOptions)
    cache: CacheOptions = field(default_factory=CacheOptions)
    scheduler: SchedulerOptions = field(default_factory=SchedulerOptions)
    kernels: KernelOptions = field(default_factory=KernelOptions)
    compile: CompileOptions = field(default_factory=CompileOptions)
    seed: int = 0
    show_progress: bool = True

    def __post_init__(self) -> None:
        _check_int("seed", self.seed, 0)
        _check_choice("show_progress", self.show_progress, (True, False))

    @classmethod
    def from_options(cls, **options: Any) -> "EngineConfig":
        """Flat names to sections. Raises ConfigError for an unknown name, with the nearest known one."""
        sections = {
            "model": ModelOptions,
            "cache": CacheOptions,
            "scheduler": SchedulerOptions,
            "kernels": KernelOptions,
            "compile": CompileOptions,
        }
        homes = {f.name: name for name, section in sections.items() for f in dataclasses.fields(section)}
        own = {"seed", "show_progress"}
        values: dict[str, dict[str, Any]] = {name: {} for name in sections}
        top: dict[str, Any] = {}
        for name, value in options.items():
            if name in own:
                top[name] = value
            elif name in homes:
                values[homes[name]][name] = value
            else:
                near = difflib.get_close_matches(name, [*homes, *own], n=1)
                hint = f"; did you mean {near[0]}?" if near else ""
                raise ConfigError(f"unknown option {name}={value!r}{hint}")
        return cls(**{name: section(**values[name]) for name, section in sections.items()}, **top)


def _check_choice(name: str, value: Any, choices: tuple[Any, ...]) -> None:
    if not any(type(value) is type(choice) and value == choice for choice in choices):
        raise ConfigError(f"{name}={value!r} must be one of {', '.join(map(str, choices))}")


def _check_text(name: str, value: Any) -> None:
    if value is not None and (not isinstance(value, str) or not value):
        raise ConfigError(f"{name}={value!r} must be a non-empty string")


def _check_int(name: str, value: Any, low: int, *, optional: bool = False) -> None:
    if value is None and optional:
        return
    if isinstance(value, bool) or not isinstance(value, int) or value < low:
        raise ConfigError(f"{name}={value!r} must be an integer of at least {low}")
