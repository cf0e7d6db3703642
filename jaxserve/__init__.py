"""jaxserve: a JAX/XLA inference engine for large language models.

>>> import jaxserve
>>> jaxserve.generate("The capital of France is", temperature=0.0)

Importing this package imports neither JAX nor transformers; they come with the first model.
"""

from typing import TYPE_CHECKING, Any

from jaxserve import errors
from jaxserve.request import (
    CompletionOutput,
    Logprob,
    RequestDelta,
    RequestMetrics,
    RequestOutput,
    SamplingParams,
)

if TYPE_CHECKING:
    from jaxserve.llm import LLM, generate

__version__ = "0.1.0"

__all__ = [
    "LLM",
    "CompletionOutput",
    "Logprob",
    "RequestDelta",
    "RequestMetrics",
    "RequestOutput",
    "SamplingParams",
    "__version__",
    "errors",
    "generate",
]


def __getattr__(name: str) -> Any:
    if name in ("LLM", "generate"):
        from jaxserve import llm

        return getattr(llm, name)
    raise AttributeError(f"module 'jaxserve' has no attribute {name!r}")
