"""Where settings come from: flags, the environment and a YAML file go in; one ServeConfig and every origin come out.

One flat namespace holds the server's settings and the engine's (`jaxserve.config`). JAXSERVE_PORT, `port:` in the file
and `--port` are the same setting; files may write - for _, and the names users of vLLM know (`ALIASES`) are good too.
A list is a YAML or JSON list, or strings between commas. What nobody knows is refused with the nearest known name.
"""

import dataclasses
import difflib
import os
import re
from collections.abc import Mapping
from functools import cache
from pathlib import Path
from typing import Any, get_args, get_origin, get_type_hints

import yaml
from pydantic import ValidationError, ValidationInfo, create_model, field_validator
from pydantic.fields import FieldInfo
from pydantic_core import from_json
from pydantic_settings import (
    BaseSettings,
    EnvSettingsSource,
    InitSettingsSource,
    PydanticBaseSettingsSource,
    SettingsConfigDict,
)

from jaxserve.config import EngineConfig
from jaxserve.errors import ConfigError
from server.settings import ALIASES, ServeConfig, ServerSettings, check_files, engine_options

PREFIX = "JAXSERVE_"
CONFIG_VARIABLE = "JAXSERVE_CONFIG"
SECRET = frozenset({"api_key"})
DEFAULT = "default"

# Kubernetes puts these into every pod beside a service named jaxserve or jaxserve-…: nobody's settings.
SERVICE_LINK = re.compile(r"JAXSERVE_(\w+_)?(SERVICE_HOST|SERVICE_PORT(_\w+)?|PORT_\d+_(TCP|UDP|SCTP)(_\w+)?)")
SERVICE_ADDRESS = re.compile(r"(tcp|udp|sctp)://")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Resolved:
    """What was asked for. origins: setting -> "--port", "JAXSERVE_PORT", "serve.yaml" or "default"."""

    config: ServeConfig
    origins: dict[str, str]

    def rows(self) -> list[tuple[str, str, str]]:
        """(name, value as people may see it, origin) of every setting, the server's first."""
        values = {**self.config.server.model_dump(), **engine_options(self.config.engine)}
        return [(name, shown(name, value), self.origins[name]) for name, value in values.items()]


def resolve(flags: Mapping[str, Any], file: str | None = None) -> Resolved:
    """The settings of `jaxserve serve`: flags over environment over file over defaults.

    flags: {setting: value} of the flags that were given; one that may be repeated comes as a list.
    file: path of the YAML file; None = JAXSERVE_CONFIG names it, or there is none.
    Raises ConfigError naming the setting, its value and where that came from.
    """
    _check_environment()
    path = file if file is not None else os.environ.get(CONFIG_VARIABLE)
    written = {} if path is None else read_file(path)
    layers = _layers(written)
    repeated: dict[str, Any] = {name: tuple(v) if isinstance(v, list) else v for name, v in flags.items()}
    environment = _Environment(layers)()
    origins = {name: DEFAULT for name in (*_server_fields(), *_engine_hints())}
    origins |= {name: Path(str(path)).name for name in written}
    origins |= {name: _variable(name) for name in environment}
    origins |= {name: "MODEL" if name == "model" else f"--{name.replace('_', '-')}" for name in flags}
    try:
        options = layers(**repeated)
        given = {name: getattr(options, name) for name in options.model_fields_set}
        server = ServerSettings(**{name: value for name, value in given.items() if name in _server_fields()})
        # A table and progress bars between JSON logs would be what nothing can read.
        asked = {"show_progress": server.log_format == "text"} | given
        engine = EngineConfig.from_options(**{name: value for name, value in asked.items() if name in _engine_hints()})
        check_files(server)
    except ValidationError as error:
        raise ConfigError(_blame(_told(error), origins)) from None
    except ConfigError as error:
        raise ConfigError(_blame(str(error), origins)) from None
    return Resolved(config=ServeConfig(server=server, engine=engine), origins=origins)


