"""Every exception jaxserve raises on purpose, so that callers can tell *whose* fault it was.

A message names the field (or file) and the value, and carries the numbers a person needs to fix it.
`InvalidRequestError` is the client's fault, `ConfigError` the operator's, `ModelError` the checkpoint's,
`EngineError` ours.
"""

from typing import Any


class JaxserveError(Exception):
    """Base of everything jaxserve raises on purpose."""


class ConfigError(JaxserveError, ValueError):
    """A setting is invalid, or settings contradict each other."""


class MemoryPlanError(ConfigError):
    """The model, its largest step and a usable KV pool do not fit the memory that was granted."""


class InvalidRequestError(JaxserveError, ValueError):
    """A request that can never run. `field` names the offending parameter, `value` what was sent."""

    def __init__(self, message: str, field: str, value: Any = None):
        super().__init__(message)
        self.field = field
        self.value = value


class EmptyPromptError(InvalidRequestError):
    """The prompt holds no token."""


class TokenOutOfRangeError(InvalidRequestError):
    """A token id lies outside [0, vocab_size)."""


class PromptTooLongError(InvalidRequestError):
    """The prompt leaves no room for one new token within `max_model_len`."""


class RequestTooLargeError(InvalidRequestError):
    """The request could never fit the KV pool, even with the whole pool to itself."""


class ChatTemplateError(InvalidRequestError):
    """The chat template is missing, invalid, or refused the messages."""


class ChatTemplateLimitError(ChatTemplateError):
    """The chat template ran past its time, memory or output cap: its own fault, not the messages'."""


class ModelError(JaxserveError):
    """The checkpoint or its files cannot be used."""


class ModelNotFoundError(ModelError, FileNotFoundError):
    """No such model path, hub id or revision."""


class UnsupportedModelError(ModelError):
    """An architecture, tensor type or option of the checkpoint that jaxserve does not implement."""


class CorruptFileError(ModelError, ValueError):
    """A model file is malformed, truncated or lies about its own lengths."""


class WeightMismatchError(ModelError, ValueError):
    """A tensor is unknown, missing, duplicate or misshapen; the message names it."""


class EngineError(JaxserveError, RuntimeError):
    """The engine failed or was shut down while the request was running."""


class NumericalError(EngineError):
    """The model produced NaN logits for this request."""
