"""Frontends of 0.1 to 0.3 that leave HTTP to another program: `http` after `llmctl`, or `dynamo-run`."""

import logging
import os
import subprocess

from fastapi import FastAPI
from pydantic import BaseModel, ConfigDict

from dynamo.llm import ModelType, register_llm
from dynamo.sdk import api, async_on_start, depends, dynamo_context, endpoint, on_shutdown, service
from dynamo.sdk.lib.config import ServiceConfig

logger = logging.getLogger(__name__)

# the port of the service itself, so that it does not take the one of the server that it starts
os.environ["DYNAMO_PORT"] = os.environ.get("OWN_PORT", "3999")


class ChatRequest(BaseModel):
    model_config = ConfigDict(extra="allow")

    model: str
    messages: list


class IngressConfig(BaseModel):
    served_model_name: str
    endpoint: str
    port: int = 8080


@service(dynamo={"namespace": "ingress"}, workers=1)
class Speller:
    @endpoint()
    async def spell(self, word: str):
        for letter in word:
            yield letter


@service(dynamo={"namespace": "ingress"}, workers=1)
class Processor:
    speller = depends(Speller)

    @async_on_start
    async def register(self):
        runtime = dynamo_context["runtime"]
        namespace, component = Processor.dynamo_address()
        answering = runtime.namespace(namespace).component(component).endpoint("chat/completions")
        await register_llm(ModelType.Chat, answering, "registered-model")

    @endpoint(name="chat/completions")
    async def chat(self, raw_request: ChatRequest):
        async for letter in self.speller.spell(raw_request.messages[-1]["content"]):
            yield self.chunk({"content": letter.upper()}, None)
        yield self.chunk({}, "stop")

    def chunk(self, delta, finish):
        choice = {"index": 0, "delta": delta, "finish_reason": finish}
        return {"id": "1", "object": "chat.completion.chunk", "created": 1, "model": "m", "choices": [choice]}


@service(dynamo={"namespace": "ingress"}, workers=1)
class Frontend:
    processor = depends(Processor)

    def __init__(self):
        self.config = IngressConfig(**ServiceConfig.get_parsed_config("Frontend"))
        self.llmctl("remove", self.config.served_model_name)
        self.llmctl("add", self.config.served_model_name, self.config.endpoint)
        logger.info("Starting HTTP server")
        self.process = subprocess.Popen(["http", "-p", str(self.config.port)], stdout=None, stderr=None)

    def llmctl(self, action, *arguments):
        subprocess.run(["llmctl", "http", action, "chat-models", *arguments], check=False)

    @api()
    def dummy_api(self) -> None:
        """Exist, so that the service has an HTTP port of its own."""

    @on_shutdown
    def cleanup(self):
        self.llmctl("remove", self.config.served_model_name)


@service(dynamo={"enabled": True, "namespace": "ingress"}, workers=1, app=FastAPI(title="LLM Example"))
class RunFrontend:
    """Has an application without a route of its own, and so no HTTP server: `port` is that of `dynamo-run`."""

    processor = depends(Processor)

    def __init__(self):
        self.config = IngressConfig(**ServiceConfig.get_parsed_config("RunFrontend"))
        output = f"out=dyn://{self.config.endpoint}"
        self.process = subprocess.Popen(["dynamo-run", "in=http", output, "--http-port", str(self.config.port)])


@service(resources={"cpu": "10", "memory": "20Gi"}, workers=1)
class WaitingFrontend:
    """Waits for its server in the constructor, as those of 0.1 do."""

    processor = depends(Processor)

    def __init__(self):
        config = IngressConfig(**ServiceConfig.get_instance().get("WaitingFrontend", {}))
        subprocess.run(["llmctl", "http", "add", "chat-models", config.served_model_name, config.endpoint], check=False)
        process = subprocess.Popen(["http", "-p", str(config.port)])
        try:
            process.wait()
        except KeyboardInterrupt:
            process.terminate()
            process.wait()
