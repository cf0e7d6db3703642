"""Every setting of `jaxserve serve`: flags > environment (JAXSERVE_…) > YAML file > defaults, validated once.

Values come in by name (`server/settings_sources.py` gathers them), frozen settings go out, and travel to the child
processes as JSON.
"""

import dataclasses
import ipaddress
import os
import ssl
from collections.abc import Mapping
from typing import Any, Literal, Self

from pydantic import BaseModel, ConfigDict, Field, model_validator

from jaxserve.config import EngineConfig
from jaxserve.errors import ConfigError

MIB = 1 << 20

# What users of vLLM call some of the settings; good wherever a setting is named: flag, environment, file.
ALIASES = {
    "block_size": "page_size",
    "gpu_memory_utilization": "memory_utilization",
    "shutdown_timeout": "drain_timeout",
    "api_server_count": "frontends",
    "uvicorn_log_level": "log_level",
}


class ServerSettings(BaseModel):
    """What concerns serving; what concerns the engine is `EngineConfig`. Durations are seconds, sizes are bytes."""

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)

    # Addresses
    host: str = Field("127.0.0.1", min_length=1)
    port: int = Field(8000, ge=0, le=65535)  # REST; 0 = any free one
    grpc_port: int = Field(50051, ge=0, le=65535)
    admin_host: str = Field("127.0.0.1", min_length=1)
    admin_port: int = Field(8081, ge=0, le=65535)  # /metrics and /admin
    root_path: str = ""  # behind a proxy that strips it
    # Processes
    frontends: int = Field(1, ge=1, le=64)
    in_process: bool = False  # engine and front end in one process, for debugging
    # Identity and access
    served_model_name: tuple[str, ...] = ()  # the first is what responses carry; () = the model's own name
    api_key: tuple[str, ...] = Field((), repr=False)  # any of them is accepted; () = no key needed
    allowed_origins: tuple[str, ...] = ()  # CORS; () = off
    ssl_certfile: str | None = None
    ssl_keyfile: str | None = None
    ssl_ca_certs: str | None = None  # set: clients must show a certificate it signed (mTLS)
    # Limits
    max_body_bytes: int = Field(4 * MIB, ge=1024)
    header_timeout: float = Field(10.0, gt=0)
    max_connections: int = Field(4096, ge=1)
    max_num_queued_reqs: int | None = Field(None, ge=0)  # samples beyond max_num_seqs; None = max(256, 4x those)
    max_num_queued_tokens: int | None = Field(None, ge=1)  # prompt tokens of all unfinished requests
    default_timeout: float | None = Field(None, gt=0)  # of requests that name none
    drain_timeout: float = Field(30.0, ge=0)
    slow_reader_timeout: float = Field(30.0, gt=0)  # a client that reads nothing for so long is dropped
    sse_keep_alive: float = Field(15.0, gt=0)
    # Behaviour
    unknown_params: Literal["error", "warn"] = "error"
    playground: bool = True
    # Observability
    log_level: Literal["debug", "info", "warning", "error"] = "info"
    log_format: Literal["text", "json"] = "text"
    log_interval: float = Field(10.0, gt=0)
    metrics_prefix: str = Field("jaxserve", pattern=r"^[A-Za-z_][A-Za-z0-9_]*$")
    otlp_traces_endpoint: str | None = None

    @model_validator(mode="after")
    def _agree(self) -> Self:
        """Refuses what each field allows and all together do not. Messages never show a key."""
        for problem in (self._access(), self._tls(), self._ports()):
            if problem:
                raise ValueError(problem)
        if self.root_path and (not self.root_path.startswith("/") or self.root_path.endswith("/")):
            raise ValueError(f"root_path={self.root_path!r} must begin with / and not end with it")
        if self.in_process and self.frontends > 1:
            raise ValueError(f"in_process=True runs one front end, frontends={self.frontends} asks for more")
        endpoint = self.otlp_traces_endpoint
        if endpoint is not None and not endpoint.startswith(("http://", "https://")):
            raise ValueError(f"otlp_traces_endpoint={endpoint!r} must begin with http:// or https://")
        return self

    def _access(self) -> str | None:
        for position, key in enumerate(self.api_key):
            # gRPC metadata and HTTP headers carry nothing else unharmed
            if not key or not key.isascii() or not key.isprintable() or " " in key:
                return (
                    f"api_key: key {position + 1} of {len(self.api_key)} must be one or more visible ASCII characters"
                )
        for name in self.served_model_name:
            if not name.strip():
                return f"served_model_name={self.served_model_name!r} holds an empty name"
        if len(set(self.served_model_name)) < len(self.served_model_name):
            return f"served_model_name={self.served_model_name!r} holds a name twice"
        for origin in self.allowed_origins:
            scheme, found, host = origin.partition("://")
            if origin != "*" and (scheme not in ("http", "https") or not found or not host or "/" in host):
                return f"allowed_origins: {origin!r} must be * or like https://example.org, without a path"
        return None

    def _tls(self) -> str | None:
        if self.ssl_keyfile is not None and self.ssl_certfile is None:
            return f"ssl_keyfile={self.ssl_keyfile!r} needs ssl_certfile"
        if self.ssl_certfile is not None and self.ssl_keyfile is None:
            return f"ssl_certfile={self.ssl_certfile!r} needs ssl_keyfile"
        if self.ssl_ca_certs is not None and self.ssl_certfile is None:
            return f"ssl_ca_certs={self.ssl_ca_certs!r} asks clients for certificates, which needs ssl_certfile"
        return None

    def _ports(self) -> str | None:
        if self.port and self.port == self.grpc_port:
            return f"port={self.port} and grpc_port={self.grpc_port} must differ"
        for name in ("port", "grpc_port"):
            number = getattr(self, name)
            if number and number == self.admin_port and _overlap(self.host, self.admin_host):
                return f"{name}={number} and admin_port={self.admin_port} must differ"
        return None


