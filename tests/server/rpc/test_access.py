"""Who gets in, over what kind of connection, and with how large a message."""

import logging
import socket
from pathlib import Path
from typing import Any

import grpc
import pytest
from grpc_reflection.v1alpha.proto_reflection_descriptor_database import ProtoReflectionDescriptorDatabase

from jaxserve.errors import ConfigError
from jaxserve.v1 import inference_pb2 as pb
from jaxserve.v1.inference_pb2_grpc import InferenceStub
from server.rpc.server import start_grpc
from server.settings import ServerSettings

KEYS = ("first-key", "zweiter-schlüssel")
ANY = pb.ListModelsRequest()


def bearer(key: str, scheme: str = "Bearer") -> tuple[tuple[str, str | bytes], ...]:
    return (("authorization", f"{scheme} {key}"),)


@pytest.fixture
def guarded(start_live: Any, connect: Any) -> InferenceStub:
    return connect(start_live(api_key=KEYS[:1]).grpc)


@pytest.mark.parametrize("scheme", ["Bearer", "bearer", "BEARER"])
def test_right_key_gets_in(guarded: InferenceStub, scheme: str) -> None:
    assert guarded.ListModels(ANY, metadata=bearer("first-key", scheme)).models


def test_every_key_gets_in(start_live: Any, connect: Any) -> None:
    stub = connect(start_live(api_key=("one", "two")).grpc)
    for key in ("one", "two"):
        assert stub.ListModels(ANY, metadata=bearer(key)).models


@pytest.mark.parametrize(
    "metadata",
    [
        (),
        bearer(""),
        bearer("wrong"),
        bearer("first-key2"),
        bearer("first-ke"),
        bearer("FIRST-KEY"),
        bearer("first-key", "Basic"),
        (("authorization", "first-key"),),
        (("api-key", "first-key"),),
        bearer("first-key") + bearer("first-key"),
        bearer("wrong") + bearer("first-key"),
    ],
)
def test_any_other_key_is_refused_by_every_method(guarded: Any, refused: Any, metadata: Any) -> None:
    paths = [f"/jaxserve.v1.Inference/{method.name}" for method in pb.DESCRIPTOR.services_by_name["Inference"].methods]
    paths += ["/grpc.reflection.v1alpha.ServerReflection/ServerReflectionInfo", "/nobody/Nothing"]
    paths += ["/grpc.health.v1.Health/Check/", "/grpc.health.v1.Health/check", "//grpc.health.v1.Health/Check"]
    for path in paths:
        for method in (guarded.channel.unary_unary(path), guarded.channel.unary_stream(path)):
            refusal = refused(lambda call=method: call(b"", metadata=metadata))
            assert (refusal.status, refusal.reason) == ("UNAUTHENTICATED", "INVALID_API_KEY"), path
            assert "first-key" not in str(refusal)


def test_health_needs_no_key(guarded: Any) -> None:
    from grpc_health.v1 import health_pb2, health_pb2_grpc

    stub = health_pb2_grpc.HealthStub(guarded.channel)
    assert stub.Check(health_pb2.HealthCheckRequest()).status == health_pb2.HealthCheckResponse.SERVING
    assert stub.List(health_pb2.HealthListRequest()).statuses


def tls(certificates: Path, *, ca: str = "ca", own: str | None = None) -> grpc.ChannelCredentials:
    def read(name: str) -> bytes:
        return (certificates / name).read_bytes()

    if own is None:
        return grpc.ssl_channel_credentials(read(f"{ca}.pem"))
    return grpc.ssl_channel_credentials(read(f"{ca}.pem"), read(f"{own}.key"), read(f"{own}.pem"))


def files(certificates: Path, **more: str) -> dict[str, str]:
    names = {"ssl_certfile": "server.pem", "ssl_keyfile": "server.key", **more}
    return {setting: str(certificates / name) for setting, name in names.items()}


def test_tls_is_for_those_who_trust_the_server(start_live: Any, connect: Any, refused: Any, certificates: Path) -> None:
    live = start_live(**files(certificates))
    assert connect(live.grpc, tls(certificates)).ListModels(ANY).models
    stranger = connect(live.grpc, tls(certificates, ca="stranger"))
    assert refused(lambda: stranger.ListModels(ANY)).status == "UNAVAILABLE"
    assert refused(lambda: connect(live.grpc).ListModels(ANY)).status == "UNAVAILABLE"  # in plain text


def test_mutual_tls_is_for_those_the_server_trusts(
    start_live: Any, connect: Any, refused: Any, certificates: Path
) -> None:
    live = start_live(**files(certificates, ssl_ca_certs="ca.pem"))
    assert connect(live.grpc, tls(certificates, own="client")).ListModels(ANY).models
    for other in (tls(certificates), tls(certificates, own="stranger")):
        stub = connect(live.grpc, other)
        assert refused(lambda stub=stub: stub.ListModels(ANY)).status == "UNAVAILABLE"


@pytest.mark.parametrize(
    ("settings", "told"),
    [
        ({"ssl_certfile": "nowhere.pem", "ssl_keyfile": "server.key"}, "nowhere.pem' cannot be read: No such file"),
        ({"ssl_certfile": "server.pem", "ssl_keyfile": "."}, "ssl_keyfile='.*' cannot be read: Is a directory"),
        ({"ssl_certfile": "names", "ssl_keyfile": "server.key"}, "TLS files cannot be used"),
    ],
)
def test_tls_files_that_cannot_be_used_are_named(
    live: Any, certificates: Path, settings: dict[str, str], told: str
) -> None:
    paths = {name: str(certificates / file) for name, file in settings.items()}
    with pytest.raises(ConfigError, match=told):
        live.call(lambda: start_grpc(live.frontend, ServerSettings(**paths), 0))


