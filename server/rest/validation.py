"""Parsed JSON -> a pydantic model, or the one ServiceError that helps most: which field, what it held, what it must be.

Values are shown in a few characters, whatever their size.
"""

import difflib
import functools
import itertools
import logging
import reprlib
from collections.abc import Callable, Iterable, Sequence
from typing import Any, TypeVar, get_args

from pydantic import BaseModel, ValidationError

from jaxserve.errors import InvalidRequestError
from server.errors import ServiceError, service_error

T = TypeVar("T", bound=BaseModel)
Path = tuple[str | int, ...]  # keys and positions, from the body inwards
Models = tuple[type[BaseModel], ...]

log = logging.getLogger(__name__)

MAX_LOOKED_AT = 100  # errors of one body, and fields named in the log
MAX_NAME = 100  # characters of a name that a client chose
_short = reprlib.Repr()
_short.maxstring = _short.maxother = 80
_short.maxlist = _short.maxdict = _short.maxlevel = 4


def shown(value: Any) -> str:
    """repr in ASCII, but short."""
    text = _short.repr(value).encode("ascii", "backslashreplace").decode()
    return text if len(text) <= 100 else text[:97] + "..."


def validated(data: Any, type_: type[T], warn: bool = False, request_id: str = "") -> T:
    """`data` as a `type_`. Raises ServiceError: unknown_parameter naming the nearest known one,
    missing_required_parameter, invalid_value.

    warn: fields that `type_` does not know are dropped, and logged with the request's id.
    """
    if not isinstance(data, dict):
        raise ServiceError("invalid_value", f"the body must be a JSON object, not {shown(data)}")
    dropped: list[str] = []

    def on_unknown(path: Path, known: Iterable[str]) -> None:
        if not warn:
            raise _unknown(path, known)
        if len(dropped) < MAX_LOOKED_AT:
            dropped.append(dotted(path))

    data = _known_part(data, (type_,), (), on_unknown)
    if dropped:
        log.warning("request %s: unknown parameters ignored: %s", request_id, ", ".join(dropped))
    try:
        return type_.model_validate(data)
    except ValidationError as error:
        raise _told(error, data, type_) from None


def _told(error: ValidationError, data: Any, type_: type[BaseModel]) -> ServiceError:
    """Of the errors in the first field at fault, the one that got furthest.

    The alternatives of a union fail one by one, and that one is most likely what the client meant. Where a field is
    missing and another is unknown, the latter is the former misspelt.
    """
    errors = [
        (_path(found["loc"], data, found["type"] == "missing"), found)
        for found in itertools.islice(error.errors(include_url=False, include_input=False), MAX_LOOKED_AT)
    ]
    path, first = max(
        ((path, found) for path, found in errors if path[:1] == errors[0][0][:1]),
        key=lambda error: (len(error[0]), error[1]["type"] == "extra_forbidden", _positions(error[0])),
    )
    param = dotted(path)
    cause = first.get("ctx", {}).get("error")
    if first["type"] == "extra_forbidden":
        return _unknown(path, _siblings(path, type_))
    if first["type"] == "missing":
        return ServiceError("missing_required_parameter", f"{param} is required", param=param)
    if isinstance(cause, InvalidRequestError):
        return service_error(cause)
    reasons = " or ".join(dict.fromkeys(_reason(found["msg"]) for other, found in errors if other == path))
    reasons = reasons.replace(" or must be ", " or ")
    if not param:
        return ServiceError("invalid_value", reasons)
    return ServiceError("invalid_value", f"{param}={shown(_at(path, data))} {reasons}", param=param)


def _reason(message: str) -> str:
    message = message.removeprefix("Value error, ").removeprefix("Input should be ")
    return message if message[:1].isupper() else f"must be {message}"


def dotted(path: Path) -> str:
    """messages[0].content"""
    text = ""
    for step in path:
        if isinstance(step, int):
            text += f"[{step}]"
        else:
            name = step[:MAX_NAME]
            text += ("." if text else "") + (name if name.isprintable() else name.encode("unicode_escape").decode())
    return text


def _positions(path: Path) -> list[int]:
    return [step for step in path if isinstance(step, int)]


def _path(loc: Sequence[str | int], data: Any, missing: bool) -> Path:
    """Pydantic's location without the names of a union's alternatives, which are no part of the body."""
    path: list[str | int] = []
    for i, step in enumerate(loc):
        inside = (isinstance(data, dict) and step in data) or (isinstance(data, list) and isinstance(step, int))
        if inside:
            data = data[step]
        if inside or (missing and i == len(loc) - 1):
            path.append(step)
    return tuple(path)


def _at(path: Path, data: Any) -> Any:
    for step in path:
        data = data[step]
    return data


def _unknown(path: Path, known: Iterable[str]) -> ServiceError:
    param = dotted(path)
    near = difflib.get_close_matches(str(path[-1])[:MAX_NAME], sorted(known), 1)
    hint = f"; did you mean {near[0]}?" if near else ""
    return ServiceError("unknown_parameter", f"unknown parameter: {param}{hint}", param=param)


@functools.cache
def _fields(models: Models) -> dict[str, Models]:
    """Names that these models know -> the models their values may be made of, in themselves or in lists."""
    annotations: dict[str, list[Any]] = {}
    for model in models:
        for name, info in model.model_fields.items():
            annotations.setdefault(info.alias or name, []).append(info.annotation)
    return {name: _models_in(found) for name, found in annotations.items()}


def _models_in(annotations: Iterable[Any]) -> Models:
    found: list[type[BaseModel]] = []
    for annotation in annotations:
        if isinstance(annotation, type) and issubclass(annotation, BaseModel):
            found.append(annotation)
        else:
            found += _models_in(get_args(annotation))
    return tuple(dict.fromkeys(found))


def _siblings(path: Path, type_: type[BaseModel]) -> Iterable[str]:
    """The names known where `path` ends."""
    models: Models = (type_,)
    for step in path[:-1]:
        if isinstance(step, str):
            models = _fields(models).get(step, ())
    return _fields(models)


def _known_part(data: Any, models: Models, path: Path, on_unknown: Callable[[Path, Iterable[str]], None]) -> Any:
    """`data` without the fields that none of `models` knows, each of which is told to `on_unknown`."""
    if not models:
        return data
    if isinstance(data, list):
        return [_known_part(item, models, (*path, i), on_unknown) for i, item in enumerate(data)]
    if not isinstance(data, dict):
        return data
    fields = _fields(models)
    closed = all(model.model_config.get("extra") == "forbid" for model in models)
    kept = {}
    for name, value in data.items():
        if name in fields:
            inside = fields[name]
            kept[name] = _known_part(value, inside, (*path, name), on_unknown) if inside else value
        elif not closed:
            kept[name] = value
        else:
            on_unknown((*path, name), fields)
    return kept
