"""The addresses and the identity of this host, and listening sockets."""

from __future__ import annotations

import errno
import socket

import pytest
from hypothesis import given
from hypothesis import strategies as st

from dynamo.errors import ConfigError, TransportError
from dynamo.transport import network as module
from dynamo.transport.network import (
    STREAM_PORTS,
    advertised_host,
    bound_host,
    host_id,
    interface_of,
    is_loopback,
    listening_at,
    listening_socket,
    same_network,
    without_credentials,
)

NOT_MINE = "192.0.2.1"  # for documentation: no host has it


@pytest.fixture(autouse=True)
def clean(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("DYN_HOST_IP", "DYN_BIND_IP"):
        monkeypatch.delenv(name, raising=False)


@pytest.mark.parametrize(
    "url", ["", "localhost", "nats://localhost:4222", "nats://127.0.0.1:4222,nats://10.0.0.1:4222"]
)
def test_loopback_for_a_server_on_this_host(url: str) -> None:
    assert advertised_host(url) == bound_host(url) == "127.0.0.1"


def test_an_unresolvable_name_is_no_error() -> None:
    assert advertised_host("nats://no.such.host.invalid:4222") == "127.0.0.1"


def test_a_configured_address_is_used(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("DYN_HOST_IP", "127.0.0.2")
    assert advertised_host("") == bound_host("") == "127.0.0.2"
    monkeypatch.setenv("DYN_BIND_IP", "0.0.0.0")
    assert (advertised_host(""), bound_host("")) == ("127.0.0.2", "0.0.0.0")
    monkeypatch.setenv("DYN_HOST_IP", NOT_MINE)  # address translation
    assert (advertised_host(""), bound_host("")) == (NOT_MINE, "0.0.0.0")


@pytest.mark.parametrize(
    ("env", "message", "hint"),
    [
        ({"DYN_HOST_IP": NOT_MINE}, f"DYN_HOST_IP={NOT_MINE}: not an address of this host", "DYN_BIND_IP=0.0.0.0"),
        ({"DYN_HOST_IP": "no.such.host.invalid"}, "DYN_HOST_IP=no.such.host.invalid: not an address", "DYN_BIND_IP"),
        ({"DYN_HOST_IP": "0.0.0.0"}, "DYN_HOST_IP=0.0.0.0: other hosts cannot connect", "DYN_BIND_IP=0.0.0.0"),
        ({"DYN_BIND_IP": NOT_MINE}, f"DYN_BIND_IP={NOT_MINE}: not an address of this host", "0.0.0.0 for all"),
    ],
)
def test_addresses_of_other_hosts_are_errors(
    env: dict[str, str], message: str, hint: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, value in env.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(ConfigError) as caught:
        bound_host("nats://127.0.0.1:4222")
    assert caught.value.message.startswith(message)
    assert hint in (caught.value.hint or "")


def test_the_id_of_a_host_has_its_network_and_its_files() -> None:
    network, files = host_id().split("-")
    assert same_network(host_id())
    assert same_network(f"{network}-00000000")
    assert not same_network(f"00000000-{files}")


def test_without_namespaces_the_machine_is_the_host(monkeypatch: pytest.MonkeyPatch) -> None:
    def missing(path: str) -> str:
        raise FileNotFoundError(path)

    monkeypatch.setattr(module.os, "readlink", missing)
    assert host_id.__wrapped__() == host_id.__wrapped__() != host_id()


@pytest.mark.parametrize(
    ("address", "own"),
    [("127.0.0.1", True), ("127.9.9.9", True), ("::1", True), ("localhost", True), ("10.0.0.1", False), ("a.b", False)],
)
def test_loopback(address: str, own: bool) -> None:
    assert is_loopback(address) is own


def test_ports_are_below_those_of_outgoing_connections() -> None:
    with listening_socket("127.0.0.1") as found:
        port = found.getsockname()[1]
        assert port in STREAM_PORTS
        socket.create_connection(("127.0.0.1", port), 1).close()
    with pytest.raises(TransportError, match=f"cannot listen on {NOT_MINE}: Cannot assign requested address"):
        listening_socket(NOT_MINE)


def test_interfaces() -> None:
    assert interface_of("127.0.0.1") == "lo"
    assert interface_of(NOT_MINE) == ""


@pytest.mark.parametrize(
    ("urls", "shown"),
    [
        ("nats://a:4222", "nats://a:4222"),
        ("nats://me:sekret@a:4222, nats://me:sek@ret@[::1]:4222/", "nats://a:4222,nats://[::1]:4222/"),
        ("token@a", "a"),
        ("nats://me:sek,ret@a", "nats://?,a"),
        ("nats://me:sek#ret:1", "nats://me:sek#ret:1"),
        ("nats://me@a:sekret", "nats://?"),
    ],
)
def test_credentials_are_removed_from_urls(urls: str, shown: str) -> None:
    assert without_credentials(urls) == shown


@given(
    user=st.text(st.characters(codec="ascii", categories=["L"]), min_size=1),
    password=st.text(st.characters(codec="ascii", exclude_characters=",")),
    hosts=st.lists(st.sampled_from(["a", "10.0.0.1:4222", "[::1]:2379"]), min_size=1, max_size=3),
)
def test_no_password_is_shown(user: str, password: str, hosts: list[str]) -> None:
    urls = ",".join(f"nats://{user}:{password}@{host}" for host in hosts)
    assert without_credentials(urls) == ",".join(f"nats://{host}" for host in hosts)


def test_a_port_in_use_is_an_error_without_python_s_address() -> None:
    with listening_socket("127.0.0.1") as found, pytest.raises(OSError, match="already in use") as caught:
        listening_at("127.0.0.1", found.getsockname()[1])
    assert (caught.value.errno, caught.value.strerror) == (errno.EADDRINUSE, "Address already in use")