@dataclasses.dataclass(frozen=True, kw_only=True)
class ServeConfig:
    """Everything a child process must know."""

    server: ServerSettings
    engine: EngineConfig

    def to_json(self) -> dict[str, Any]:
        """`from_json` undoes it. Holds the API keys: for a pipe, never for a file or a log."""
        return {"settings": self.server.model_dump(mode="json"), "engine": engine_options(self.engine)}

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> Self:
        server = ServerSettings.model_validate(data["settings"])
        return cls(server=server, engine=EngineConfig.from_options(**data["engine"]))


def engine_options(config: EngineConfig) -> dict[str, Any]:
    """The flat names and values that `EngineConfig.from_options` makes `config` of."""
    options: dict[str, Any] = {}
    for field in dataclasses.fields(config):
        value = getattr(config, field.name)
        options |= dataclasses.asdict(value) if dataclasses.is_dataclass(value) else {field.name: value}  # type: ignore[arg-type]
    return options


def check_files(settings: ServerSettings) -> None:
    """Refuses TLS files that cannot be used. Raises ConfigError, here and not in a child that is half started."""
    for name in ("ssl_certfile", "ssl_keyfile", "ssl_ca_certs"):
        path = getattr(settings, name)
        if path is not None and not (os.path.isfile(path) and os.access(path, os.R_OK)):
            raise ConfigError(f"{name}={path!r} is not a file that can be read")
    if settings.ssl_certfile is None:
        return
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    try:
        # The empty password keeps OpenSSL from asking a terminal for one.
        context.load_cert_chain(settings.ssl_certfile, settings.ssl_keyfile, password="")
    except (ssl.SSLError, OSError, ValueError) as error:
        raise ConfigError(
            f"ssl_certfile={settings.ssl_certfile!r} and ssl_keyfile={settings.ssl_keyfile!r} must be a certificate "
            f"and its unencrypted key, in PEM: {error}"
        ) from None
    if settings.ssl_ca_certs is not None:
        try:
            context.load_verify_locations(settings.ssl_ca_certs)
        except (ssl.SSLError, OSError) as error:
            raise ConfigError(f"ssl_ca_certs={settings.ssl_ca_certs!r} holds no certificates in PEM: {error}") from None


def _overlap(host: str, other: str) -> bool:
    """Whether listening on one port of both would clash."""
    return host == other or any(_is_wildcard(name) for name in (host, other))


def _is_wildcard(host: str) -> bool:
    try:
        return ipaddress.ip_address(host).is_unspecified
    except ValueError:
        return False
