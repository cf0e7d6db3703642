"""What a model can be loaded from: a path or hub id goes in, a `Checkpoint` comes out.

The rest of loading sees only the protocol, so that a new file format is one new file and one line here.
"""

import os
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from jaxserve.config import LOAD_FORMATS
from jaxserve.errors import ConfigError, ModelNotFoundError
from jaxserve.loading import hub
from jaxserve.loading.files import regular_file
from jaxserve.loading.safetensors import SafetensorsCheckpoint

HUB_ID = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,95}/[A-Za-z0-9][A-Za-z0-9._-]{0,95}")


class Checkpoint(Protocol):
    """An opened model: its configs parsed, its tensors named but not yet read."""

    @property
    def path(self) -> Path: ...  # the directory or file

    @property
    def hf_config(self) -> dict[str, Any]: ...  # config.json, or the same keys built from other metadata

    @property
    def generation_config(self) -> dict[str, Any]: ...  # generation_config.json; {} if there is none

    @property
    def tokenizer_source(self) -> Path | Mapping[str, Any]: ...  # a directory, or GGUF metadata

    def names(self) -> list[str]:
        """Every tensor, by its Hugging Face name."""
        ...

    def shape(self, name: str) -> tuple[int, ...]:
        """As Hugging Face lays it out: [out, in] for a projection."""
        ...

    def nbytes(self, name: str) -> int:
        """Bytes in the file."""
        ...

    def read(self, name: str) -> np.ndarray:
        """The tensor in its own dtype (bfloat16 from `ml_dtypes`), in an array that no one else keeps."""
        ...


def open_checkpoint(model: str, *, revision: str | None = None, load_format: str = "auto") -> Checkpoint:
    """Opens a local directory, a local .gguf file, or a Hugging Face hub id `org/name` (downloaded if need be).

    revision     branch, tag or commit, of a hub id only
    load_format  "auto" prefers safetensors to GGUF where a directory holds both; "dummy" reads config and tokenizer
                 but no weights, for `weights.dummy_params`

    Raises `ConfigError` (arguments), `ModelNotFoundError`, `UnsupportedModelError`, `CorruptFileError`.
    """
    if load_format not in LOAD_FORMATS:
        raise ConfigError(f"load_format={load_format!r} must be one of {', '.join(LOAD_FORMATS)}")
    if os.path.exists(model):
        if revision is not None:
            raise ConfigError(f"revision={revision!r} needs a hub id, model={model!r} is a local path")
        return _open_local(Path(model), load_format)
    if not HUB_ID.fullmatch(model) or model.endswith(".gguf"):
        raise ModelNotFoundError(f"model={model!r}: no such file or directory, and not a hub id (org/name)")
    return _open_local(hub.download(model, revision, weights=load_format != "dummy"), load_format)


def _open_local(path: Path, load_format: str) -> Checkpoint:
    if not path.is_dir():
        path = regular_file(path.parent, path.name)
        if path.suffix != ".gguf" or load_format == "safetensors":
            raise ConfigError(f"model={str(path)!r} is not a model directory or .gguf file ({load_format=})")
        return _open_gguf(path)
    names = os.listdir(path)
    gguf_files = sorted(name for name in names if name.endswith(".gguf"))
    has_safetensors = any(name.endswith(".safetensors") for name in names)
    if load_format == "gguf" or (gguf_files and not has_safetensors and load_format in ("auto", "dummy")):
        if not gguf_files:
            raise ModelNotFoundError(f"{path}: load_format=gguf, but it holds no .gguf file")
        if len(gguf_files) > 1:
            raise ConfigError(f"model={str(path)!r} holds {len(gguf_files)} .gguf files: name one, as {gguf_files[0]}")
        return _open_gguf(regular_file(path, gguf_files[0]))
    return SafetensorsCheckpoint(path, weights=load_format != "dummy")


def _open_gguf(path: Path) -> Checkpoint:
    from jaxserve.loading.gguf_checkpoint import GGUFCheckpoint

    return GGUFCheckpoint(path)
