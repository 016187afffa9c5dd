"""NATS and etcd that ask for credentials, given by the variables of ai-dynamo 0.x."""

from __future__ import annotations

import asyncio
import base64
import json
import subprocess
import time
from collections.abc import Callable
from contextlib import aclosing
from pathlib import Path
from typing import Any

import nkeys
import pytest
from nacl.signing import SigningKey

from dynamo.errors import ConfigError, TransportError
from dynamo.transport.etcd import Etcd, Put, Snapshot
from dynamo.transport.nats import Nats
from tests.guarded import etcd_with, nats_with

SECRET = "sekret"


@pytest.fixture
def setenv(monkeypatch: pytest.MonkeyPatch) -> Callable[..., None]:
    """Set the given variables and unset the others of authentication."""

    def setenv(**values: str) -> None:
        for kind in ("NATS_AUTH", "ETCD_AUTH"):
            for name in (
                "USERNAME",
                "PASSWORD",
                "TOKEN",
                "NKEY",
                "CREDENTIALS_FILE",
                "CA",
                "CLIENT_CERT",
                "CLIENT_KEY",
            ):
                monkeypatch.delenv(f"{kind}_{name}", raising=False)
        for name, value in values.items():
            monkeypatch.setenv(name, value)

    setenv()
    return setenv


# -- NATS


def nkey(prefix: int) -> nkeys.KeyPair:
    return nkeys.from_seed(bytearray(nkeys.encode_seed(bytes(SigningKey.generate()), prefix)))


def jwt(issuer: nkeys.KeyPair, subject: nkeys.KeyPair, name: str, expires: float | None = None, **claims: Any) -> str:
    """Return a JWT as NATS's operators, accounts and users have it. `expires` is Unix time."""

    def encoded(part: dict[str, Any] | bytes) -> str:
        data = part if isinstance(part, bytes) else json.dumps(part).encode()
        return base64.urlsafe_b64encode(data).rstrip(b"=").decode()

    body: dict[str, Any] = {
        "jti": name,
        "iat": 1,
        "iss": issuer.public_key.decode(),
        "sub": subject.public_key.decode(),
        "name": name,
    }
    if expires is not None:
        body["exp"] = int(expires)
    text = f"{encoded({'typ': 'JWT', 'alg': 'ed25519-nkey'})}.{encoded({**body, 'nats': {'version': 2, **claims}})}"
    return f"{text}.{encoded(issuer.sign(text.encode()))}"


async def check(url: str) -> None:
    """Connect, publish and receive."""
    nats = await Nats.connect(url)
    try:
        received = asyncio.get_running_loop().create_future()
        await nats.listen("a", received.set_result)
        await nats.publish("a", b"1")
        assert await asyncio.wait_for(received, 5) == b"1"
    finally:
        await nats.close()


async def refused(url: str) -> TransportError:
    with pytest.raises(TransportError) as caught:
        await Nats.connect(url)
    assert caught.value.message.startswith(f"cannot connect to NATS at {url}: ")
    assert "Authorization Violation" in caught.value.message
    assert "NATS_AUTH_USERNAME and NATS_AUTH_PASSWORD" in str(caught.value.hint)
    assert SECRET not in str(caught.value)
    return caught.value


async def test_nats_user_and_token(tmp_path: Path, setenv: Callable[..., None]) -> None:
    user = {"NATS_AUTH_USERNAME": "ann", "NATS_AUTH_PASSWORD": SECRET}
    async with nats_with(tmp_path, authorization={"user": "ann", "password": SECRET}) as url:
        await refused(url)
        setenv(**user)
        await check(url)
        setenv(**user, NATS_AUTH_TOKEN="less", NATS_AUTH_NKEY="less")
        await check(url)
        setenv(NATS_AUTH_USERNAME="ann", NATS_AUTH_PASSWORD=f"{SECRET}2")
        await refused(url)
        await check(url.replace("//", f"//ann:{SECRET}@"))
    async with nats_with(tmp_path, authorization={"token": SECRET}) as url:
        await refused(url)
        setenv(
            NATS_AUTH_USERNAME="ann", NATS_AUTH_TOKEN=SECRET, NATS_AUTH_NKEY="less", NATS_AUTH_CREDENTIALS_FILE="less"
        )
        await check(url)
    async with nats_with(tmp_path) as url:  # which asks for nothing
        await check(url)


