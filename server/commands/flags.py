"""The flags commands share: a function that takes `engine`, `sampling` or `settings` goes in, a command comes out.

Names, types and defaults are those of `EngineConfig`, `SamplingParams` and `ServerSettings`; only the help texts live
here and in `server_flags.py`. A flag that was not given is not passed on, so every default has one home.
"""

import dataclasses
import functools
import inspect
import types
from collections.abc import Callable
from typing import Annotated, Any, Literal, get_args, get_origin, get_type_hints

import typer

from jaxserve.config import CacheOptions, CompileOptions, EngineConfig, KernelOptions, ModelOptions, SchedulerOptions
from jaxserve.errors import JaxserveError
from jaxserve.request import SamplingParams
from server.commands.server_flags import SERVER_DEFAULTS, SERVER_HELP
from server.settings import ALIASES, ServerSettings

EXIT_REFUSED = 2  # JaxserveError: the request, the settings or the model are at fault
EXIT_INTERRUPTED = 130  # 128 + SIGINT, as shells have it

PANELS: dict[type, str] = {
    ModelOptions: "Model",
    CacheOptions: "KV pool",
    SchedulerOptions: "Scheduling",
    KernelOptions: "Kernels",
    CompileOptions: "Compilation",
    EngineConfig: "Output",
    SamplingParams: "Sampling",
}

# Where requests have flags too, EngineConfig.seed has none: --seed is the request's own.
ENGINE_HELP: dict[type, dict[str, str]] = {
    ModelOptions: {
        "model": "Hugging Face directory, .gguf file or hub id",
        "revision": "Branch, tag or commit of a hub id",
        "tokenizer": "Take the tokenizer from this directory or .gguf file instead",
        "chat_template": "Jinja source or file that replaces the model's own template",
        "load_format": "auto, safetensors, gguf, or dummy (random weights)",
        "dtype": "auto, float32, bfloat16 or float16; auto = bfloat16 on GPU, float32 on CPU",
        "quantization": "none, int8, fp8 or int4: weights are narrowed while they are loaded",
        "max_model_len": "Longest prompt + output, in tokens",
        "generation_config": "auto = sampling defaults come from the checkpoint; none = they do not",
    },
    CacheOptions: {
        "page_size": "Tokens in a page: 8, 16, 32 or 64",
        "memory_utilization": "Share of the device's memory that may be used",
        "kv_cache_memory_bytes": "Size of the pool in bytes",
        "num_pages": "Size of the pool in pages",
        "kv_cache_dtype": "auto = the model's dtype; fp8 = half the memory of 16 bits, less exact",
        "enable_prefix_caching": "Share pages between requests that begin alike",
    },
    SchedulerOptions: {
        "max_num_seqs": "Sequences that run at once",
        "max_num_batched_tokens": "Tokens computed in one step",
        "scheduling_policy": "fcfs or priority",
        "overlap": "1 = launch the next step before reading the last one's tokens, 0 = wait",
        "max_logprobs": "Most top logprobs that a request may ask for",
    },
    KernelOptions: {
        "attention_backend": "auto, reference (plain JAX), triton or mosaic (Hopper); on CPU, kernels run interpreted",
        "sampling_backend": "auto, reference or triton",
        "matmul_backend": "auto, reference or triton; of products with quantised weights",
    },
    CompileOptions: {
        "compilation_cache_dir": "Where compiled programs are kept",
        "compile_threads": "Programs compiled at once",
    },
    EngineConfig: {
        "show_progress": "Memory plan and progress bars on standard error",
    },
}
SAMPLING_HELP: dict[type, dict[str, str]] = {
    SamplingParams: {
        "max_tokens": "Tokens to generate at most",
        "min_tokens": "Tokens to generate at least",
        "temperature": "0 = greedy",
        "top_p": "Nucleus sampling",
        "top_k": "Only the k most likely tokens; 0 = off",
        "min_p": "Only tokens at least this likely beside the likeliest",
        "presence_penalty": "-2..2",
        "frequency_penalty": "-2..2",
        "repetition_penalty": "1 = off",
        "seed": "The same seed gives the same text",
        "stop": "Stop before this string; may be given several times",
        "ignore_eos": "Generate on after the end-of-sequence token",
    },
}
# What an absent flag means, where the dataclass only says None
DEFAULTS = {
    "model": "SmolLM2-135M-Instruct, if installed",
    "max_model_len": "what the model was trained for",
    "kv_cache_memory_bytes": "what the memory plan leaves; 1 GiB on CPU",
    "max_num_seqs": "256 on GPU, 32 on CPU",
    "max_num_batched_tokens": "8192 on GPU, 512 on CPU",
    "compilation_cache_dir": "~/.cache/jaxserve/xla",
    "compile_threads": "one per core, at most 8",
    "show_progress": "if it is a terminal",
    "temperature": "the model's, else 0.3",
    "top_p": "the model's, else 0.9",
    "top_k": "the model's",
    "repetition_penalty": "the model's",
    **SERVER_DEFAULTS,
}
SEED_HELP = {"seed": "What requests without a seed of their own draw theirs from"}

