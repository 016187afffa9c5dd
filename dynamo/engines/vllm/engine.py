"""vLLM's AsyncLLM behind the Engine protocol. Tested with vLLM 0.26 (GPU) and 0.32 (CPU).

Only the modules of this package and our connector import vLLM.

On the CPU the engine core is forked after its modules are imported, and runs without worker processes: it is ready in
8 s, where vLLM's default start takes 20 to 50 s. The fork dies with this process, which vLLM alone does not ensure.
"""

from __future__ import annotations

import asyncio
import importlib
import logging
import os
import time
from collections.abc import AsyncIterator, Callable, Coroutine, Mapping
from typing import Any

import msgspec

from dynamo.engines.kv_transfer import configuration as kv_transfer
from dynamo.engines.kv_transfer.release import release
from dynamo.engines.vllm import options, process, translation
from dynamo.engines.vllm.events import KvEventSource
from dynamo.engines.vllm.events_config import remove_sockets
from dynamo.engines.vllm.install import cpu_build
from dynamo.engines.vllm.multi_node import NodeGroup
from dynamo.engines.vllm.stats import StatsRecorder
from dynamo.errors import EngineDeadError, EngineError, StartError
from dynamo.llm.engine import EngineInfo, EngineStats, KvListener, KvTransfers
from dynamo.llm.model_files import tokenizer_dir
from dynamo.llm.protocol import Delta, GenerateRequest, Sampling
from dynamo.streams import Channel, Stream
from dynamo.tasks import TaskSet

log = logging.getLogger(__name__)

STALL_S = 120.0
"""How long the engine may be silent while requests run. A long prefill on a slow CPU takes tens of seconds."""


