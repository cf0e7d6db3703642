"""`jaxserve doctor`: looks at this machine; one line a finding comes out, and exit code 1 if jaxserve cannot run."""

import os
import platform
import re
import shutil
import sys
from collections.abc import Iterator
from importlib import metadata, util
from pathlib import Path
from typing import Any, Literal, NamedTuple

import typer

from server.commands.flags import command

EXIT_UNFIT = 1
PYTHON_FLOOR = (3, 11)
JAX_FLOOR, JAX_CEILING = (0, 10), (0, 13)  # floor included, ceiling not
SMALL_DISK = 2 * 2**30  # bytes; a ladder of compiled programs takes some hundred MiB
NVIDIA_DRIVER = Path("/proc/driver/nvidia/version")
OPTIONAL = {"torch": "the tests only", "gguf": "the tests only"}

Verdict = Literal["ok", "note", "wrong"]


class Finding(NamedTuple):
    verdict: Verdict  # wrong = jaxserve cannot run
    subject: str
    text: str


@command
def doctor(*, engine: dict[str, Any]) -> None:
    """Check Python, JAX, devices, memory, the compilation cache and the default model."""
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    marks = {"ok": ("✓", "green"), "note": ("•", "yellow"), "wrong": ("✗", "red")}
    table = Table(show_header=False, box=None, padding=(0, 1))
    num_wrong = 0
    for finding in examine(engine):
        mark, colour = marks[finding.verdict]
        num_wrong += finding.verdict == "wrong"
        table.add_row(Text(mark, style=colour), Text(finding.subject, style="bold"), Text(finding.text))
    Console(soft_wrap=not sys.stdout.isatty()).print(table)
    if num_wrong:
        typer.secho(f"{num_wrong} of these must be mended before jaxserve can run", fg="red", err=True)
        raise typer.Exit(EXIT_UNFIT)
    typer.echo("jaxserve can run here")


def examine(engine: dict[str, Any]) -> Iterator[Finding]:
    """Every finding, in the order shown. engine: the flags that were given (`compilation_cache_dir` matters)."""
    yield _python()
    yield from _packages()
    yield from _devices()
    yield _host_memory()
    yield _cache(engine)
    yield _default_model()
    yield from _optional()


def _python() -> Finding:
    fits = sys.version_info >= PYTHON_FLOOR
    need = "" if fits else f"; {'.'.join(map(str, PYTHON_FLOOR))} or newer is needed"
    text = f"{platform.python_version()} on {platform.system()} {platform.machine()}{need}"
    return Finding("ok" if fits else "wrong", "python", text)


def _packages() -> Iterator[Finding]:
    import jaxserve

    origin = "" if _version("jaxserve") else ", run from its source tree (not installed)"
    yield Finding("ok", "jaxserve", jaxserve.__version__ + origin)
    jax, jaxlib = _version("jax"), _version("jaxlib")
    if jax is None or jaxlib is None:
        yield Finding("wrong", "jax", "not installed: pip install jax")
    else:
        fits = JAX_FLOOR <= _release(jax) < JAX_CEILING
        need = "" if fits else f"; jaxserve needs {_dotted(JAX_FLOOR)} or newer, below {_dotted(JAX_CEILING)}"
        yield Finding("ok" if fits else "wrong", "jax", f"{jax}, jaxlib {jaxlib}{need}")
    missing = [name for name in _requirements() if _version(name) is None]
    if missing:
        yield Finding("wrong", "packages", f"not installed: pip install {' '.join(missing)}")


