"""vLLM's AsyncLLM behind the Engine protocol. Seen with 0.26 (GPU) and 0.32 (CPU).

This file, its `vllm_*` neighbours and our connector are the only ones that import vLLM.

On the CPU the engine core is forked after its modules are imported, and stays without worker processes: ready in 8 s
where vLLM's own way takes 20 to 50. It dies with this process, which vLLM alone does not see to.
"""

from __future__ import annotations

import asyncio
import importlib
import logging
import os
import time
from collections.abc import AsyncIterator, Callable, Coroutine, Mapping
from typing import Any, TypeVar

import msgspec

from dynamo.engines.kv_transfer import configuration as kv_transfer
from dynamo.engines.kv_transfer.release import release
from dynamo.engines.vllm import events, options, process, translation
from dynamo.engines.vllm.install import cpu_build
from dynamo.engines.vllm.multi_node import MultiNode
from dynamo.engines.vllm.stats import Record
from dynamo.errors import EngineDeadError, EngineError, StartError
from dynamo.llm.engine import EngineInfo, EngineStats, KvListener, KvTransfers
from dynamo.llm.model_files import tokenizer_dir
from dynamo.llm.protocol import Delta, GenerateRequest, Sampling
from dynamo.streams import Channel, Stream

log = logging.getLogger(__name__)

STALL_S = 120.0
"""How long the engine may be silent while requests run. A long prefill on a slow CPU takes tens of seconds."""

T = TypeVar("T")