def read_file(path: str) -> dict[str, Any]:
    """{setting: value} of a YAML file, by the settings' own names. Raises ConfigError."""
    try:
        text = Path(path).read_text("utf-8")
    except (OSError, UnicodeError) as error:
        raise ConfigError(f"config={path!r} cannot be read: {getattr(error, 'strerror', None) or error}") from None
    try:
        content = yaml.load(text, _StrictLoader)
    except yaml.MarkedYAMLError as error:  # its text would quote the line, and a key with it
        line = error.problem_mark.line + 1 if error.problem_mark else 1
        raise ConfigError(f"config={path!r} is not YAML: line {line}: {error.problem or error.context}") from None
    except yaml.YAMLError as error:
        raise ConfigError(f"config={path!r} is not YAML: {error}") from None
    if content is None:
        return {}
    if not isinstance(content, dict):
        raise ConfigError(f"config={path!r} must hold `name: value` lines, not a {type(content).__name__}")
    values: dict[str, Any] = {}
    for key, value in content.items():
        name = _canonical(str(key).replace("-", "_"))
        if name is None:
            raise ConfigError(f"config={path!r}: unknown setting {key}{_nearest(str(key).replace('-', '_'))}")
        if name in values:
            raise ConfigError(f"config={path!r} sets {name} twice, the second time as {key}")
        values[name] = value
    return values


def shown(name: str, value: Any) -> str:
    """A value as people may see it: API keys are masked."""
    if name in SECRET and value:
        return ", ".join(["***"] * len(value))
    if value in (None, "", ()):
        return "–"
    if isinstance(value, bool):
        return str(value).lower()
    return ", ".join(map(str, value)) if isinstance(value, tuple) else str(value)


class _Options(BaseSettings):
    """The flat namespace's base: types are checked here, what belongs together in ServerSettings and EngineConfig."""

    model_config = SettingsConfigDict(
        env_prefix=PREFIX, enable_decoding=False, extra="forbid", allow_inf_nan=False, validate_default=False
    )

    @field_validator("*", mode="before", check_fields=False)
    @classmethod
    def _read(cls, value: Any, info: ValidationInfo) -> Any:
        assert info.field_name is not None
        annotation = cls.model_fields[info.field_name].annotation
        kinds = get_args(annotation) or (annotation,)
        if isinstance(value, bool) and bool not in kinds:
            raise ValueError("must not be true or false")  # YAML reads yes and on as true, and true counts as 1
        return _as_list(value) if get_origin(annotation) is tuple else value


class _Environment(EnvSettingsSource):
    """JAXSERVE_… variables, aliases too; Kubernetes' are passed over."""

    def get_field_value(self, field: FieldInfo, field_name: str) -> tuple[Any, str, bool]:
        found = os.environ.get(_variable(field_name))
        if found is not None and SERVICE_ADDRESS.match(found) and field_name.endswith("port"):
            found = None
        return found, field_name, False


def _layers(written: Mapping[str, Any]) -> type[BaseSettings]:
    """The class of settings over a file's; pydantic-settings wants the sources in the class."""

    class Layers(_namespace()):  # type: ignore[misc]
        @classmethod
        def settings_customise_sources(
            cls,
            settings_cls: type[BaseSettings],
            init_settings: PydanticBaseSettingsSource,
            *_: PydanticBaseSettingsSource,
            **__: PydanticBaseSettingsSource,
        ) -> tuple[PydanticBaseSettingsSource, ...]:
            return init_settings, _Environment(settings_cls), InitSettingsSource(settings_cls, dict(written))

    return Layers


@cache
def _namespace() -> type[_Options]:
    fields: dict[str, Any] = {name: (field.annotation, field) for name, field in _server_fields().items()}
    fields |= {name: (hint, None) for name, hint in _engine_hints().items()}
    return create_model("Namespace", __base__=_Options, **fields)