Flags = list[tuple[type, str, dict[str, str]]]  # (where the settings are defined, panel, {setting: help})


def _panelled(sections: dict[type, dict[str, str]]) -> Flags:
    return [(home, PANELS[home], texts) for home, texts in sections.items()]


GROUPS: dict[str, Flags] = {
    "engine": _panelled(ENGINE_HELP),
    "sampling": _panelled(SAMPLING_HELP),
    "settings": [
        *((ServerSettings, panel, texts) for panel, texts in SERVER_HELP.items()),
        *_panelled(ENGINE_HELP),
        (EngineConfig, PANELS[SchedulerOptions], SEED_HELP),
    ],
}


def command(function: Callable[..., None]) -> Callable[..., None]:
    """Give `function` one flag per setting, and turn its `JaxserveError` into one line and exit code 2.

    function: its parameters `engine`, `sampling` and `settings` (server and engine), where it has them, receive
        {name: value} of the flags that were given. A parameter of its own with a setting's name takes that setting's
        place, and is not in the dict.
    """
    parameters = inspect.signature(function, eval_str=True).parameters
    own = [parameter for name, parameter in parameters.items() if name not in GROUPS]
    taken = {parameter.name for parameter in own}
    flags = {
        group: [flag for flag in _flags(GROUPS[group]) if flag.name not in taken]
        for group in parameters
        if group in GROUPS
    }

    @functools.wraps(function)
    def run(*, debug: bool, **values: Any) -> None:
        for group, members in flags.items():
            given = {flag.name: values.pop(flag.name) for flag in members}
            values[group] = {name: value for name, value in given.items() if value is not None and value != []}
        try:
            function(**values)
        except JaxserveError as error:
            if debug:
                raise
            typer.secho(f"error: {' '.join(str(error).split())}", fg="red", err=True)
            raise typer.Exit(EXIT_REFUSED) from None
        except KeyboardInterrupt:
            raise typer.Exit(EXIT_INTERRUPTED) from None

    every = [*own, *(flag for members in flags.values() for flag in members), _DEBUG]
    by_name = [parameter.replace(kind=inspect.Parameter.KEYWORD_ONLY) for parameter in every]
    run.__signature__ = inspect.Signature(by_name)  # type: ignore[attr-defined]
    run.__annotations__ = {parameter.name: parameter.annotation for parameter in by_name}
    return run


_DEBUG = inspect.Parameter(
    "debug",
    inspect.Parameter.KEYWORD_ONLY,
    default=False,
    annotation=Annotated[bool, typer.Option("--debug", help="Show the traceback of an error.")],
)


def _flags(sections: Flags) -> list[inspect.Parameter]:
    return [_flag(home, panel, name, text) for home, panel, texts in sections for name, text in texts.items()]


def _flag(home: type, panel: str, name: str, text: str) -> inspect.Parameter:
    default, hint = _defined(home, name)
    shown = DEFAULTS.get(name) or (
        str(default).lower() if default not in (None, "", ()) and home is not SamplingParams else ""
    )
    kebab = name.replace("_", "-")
    names = [f"--{kebab}/--no-{kebab}" if isinstance(default, bool) else f"--{kebab}"]
    names += [f"--{alias.replace('_', '-')}" for alias, own in ALIASES.items() if own == name]
    option = typer.Option(
        *(["-m"] if name == "model" else []),
        *names,
        help=text,
        rich_help_panel=panel,
        show_default=shown or False,
    )
    kind = _plain(hint)
    annotation = Annotated[kind | None, option]  # type: ignore[valid-type]
    return inspect.Parameter(name, inspect.Parameter.KEYWORD_ONLY, default=None, annotation=annotation)


def _defined(home: type, name: str) -> tuple[Any, Any]:
    """(default, type hint) of a setting."""
    if home is ServerSettings:
        field = ServerSettings.model_fields[name]
        return field.default, field.annotation
    default = next(field.default for field in dataclasses.fields(home) if field.name == name)
    return default, get_type_hints(home)[name]


def _plain(hint: Any) -> Any:
    """The type of a flag's value: `int | None` -> `int`, what may be a list -> `list[str]`, choices -> `str`."""
    if get_origin(hint) is Literal:
        return str
    if get_origin(hint) is tuple:
        return list[str]
    kinds = [kind for kind in get_args(hint) if kind is not types.NoneType]
    if any(get_origin(kind) in (list, tuple) for kind in kinds):
        return list[str]
    return kinds[0] if kinds else hint
