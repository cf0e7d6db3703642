"""The committed gRPC stubs are those of the .proto files, and what pyproject.toml asks for can load them."""

import re
import subprocess
import sys
import tomllib
from pathlib import Path

from packaging.requirements import Requirement
from packaging.version import Version

ROOT = Path(__file__).parents[1]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]


def stubs(directory: Path) -> dict[str, str]:
    paths = [path for path in (directory / "jaxserve").rglob("*_pb2*") if path.suffix in (".py", ".pyi")]
    return {str(path.relative_to(directory)): path.read_text() for path in paths}


def test_stubs_are_what_make_protos_writes(tmp_path: Path) -> None:
    subprocess.run([sys.executable, ROOT / "protos" / "generate.py", tmp_path], check=True, timeout=120)
    written = stubs(tmp_path)
    assert len(written) == 3 * len([*(ROOT / "protos").rglob("*.proto")])
    assert written == stubs(ROOT)


def floor(package: str) -> Version:
    [requirement] = [each for each in map(Requirement, PROJECT["dependencies"]) if each.name == package]
    [lowest] = [clause.version for clause in requirement.specifier if clause.operator == ">="]
    return Version(lowest)


def test_declared_floors_can_load_the_stubs() -> None:
    """Stubs refuse libraries older than the tools that wrote them."""
    for name, text in stubs(ROOT).items():
        if needed := re.search(r"^# Protobuf Python Version: (\S+)$", text, re.MULTILINE):
            assert floor("protobuf") >= Version(needed[1]), name
        if needed := re.search(r"^GRPC_GENERATED_VERSION = '(\S+)'$", text, re.MULTILINE):
            assert floor("grpcio") >= Version(needed[1]), name