def test_address_that_is_not_ours_is_named(live: Any) -> None:
    with pytest.raises(ConfigError, match=r"host='192\.0\.2\.1' grpc_port=50099: cannot listen"):
        live.call(lambda: start_grpc(live.frontend, ServerSettings(host="192.0.2.1"), 50099))


def test_two_front_ends_share_a_port(live: Any, connect: Any) -> None:
    port = int(live.grpc.rpartition(":")[2])
    server, bound = live.call(lambda: start_grpc(live.frontend, live.settings, port))
    try:
        assert bound == port
    finally:
        live.call(lambda: server.stop(None))


def test_connections_beyond_the_bound_are_refused(start_live: Any, connect: Any, refused: Any) -> None:
    live = start_live(max_connections=3)
    stubs = [connect(live.grpc, use_local_subchannel_pool=1) for _ in range(4)]
    assert all(stub.ListModels(ANY).models for stub in stubs[:3])
    assert refused(lambda: stubs[3].ListModels(ANY)).status == "UNAVAILABLE"
    assert stubs[0].ListModels(ANY).models


def test_connection_that_says_nothing_is_closed(start_live: Any) -> None:
    host, _, port = start_live(header_timeout=0.5).grpc.rpartition(":")
    with socket.create_connection((host, int(port)), timeout=60) as silent:
        while silent.recv(4096):  # the server's own greeting, then the end
            pass


@pytest.mark.parametrize("metadata", [(("x-long", "a" * 100_000),), tuple((f"x-{i}", "a") for i in range(10_000))])
def test_metadata_beyond_the_cap_is_refused(stub: InferenceStub, refused: Any, metadata: Any) -> None:
    assert refused(lambda: stub.ListModels(ANY, metadata=metadata)).status == "RESOURCE_EXHAUSTED"
    assert stub.ListModels(ANY).models


def test_message_beyond_the_cap_is_refused_before_it_is_read(start_live: Any, connect: Any, refused: Any) -> None:
    stub = connect(start_live(max_body_bytes=4096).grpc)
    assert stub.Tokenize(pb.TokenizeRequest(text="a" * 2000)).token_ids
    refusal = refused(lambda: stub.Tokenize(pb.TokenizeRequest(text="a" * 5000)))
    assert (refusal.status, "larger than max" in refusal.message) == ("RESOURCE_EXHAUSTED", True)


@pytest.mark.parametrize("compression", [grpc.Compression.Gzip, grpc.Compression.Deflate])
def test_compressed_messages_are_not_unpacked(stub: InferenceStub, refused: Any, compression: grpc.Compression) -> None:
    bomb = pb.TokenizeRequest(text="a" * 3_000_000)
    assert refused(lambda: stub.Tokenize(bomb, compression=compression)).status == "UNIMPLEMENTED"


@pytest.mark.parametrize(
    ("data", "method"),
    [
        (b"\xff\xff\xff\xff", "Generate"),
        (b"\x12\xff\xff\xff\x7f", "Generate"),  # a text longer than the message
        (b"\x12\x02\xc3\x28", "GenerateStream"),  # a text that is not UTF-8
        (b"\x12\x03\xed\xa0\x80", "Tokenize"),  # a lone surrogate
        (b"\x22" + b"\x01\x22" * 100, "Chat"),
    ],
)
def test_malformed_message_is_the_clients_fault(
    stub: Any, refused: Any, caplog: pytest.LogCaptureFixture, data: bytes, method: str
) -> None:
    path = f"/jaxserve.v1.Inference/{method}"
    call = (stub.channel.unary_stream if method.endswith("Stream") else stub.channel.unary_unary)(path)
    with caplog.at_level(logging.ERROR):
        refusal = refused(lambda: call(data))
    assert (refusal.status, refusal.reason) == ("INVALID_ARGUMENT", "INVALID_VALUE")
    assert caplog.records == []


def test_unforeseen_failure_is_logged_and_tells_nothing(
    stub: InferenceStub, live: Any, refused: Any, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def fail(name: str) -> str:
        raise RuntimeError("the secret")

    monkeypatch.setattr(live.frontend, "check_model", fail)
    with caplog.at_level(logging.ERROR):
        refusal = refused(lambda: stub.Generate(pb.GenerateRequest(text="a")))
    assert (refusal.status, refusal.reason) == ("INTERNAL", "INTERNAL_ERROR")
    assert "secret" not in str(refusal)
    assert "the secret" in caplog.text and dict(refusal.metadata)["x-request-id"] in caplog.text


def test_reflection_describes_every_service(stub: Any) -> None:
    database = ProtoReflectionDescriptorDatabase(stub.channel)
    assert {"jaxserve.v1.Inference", "grpc.health.v1.Health"} <= set(database.get_services())
    file = database.FindFileContainingSymbol("jaxserve.v1.Inference")
    assert [method.name for method in file.service[0].method] == [
        method.name for method in pb.DESCRIPTOR.services_by_name["Inference"].methods
    ]
    assert not any("internal" in service for service in database.get_services())
