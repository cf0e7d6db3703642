"""Ports are ours or refused by name, and shared among front ends."""

import socket
from collections.abc import Iterator

import pytest

from jaxserve.errors import ConfigError
from server.settings import ServerSettings
from server.supervision.ports import reserve


def settings(**values: object) -> ServerSettings:
    return ServerSettings.model_validate({"port": 0, "grpc_port": 0, "admin_port": 0, **values})


def listening(port: int = 0, *, shared: bool = False, host: str = "127.0.0.1") -> socket.socket:
    sock = socket.socket(socket.AF_INET6 if ":" in host else socket.AF_INET)
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT, shared)
    sock.bind((host, port))
    sock.listen()
    return sock


def refuse(message: str, **values: object) -> None:
    with pytest.raises(ConfigError, match=message), reserve(settings(**values)):
        pass


@pytest.fixture
def stranger() -> Iterator[int]:
    """A port that another program listens on, and would share."""
    with listening(shared=True) as sock:
        yield sock.getsockname()[1]


def test_port_0_becomes_three_different_free_ports() -> None:
    for _ in range(20):
        with reserve(settings()) as ports:
            numbers = set(ports.to_json().values())
            assert len(numbers) == 3 and 0 not in numbers


@pytest.mark.parametrize(("name", "flag"), [("port", "--port"), ("grpc_port", "--grpc-port")])
@pytest.mark.parametrize("host", ["127.0.0.1", "0.0.0.0", "localhost"])
def test_a_port_somebody_listens_on_is_refused_by_name_even_if_it_could_be_shared(
    stranger: int, name: str, flag: str, host: str
) -> None:
    refuse(rf"^{name}={stranger} on {host} is taken .* {flag} ", host=host, **{name: stranger})


def test_the_admin_port_is_looked_for_at_its_own_address(stranger: int) -> None:
    refuse(f"^admin_port={stranger} on 127.0.0.1 is taken", host="127.0.0.2", admin_port=stranger)


def test_a_second_server_is_refused_even_before_anything_listens() -> None:
    with reserve(settings()) as ports:
        refuse(f"^grpc_port={ports.grpc} .* is taken", grpc_port=ports.grpc)


def test_several_front_ends_listen_on_a_reserved_port_and_no_connection_goes_astray() -> None:
    with (
        reserve(settings()) as ports,
        listening(ports.rest, shared=True) as one,
        listening(ports.rest, shared=True) as other,
    ):
        clients = [socket.create_connection(("127.0.0.1", ports.rest), timeout=10) for _ in range(32)]
        accepted = []
        for listener in (one, other):
            listener.setblocking(False)
            try:
                while True:
                    accepted.append(listener.accept()[0])
            except BlockingIOError:
                pass
        assert len(accepted) == 32
        for sock in (*clients, *accepted):
            sock.close()


def test_a_port_is_free_again_after_the_server() -> None:
    with reserve(settings()) as ports, listening(ports.rest, shared=True) as server:
        client = socket.create_connection(("127.0.0.1", ports.rest), timeout=10)
        accepted, _ = server.accept()
        accepted.close()  # first, so that its side lingers in TIME_WAIT
        client.close()
    with reserve(settings(port=ports.rest)) as again:
        assert again.rest == ports.rest


@pytest.mark.parametrize("name", ["host", "admin_host"])
@pytest.mark.parametrize("value", ["203.0.113.7", "a" * 70 + ".invalid"])
def test_an_address_of_another_machine_is_refused_by_name(name: str, value: str) -> None:
    refuse(f"^{name}='{value}' is no address of this machine", **{name: value})