async def test_nats_nkey(tmp_path: Path, setenv: Callable[..., None]) -> None:
    user = nkey(nkeys.PREFIX_BYTE_USER)
    async with nats_with(tmp_path, authorization={"users": [{"nkey": user.public_key.decode()}]}) as url:
        setenv(NATS_AUTH_NKEY=user.seed.decode(), NATS_AUTH_CREDENTIALS_FILE="less")
        await check(url)
        setenv(NATS_AUTH_NKEY=nkey(nkeys.PREFIX_BYTE_USER).seed.decode())
        await refused(url)
        setenv(NATS_AUTH_NKEY=SECRET)
        with pytest.raises(ConfigError, match="NATS_AUTH_NKEY is not the seed of an nkey") as caught:
            await Nats.connect(url)
        assert SECRET not in str(caught.value)


class Accounts:
    """An operator with an account whose user has a credentials file."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._operator, self.account, self._user = map(
            nkey, (nkeys.PREFIX_BYTE_OPERATOR, nkeys.PREFIX_BYTE_ACCOUNT, nkeys.PREFIX_BYTE_USER)
        )
        self._unlimited = {"subs": -1, "data": -1, "payload": -1}

    def server(self) -> dict[str, Any]:
        """Return the configuration of the server."""
        limits = {**self._unlimited, "imports": -1, "exports": -1, "conn": -1, "leaf": -1, "wildcards": True}
        account = jwt(self._operator, self.account, "A", type="account", limits=limits)
        return {
            "operator": jwt(self._operator, self._operator, "O", type="operator"),
            "resolver": "MEMORY",
            "resolver_preload": {self.account.public_key.decode(): account},
        }

    def write(self, name: str, signer: nkeys.KeyPair, expires: float | None = None) -> str:
        """Write a credentials file; return its path."""
        user = jwt(signer, self._user, "U", expires, type="user", pub={}, sub={}, **self._unlimited)
        seed = self._user.seed.decode()
        path = self._folder / name
        path.write_text(
            f"-----BEGIN NATS USER JWT-----\n{user}\n------END NATS USER JWT------\n\n"
            f"-----BEGIN USER NKEY SEED-----\n{seed}\n------END USER NKEY SEED------\n"
        )
        return str(path)


async def test_nats_credentials_file(tmp_path: Path, setenv: Callable[..., None]) -> None:
    accounts = Accounts(tmp_path)
    async with nats_with(tmp_path, **accounts.server()) as url:
        setenv(NATS_AUTH_CREDENTIALS_FILE=accounts.write("good.creds", accounts.account))
        await check(url)
        setenv(NATS_AUTH_CREDENTIALS_FILE=accounts.write("bad.creds", nkey(nkeys.PREFIX_BYTE_ACCOUNT)))
        await refused(url)
        setenv(NATS_AUTH_CREDENTIALS_FILE=str(tmp_path / "none"))
        with pytest.raises(ConfigError, match="cannot read the file of NATS_AUTH_CREDENTIALS_FILE: No such file"):
            await Nats.connect(url)
        (tmp_path / "empty").touch()
        setenv(NATS_AUTH_CREDENTIALS_FILE=str(tmp_path / "empty"))
        with pytest.raises(ConfigError, match="has no user JWT and seed"):
            await Nats.connect(url)


async def test_nats_credentials_that_are_renewed(tmp_path: Path, setenv: Callable[..., None]) -> None:
    """A user's JWT ends after a time; the server closes the connection then."""
    accounts = Accounts(tmp_path)
    async with nats_with(tmp_path, **accounts.server()) as url:
        setenv(NATS_AUTH_CREDENTIALS_FILE=accounts.write("user.creds", accounts.account, time.time() + 3))
        nats = await Nats.connect(url)
        try:
            received: list[bytes] = []
            await nats.listen("a", received.append)
            accounts.write("user.creds", accounts.account)
            async with asyncio.timeout(30):
                while nats.session == 1:
                    await asyncio.sleep(0.05)
                await nats.publish("a", b"1")
                while received != [b"1"]:
                    await asyncio.sleep(0.01)
        finally:
            await nats.close()


# -- etcd


