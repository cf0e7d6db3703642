"""Launch configurations: what was measured on this device, else the op's own heuristic.

`tuned/<device>.json` is a list of rows {"op", "key", "config", ...}, written by `benchmarks/kernels.py --tune`. A key
is made of static sizes only, so a step's configurations are settled when it is traced. Sizes that vary (rows, tokens,
context) are rounded up to powers of two in a key, by the op.
"""

import functools
import json
import logging
from collections.abc import Mapping
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any, TypeVar

TUNED = Path(__file__).parent / "tuned"

logger = logging.getLogger(__name__)

Config = TypeVar("Config")  # a frozen dataclass of an op


def choose(op: str, device: str, key: Mapping[str, int | str], heuristic: Config) -> Config:
    """The configuration measured for `key` on `device`, else `heuristic`.

    A tuned row names only what it changes. A field the op no longer has is an error: the file is stale.
    """
    changes = _rows(device).get((op, _canonical(key)))
    if changes is None:
        return heuristic
    return replace(heuristic, **changes)  # type: ignore[type-var]


def row(op: str, key: Mapping[str, int | str], config: Any, **facts: Any) -> dict[str, Any]:
    """One line of a tuned file; facts: what was measured, for readers."""
    return {"op": op, "key": dict(key), "config": asdict(config), **facts}


def path(device: str) -> Path:
    """The file of a device kind: "NVIDIA H200" -> tuned/nvidia_h200.json."""
    return TUNED / f"{device.lower().replace(' ', '_')}.json"


def _canonical(key: Mapping[str, int | str]) -> str:
    return json.dumps(key, sort_keys=True)


@functools.cache
def _rows(device: str) -> dict[tuple[str, str], dict[str, Any]]:
    if not device or not path(device).is_file():
        return {}
    rows = json.loads(path(device).read_text())
    logger.info("%d tuned configurations for %s", len(rows), device)
    return {(row["op"], _canonical(row["key"])): row["config"] for row in rows}
