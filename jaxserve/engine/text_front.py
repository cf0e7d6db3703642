"""The text side of an engine: tokenizer, chat template, sampling defaults and admission. Imports no JAX.

Text goes in, requests the engine accepts come out; `RequestAssembler` is the way back.
"""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from jaxserve.config import EngineConfig
from jaxserve.engine.admission import Admission
from jaxserve.errors import ConfigError, PromptTooLongError
from jaxserve.loading.checkpoint import Checkpoint, open_checkpoint
from jaxserve.loading.default_model import default_model_path
from jaxserve.request import SamplingParams
from jaxserve.scheduling.limits import Limits
from jaxserve.text.chat_prompt import encode_chat
from jaxserve.text.chat_template import ChatTemplate
from jaxserve.text.tokenizer import Tokenizer, load_tokenizer

GENERATION_DEFAULTS = ("temperature", "top_p", "top_k", "min_p", "repetition_penalty")


class TextFront:
    """Thread-safe but for `admission`, which has one caller at a time. `close` ends the chat template's process.

    seed: what the seeds of requests without one are drawn from; None = the configuration's.

    Raises ConfigError for a chat template that cannot be read, ModelError for a tokenizer that cannot be used.
    """

    def __init__(
        self,
        config: EngineConfig,
        checkpoint: Checkpoint,
        limits: Limits,
        *,
        vocab_size: int,
        eos_token_ids: tuple[int, ...],
        seed: int | tuple[int, ...] | None = None,
    ):
        source = checkpoint
        if config.model.tokenizer is not None:
            source = open_checkpoint(config.model.tokenizer, load_format="dummy")
        self.tokenizer: Tokenizer = load_tokenizer(source.tokenizer_source)
        self.limits = limits
        own_template = _template_text(config.model.chat_template)
        self._template = ChatTemplate(own_template or self.tokenizer.chat_template, self.tokenizer.special_tokens)
        use_defaults = config.model.generation_config == "auto"
        self._defaults = _sampling_defaults(checkpoint.generation_config) if use_defaults else {}
        self.admission = Admission(
            self.tokenizer,
            limits,
            vocab_size=vocab_size,
            eos_token_ids=eos_token_ids,
            max_logprobs=config.scheduler.max_logprobs,
            seed=config.seed if seed is None else seed,
        )

    def close(self) -> None:
        """Safe to call twice."""
        self._template.close()

    def default_sampling_params(self, **overrides: Any) -> SamplingParams:
        """The checkpoint's own sampling defaults (generation_config.json) under `overrides`."""
        return SamplingParams(**{**self._defaults, **overrides})

    def render(self, messages: Sequence[Mapping[str, Any]], **options: Any) -> str:
        """The prompt text the chat template makes of a conversation. Raises ChatTemplateError."""
        return self._template.render(messages, **options)

    def encode_chat(self, messages: Sequence[Mapping[str, Any]], **options: Any) -> tuple[str, list[int]]:
        """(prompt text, token ids) of a conversation; what messages spell is never a special token."""
        return encode_chat(
            self._template, self.tokenizer, messages, check=lambda text: self._check_length(text, "messages"), **options
        )

    def encode_text(self, text: str, add_special_tokens: bool = True) -> list[int]:
        """Token ids. Raises PromptTooLongError, before tokenizing, for a text no context could hold."""
        self._check_length(text, "prompt")
        return self.tokenizer.encode(text, add_special_tokens=add_special_tokens)

    def _check_length(self, text: str, field: str) -> None:
        longest = self.tokenizer.max_token_chars
        if longest is not None and (at_least := len(text) // longest) > self.limits.max_model_len:
            raise PromptTooLongError(
                f"this model's maximum context length is {self.limits.max_model_len} tokens (max_model_len), and the "
                f"prompt has {len(text)} characters, which is at least {at_least} tokens",
                field,
                len(text),
            )


def check_text(config: EngineConfig) -> None:
    """Raises what `TextFront` would, without any engine; but nothing about a tokenizer that must be downloaded."""
    model = config.model
    _template_text(model.chat_template)
    path, load_format = model.tokenizer, "dummy"
    if path is None:
        path = model.model or str(default_model_path())
        load_format = "dummy" if model.load_format == "auto" else model.load_format
    if Path(path).exists():
        load_tokenizer(open_checkpoint(path, load_format=load_format).tokenizer_source)


def open_model(config: EngineConfig) -> Checkpoint:
    """The checkpoint a configuration names, or the embedded default model."""
    path = config.model.model or str(default_model_path())
    return open_checkpoint(path, revision=config.model.revision, load_format=config.model.load_format)


def _template_text(option: str | None) -> str | None:
    """The chat_template option is Jinja source, or the path of a file that holds it."""
    if option is None or "{" in option:
        return option
    try:
        return Path(option).read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"chat_template={option!r} cannot be read: {error}") from None


def _sampling_defaults(generation_config: Mapping[str, Any]) -> dict[str, Any]:
    defaults = {
        name: generation_config[name] for name in GENERATION_DEFAULTS if generation_config.get(name) is not None
    }
    if generation_config.get("max_new_tokens") is not None:
        defaults["max_tokens"] = generation_config["max_new_tokens"]
    return defaults
