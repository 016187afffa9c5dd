"""A model in this very process, without NATS, etcd or HTTP: an engine and what turns messages into tokens."""

from __future__ import annotations

import asyncio
import os
import signal
import sys
import tempfile
import threading
from collections.abc import Generator, Iterator
from contextlib import contextmanager
from types import TracebackType
from typing import Any, Self

from dynamo import engines, prctl
from dynamo.cli.chat import Message, Piece, Progress, Sampled
from dynamo.engines.vllm.install import cpu_build
from dynamo.launcher import guard
from dynamo.llm import tiny
from dynamo.llm.model_files import tokenizer_dir
from dynamo.llm.preprocess import Preprocessor
from dynamo.llm.protocol import ChatRequest, Delta, GenerateRequest, Sampling
from dynamo.llm.tokenizer import Tokenizer
from dynamo.streams import Stream
from dynamo.worker.environment import RUN_DIR

POLL_S = 0.1
SETTLE_S = 0.05  # until the engine has heard that its request was given up
TINY_KV_BYTES = 64 << 20


class LocalModel:
    """Started by `with`, gone after it: the engine's processes too, also when a signal ends the loading.

    Its event loop runs while a token is awaited, and not while the user thinks.
    """

    def __init__(self, model: str, engine: str, context_tokens: int | None, progress: Progress) -> None:
        self.name = f"{model} ({engine})"
        self._model, self._engine_name, self._context_tokens = model, engine, context_tokens
        self._progress = progress

    def __enter__(self) -> Self:
        tokenizer = Tokenizer(tokenizer_dir(self._model))
        self._engine = engines.create(self._engine_name, self._model, self._arguments(), self._progress.say)
        self._runner = asyncio.Runner()
        self._run_dir = tempfile.TemporaryDirectory(prefix="dynamo-")  # vLLM leaves its sockets behind
        os.environ[RUN_DIR] = self._run_dir.name
        try:
            with _stoppable_loading():
                info = self._runner.run(self._engine.start())
        except BaseException:
            self._stop()
            guard.kill_tree()  # an engine core that is not known yet to the engine that was starting it
            raise
        finally:
            self._progress.clear()
        self._preprocessor = Preprocessor(tokenizer, info.context_length)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._stop()

    def _stop(self) -> None:
        try:
            self._runner.run(self._engine.stop())
        finally:
            self._runner.close()
            del os.environ[RUN_DIR]
            self._run_dir.cleanup()

    def _arguments(self) -> dict[str, Any]:
        """For one user who wants to begin soon."""
        arguments: dict[str, Any] = {}
        if self._context_tokens is not None:
            arguments["max-model-len"] = self._context_tokens
        if self._engine_name != "vllm":
            return arguments
        if cpu_build():
            arguments |= {"enforce-eager": True, "block-size": 32}
        if self._model == tiny.NAME:
            arguments["kv-cache-memory-bytes"] = TINY_KV_BYTES
        return arguments

    def answer(self, messages: list[Message], sampled: Sampled) -> Generator[Piece]:
        """Raises RequestError and ContextLengthError for the messages, EngineError when the engine fails."""
        temperature = sampled.temperature
        if temperature is None and self._model == tiny.NAME:
            temperature = 0.0  # it was trained to answer word for word
        sampling = Sampling(max_tokens=sampled.max_tokens, temperature=temperature)
        chat = ChatRequest(self._model, [dict(message) for message in messages], sampling)
        stream = self._runner.run(self._open(chat))
        try:
            while (delta := self._runner.run(_next(stream))) is not None:
                yield Piece(delta.text, len(delta.token_ids), delta.prompt_tokens or 0)
        except BaseException:
            self._runner.run(_leave(stream))
            raise

    async def _open(self, chat: ChatRequest) -> Stream[Delta]:
        request: GenerateRequest = await self._preprocessor.chat(chat)
        return self._engine.generate(request)


async def _next(stream: Stream[Delta]) -> Delta | None:
    return await anext(stream, None)


async def _leave(stream: Stream[Delta]) -> None:
    stream.cancel()
    await asyncio.sleep(SETTLE_S)


@contextmanager
def _stoppable_loading() -> Iterator[None]:
    """Ctrl-C ends this process at once, with all below it, though the main thread is deep in an engine's start.

    SIGINT is blocked meanwhile, and so for good in what the engine starts: a terminal sends it to the whole process
    group, and an engine core would take it as its own end when the user only wants to stop an answer.
    """
    before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
    prctl.set_subreaper()
    loaded = threading.Event()

    def watch() -> None:
        while not loaded.is_set():
            if signal.sigtimedwait({signal.SIGINT}, POLL_S) is not None:
                guard.kill_tree(0)
                sys.stderr.write("\n")
                sys.stderr.flush()
                os._exit(128 + signal.SIGINT)

    watcher = threading.Thread(target=watch, name="ctrl-c", daemon=True)
    watcher.start()
    try:
        yield
    finally:
        loaded.set()
        watcher.join()
        signal.pthread_sigmask(signal.SIG_SETMASK, before)
