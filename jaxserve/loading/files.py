"""Files of a checkpoint directory, never trusted: a directory and a name go in, a path or parsed JSON comes out.

It is the *name* that is confined to the directory, not the file it resolves to: every file in a Hugging Face cache
snapshot is a symbolic link to ../../blobs.
"""

import json
import os
import stat
from pathlib import Path
from typing import Any

from jaxserve.errors import CorruptFileError, ModelNotFoundError

MAX_JSON_BYTES = 64 << 20  # the shard maps of the largest published models take about 10 MiB


def regular_file(directory: Path, name: str) -> Path:
    """`directory / name`, if `name` is a plain file name and a regular file lies there.

    Raises `CorruptFileError` for a name that leads elsewhere and for anything that is not a regular file (reading a
    FIFO would block for ever), `ModelNotFoundError` where there is nothing.
    """
    if name in ("", ".", "..") or os.path.basename(name) != name or "\\" in name or "\0" in name:
        raise CorruptFileError(f"{directory}: file name {name!r} must not leave the model directory")
    path = directory / name
    try:
        mode = path.stat().st_mode
    except OSError as error:
        raise ModelNotFoundError(f"{path}: {error.strerror}") from None
    if not stat.S_ISREG(mode):
        raise CorruptFileError(f"{path}: not a regular file")
    return path


def read_json(directory: Path, name: str, unique_keys: bool = False) -> dict[str, Any]:
    """The JSON object in a file. With `unique_keys` a repeated key is an error; else the last one counts."""
    path = regular_file(directory, name)
    size = path.stat().st_size
    if size > MAX_JSON_BYTES:
        raise CorruptFileError(f"{path}: {size} bytes of JSON, at most {MAX_JSON_BYTES} are read")
    try:
        content = json.loads(path.read_bytes(), object_pairs_hook=_without_repeated_keys if unique_keys else None)
    except OSError as error:
        raise ModelNotFoundError(f"{path}: {error.strerror}") from None
    except (ValueError, RecursionError) as error:
        raise CorruptFileError(f"{path}: not valid JSON: {error}") from None
    if not isinstance(content, dict):
        raise CorruptFileError(f"{path}: must hold a JSON object, not {type(content).__name__}")
    return content


def _without_repeated_keys(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    content = dict(pairs)
    if len(content) != len(pairs):
        keys = [key for key, _ in pairs]
        repeated = next(key for key in keys if keys.count(key) > 1)
        raise ValueError(f"key {repeated!r} is repeated")
    return content
