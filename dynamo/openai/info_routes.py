"""The read-only routes of the OpenAI server: models, health, metrics, and the page to try the models."""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Collection
from pathlib import Path
from typing import TYPE_CHECKING, Any

import orjson
from fastapi import FastAPI
from starlette.responses import Response

from dynamo.errors import ModelNotFoundError
from dynamo.http.error_handlers import ERROR_RESPONSES
from dynamo.http.prometheus_text import http_sd, load, merge
from dynamo.llm.protocol import ServedModel
from dynamo.openai.backend import Models
from dynamo.openai.metrics import FrontendMetrics

if TYPE_CHECKING:
    from dynamo.rpc.metrics import ProcessMetrics

PAGE = Path(__file__).with_name("page.html")

Targets = Callable[[], Awaitable[Collection[str]]]


def add_info_routes(
    app: FastAPI,
    backend: Models,
    metrics: FrontendMetrics,
    *,
    processes: ProcessMetrics | None,
    targets: Targets | None,
    unavailable_reason: Callable[[], str],
) -> None:
    """Add the routes to an application, each for GET and HEAD; the arguments are those of `create_app`."""

    async def models() -> Response:
        return _json({"object": "list", "data": [_model(m) for m in backend.models()]})

    async def model(name: str) -> Response:
        for found in backend.models():
            if found.name == name:
                return _json(_model(found))
        raise ModelNotFoundError(f"The model `{name}` does not exist.", param="model")

    async def health() -> Response:
        names = [m.name for m in backend.models()]
        reason = unavailable_reason()
        status = "unavailable" if reason else "healthy" if names else "starting"
        state = {"status": status, "models": names, "instances": backend.instance_counts()}
        return _json({**state, "reason": reason} if reason else state, 200 if status == "healthy" else 503)

    async def live() -> Response:
        return _json({"status": "live"})

    async def metrics_page() -> Response:
        body, content_type = metrics.exposition()
        if processes is not None:
            others = await processes.gather()
            own = processes.text()
            body = merge([body, own, *others, load([own, *others])])
        return Response(body, headers={"content-type": content_type})

    async def metrics_targets() -> Response:
        return Response(http_sd(await targets() if targets is not None else ()), media_type="application/json")

    page = PAGE.read_bytes()

    async def index() -> Response:
        return Response(page, media_type="text/html")

    for path, answer, summary in (
        ("/v1/models", models, "Models that can answer now"),
        ("/v1/models/{name:path}", model, "One model"),
        ("/health", health, "200 when a model can answer, else 503"),
        ("/live", live, "200 while the process runs"),
        ("/metrics", metrics_page, "Prometheus metrics"),
        ("/metrics/targets", metrics_targets, "Prometheus' list of the hosts to scrape"),
        ("/", index, "A page to try the models"),
    ):
        app.add_api_route(path, answer, methods=["GET"], summary=summary, responses=ERROR_RESPONSES)
        app.add_api_route(path, answer, methods=["HEAD"], include_in_schema=False)


def _json(value: Any, status: int = 200) -> Response:
    return Response(orjson.dumps(value), status, media_type="application/json")


def _model(model: ServedModel) -> dict[str, Any]:
    return {
        "id": model.name,
        "object": "model",
        "created": model.created,
        "owned_by": "dynamo",
        "root": model.root,
        "parent": None,
        "max_model_len": model.context_length or None,
    }
