"""Middleware of the admin port: no web page reaches it, whatever address its name was made to resolve to.

A browser sends the page's own name as Host (DNS rebinding) or its origin as Origin (a form or script of another site);
either gives it away. Programs that are no browsers send neither wrongly.
"""

import ipaddress

from starlette.types import ASGIApp, Receive, Scope, Send

from server.errors import ServiceError
from server.rest.errors import error_response


class SameHost:
    """Lets through requests whose Host is a loopback name or address, or `admin_host`, on any port.

    An admin_host that stands for all addresses ("0.0.0.0", "::") admits any address, but no name other than localhost.
    """

    def __init__(self, app: ASGIApp, admin_host: str):
        self.app = app
        self._admin_host = admin_host.lower()
        own = _address(admin_host)
        self._any_address = own is not None and own.is_unspecified

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        refusal = self._refusal(scope["headers"])
        if refusal is None:
            return await self.app(scope, receive, send)
        error = ServiceError("permission_denied", refusal)
        await error_response(error)(scope, receive, send)

    def _refusal(self, headers: list[tuple[bytes, bytes]]) -> str | None:
        hosts = [value.decode("latin-1").lower() for name, value in headers if name == b"host"]
        if len(hosts) != 1 or not self._known(_name_of(hosts[0])):
            return f"Host={', '.join(hosts)[:200]!a} is not this admin port; use its address"
        for name, value in headers:
            origin = value.decode("latin-1").lower()
            if name == b"origin" and origin.partition("://")[2] != hosts[0]:
                return f"Origin={origin[:200]!a} is another site"
        return None

    def _known(self, name: str) -> bool:
        address = _address(name)
        if address is None:
            return name in ("localhost", self._admin_host)
        return address.is_loopback or name == self._admin_host or self._any_address


def _name_of(host: str) -> str:
    """Without the port, and an IPv6 address without its brackets."""
    if host.startswith("["):
        return host[1:].partition("]")[0]
    return host.partition(":")[0]


def _address(name: str) -> ipaddress.IPv4Address | ipaddress.IPv6Address | None:
    try:
        return ipaddress.ip_address(name)
    except ValueError:
        return None
