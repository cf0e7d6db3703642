"""Chooses a backend for every op once, at start-up, and logs the choice. Nothing changes backend later."""

import functools
import logging
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from pallas_kernels.kv_update import reference as kv_update_reference
from pallas_kernels.paged_attention import reference as attention_reference

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Kernels:
    """The ops a model calls, each already bound to its backend."""

    prepare_attention: Callable[..., Any]
    attend: Callable[..., Any]
    update_kv: Callable[..., Any]
    backends: tuple[tuple[str, str], ...]  # (op, backend), for logs and reports


def choose(platform: str, page_size: int) -> Kernels:
    """The ops for a device of `platform` ("cpu", "gpu") and a pool of `page_size` tokens a page."""
    kernels = Kernels(
        prepare_attention=functools.partial(attention_reference.prepare_attention, page_size=page_size),
        attend=attention_reference.attend,
        update_kv=kv_update_reference.update_kv,
        backends=(("paged_attention", "reference"), ("kv_update", "reference"), ("sampling", "reference")),
    )
    logger.info("kernels on %s: %s", platform, ", ".join(f"{op}={backend}" for op, backend in kernels.backends))
    return kernels
