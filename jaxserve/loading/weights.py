"""Parameters on a device: a `Checkpoint` (or a seed) and a `ModelConfig` go in, `DecoderParams` come out.

Loading is strict: the checkpoint must hold exactly the tensors that the model's table names, in exactly the shapes,
and all of that is checked before the first tensor is read. Then one parameter at a time is read, cast, fused and
transposed on the host and sent off, so that the host holds about two parameters and never the model.
"""

import re
from collections import Counter
from collections.abc import Iterable
from functools import partial
from typing import Any

import jax
import numpy as np
from jax.typing import DTypeLike

from jaxserve.errors import WeightMismatchError
from jaxserve.loading.checkpoint import Checkpoint
from jaxserve.loading.progress import Progress, no_progress
from jaxserve.models.config import ModelConfig
from jaxserve.models.params import DecoderParams
from jaxserve.models.registry import model_spec
from jaxserve.models.spec import ParamSpec, Placement, Source, random_params, shapes, sources
from jaxserve.quant.scheme import UNQUANTISED, Quantisation, narrow

# Constants that old checkpoints carry although every reader computes them.
IGNORED = re.compile(r"(.+\.)?rotary_emb\.inv_freq")
TRANSPOSE_ROWS = 16  # rows a time: a whole-array transpose walks memory against the cache and takes 8 times as long
LISTED = 5  # names an error message spells out


def param_shapes(
    config: ModelConfig, dtype: DTypeLike, quantisation: Quantisation = UNQUANTISED
) -> DecoderParams[jax.ShapeDtypeStruct]:
    """`DecoderParams` with `jax.ShapeDtypeStruct` leaves: what loading will return, without any memory."""
    table = model_spec(config)

    def kept(spec: ParamSpec, shape: jax.ShapeDtypeStruct) -> Any:
        return jax.eval_shape(lambda param: _kept(spec, param, quantisation), shape)

    return jax.tree.map(kept, table, shapes(table, dtype))


def dummy_params(
    config: ModelConfig,
    dtype: DTypeLike,
    seed: int = 0,
    placement: Placement = None,
    quantisation: Quantisation = UNQUANTISED,
) -> DecoderParams[jax.Array]:
    """Random parameters of activation-preserving scale, drawn on the device; no host array is made."""

    finish = partial(_kept, quantisation=quantisation)
    return random_params(model_spec(config), dtype, seed, placement, finish)


def load_params(
    checkpoint: Checkpoint,
    config: ModelConfig,
    dtype: DTypeLike,
    placement: Placement = None,
    progress: Progress = no_progress,
    quantisation: Quantisation = UNQUANTISED,
) -> DecoderParams[jax.Array]:
    """The checkpoint's parameters in `dtype`, on `placement` (device or sharding; None = the default device).

    Projections are quantised there one by one as they arrive: the device never holds the model unquantised.
    Raises `WeightMismatchError` naming the unknown, missing, duplicate or misshapen tensors. With tied embeddings a
    `lm_head.weight` is ignored, as transformers does: the config decides.
    """
    table = model_spec(config)
    needed = sources(table)
    check_tensors(checkpoint, needed, config.tie_word_embeddings)
    total, done = sum(checkpoint.nbytes(name) for name in needed), 0
    progress(done, total)
    specs, structure = jax.tree.flatten(table)
    params: list[Any] = []
    for spec in specs:
        param = _kept(spec, jax.device_put(assemble(spec, checkpoint, dtype), placement), quantisation)
        if params:
            jax.block_until_ready(params[-1])  # bounds the copies still in flight to this parameter's
        params.append(param)
        if spec.sources:
            done += sum(checkpoint.nbytes(source.name) for source in spec.sources)
            progress(done, total)
    return jax.block_until_ready(jax.tree.unflatten(structure, params))


def check_tensors(checkpoint: Checkpoint, needed: dict[str, Source], tied: bool) -> None:
    """Raises `WeightMismatchError` unless the checkpoint holds exactly the `needed` tensors. Reads none."""
    counts = Counter(checkpoint.names())
    ignored = {name for name in counts if IGNORED.fullmatch(name) or (tied and name == "lm_head.weight")}
    problems = {
        "duplicate": [name for name, count in counts.items() if count > 1],
        "missing": [f"{name} {list(source.shape)}" for name, source in needed.items() if name not in counts],
        "unknown": [
            f"{name} {list(checkpoint.shape(name))}" for name in counts if name not in needed and name not in ignored
        ],
        "misshapen": [
            f"{name} is {list(checkpoint.shape(name))}, config.json asks for {list(source.shape)}"
            for name, source in needed.items()
            if name in counts and tuple(checkpoint.shape(name)) != source.shape
        ],
    }
    found = [f"{kind} {_listed(names)}" for kind, names in problems.items() if names]
    if found:
        raise WeightMismatchError(f"{checkpoint.path}: " + "; ".join(found))


def assemble(spec: ParamSpec, checkpoint: Checkpoint, dtype: DTypeLike) -> np.ndarray:
    """One parameter on the host: its sources read one after another, cast, fused, and transposed if need be."""
    dtype = np.dtype(dtype)
    if len(spec.sources) == 1:
        fused = checkpoint.read(spec.sources[0].name).astype(dtype, copy=False)
    else:
        fused = np.empty(spec.fused_shape, dtype)
        for source in spec.sources:
            part = fused[source.where]
            part[...] = checkpoint.read(source.name).reshape(part.shape)
    return _contracted_axis_first(fused) if spec.transposed else fused


def _kept(spec: ParamSpec, param: jax.Array, quantisation: Quantisation) -> Any:
    """What stays on the device of a parameter: projections may be narrowed."""
    return param if spec.contracted is None else narrow(param, spec.contracted, quantisation)


def _contracted_axis_first(fused: np.ndarray) -> np.ndarray:
    """[..., D] -> [D, ...], contiguous."""
    rows = fused.reshape(-1, fused.shape[-1])
    turned = np.empty(rows.shape[::-1], fused.dtype)
    for start in range(0, len(rows), TRANSPOSE_ROWS):
        turned[:, start : start + TRANSPOSE_ROWS] = rows[start : start + TRANSPOSE_ROWS].T
    return turned.reshape(fused.shape[-1:] + fused.shape[:-1])


def _listed(names: Iterable[str]) -> str:
    names = list(names)
    more = f" and {len(names) - LISTED} more" if len(names) > LISTED else ""
    return ", ".join(names[:LISTED]) + more