class VllmEngine:
    def __init__(self, model: str, arguments: Mapping[str, Any], progress: Callable[[str], None]) -> None:
        """`arguments` are vLLM's flags, and ours: `kv-transfer` (bool), to compute KV for other engines and to fetch it
        from them with our connector unless a `kv-transfer-config` names one; `kv-transfer-lease-s`, for how long it is
        kept for whoever does not come.
        """
        self._model, self._progress = model, progress
        self._options = options.Options(model, arguments)
        self._record = Record()
        self._llm: Any = None
        self._nodes = MultiNode.of(self._options.flags)
        self._executor: Any = None
        """instead of the LLM, on a node that does not lead"""
        self._tasks: set[asyncio.Task[Any]] = set()
        self._releases: set[asyncio.Task[None]] = set()
        self._last_output = 0.0
        self._listener: KvListener | None = None
        self._sources: list[events.KvEventSource] = []

    async def start(self) -> EngineInfo:
        """Blocks the event loop for as long as vLLM takes to import and load: it must stay in the main thread."""
        if os.path.sep in self._model or not self._model:
            tokenizer_dir(self._model)  # fails in milliseconds where vLLM takes 10 s to find out
        options.set_environment()
        if self._nodes is not None:
            options.face_other_nodes()
        self._progress("importing vLLM")
        started = time.monotonic()
        try:
            arg_utils = importlib.import_module("vllm.engine.arg_utils")
            async_llm = importlib.import_module("vllm.v1.engine.async_llm")
        except (ImportError, OSError) as error:  # a library of another version, a CUDA library that is missing
            raise StartError(f"vLLM cannot be imported: {error}", hint="see the versions with: dynamo env") from error
        log.debug("vLLM imported in %.1f s", time.monotonic() - started)
        config, no_stats = self._options.configuration(arg_utils.AsyncEngineArgs, events=self._listener is not None)
        ranks = int(config.parallel_config.data_parallel_size)
        self._record.expect(ranks)
        if self._nodes is not None:
            await self._nodes.meet(self._progress, process.end)
            if not self._nodes.leads:
                return self._stand_by(config, self._nodes)
        if cpu_build() and config.parallel_config.world_size == 1:
            process.prepare_fork()
        self._progress(_loading())
        try:
            self._llm = async_llm.AsyncLLM.from_vllm_config(
                config, stat_loggers=[self._record.logger], disable_log_stats=no_stats
            )
        except Exception as error:
            raise _not_started(error) from error
        if self._nodes is not None:
            self._nodes.started()
        self._defaults = config.model_config.get_diff_sampling_param()
        self._listen(config.kv_events_config, ranks)
        cache = self._llm.vllm_config.cache_config  # as the engine cores have set it; its blocks are those of all ranks
        blocks = (cache.num_gpu_blocks or 0) // ranks
        slots = config.scheduler_config.max_num_seqs
        return EngineInfo(config.model_config.max_model_len, cache.block_size, blocks, ranks, slots)

    def _stand_by(self, config: Any, nodes: MultiNode) -> EngineInfo:
        """Run this node's workers, which the leader's engine core drives."""
        self._progress(_loading())
        executors = importlib.import_module("vllm.v1.executor.multiproc_executor")
        try:
            self._executor = executors.MultiprocExecutor(config)
        except Exception as error:
            raise _not_started(error) from error
        nodes.started()
        return EngineInfo(config.model_config.max_model_len, 0, 0, headless=str(nodes))

    def _listen(self, config: Any, ranks: int) -> None:
        if self._listener is not None:
            for rank in range(ranks):
                source = events.KvEventSource(rank, config.endpoint, config.replay_endpoint, self._listener)
                self._sources.append(source)

    # -- requests

    def _begin(self, work: Coroutine[Any, Any, T]) -> asyncio.Task[T]:
        """A task that `stop` cancels, and during which the engine may not be silent for long."""
        if not self._tasks:
            self._last_output = time.monotonic()
        task = asyncio.get_running_loop().create_task(work)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)
        return task

    def generate(self, request: GenerateRequest) -> Stream[Delta]:
        channel: Channel[Delta] = Channel()
        channel.on_cancel = self._begin(self._generate(request, channel)).cancel
        return Stream(channel)

    async def _generate(self, request: GenerateRequest, channel: Channel[Delta]) -> None:
        first = True
        try:
            async for output in self._outputs(request):
                self._last_output = time.monotonic()
                for choice in output.outputs:
                    if choice.token_ids or choice.text or choice.finish_reason:
                        channel.push(translation.delta_of(request, output, choice, first=first))
                        first = False
            channel.end()
        except asyncio.CancelledError:
            channel.cancel()
            if first and request.kv_transfer:
                self._release(request.kv_transfer)
            raise
        except Exception as error:
            channel.end(translation.error_of(error))

    def _outputs(self, request: GenerateRequest) -> AsyncIterator[Any]:
        outputs: AsyncIterator[Any] = self._llm.generate(
            {"prompt_token_ids": request.token_ids},
            translation.sampling_params(request, self._defaults),
            request.request_id or os.urandom(8).hex(),
            priority=request.sampling.priority,
            data_parallel_rank=request.rank,
        )
        return outputs

    def _release(self, params: Mapping[str, Any]) -> None:
        """Of a request that ended before its first token: perhaps the engine core, which would tell, has not seen it."""
        task = asyncio.get_running_loop().create_task(asyncio.to_thread(release, params))
        self._releases.add(task)
        task.add_done_callback(self._releases.discard)

    async def prefill(self, request: GenerateRequest) -> dict[str, Any]:
        """Empty where a user's connector has both sides find KV by its content, without being told."""
        if not self._options.transfers:
            raise EngineError("this engine keeps no KV for others", hint="set kv-transfer: true for its worker")
        try:
            return await self._begin(self._prefill(request))
        except asyncio.CancelledError:
            caller = asyncio.current_task()
            if caller is not None and caller.cancelling():
                raise
            raise EngineError("the engine is stopping") from None

    async def _prefill(self, request: GenerateRequest) -> dict[str, Any]:
        # connectors keep the KV of requests that end by their length
        sampling = Sampling(max_tokens=1, temperature=0.0, ignore_eos=True, priority=request.sampling.priority)
        wanted = msgspec.structs.replace(request, sampling=sampling, final_only=True, kv_transfer=kv_transfer.PREFILL)
        last: Any = None
        try:
            async for output in self._outputs(wanted):
                self._last_output = time.monotonic()
                last = output
        except Exception as error:
            raise translation.error_of(error) from error
        if last is None or last.outputs[0].finish_reason != "length":
            raise EngineError("the prefill was aborted")
        if not last.kv_transfer_params:
            return {}
        return {**last.kv_transfer_params, translation.CACHED: last.num_cached_tokens or 0}

    async def abort(self, request_id: str) -> None:
        await self._llm.abort(request_id)

    # -- what it tells

    def kv_transfers(self) -> KvTransfers | None:
        # NIXL's and others' are among vLLM's own metrics
        return self._record.transfers() if self._options.own_transfer else None

    def stats(self) -> list[EngineStats]:
        """vLLM tells what it does with its steps: without requests there are none, and its last word may be old."""
        last = self._record.ranks
        if self._tasks:
            return list(last)
        # while it holds KV for others it steps, and tells
        holds = self._options.transfers
        return [s._replace(running=0, waiting=0, kv_usage=s.kv_usage if holds else 0.0) for s in last]

    def kv_events(self, listener: KvListener) -> bool:
        """False without prefix caching, and where a kv-events-config sends the events elsewhere."""
        if not self._options.tells_events():
            return False
        self._listener = listener
        return True

    async def check_health(self) -> None:
        """vLLM notices an engine core that died; one that is stopped or hangs it does not."""
        if self._nodes is not None and self._nodes.lost:
            raise EngineDeadError(self._nodes.lost, hint="all its nodes start again")
        if self._executor is not None and self._executor.is_failed:
            raise EngineDeadError("a worker process of vLLM has died", hint="all nodes of the engine start again")
        try:
            if self._llm is not None:
                await self._llm.check_health()
        except Exception as error:
            raise translation.error_of(error) from error
        for pid in process.children():
            if process.stopped(pid):
                raise EngineError(f"vLLM's process {pid} is stopped", hint="the worker is being restarted")
        if self._tasks and time.monotonic() - self._last_output > STALL_S:
            raise EngineError(f"vLLM has answered nothing for {STALL_S:.0f} s", hint="the worker is being restarted")

    async def stop(self) -> None:
        for source in self._sources:
            source.close()
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)
        await asyncio.gather(*self._releases, return_exceptions=True)
        if self._nodes is not None:
            self._nodes.close()
        if self._llm is not None:
            self._llm.shutdown()
        if self._executor is not None:
            self._executor.shutdown()
        if self._options.private_events is not None:
            events.remove(self._options.private_events)


def _loading() -> str:
    return "loading the model" if cpu_build() else "loading the model; a first start on a machine compiles for minutes"


def _not_started(error: Exception) -> StartError:
    return StartError(f"vLLM did not start: {translation.first_line(error)}", hint="its own log is above")
