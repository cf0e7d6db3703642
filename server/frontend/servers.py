"""The three doors of a front end, opened on one event loop: REST, gRPC, and the admin port."""

from dataclasses import dataclass

import grpc

from server.admin.app import build_admin_app
from server.frontend.frontend import Frontend
from server.rest.app import build_app
from server.rest.listener import HttpListener, bind, serve_http
from server.rpc.server import start_grpc
from server.supervision.ports import Ports


@dataclass
class Servers:
    """What listens. ports: the real ones, where 0 was asked for."""

    ports: Ports
    _grpc: grpc.aio.Server
    _http: tuple[HttpListener, ...]

    async def stop(self, grace: float) -> None:
        """Refuses what is new at once; what runs has `grace` seconds."""
        await self._grpc.stop(grace)
        for server in self._http:
            await server.stop(grace)


async def open_servers(frontend: Frontend, ports: Ports) -> Servers:
    """Several front ends may listen on the same ports. Raises ConfigError where one cannot be had."""
    settings = frontend.settings
    app = build_app(frontend)
    rest = await serve_http(app, settings, bind(settings.host, ports.rest))
    admin_socket = bind(settings.admin_host, ports.admin)
    admin = await serve_http(build_admin_app(frontend), settings, admin_socket, tls=False)  # loopback, and scraped
    rpc, rpc_port = await start_grpc(frontend, settings, ports.grpc)
    app.state.grpc_port = rpc_port  # /v1/engine/status tells it to the playground
    return Servers(Ports(rest=rest.port, grpc=rpc_port, admin=admin.port), rpc, (rest, admin))