class VllmEngine:
    """An engine of vLLM in this process, with its engine core in a child process.

    On a node of a multi-node engine other than the leader, it runs that node's workers instead and takes no requests.
    """

    def __init__(self, model: str, arguments: Mapping[str, Any], progress: Callable[[str], None]) -> None:
        """`arguments` are vLLM's flags and two of ours.

        `kv-transfer` (bool): compute KV for other engines and fetch KV from them, with our connector unless a
        `kv-transfer-config` names another. `kv-transfer-lease-s`: how long that KV is kept if no engine fetches it.
        """
        self._model = model
        self._progress = progress
        self._options = options.Options(model, arguments)
        self._recorder = StatsRecorder()
        self._llm: Any = None
        self._nodes = NodeGroup.from_flags(self._options.flags)
        self._executor: Any = None
        """in place of the LLM on a node other than the leader"""
        self._requests = TaskSet("vllm")
        self._releases = TaskSet("vllm")
        self._last_output = 0.0
        self._listener: KvListener | None = None
        self._sources: list[KvEventSource] = []

    # -- start

    async def start(self) -> EngineInfo:
        """Start the engine. Blocks the event loop while vLLM imports and loads: both must run in the main thread."""
        if os.path.sep in self._model or not self._model:
            tokenizer_dir(self._model)  # reports a wrong path in milliseconds, where vLLM takes 10 s
        options.set_environment()
        if self._nodes is not None:
            options.set_network_environment()
        arg_utils, async_llm = self._import_vllm()
        config, no_stats = self._options.configuration(arg_utils.AsyncEngineArgs, events=self._listener is not None)
        ranks = int(config.parallel_config.data_parallel_size)
        self._recorder.set_rank_count(ranks)
        if self._nodes is not None:
            await self._nodes.connect(self._progress, process.abort_start)
            if not self._nodes.is_leader:
                return self._start_workers(config, self._nodes)
        if cpu_build() and config.parallel_config.world_size == 1:
            process.prepare_fork()
        self._progress(_loading())
        try:
            self._llm = async_llm.AsyncLLM.from_vllm_config(
                config, stat_loggers=[self._recorder.stat_logger], disable_log_stats=no_stats
            )
        except Exception as error:
            raise _not_started(error) from error
        if self._nodes is not None:
            self._nodes.mark_started()
        self._defaults = config.model_config.get_diff_sampling_param()
        self._subscribe(config.kv_events_config, ranks)
        cache = self._llm.vllm_config.cache_config  # as the engine cores have set it; its blocks are those of all ranks
        blocks = (cache.num_gpu_blocks or 0) // ranks
        slots = config.scheduler_config.max_num_seqs
        return EngineInfo(config.model_config.max_model_len, cache.block_size, blocks, ranks, slots)

    def _import_vllm(self) -> tuple[Any, Any]:
        """Import and return vLLM's modules `engine.arg_utils` and `v1.engine.async_llm`. Raises StartError."""
        self._progress("importing vLLM")
        started = time.monotonic()
        try:
            arg_utils = importlib.import_module("vllm.engine.arg_utils")
            async_llm = importlib.import_module("vllm.v1.engine.async_llm")
        except (ImportError, OSError) as error:  # a library of another version, or a missing CUDA library
            raise StartError(f"vLLM cannot be imported: {error}", hint="see the versions with: dynamo env") from error
        log.debug("vLLM imported in %.1f s", time.monotonic() - started)
        return arg_utils, async_llm

    def _start_workers(self, config: Any, nodes: NodeGroup) -> EngineInfo:
        """Start this node's workers, which the leader's engine core drives."""
        self._progress(_loading())
        executors = importlib.import_module("vllm.v1.executor.multiproc_executor")
        try:
            self._executor = executors.MultiprocExecutor(config)
        except Exception as error:
            raise _not_started(error) from error
        nodes.mark_started()
        return EngineInfo(config.model_config.max_model_len, 0, 0, headless=str(nodes))

    def _subscribe(self, events_config: Any, ranks: int) -> None:
        """Subscribe to every rank's KV events if there is a listener."""
        if self._listener is None:
            return
        for rank in range(ranks):
            source = KvEventSource(rank, events_config.endpoint, events_config.replay_endpoint, self._listener)
            self._sources.append(source)

    # -- requests

    def generate(self, request: GenerateRequest) -> Stream[Delta]:
        channel: Channel[Delta] = Channel()
        channel.on_cancel = self._spawn(self._generate(request, channel), name="generate").cancel
        return Stream(channel)

    async def _generate(self, request: GenerateRequest, channel: Channel[Delta]) -> None:
        first = True
        try:
            async for output in self._outputs(request):
                self._last_output = time.monotonic()
                for choice in output.outputs:
                    if choice.token_ids or choice.text or choice.finish_reason:
                        channel.push(translation.to_delta(request, output, choice, first=first))
                        first = False
            channel.end()
        except asyncio.CancelledError:
            channel.cancel()
            if first and request.kv_transfer:
                # the engine core, which would release the lease, may not have received the request
                self._releases.spawn(asyncio.to_thread(release, request.kv_transfer), name="release KV")
            raise
        except Exception as error:
            channel.end(translation.to_error(error))

    async def prefill(self, request: GenerateRequest) -> dict[str, Any]:
        """Compute a prompt's KV, keep it and return the kv_transfer_params for the engine that fetches it.

        They are empty if a user's connector finds KV by its content. Raises EngineError if `kv-transfer` is off, the
        request is aborted or the engine stops.
        """
        if not self._options.transfers_kv:
            raise EngineError("this engine keeps no KV for other engines", hint="set kv-transfer: true for its worker")
        try:
            found: dict[str, Any] = await self._spawn(self._prefill(request), name="prefill", log_errors=False)
            return found
        except asyncio.CancelledError:
            caller = asyncio.current_task()
            if caller is not None and caller.cancelling():
                raise
            raise EngineError("the engine is stopping") from None

    async def _prefill(self, request: GenerateRequest) -> dict[str, Any]:
        # connectors keep the KV of requests that end by their length
        sampling = Sampling(max_tokens=1, temperature=0.0, ignore_eos=True, priority=request.sampling.priority)
        prefill = msgspec.structs.replace(request, sampling=sampling, final_only=True, kv_transfer=kv_transfer.PREFILL)
        last: Any = None
        try:
            async for output in self._outputs(prefill):
                self._last_output = time.monotonic()
                last = output
        except Exception as error:
            raise translation.to_error(error) from error
        if last is None or last.outputs[0].finish_reason != "length":
            raise EngineError("the prefill was aborted")
        if not last.kv_transfer_params:
            return {}
        return {**last.kv_transfer_params, translation.CACHED_TOKENS: last.num_cached_tokens or 0}

    def _spawn(self, work: Coroutine[Any, Any, Any], *, name: str, log_errors: bool = True) -> asyncio.Task[Any]:
        """Run a request's work until `stop`. While such work runs, the engine counts as stalled after STALL_S."""
        if not self._requests:
            self._last_output = time.monotonic()
        return self._requests.spawn(work, name=name, log_errors=log_errors)

    def _outputs(self, request: GenerateRequest) -> AsyncIterator[Any]:
        outputs: AsyncIterator[Any] = self._llm.generate(
            {"prompt_token_ids": request.token_ids},
            translation.sampling_params(request, self._defaults),
            request.request_id or os.urandom(8).hex(),
            priority=request.sampling.priority,
            data_parallel_rank=request.rank,
        )
        return outputs

    async def abort(self, request_id: str) -> None:
        await self._llm.abort(request_id)

    # -- load, KV events, health

    def kv_transfers(self) -> KvTransfers | None:
        """Return the counts of our connector; None with another one, whose counts are among vLLM's own metrics."""
        return self._recorder.transfers() if self._options.uses_own_connector else None

    def stats(self) -> list[EngineStats]:
        """Return each rank's load. Without requests vLLM takes no steps and reports nothing, so the load is set to 0.

        KV usage is kept if the engine transfers KV: while it keeps KV for others, vLLM takes steps and reports.
        """
        latest = self._recorder.ranks
        if self._requests:
            return list(latest)
        keeps_kv = self._options.transfers_kv
        return [s._replace(running=0, waiting=0, kv_usage=s.kv_usage if keeps_kv else 0.0) for s in latest]

    def kv_events(self, listener: KvListener) -> bool:
        """Set the listener that `start` subscribes to KV events; return False if the engine does not publish them here."""
        if not self._options.publishes_kv_events():
            return False
        self._listener = listener
        return True

    async def check_health(self) -> None:
        """Raise EngineError if the engine has failed. vLLM itself detects a dead engine core, not a stopped or hung one."""
        if self._nodes is not None and self._nodes.lost:
            raise EngineDeadError(self._nodes.lost, hint="all its nodes start again")
        if self._executor is not None and self._executor.is_failed:
            raise EngineDeadError("a worker process of vLLM has died", hint="all nodes of the engine start again")
        try:
            if self._llm is not None:
                await self._llm.check_health()
        except Exception as error:
            raise translation.to_error(error) from error
        for pid in process.child_pids():
            if process.is_stopped(pid):
                raise EngineError(f"vLLM's process {pid} is stopped", hint="the worker is being restarted")
        if self._requests and time.monotonic() - self._last_output > STALL_S:
            raise EngineError(f"vLLM produced no output for {STALL_S:.0f} s", hint="the worker is being restarted")

    async def stop(self) -> None:
        for source in self._sources:
            source.close()
        await self._requests.aclose()
        await self._releases.wait()
        if self._nodes is not None:
            self._nodes.close()
        if self._llm is not None:
            self._llm.shutdown()
        if self._executor is not None:
            self._executor.shutdown()
        if self._options.private_events is not None:
            remove_sockets(self._options.private_events)


def _loading() -> str:
    return "loading the model" if cpu_build() else "loading the model; a first start on a machine compiles for minutes"


def _not_started(error: Exception) -> StartError:
    return StartError(f"vLLM did not start: {translation.first_line(error)}", hint="its own log is above")
