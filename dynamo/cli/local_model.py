"""A model in this process, without NATS, etcd or HTTP: an engine and a preprocessor."""

from __future__ import annotations

import asyncio
import os
import signal
import sys
import tempfile
import threading
from collections.abc import Coroutine, Generator, Iterator, Mapping
from contextlib import contextmanager
from types import TracebackType
from typing import Any, Self, TypeVar

from dynamo import engines, prctl
from dynamo.cli.chat import Message, Piece, Progress, SamplingOptions
from dynamo.engines.vllm.install import cpu_build
from dynamo.launcher import guard
from dynamo.llm import tiny
from dynamo.llm.engine import Engine
from dynamo.llm.model_files import tokenizer_dir
from dynamo.llm.preprocess import Preprocessor
from dynamo.llm.protocol import ChatRequest, Delta, GenerateRequest, Sampling
from dynamo.llm.tokenizer import Tokenizer
from dynamo.streams import Stream
from dynamo.worker.environment import RUN_DIR

T = TypeVar("T")

POLL_S = 0.1
CANCEL_S = 0.05  # for the engine to receive a cancellation
TINY_KV_BYTES = 64 << 20


class LocalModel:
    """A model that runs while its `with` block does. The engine's processes end with it, also on a signal while loading.

    Its event loop runs only while a token is awaited, not while the user types.
    """

    engine: Engine
    preprocessor: Preprocessor

    def __init__(
        self,
        model: str,
        engine: str,
        context_tokens: int | None,
        progress: Progress,
        arguments: Mapping[str, Any] | None = None,
    ) -> None:
        """`arguments` are further arguments of the engine, vLLM's flags by name."""
        self.name = f"{model} ({engine})"
        self._given = dict(arguments or {})
        self._model = model
        self._engine_name = engine
        self._context_tokens = context_tokens
        self._progress = progress

    def __enter__(self) -> Self:
        tokenizer = Tokenizer(tokenizer_dir(self._model))
        self.engine = engines.create(self._engine_name, self._model, self._arguments(), self._progress.show)
        self._runner = asyncio.Runner()
        self._run_dir = tempfile.TemporaryDirectory(prefix="dynamo-")  # vLLM leaves its sockets behind
        os.environ[RUN_DIR] = self._run_dir.name
        try:
            with _stoppable_loading():
                info = self._runner.run(self.engine.start())
        except BaseException:
            self._stop()
            guard.kill_tree()  # also an engine core that its engine, still starting, does not know yet
            raise
        finally:
            self._progress.clear()
        self.preprocessor = Preprocessor(tokenizer, info.context_length)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._stop()

    def _stop(self) -> None:
        try:
            self._runner.run(self.engine.stop())
        finally:
            self._runner.close()
            del os.environ[RUN_DIR]
            self._run_dir.cleanup()

    def _arguments(self) -> dict[str, Any]:
        """Return engine arguments for a short start and a single user."""
        arguments: dict[str, Any] = {}
        if self._context_tokens is not None:
            arguments["max-model-len"] = self._context_tokens
        if self._engine_name != "vllm":
            return arguments | self._given
        if cpu_build():
            arguments |= {"enforce-eager": True, "block-size": 32}
        if self._model == tiny.NAME:
            arguments["kv-cache-memory-bytes"] = TINY_KV_BYTES
        return arguments | self._given

    def run(self, work: Coroutine[Any, Any, T]) -> T:
        """Run a coroutine on the model's event loop, such as one that serves its engine."""
        return self._runner.run(work)

    def answer(self, messages: list[Message], sampling: SamplingOptions) -> Generator[Piece]:
        """Answer the last message. Raises RequestError or ContextLengthError for the messages, EngineError of the engine."""
        temperature = sampling.temperature
        if temperature is None and self._model == tiny.NAME:
            temperature = 0.0  # trained to give exact answers
        request = ChatRequest(
            self._model,
            [dict(message) for message in messages],
            Sampling(max_tokens=sampling.max_tokens, temperature=temperature),
        )
        stream = self._runner.run(self._open(request))
        try:
            while (delta := self._runner.run(_next(stream))) is not None:
                yield Piece(delta.text, len(delta.token_ids), delta.prompt_tokens or 0)
        except BaseException:
            self._runner.run(_cancel(stream))
            raise

    async def _open(self, chat: ChatRequest) -> Stream[Delta]:
        request: GenerateRequest = await self.preprocessor.chat(chat)
        return self.engine.generate(request)


async def _next(stream: Stream[Delta]) -> Delta | None:
    return await anext(stream, None)


async def _cancel(stream: Stream[Delta]) -> None:
    stream.cancel()
    await asyncio.sleep(CANCEL_S)


@contextmanager
def _stoppable_loading() -> Iterator[None]:
    """Let Ctrl-C end this process and all below it immediately, while the main thread is busy starting an engine.

    SIGINT is blocked in the block, and the processes that the engine starts inherit this for good: a terminal sends SIGINT
    to the whole process group, and an engine core would exit when the user only wants to stop an answer.
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