async def test_etcd_user(tmp_path: Path, setenv: Callable[..., None]) -> None:
    """A token of etcd ends after a time without calls, here 1 s: calls, watches and leases outlive it."""
    async with etcd_with(tmp_path, "--auth-token-ttl=1") as server:
        await server.enable_auth("ann", SECRET)
        async with Etcd.connect(server.url) as client:
            with pytest.raises(TransportError, match="user name is empty") as caught:
                await client.get("k")
            assert caught.value.hint == "set the credentials that it accepts: ETCD_AUTH_USERNAME and ETCD_AUTH_PASSWORD"
        setenv(ETCD_AUTH_USERNAME="ann", ETCD_AUTH_PASSWORD=f"{SECRET}2")
        async with Etcd.connect(server.url) as client:
            with pytest.raises(TransportError, match="authentication failed") as caught:
                await client.get("k")
            assert caught.value.hint == "set the credentials that it accepts: ETCD_AUTH_USERNAME and ETCD_AUTH_PASSWORD"
            assert SECRET not in str(caught.value)
        async with Etcd.connect(server.url.replace("//", f"//ann:{SECRET}@")) as client:
            assert await client.get("k") is None
        setenv(ETCD_AUTH_USERNAME="ann", ETCD_AUTH_PASSWORD=SECRET)
        async with Etcd.connect(server.url) as client, aclosing(client.watch_prefix("k/")) as events:
            assert await anext(events) == Snapshot({})
            lease = await client.lease(2)
            for number in range(2):
                first = client._cluster._token
                await asyncio.sleep(3)  # nothing is called but the lease's keep-alive
                await lease.put(f"k/{number}", b"1")
                assert await asyncio.wait_for(anext(events), 5) == Put(f"k/{number}", b"1")
                assert client._cluster._token != first
            assert await client.get("k/0") == b"1"


def certificates(folder: Path, *names: str) -> None:
    """Write ca.pem, and a certificate and key of each name."""

    def run(*arguments: str) -> None:
        subprocess.run(["openssl", *arguments], cwd=folder, check=True, capture_output=True)

    new = ("req", "-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:prime256v1", "-nodes")
    run(*new, "-x509", "-keyout", "ca.key", "-out", "ca.pem", "-subj", "/CN=ca")
    (folder / "extensions").write_text("subjectAltName=IP:127.0.0.1")
    for name in names:
        run(*new, "-keyout", f"{name}.key", "-out", f"{name}.csr", "-subj", f"/CN={name}")
        run("x509", "-req", "-in", f"{name}.csr", "-CA", "ca.pem", "-CAkey", "ca.key", "-CAcreateserial",
            "-extfile", "extensions", "-out", f"{name}.pem")  # fmt: skip


async def test_etcd_certificates(tmp_path: Path, setenv: Callable[..., None]) -> None:
    await asyncio.to_thread(certificates, tmp_path, "server", "ann")
    ca, cert, key = (str(tmp_path / name) for name in ("ca.pem", "ann.pem", "ann.key"))
    options = (f"--cert-file={tmp_path}/server.pem", f"--key-file={tmp_path}/server.key", f"--trusted-ca-file={ca}")
    tls = {"ETCD_AUTH_CA": ca, "ETCD_AUTH_CLIENT_CERT": cert, "ETCD_AUTH_CLIENT_KEY": key}
    async with etcd_with(tmp_path, *options, "--client-cert-auth", scheme="https") as server:
        await server.enable_auth("ann", SECRET, f"--cacert={ca}", f"--cert={cert}", f"--key={key}")
        texts = {name: Path(path).read_text() for name, path in tls.items()}
        for given in (tls, texts):
            setenv(**given)
            for url in (server.url, server.url.removeprefix("https://")):
                async with Etcd.connect(url) as client:
                    await client.put("k", b"1")  # etcd reads the user, ann, from the certificate
                    assert await client.get("k") == b"1"
        for given in ({}, {"ETCD_AUTH_CA": ca}):
            setenv(**given)
            async with Etcd.connect(server.url) as client:
                with pytest.raises(TransportError, match="etcd does not answer at https://") as caught:
                    await client.get("k", timeout_s=0.5)
                assert "ETCD_AUTH_CA" in str(caught.value.hint)
    setenv(ETCD_AUTH_CLIENT_CERT=cert)
    with pytest.raises(ConfigError, match="ETCD_AUTH_CLIENT_CERT and ETCD_AUTH_CLIENT_KEY belong together"):
        Etcd.connect(server.url)
    setenv(ETCD_AUTH_CA=str(tmp_path / "none"))
    with pytest.raises(ConfigError, match="cannot read the file of ETCD_AUTH_CA: No such file"):
        Etcd.connect(server.url)
    setenv(ETCD_AUTH_CA=str(tmp_path / "extensions"))
    with pytest.raises(ConfigError, match="ETCD_AUTH_CA holds no PEM"):
        Etcd.connect(server.url)
