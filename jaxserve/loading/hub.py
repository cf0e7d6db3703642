"""The Hugging Face hub: a model id goes in, a local directory of its config, tokenizer and weight files comes out."""

import logging
import re
from pathlib import Path

from jaxserve.errors import ModelNotFoundError

logger = logging.getLogger(__name__)

# Nothing else is fetched: no pickles, no code.
CONFIG_PATTERNS = ("*.json", "tokenizer.model", "*.txt", "*.jinja")
WEIGHT_PATTERNS = ("*.safetensors",)
IGNORED_PATTERNS = ("*/*", "consolidated*.safetensors", "adapter_*")  # copies of the weights in other layouts
REVISION = re.compile(r"[A-Za-z0-9][A-Za-z0-9._/-]{0,249}")


def download(model: str, revision: str | None, weights: bool = True) -> Path:
    """The snapshot directory of one commit of `model`, fetched or found in the cache.

    The revision is resolved to a commit once, so that files of two commits never mix; the directory carries its name.
    Without a network the cache serves. Raises `ModelNotFoundError` with a one-line reason. The hub library reports
    progress and takes HF_TOKEN, HF_HOME and HF_HUB_OFFLINE from the environment.
    """
    from huggingface_hub import errors, snapshot_download

    if revision is not None and (not REVISION.fullmatch(revision) or ".." in revision):
        raise ModelNotFoundError(f"model={model!r}: revision={revision!r} is not a branch, tag or commit")
    # Subclasses before their bases
    reasons: tuple[tuple[type[Exception], str], ...] = (
        (errors.GatedRepoError, "access is gated: accept its terms on the hub and set HF_TOKEN"),
        (errors.RepositoryNotFoundError, "no such path here and no such model on the hub, or it is private"),
        (errors.RevisionNotFoundError, f"no revision {revision!r}"),
        (errors.OfflineModeIsEnabled, "not in the cache, and HF_HUB_OFFLINE forbids to fetch it"),
        (errors.LocalEntryNotFoundError, "not in the cache, and the hub cannot be reached"),
    )
    patterns = CONFIG_PATTERNS + (WEIGHT_PATTERNS if weights else ())
    try:
        directory = Path(
            snapshot_download(
                model, revision=revision, allow_patterns=list(patterns), ignore_patterns=list(IGNORED_PATTERNS)
            )
        )
    except (OSError, ValueError, errors.EntryNotFoundError) as error:
        reason = next((text for kind, text in reasons if isinstance(error, kind)), None)
        first_line = next(iter(str(error).strip().splitlines()), type(error).__name__)
        raise ModelNotFoundError(f"model={model!r}: {reason or first_line}") from None
    logger.info("model %s, revision %s is commit %s", model, revision or "main", directory.name)
    return directory
