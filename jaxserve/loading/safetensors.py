"""Hugging Face model directories: config.json and safetensors files go in, a `Checkpoint` comes out.

Weights are one `model.safetensors`, or shards listed by `model.safetensors.index.json`. Index and shards must agree on
every tensor. Files of pickles are never opened: reading one runs code.
"""

import math
import os
from pathlib import Path
from typing import Any

import numpy as np
from safetensors import SafetensorError, safe_open

from jaxserve.errors import CorruptFileError, ModelNotFoundError, UnsupportedModelError, WeightMismatchError
from jaxserve.loading.files import read_json, regular_file

SINGLE_FILE = "model.safetensors"
INDEX_FILE = "model.safetensors.index.json"
PICKLE_SUFFIXES = (".bin", ".pt", ".pth", ".ckpt", ".pkl")
ITEM_BYTES = {"F64": 8, "F32": 4, "F16": 2, "BF16": 2}  # safetensors' dtype names; others are quantised formats


class SafetensorsCheckpoint:
    """An opened model directory. Files stay memory-mapped while this lives; see `checkpoint.Checkpoint`."""

    def __init__(self, path: Path, weights: bool = True):
        """With `weights` False only the configs are read. Raises the errors of `open_checkpoint`."""
        self.path = path
        self.hf_config: dict[str, Any] = read_json(path, "config.json")
        has_generation = (path / "generation_config.json").exists()
        self.generation_config: dict[str, Any] = read_json(path, "generation_config.json") if has_generation else {}
        self.tokenizer_source = path
        self._shards = _open_shards(path) if weights else {}
        self._shard_of = {name: shard for shard, file in self._shards.items() for name in file.keys()}

    def names(self) -> list[str]:
        return list(self._shard_of)

    def shape(self, name: str) -> tuple[int, ...]:
        return tuple(self._slice(name).get_shape())

    def nbytes(self, name: str) -> int:
        return math.prod(self.shape(name)) * ITEM_BYTES[self._dtype(name)]

    def read(self, name: str) -> np.ndarray:
        self._dtype(name)
        shard = self._shard_of[name]
        try:
            return self._shards[shard].get_tensor(name)
        except (SafetensorError, OSError) as error:
            raise CorruptFileError(f"{self.path / shard}: tensor {name}: {_one_line(error)}") from None

    def _slice(self, name: str) -> Any:
        return self._shards[self._shard_of[name]].get_slice(name)

    def _dtype(self, name: str) -> str:
        dtype = self._slice(name).get_dtype()
        if dtype not in ITEM_BYTES:
            file = self.path / self._shard_of[name]
            raise UnsupportedModelError(f"{file}: tensor {name} is {dtype}, only {', '.join(ITEM_BYTES)} are supported")
        return dtype


def _open_shards(path: Path) -> dict[str, Any]:
    """Shard name -> open file; every tensor lies in exactly one of them."""
    if (path / SINGLE_FILE).exists():
        return {SINGLE_FILE: _open_file(path, SINGLE_FILE)}
    if (path / INDEX_FILE).exists():
        return _open_indexed(path)
    found = sorted(name for name in os.listdir(path) if name.endswith(".safetensors"))
    if len(found) == 1:
        return {found[0]: _open_file(path, found[0])}
    if found:
        raise ModelNotFoundError(f"{path}: {len(found)} safetensors files but no {INDEX_FILE}")
    pickles = sorted(name for name in os.listdir(path) if name.endswith(PICKLE_SUFFIXES))
    if pickles:
        raise UnsupportedModelError(
            f"{path}: {pickles[0]} is a pickle, and loading one runs code; convert it to safetensors "
            "(transformers: model.save_pretrained(directory))"
        )
    raise ModelNotFoundError(f"{path}: no {SINGLE_FILE}, {INDEX_FILE} or .gguf file")


def _open_indexed(path: Path) -> dict[str, Any]:
    weight_map = read_json(path, INDEX_FILE, unique_keys=True).get("weight_map")
    if not isinstance(weight_map, dict) or not all(isinstance(shard, str) for shard in weight_map.values()):
        raise CorruptFileError(f"{path / INDEX_FILE}: weight_map must map tensor names to file names")
    shards: dict[str, Any] = {}
    shard_of: dict[str, str] = {}
    for shard in sorted(set(weight_map.values())):
        shards[shard] = _open_file(path, shard)
        for name in shards[shard].keys():
            if name in shard_of:
                raise WeightMismatchError(f"{path}: tensor {name} is in both {shard_of[name]} and {shard}")
            shard_of[name] = shard
    for name, shard in weight_map.items():
        if shard_of.get(name) != shard:
            raise WeightMismatchError(f"{path / INDEX_FILE}: tensor {name} is not in {shard}, where it should be")
    for name, shard in shard_of.items():
        if name not in weight_map:
            raise WeightMismatchError(f"{path / INDEX_FILE}: tensor {name} of {shard} is missing from the file")
    return shards


def _open_file(path: Path, name: str) -> Any:
    if not name.endswith(".safetensors"):
        raise UnsupportedModelError(f"{path}: shard {name!r} is not a .safetensors file")
    file = regular_file(path, name)
    try:
        return safe_open(file, framework="np")
    except (SafetensorError, OSError) as error:
        raise CorruptFileError(f"{file}: not a valid safetensors file: {_one_line(error)}") from None


def _one_line(error: Exception) -> str:
    return " ".join(str(error).split())
