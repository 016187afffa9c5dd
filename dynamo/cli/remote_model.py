"""A model behind an OpenAI endpoint, over the standard library's HTTP, so that Ctrl-C interrupts a blocking read."""

from __future__ import annotations

import http.client
import json
from collections.abc import Generator, Iterator
from typing import Any
from urllib.parse import urlsplit

from dynamo.cli.chat import Message, Piece, SamplingOptions
from dynamo.errors import ConfigError, EngineError, ModelNotFoundError, RequestError, TransportError, UnavailableError

CONNECT_S = 5.0
READ_S = 600.0  # between two lines of an answer
ERROR_BODY_CHARS = 300


class RemoteModel:
    """A model of a server.

    `url` may end in /v1, or be host:port; `name` None: the first model that the server lists. Raises ConfigError for an
    invalid URL, TransportError if no server answers there, ModelNotFoundError, UnavailableError if it has no model yet.
    """

    def __init__(self, url: str, name: str | None = None, api_key: str | None = None) -> None:
        self._connection_class, self._host, self._port, self._path = _parse(url)
        self._headers = {"Content-Type": "application/json", "User-Agent": "dynamo-run"}
        if api_key:
            self._headers["Authorization"] = f"Bearer {api_key}"
        names = self._names()
        if not names:
            raise UnavailableError(f"{self._server} has no model yet", hint="wait for it, or look at its /health")
        if name is not None and name not in names:
            raise ModelNotFoundError(f"{self._server} has no model {name!r}", hint=f"models: {', '.join(names)}")
        self.name = name or names[0]

    @property
    def _server(self) -> str:
        return f"{self._host}:{self._port}"

    def _names(self) -> list[str]:
        connection, response = self._request("GET", "/models", None)
        try:
            body = json.loads(response.read())
            return [str(model["id"]) for model in body["data"]]
        except (ValueError, KeyError, TypeError, OSError, http.client.HTTPException):
            raise TransportError(
                f"{self._server} does not answer as an OpenAI server", hint="give the URL that `dynamo serve` prints"
            ) from None
        finally:
            connection.close()

    def answer(self, messages: list[Message], sampling: SamplingOptions) -> Generator[Piece]:
        """Answer the last message.

        Raises RequestError, UnavailableError or EngineError as the server reports, TransportError if the connection is lost.
        """
        body: dict[str, Any] = {
            "model": self.name,
            "messages": messages,
            "stream": True,
            "stream_options": {"include_usage": True},
        }
        body |= {key: value for key, value in sampling._asdict().items() if value is not None}
        connection, response = self._request("POST", "/chat/completions", json.dumps(body).encode())
        try:
            for event in self._events(response):
                yield from _pieces(event)
        finally:
            connection.close()

    def _request(
        self, method: str, path: str, body: bytes | None
    ) -> tuple[http.client.HTTPConnection, http.client.HTTPResponse]:
        connection = self._connection_class(self._host, self._port, timeout=CONNECT_S)
        try:
            connection.connect()
            connection.sock.settimeout(READ_S)
            connection.request(method, self._path + path, body, self._headers)
            response = connection.getresponse()
            if response.status != 200:
                raise _http_error(response.status, response.read(1 << 20))
        except (OSError, http.client.HTTPException) as error:
            connection.close()
            reason = getattr(error, "strerror", None) or str(error) or type(error).__name__
            raise TransportError(
                f"cannot reach {self._server}: {reason}", hint="start a graph with `dynamo serve`, or check --url"
            ) from None
        except BaseException:
            connection.close()
            raise
        return connection, response

    def _events(self, response: http.client.HTTPResponse) -> Iterator[dict[str, Any]]:
        try:
            while line := response.readline():
                if not line.startswith(b"data:"):
                    continue
                data = line[5:].strip()
                if data == b"[DONE]":
                    return
                yield json.loads(data)
        except (OSError, ValueError, http.client.HTTPException) as error:
            reason = error or type(error).__name__
            raise TransportError(f"failed to read the answer of {self._server}: {reason}", hint="ask again") from None
        raise TransportError(f"{self._server} closed the connection before the end of the answer", hint="ask again")


def _parse(url: str) -> tuple[type[http.client.HTTPConnection], str, int, str]:
    parts = urlsplit(url if "://" in url else f"http://{url}")
    kinds = {"http": (http.client.HTTPConnection, 80), "https": (http.client.HTTPSConnection, 443)}
    try:
        kind, usual = kinds[parts.scheme]
        host, port = parts.hostname, parts.port or usual
        if not host:
            raise ValueError
    except (KeyError, ValueError):
        raise ConfigError(f"--url {url}: not a URL", hint="write it as http://127.0.0.1:8000") from None
    path = parts.path.rstrip("/")
    return kind, host, port, path if path.endswith("/v1") else f"{path}/v1"


def _pieces(event: dict[str, Any]) -> Iterator[Piece]:
    if "error" in event:
        raise EngineError(_message(event) or "the server reported an error without a message")
    for choice in event.get("choices") or ():
        text = (choice.get("delta") or {}).get("content")
        if text:
            yield Piece(text)
    usage = event.get("usage")
    if usage:
        yield Piece("", int(usage.get("completion_tokens") or 0), int(usage.get("prompt_tokens") or 0))


def _http_error(status: int, body: bytes) -> RequestError | UnavailableError | EngineError:
    try:
        text = _message(json.loads(body))
    except ValueError:
        text = ""
    text = (
        text
        or f"HTTP {status} {http.client.responses.get(status, '')}: {body[:ERROR_BODY_CHARS].decode(errors='replace')}"
    )
    if status == 401:
        return RequestError(text, hint="set DYN_API_KEY to a key of that server")
    if status in (429, 503):
        return UnavailableError(text, hint="try again in a few seconds")
    return RequestError(text) if status < 500 else EngineError(text)


def _message(body: Any) -> str:
    error = body.get("error") if isinstance(body, dict) else None
    return str(error.get("message") or "") if isinstance(error, dict) else str(error or "")