def _server_fields() -> dict[str, FieldInfo]:
    return ServerSettings.model_fields


@cache
def _engine_hints() -> dict[str, Any]:
    """{flat name: type} of EngineConfig's options."""
    hints: dict[str, Any] = {}
    for name, hint in get_type_hints(EngineConfig).items():
        hints |= get_type_hints(hint) if dataclasses.is_dataclass(hint) else {name: hint}
    return hints


def _canonical(name: str) -> str | None:
    """A setting's own name for any of its spellings; None = nobody knows it."""
    name = ALIASES.get(name, name)
    return name if name in _server_fields() or name in _engine_hints() else None


def _nearest(name: str) -> str:
    known = [*_server_fields(), *_engine_hints(), *ALIASES]
    near = difflib.get_close_matches(name, known, n=1)
    return f"; did you mean {near[0]}?" if near else ""


def _variable(name: str) -> str:
    """The variable a setting is, or would be, read from."""
    spellings = [PREFIX + spelling.upper() for spelling in (name, *(a for a, own in ALIASES.items() if own == name))]
    return next((spelling for spelling in spellings if spelling in os.environ), spellings[0])


def _check_environment() -> None:
    """Refuses JAXSERVE_… variables that are no setting, and settings that two variables name."""
    seen: dict[str, str] = {}
    for variable, value in sorted(os.environ.items()):
        if not variable.startswith(PREFIX) or variable == CONFIG_VARIABLE or SERVICE_LINK.fullmatch(variable):
            continue
        if variable.endswith("PORT") and SERVICE_ADDRESS.match(value):
            continue
        spelling = variable.removeprefix(PREFIX).lower()
        name = _canonical(spelling)
        if name is None or not variable.isupper():
            near = difflib.get_close_matches(spelling, [*_server_fields(), *_engine_hints(), *ALIASES, "config"], n=1)
            hint = f"; did you mean {PREFIX}{near[0].upper()}?" if near else ""
            raise ConfigError(f"unknown environment variable {variable}{hint}")
        if name in seen:
            raise ConfigError(f"{seen[name]} and {variable} both set {name}: give one")
        seen[name] = variable


def _as_list(value: Any) -> Any:
    """A string as the strings it holds, a JSON list or parts between commas; a repeated flag is a tuple of such.

    A list comes from the file, which has said already where its entries end.
    """
    if isinstance(value, tuple):
        return [inner for part in value for inner in _as_list(part)]
    if not isinstance(value, str):
        return value
    if not value.startswith("["):
        return [part.strip() for part in value.split(",")]
    try:
        return from_json(value)
    except ValueError:
        raise ValueError("begins with [ and is not a JSON list") from None


def _told(error: ValidationError) -> str:
    """pydantic's findings in our words, on one line."""
    lines = []
    for finding in error.errors(include_url=False, include_context=False):
        message = finding["msg"].removeprefix("Value error, ")
        message = re.sub(r"^(Input|String) should ", "must ", message)
        name = str(finding["loc"][0]) if finding["loc"] else ""
        if not name:
            lines.append(message)
        elif name in SECRET:
            lines.append(f"{name}: {message}")
        else:
            lines.append(f"{name}={finding['input']!r} {message}")
    return "; ".join(lines)


def _blame(message: str, origins: Mapping[str, str]) -> str:
    """The message, and where the setting that it begins with came from."""
    name = re.match(r"\w+", message)
    origin = origins.get(name[0], DEFAULT) if name else DEFAULT
    return message if origin == DEFAULT else f"{message} (from {origin})"


class _StrictLoader(yaml.SafeLoader):
    """Plain data only, and no key twice."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        keys = [self.construct_object(key, deep=True) for key, _ in node.value]
        for position, key in enumerate(keys):
            if key in keys[:position]:
                raise yaml.constructor.ConstructorError(None, None, f"{key} is set twice", node.start_mark)
        return super().construct_mapping(node, deep)
