"""From protos/**/*.proto to the Python stubs: messages, their types and the gRPC classes.

    python protos/generate.py [DIRECTORY]

DIRECTORY is what the packages lie under, by default this repository. Needs the `grpcio-tools` that pyproject.toml pins:
another version writes other code.
"""

import sys
from pathlib import Path

import grpc_tools
from grpc_tools import protoc

PROTOS = Path(__file__).parent
WELL_KNOWN = Path(grpc_tools.__file__).parent / "_proto"  # google/protobuf/*.proto


def generate(directory: Path) -> None:
    """Writes the stubs of every .proto file; SystemExit with protoc's status where one is wrong."""
    sources = sorted(str(path.relative_to(PROTOS)) for path in PROTOS.rglob("*.proto"))
    flags = [f"--{kind}_out={directory}" for kind in ("python", "pyi", "grpc_python")]
    if status := protoc.main(["protoc", f"-I{PROTOS}", f"-I{WELL_KNOWN}", *flags, *sources]):
        sys.exit(status)


if __name__ == "__main__":
    generate(Path(sys.argv[1]) if len(sys.argv) > 1 else PROTOS.parent)
