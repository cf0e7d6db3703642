"""Version-bound JAX API stays in one file, so that a new JAX release is one file's work."""

import ast
from pathlib import Path

PACKAGE = Path(__file__).parents[2] / "pallas_kernels"
VERSION_BOUND = ("jax._src", "jax.experimental.pallas.triton", "jax.experimental.pallas.mosaic_gpu")


def imported(path: Path) -> set[str]:
    names: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            names |= {f"{node.module}.{alias.name}" for alias in node.names}
    return names


def test_only_compat_names_deprecated_or_private_jax():
    guilty = {
        f"{path.relative_to(PACKAGE)}: {name}"
        for path in PACKAGE.rglob("*.py")
        for name in imported(path)
        if path.name != "compat.py" and name.startswith(VERSION_BOUND)
    }
    assert not guilty
