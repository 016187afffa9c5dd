"""Three services that pass a text along: the smallest graph with an HTTP endpoint."""

from __future__ import annotations

from collections.abc import AsyncIterator

from pydantic import BaseModel

from dynamo.sdk import Service, api, depends, endpoint, service


class Text(BaseModel):
    text: str


@service(dynamo={"namespace": "inference"})
class Backend(Service):
    """Answers with the words of the text, one by one."""

    def __init__(self, message: str = "back") -> None:
        """
        Args:
            message: appended to the text.
        """
        self.message = message

    @endpoint
    async def generate(self, request: Text) -> AsyncIterator[str]:
        for word in f"{request.text}-{self.message}".split():
            yield f"Backend: {word}"


@service(dynamo={"namespace": "inference"})
class Middle(Service):
    """Calls Backend and streams its answer on."""

    backend = depends(Backend)

    def __init__(self, message: str = "mid") -> None:
        """
        Args:
            message: appended to the text.
        """
        self.message = message

    @endpoint
    async def generate(self, request: Text) -> AsyncIterator[str]:
        async for answer in self.backend.generate(Text(text=f"{request.text}-{self.message}")):
            yield f"Middle: {answer}"


@service(dynamo={"namespace": "inference"})
class Frontend(Service):
    """Serves `POST /generate`."""

    middle = depends(Middle)

    def __init__(self, message: str = "Frontend") -> None:
        """
        Args:
            message: the beginning of each answer.
        """
        self.message = message

    @api
    async def generate(self, request: Text) -> AsyncIterator[str]:
        """Send a text through the graph and stream the answer."""
        async for answer in self.middle.generate(request):
            yield f"{self.message}: {answer}"
