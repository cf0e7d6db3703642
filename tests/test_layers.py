"""The import arrows: every import in the packages goes down a layer or stays in its folder."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PACKAGES = ("pallas_kernels", "jaxserve", "server")

# The longest matching prefix counts, so `jaxserve` alone is the package's front door (generate, LLM, __version__).
LAYERS = {
    "pallas_kernels": 0,
    "jaxserve.errors": 1,
    "jaxserve.config": 1,
    "jaxserve.request": 1,
    "jaxserve.shapes": 1,
    "jaxserve.v1": 1,
    "jaxserve.internal": 1,
    "jaxserve.client": 2,
    "jaxserve.scheduling": 2,
    "jaxserve.text": 2,
    "jaxserve.batch": 2,
    "jaxserve.parallel": 2,
    "jaxserve.quant": 2,
    "jaxserve.models": 3,
    "jaxserve.loading": 3,
    "jaxserve.runner": 4,
    "jaxserve.engine": 5,
    "jaxserve.llm": 5,
    "jaxserve": 5,
    "server": 6,
}
# Arrows inside a layer, between its folders. Within one folder every import is allowed.
SIDEWAYS = {
    ("jaxserve.config", "jaxserve.errors"),
    ("jaxserve.request", "jaxserve.errors"),
    ("jaxserve.shapes", "jaxserve.errors"),
    ("jaxserve.internal", "jaxserve.v1"),
    ("jaxserve.loading", "jaxserve.models"),
    ("jaxserve.llm", "jaxserve.engine"),
    ("jaxserve", "jaxserve.llm"),
}
# Down, and still not wanted: scheduling and text know no models, and models know neither. They meet above.
APART = {
    (upper, lower)
    for upper in ("jaxserve.models", "jaxserve.loading")
    for lower in ("jaxserve.scheduling", "jaxserve.text")
}
ON_THE_HOST = ("jaxserve.errors", "jaxserve.config", "jaxserve.request", "jaxserve.shapes")
ON_THE_HOST += ("jaxserve.scheduling", "jaxserve.text")
DEVICE_LIBRARIES = {"jax", "jaxlib", "flax"}


def module_name(path: Path) -> str:
    parts = path.relative_to(ROOT).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def sources() -> dict[str, str]:
    return {module_name(path): path.read_text() for package in PACKAGES for path in (ROOT / package).rglob("*.py")}


def imports(source: str, known: set[str]) -> set[str]:
    """Modules a file imports, lazily or not. `from a import b` is a.b where that is a module."""
    found = set()
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            found.update(alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0 and node.module, "imports are absolute"
            names = {f"{node.module}.{alias.name}" for alias in node.names}
            found.update(name if name in known else node.module for name in names)
    return found


def place(module: str) -> str:
    """The entry of LAYERS that a module belongs to."""
    fitting = [prefix for prefix in LAYERS if module == prefix or module.startswith(prefix + ".")]
    assert fitting, f"{module} has no layer"
    longest = max(fitting, key=len)
    assert longest != "jaxserve" or module == "jaxserve", f"{module} has no layer of its own"
    return longest


def wrong_arrows(files: dict[str, str]) -> list[str]:
    wrong = []
    for module, source in files.items():
        here = place(module)
        for target in imports(source, set(files)):
            if target.split(".")[0] not in PACKAGES:
                continue
            there = place(target)
            down = LAYERS[there] < LAYERS[here] and (here, there) not in APART
            if not (down or here == there or (here, there) in SIDEWAYS):
                wrong.append(f"{module} -> {target}")
    return sorted(wrong)


def test_imports_only_go_down() -> None:
    assert wrong_arrows(sources()) == []


@pytest.mark.parametrize(
    ("module", "line"),
    [
        ("pallas_kernels.rope", "from jaxserve.errors import ConfigError"),
        ("jaxserve.errors", "from jaxserve import config"),
        ("jaxserve.scheduling.pages", "import jaxserve.runner.pack"),
        ("jaxserve.scheduling.pages", "from jaxserve.text.tokenizer import Tokenizer"),
        ("jaxserve.models.llama", "from jaxserve.loading.gguf import GGUFFile"),
        ("jaxserve.loading.gguf", "from jaxserve.text.tokenizer import Tokenizer"),
        ("jaxserve.engine.core", "def late():\n    from jaxserve import LLM"),
        ("jaxserve.llm", "from server import cli"),
    ],
)
def test_an_arrow_that_runs_up_is_found(module: str, line: str) -> None:
    files = dict.fromkeys(("jaxserve.config", "jaxserve.runner.pack", "jaxserve.loading.gguf", "server.cli"), "")
    assert len(wrong_arrows(files | {module: line})) == 1


def test_host_side_files_import_no_device_library() -> None:
    files = sources()
    hosts = {name: source for name, source in files.items() if place(name) in ON_THE_HOST}
    assert hosts
    guilty = {
        name: found
        for name, source in hosts.items()
        if (found := {target.split(".")[0] for target in imports(source, set(files))} & DEVICE_LIBRARIES)
    }
    assert guilty == {}


def test_host_side_modules_load_without_jax_or_transformers() -> None:
    """Also through what they import, which the syntax tree does not show."""
    hosts = sorted(name for name in sources() if place(name) in ON_THE_HOST)
    unwanted = sorted(DEVICE_LIBRARIES | {"transformers"})
    script = f"import sys, {', '.join(hosts)}\nsys.exit(' '.join(set({unwanted}) & set(sys.modules)) or None)"
    result = subprocess.run([sys.executable, "-c", script], cwd=ROOT, capture_output=True, text=True, timeout=60)
    assert result.returncode == 0, result.stderr
