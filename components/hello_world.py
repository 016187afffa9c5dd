"""Three services that pass a text on: the smallest graph with HTTP in front."""

from __future__ import annotations

from collections.abc import AsyncIterator

from pydantic import BaseModel

from dynamo.sdk import Service, api, depends, endpoint, service


class Text(BaseModel):
    text: str


@service(dynamo={"namespace": "inference"})
class Backend(Service):
    def __init__(self, message: str = "back") -> None:
        self.message = message

    @endpoint
    async def generate(self, request: Text) -> AsyncIterator[str]:
        for word in f"{request.text}-{self.message}".split():
            yield f"Backend: {word}"


@service(dynamo={"namespace": "inference"})
class Middle(Service):
    backend = depends(Backend)

    def __init__(self, message: str = "mid") -> None:
        self.message = message

    @endpoint
    async def generate(self, request: Text) -> AsyncIterator[str]:
        async for answer in self.backend.generate(Text(text=f"{request.text}-{self.message}")):
            yield f"Middle: {answer}"


@service(dynamo={"namespace": "inference"})
class Frontend(Service):
    middle = depends(Middle)

    def __init__(self, message: str = "Frontend") -> None:
        """
        Args:
            message: what each answer begins with.
        """
        self.message = message

    @api
    async def generate(self, request: Text) -> AsyncIterator[str]:
        """Send a text through the graph; the answer is streamed."""
        async for answer in self.middle.generate(request):
            yield f"{self.message}: {answer}"
