"""Ports: addresses in settings go in, free port numbers come out, held for this server's processes until the end."""

import errno
import os
import socket
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, dataclass
from typing import Any

from jaxserve.errors import ConfigError
from server.settings import ServerSettings


@dataclass(frozen=True)
class Ports:
    """Where the front ends listen, 0 resolved."""

    rest: int
    grpc: int
    admin: int

    def to_json(self) -> dict[str, int]:
        return asdict(self)


@contextmanager
def reserve(settings: ServerSettings) -> Iterator[Ports]:
    """Holds every port inside the `with`. Raises ConfigError, naming setting and port, for one that cannot be had.

    Front ends share a port through SO_REUSEPORT, and with it a stranger of the same user could share it too: so each
    is first bound without. What then holds it is bound and never listens: no connection ends up here, and a port stays
    ours while no front end runs.
    """
    with ExitStack() as held:
        numbers = []
        for host, name in ((settings.host, "port"), (settings.host, "grpc_port"), (settings.admin_host, "admin_port")):
            place = held.enter_context(_claim(host, getattr(settings, name), name))
            numbers.append(place.getsockname()[1])
        yield Ports(*numbers)


def _claim(host: str, port: int, name: str) -> socket.socket:
    try:
        family, kind, protocol, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
    except (OSError, UnicodeError) as error:
        raise ConfigError(f"{_host_of(name)}={host!r} is no address of this machine: {error}") from None
    try:
        if port:
            # Connections of an earlier server that linger in TIME_WAIT do not count, listeners do.
            _bound(family, kind, protocol, address, reuse_address=True).close()
        try:
            # The probe of another server sees this one, even while nothing listens.
            return _bound(family, kind, protocol, address, reuse_port=True)
        except OSError as error:
            if error.errno != errno.EADDRINUSE:
                raise
            # Lingering connections of a server that knew no SO_REUSEPORT; they leave within a minute.
            return _bound(family, kind, protocol, address, reuse_port=True, reuse_address=True)
    except OSError as error:
        raise ConfigError(_refusal(error, host, port, name)) from None


def _bound(
    family: int, kind: int, protocol: int, address: Any, *, reuse_port: bool = False, reuse_address: bool = False
) -> socket.socket:
    place = socket.socket(family, kind, protocol)
    try:
        place.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, reuse_address)
        place.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT, reuse_port)
        if family == socket.AF_INET6:
            place.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, address[0] != "::")
        place.bind(address)
    except OSError:
        place.close()
        raise
    return place


def _refusal(error: OSError, host: str, port: int, name: str) -> str:
    flag = f"--{name.replace('_', '-')}"
    match error.errno:
        case errno.EADDRINUSE:
            return f"{name}={port} on {host} is taken by another process: stop it, or choose another {flag} (0 = any)"
        case errno.EACCES:
            return f"{name}={port} is not open to this user: choose a {flag} of 1024 or more"
        case errno.EADDRNOTAVAIL:
            return f"{_host_of(name)}={host!r} is no address of this machine"
    return f"{name}={port} on {host} cannot be used: {os.strerror(error.errno or 0)}"


def _host_of(name: str) -> str:
    return "admin_host" if name == "admin_port" else "host"