def _devices() -> Iterator[Finding]:
    # Looking must not take the memory that a running engine, or the next one, needs.
    os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")
    try:
        import jax

        devices = jax.devices()
    except Exception as error:  # whatever a plug-in or driver raises is the finding
        first_line = next(iter(str(error).splitlines()), "")
        yield Finding("wrong", "devices", f"JAX cannot start: {type(error).__name__}: {first_line}")
        return
    for device in devices:
        memory = device.memory_stats() or {} if device.platform != "cpu" else {}
        limit, used = memory.get("bytes_limit"), memory.get("bytes_in_use", 0)
        size = f", {_size(limit - used)} of {_size(limit)} free" if limit else ""
        yield Finding("ok", "device", f"{device.platform}:{device.id} {device.device_kind}{size}")
    plugins = sorted(
        (dist.name, dist.version) for dist in metadata.distributions() if re.fullmatch(r"jax-cuda\d+-plugin", dist.name)
    )
    for name, version in plugins:
        alike = _release(version) == _release(_version("jaxlib") or "")
        note = "" if alike else f"; jaxlib is {_version('jaxlib')}, and the two should be alike"
        yield Finding("ok" if alike else "note", "plug-in", f"{name} {version}{note}")
    if NVIDIA_DRIVER.exists() and all(device.platform == "cpu" for device in devices):
        cause = (
            "its plug-in found no usable GPU" if plugins else "JAX has no CUDA plug-in: pip install 'jaxserve[cuda13]'"
        )
        yield Finding("note", "GPU", f"an NVIDIA driver is here, but {cause}")


def _host_memory() -> Finding:
    import psutil

    memory = psutil.virtual_memory()
    return Finding("ok", "memory", f"{_size(memory.available)} of {_size(memory.total)} free, {os.cpu_count()} cores")


def _cache(engine: dict[str, Any]) -> Finding:
    from jaxserve.config import CompileOptions

    directory = CompileOptions(compilation_cache_dir=engine.get("compilation_cache_dir")).cache_dir
    existing = next(path for path in (directory, *directory.parents) if path.exists())
    free = shutil.disk_usage(existing).free
    if not existing.is_dir() or not os.access(existing, os.W_OK):
        return Finding("wrong", "cache", f"{existing} cannot be written; name another with --compilation-cache-dir")
    files = [path for path in directory.rglob("*") if path.is_file()] if directory.is_dir() else []
    held = f"{len(files)} files, {_size(sum(path.stat().st_size for path in files))}" if files else "empty"
    return Finding(
        "ok" if free >= SMALL_DISK else "note", "cache", f"{directory} ({held}); {_size(free)} free on the disk"
    )


def _default_model() -> Finding:
    from jaxserve.errors import ModelNotFoundError
    from jaxserve.loading.default_model import default_model_path

    try:
        path = default_model_path()
    except ModelNotFoundError as error:
        return Finding("note", "default model", str(error))
    return Finding("ok", "default model", f"{path.name} ({_size(path.stat().st_size)})")


def _optional() -> Iterator[Finding]:
    for module, purpose in OPTIONAL.items():
        name = module.replace("_", "-")
        if util.find_spec(module) is not None:
            yield Finding("ok", name, f"{_version(name)}, for {purpose}")
        else:
            yield Finding("note", name, f"not installed; for {purpose}")


def _requirements() -> list[str]:
    """Distributions that jaxserve itself requires, without those of its extras; none if it is not installed."""
    lines = (metadata.requires("jaxserve") if _version("jaxserve") else None) or []
    return [re.split(r"[^A-Za-z0-9._-]", line, maxsplit=1)[0] for line in lines if "extra ==" not in line]


def _version(distribution: str) -> str | None:
    try:
        return metadata.version(distribution)
    except metadata.PackageNotFoundError:
        return None


def _release(version: str) -> tuple[int, ...]:
    """ "0.10.2.dev1" -> (0, 10, 2)."""
    found = re.match(r"\d+(\.\d+)*", version)
    return tuple(map(int, found[0].split("."))) if found else ()


def _dotted(release: tuple[int, ...]) -> str:
    return ".".join(map(str, release))


def _size(num_bytes: int) -> str:
    """Bytes for people."""
    return f"{num_bytes / 2**30:.1f} GiB" if num_bytes >= 2**30 else f"{num_bytes / 2**20:.1f} MiB"
