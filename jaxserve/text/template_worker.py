"""Child process that renders chat templates: run by file path, imports only the standard library and jinja2.

    stdin    frames of {"template", "context", "max_chars", "timeout_s"}
    stdout   one frame {"ready"} at the start, then for each request {"text"} or {"error", "message"}

A frame is an 8-byte big-endian length and that much JSON. "error" is one of "syntax", "render", "size", "memory".
Arguments: the memory cap in bytes, then directories to import jinja2 from.

Templates come with the model and messages from anyone, so this process is poor on purpose: sandboxed Jinja, capped
memory, no files, programs or sockets, and it ends on its own when its parent is gone, even in the middle of a render.
"""

import contextlib
import functools
import json
import os
import resource
import signal
import sys
from datetime import datetime
from typing import Any, BinaryIO

HEADER_BYTES = 8
GRACE_S = 2.0  # the parent kills at timeout_s; this alarm matters when there is no parent any more
MAX_MESSAGE = 1000
REFUSED = {
    "ctypes",
    "fcntl",
    "mmap",
    "os",
    "pty",
    "shutil",
    "socket",
    "subprocess",
    "tempfile",
    "urllib",
}  # audit events

sys.path.extend(sys.argv[2:])  # `python -I` sees neither PYTHONPATH nor the user's site-packages

import jinja2  # noqa: E402
import jinja2.ext  # noqa: E402
import jinja2.nodes  # noqa: E402
import jinja2.parser  # noqa: E402
import jinja2.sandbox  # noqa: E402


class GenerationBlock(jinja2.ext.Extension):
    """`{% generation %}...{% endgeneration %}` marks the assistant's text for training; here it renders its body."""

    tags = {"generation"}  # noqa: RUF012  jinja2 declares it so

    def parse(self, parser: jinja2.parser.Parser) -> jinja2.nodes.Node:
        lineno = next(parser.stream).lineno
        body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
        return jinja2.nodes.CallBlock(self.call_method("_body"), [], [], body).set_lineno(lineno)

    def _body(self, caller: Any) -> str:
        return caller()


@functools.lru_cache(maxsize=32)
def compiled(template: str) -> jinja2.Template:
    """The template in the environment Hugging Face templates are written for."""
    environment = jinja2.sandbox.ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=["jinja2.ext.loopcontrols", GenerationBlock]
    )
    environment.filters["tojson"] = to_json
    environment.globals["raise_exception"] = raise_exception
    environment.globals["strftime_now"] = lambda layout: datetime.now().strftime(layout)
    return environment.from_string(template)


def to_json(
    value: Any,
    ensure_ascii: bool = False,
    indent: int | str | None = None,
    separators: tuple[str, str] | None = None,
    sort_keys: bool = False,
) -> str:
    """Plain JSON: Jinja's own filter escapes for HTML."""
    return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)


def raise_exception(message: str) -> None:
    raise jinja2.TemplateError(message)


def answer(request: dict[str, Any]) -> dict[str, str]:
    try:
        template = compiled(request["template"])
    except jinja2.TemplateSyntaxError as error:
        return {"error": "syntax", "message": f"line {error.lineno}: {error.message}"}
    except MemoryError:
        return {"error": "memory", "message": "while compiling the template"}
    except Exception as error:
        return {"error": "syntax", "message": describe(error)}
    pieces, size = [], 0
    try:
        for piece in template.generate(request["context"]):
            size += len(piece)
            if size > request["max_chars"]:
                return {"error": "size", "message": ""}
            pieces.append(piece)
        return {"text": "".join(pieces)}
    except MemoryError:
        return {"error": "memory", "message": "while rendering"}
    except Exception as error:
        return {"error": "render", "message": describe(error)}


def describe(error: Exception) -> str:
    text = str(error)[:MAX_MESSAGE]
    return text if type(error) is jinja2.TemplateError else f"{type(error).__name__}: {text}"


def read_frame(stream: BinaryIO) -> dict[str, Any] | None:
    """The next frame; None when the parent has closed the pipe."""
    header = stream.read(HEADER_BYTES)
    if len(header) < HEADER_BYTES:
        return None
    size = int.from_bytes(header, "big")
    body = stream.read(size)
    return json.loads(body) if len(body) == size else None


def write_frame(stream: BinaryIO, content: dict[str, Any]) -> None:
    body = json.dumps(content).encode()
    stream.write(len(body).to_bytes(HEADER_BYTES, "big") + body)
    stream.flush()


def confine(memory_bytes: int) -> None:
    """Cap memory, and refuse what only a template that broke out of the sandbox would do."""
    try:
        resource.setrlimit(resource.RLIMIT_AS, (memory_bytes, memory_bytes))
    except (OSError, ValueError):  # macOS refuses; time and output stay capped
        print("jaxserve: this system does not cap the memory of chat templates", file=sys.stderr)
    modules = tuple(directory + os.sep for directory in sys.path if directory)

    def audit(event: str, details: tuple[Any, ...]) -> None:
        if event == "open":  # Python reads some of its own modules late
            path, mode = details[:2]
            if mode in ("r", "rb") and isinstance(path, str) and path.startswith(modules) and ".." not in path:
                return
        elif event == "os.listdir" or event.partition(".")[0] not in REFUSED:
            return
        raise PermissionError(f"chat templates may not {event}")

    sys.addaudithook(audit)


def main() -> None:
    requests, answers = sys.stdin.buffer, sys.stdout.buffer
    confine(int(sys.argv[1]))
    write_frame(answers, {"ready": True})
    while (request := read_frame(requests)) is not None:
        signal.setitimer(signal.ITIMER_REAL, request["timeout_s"] + GRACE_S)
        write_frame(answers, answer(request))
        signal.setitimer(signal.ITIMER_REAL, 0)


if __name__ == "__main__":
    with contextlib.suppress(MemoryError, BrokenPipeError):  # too large a request, or no parent to answer
        main()
