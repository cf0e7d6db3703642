"""How a client reaches its server: address, TLS, keepalive and retries, as arguments of gRPC's own channels."""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import grpc

from jaxserve.v1 import inference_pb2 as pb

MAX_MESSAGE_BYTES = 64 << 20
SERVICE = pb.DESCRIPTOR.services_by_name["Inference"]


@dataclass(frozen=True, kw_only=True)
class Tls:
    """Paths of PEM files.

    ca           who signed the server's certificate; None = whom this system trusts
    cert, key    what this client shows of itself, to servers that ask for it (mTLS)
    server_name  the name in the server's certificate, where it is not the address
    """

    ca: str | Path | None = None
    cert: str | Path | None = None
    key: str | Path | None = None
    server_name: str | None = None


def credentials(tls: bool | Tls) -> Any:
    """grpc.ChannelCredentials, or None for plain text. Raises OSError for a file that cannot be read."""
    if tls is False:
        return None
    paths = Tls() if tls is True else tls
    ca, cert, key = (None if path is None else Path(path).read_bytes() for path in (paths.ca, paths.cert, paths.key))
    return grpc.ssl_channel_credentials(ca, key, cert)


def channel_options(tls: bool | Tls, max_attempts: int) -> list[tuple[str, Any]]:
    """max_attempts: how often in all a unary call is made that the server is not there for; 1 = no retries."""
    options: list[tuple[str, Any]] = [
        ("grpc.max_receive_message_length", MAX_MESSAGE_BYTES),
        ("grpc.max_send_message_length", MAX_MESSAGE_BYTES),
        ("grpc.keepalive_time_ms", 60_000),  # so that a stream notices a server that vanished
        ("grpc.keepalive_timeout_ms", 20_000),
        ("grpc.service_config", json.dumps(_service_config(max_attempts))),
    ]
    if isinstance(tls, Tls) and tls.server_name is not None:
        options.append(("grpc.ssl_target_name_override", tls.server_name))
    return options


def _service_config(max_attempts: int) -> dict[str, Any]:
    """Only UNAVAILABLE is tried again, after the time the server names: nothing was done for such a call."""
    if max_attempts == 1:
        return {}
    unary = [method.name for method in SERVICE.methods if not method.server_streaming]
    policy = {
        "maxAttempts": max_attempts,
        "initialBackoff": "0.2s",
        "maxBackoff": "5s",
        "backoffMultiplier": 3,
        "retryableStatusCodes": ["UNAVAILABLE"],
    }
    names = [{"service": SERVICE.full_name, "method": name} for name in unary]
    return {"methodConfig": [{"name": names, "retryPolicy": policy}]}
