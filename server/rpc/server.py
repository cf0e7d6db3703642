"""A front end and its settings in, a gRPC server that listens out: the public service, health and reflection."""

import logging
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import grpc
from grpc_health.v1.health_pb2 import DESCRIPTOR as HEALTH
from grpc_health.v1.health_pb2_grpc import add_HealthServicer_to_server
from grpc_reflection.v1alpha import reflection

from jaxserve.errors import ConfigError
from jaxserve.v1.inference_pb2_grpc import add_InferenceServicer_to_server
from server.frontend.frontend import Frontend
from server.rpc.auth import ApiKeys
from server.rpc.calls import SERVICE, Calls
from server.rpc.health import MAX_WATCHERS, Health
from server.rpc.inference import Inference
from server.settings import MIB, ServerSettings

MAX_SEND_BYTES = 64 * MIB
SPARE_CALLS = MAX_WATCHERS + 64  # beyond max_connections, so that health and refusals are told when calls fill it


async def start_grpc(frontend: Frontend, settings: ServerSettings, port: int) -> tuple[grpc.aio.Server, int]:
    """Returns (the running server, its port); call on the front end's loop. port: 0 = any free one.

    `await server.stop(grace)` refuses new calls at once, and ends after `grace` seconds those that still run.

    Raises ConfigError where the address or a TLS file cannot be used.
    """
    logging.getLogger("grpc._cython.cygrpc").addFilter(concerns_the_server)
    server = grpc.aio.server(
        interceptors=[ApiKeys(settings.api_key), Calls(settings.max_connections, settings.slow_reader_timeout)],
        options=_options(settings),
        maximum_concurrent_rpcs=settings.max_connections + SPARE_CALLS,
    )
    add_InferenceServicer_to_server(Inference(frontend), server)
    add_HealthServicer_to_server(Health(frontend.health.ready, lambda: frontend.draining), server)
    services = (SERVICE, *(service.full_name for service in HEALTH.services_by_name.values()))
    reflection.enable_server_reflection((*services, reflection.SERVICE_NAME), server)
    address = f"[{settings.host}]:{port}" if ":" in settings.host else f"{settings.host}:{port}"
    credentials = _credentials(settings)
    try:
        bound = server.add_secure_port(address, credentials) if credentials else server.add_insecure_port(address)
    except RuntimeError:
        raise ConfigError(
            f"host={settings.host!r} grpc_port={port}: cannot listen there; the address is not this machine's, "
            "the port is taken" + (", or the TLS files cannot be used" if credentials else "")
        ) from None
    await server.start()
    return server, bound


def concerns_the_server(record: logging.LogRecord) -> bool:
    """False for gRPC's own record, with a traceback, that a client went in the moment its answer was sent."""
    return not record.getMessage().startswith("ExecuteBatchError raised in core by servicer method")


def _options(settings: ServerSettings) -> Sequence[tuple[str, int]]:
    return (
        ("grpc.so_reuseport", 1),
        ("grpc.max_receive_message_length", settings.max_body_bytes),
        ("grpc.max_send_message_length", MAX_SEND_BYTES),
        ("grpc.compression_enabled_algorithms_bitset", 1),  # none: a small message could unpack to any size
        ("grpc.max_allowed_incoming_connections", settings.max_connections),
        ("grpc.max_concurrent_streams", 1024),  # of one connection
        ("grpc.server_handshake_timeout_ms", int(settings.header_timeout * 1000)),
        # A peer that vanished is noticed within 80 s; one that pings more often than every 10 s is hung up on.
        ("grpc.keepalive_time_ms", 60_000),
        ("grpc.keepalive_timeout_ms", 20_000),
        ("grpc.keepalive_permit_without_calls", 1),
        ("grpc.http2.min_ping_interval_without_data_ms", 10_000),
        ("grpc.http2.max_ping_strikes", 3),
    )


def _credentials(settings: ServerSettings) -> Any:
    """grpc.ServerCredentials, or None for plain text."""
    if settings.ssl_certfile is None:
        return None
    key, certificate = _content(settings, "ssl_keyfile"), _content(settings, "ssl_certfile")
    roots = None if settings.ssl_ca_certs is None else _content(settings, "ssl_ca_certs")
    return grpc.ssl_server_credentials([(key, certificate)], roots, require_client_auth=roots is not None)


def _content(settings: ServerSettings, name: str) -> bytes:
    path = getattr(settings, name)
    try:
        return Path(path).read_bytes()
    except OSError as error:
        raise ConfigError(f"{name}={path!r} cannot be read: {error.strerror}") from None
