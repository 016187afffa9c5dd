"""vLLM's AsyncLLM behind the Engine protocol: the one file that imports vLLM. Seen with 0.26 (GPU) and 0.32 (CPU).

On the CPU the engine core is forked after its modules are imported, and stays without worker processes: ready in 8 s
where vLLM's own way takes 20 to 50. It dies with this process, which vLLM alone does not see to.
"""

from __future__ import annotations

import argparse
import asyncio
import ctypes
import importlib
import json
import logging
import os
import signal
import sys
import time
import warnings
from collections.abc import AsyncIterator, Callable, Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

import msgspec

from dynamo.errors import ContextLengthError, EngineDeadError, EngineError, RequestError, StartError
from dynamo.llm.engine import EngineInfo, EngineStats, KvListener, KvTransfers
from dynamo.llm.engines import vllm_events
from dynamo.llm.engines.installed import cpu_build
from dynamo.llm.engines.kv_transfer import configuration as kv_transfer
from dynamo.llm.engines.kv_transfer.release import release
from dynamo.llm.engines.nodes import Nodes
from dynamo.llm.models import resolve, tokenizer_dir
from dynamo.llm.protocol import Delta, GenerateRequest, Sampling, TokenLogprob
from dynamo.transport.host import advertised_host, interface_of
from dynamo.wire.stream import Channel, Stream

log = logging.getLogger(__name__)

STALL_S = 120.0
"""How long the engine may be silent while requests run. A long prefill on a slow CPU takes tens of seconds."""
USED_GPU_MEMORY = 0.9
"""of a whole GPU, vLLM's default; a worker that shares one takes its share of this"""
CPU_BLOCK_TOKENS = 32  # vLLM's CPU attention takes multiples of this
_PR_SET_PDEATHSIG = 1
_ENVIRONMENT = {
    "VLLM_NO_USAGE_STATS": "1",
    "DO_NOT_TRACK": "1",
    "TOKENIZERS_PARALLELISM": "false",
    "PYTHONHASHSEED": "0",  # block hashes that are equal in all workers
}
_CPU_ENVIRONMENT = {
    "VLLM_ENABLE_V1_MULTIPROCESSING": "0",  # keeps the executor in the engine core's process
    "VLLM_CPU_OMP_THREADS_BIND": "nobind",
    "VLLM_PLUGINS": "",
    "TORCH_CPP_LOG_LEVEL": "ERROR",
}


_CACHED = "remote_prefill_cached_tokens"  # vLLM's name in kv_transfer_params
_IDLE = EngineStats(0, 0, 0.0, 0, 0)


class VllmEngine:
    def __init__(self, model: str, arguments: Mapping[str, Any], progress: Callable[[str], None]) -> None:
        """`arguments` are vLLM's flags, and ours: `kv-transfer` (bool), to compute KV for other engines and to fetch it
        from them with our connector unless a `kv-transfer-config` names one; `kv-transfer-lease-s`, for how long it is
        kept for whoever does not come.
        """
        self._model, self._arguments, self._progress = model, dict(arguments), progress
        self._transfers = bool(self._arguments.pop("kv-transfer", False))
        self._lease_s = float(self._arguments.pop("kv-transfer-lease-s", kv_transfer.LEASE_S))
        self.kv_transferred: dict[str, float] = {}
        """since the start: what `KvTransfers` says with our connector, other numbers with another one"""
        self._own_transfer = False
        self._llm: Any = None
        self._nodes = Nodes.of(self._arguments)
        self._executor: Any = None
        """instead of the LLM, on a node that does not lead"""
        self._tasks: set[asyncio.Task[Any]] = set()
        self._releases: set[asyncio.Task[None]] = set()
        self._stats = [_IDLE]  # of each data-parallel rank
        self._last_output = 0.0
        self._listener: KvListener | None = None
        self._private_events: dict[str, Any] | None = None
        self._sources: list[vllm_events.KvEventSource] = []

    async def start(self) -> EngineInfo:
        """Blocks the event loop for as long as vLLM takes to import and load: it must stay in the main thread."""
        if os.path.sep in self._model or not self._model:
            tokenizer_dir(self._model)  # fails in milliseconds where vLLM takes 10 s to find out
        cpu = cpu_build()
        for name, value in {**_ENVIRONMENT, **(_CPU_ENVIRONMENT if cpu else {})}.items():
            os.environ.setdefault(name, value)
        if logging.getLogger().getEffectiveLevel() > logging.DEBUG:
            # on the CPU its warnings are about what we choose on purpose: eager mode, no Triton, no preloaded libraries
            os.environ.setdefault("VLLM_LOGGING_LEVEL", "ERROR" if cpu else "WARNING")
            warnings.filterwarnings("ignore", category=FutureWarning)
            os.environ.setdefault("TORCH_LOGS", "-all")
        if os.environ.get("VLLM_CONFIGURE_LOGGING", "1") != "0":  # in all its processes vLLM logs as this one does
            os.environ.setdefault("VLLM_LOGGING_CONFIG_PATH", str(Path(__file__).with_name("vllm_logging.json")))
        if cpu:
            os.environ.setdefault("OMP_NUM_THREADS", str(max(1, (os.cpu_count() or 1) // 2)))
        if self._nodes is not None:
            _face_other_nodes()
        self._progress("importing vLLM")
        started = time.monotonic()
        arg_utils = importlib.import_module("vllm.engine.arg_utils")
        async_llm = importlib.import_module("vllm.v1.engine.async_llm")
        usage = importlib.import_module("vllm.usage.usage_lib")
        log.debug("vLLM imported in %.1f s", time.monotonic() - started)
        if self._listener is not None and self._argument("kv-events-config") is None:
            self._private_events = vllm_events.private_config()
        self._own_transfer = own_transfer = self._configure_transfer()
        options = self._parse(arg_utils.AsyncEngineArgs, cpu)
        try:
            config = arg_utils.AsyncEngineArgs.from_cli_args(options).create_engine_config(
                usage_context=usage.UsageContext.OPENAI_API_SERVER
            )
        except (ValueError, OSError) as error:
            raise StartError(f"vLLM refuses the configuration: {_first_line(error)}") from error
        if own_transfer and config.parallel_config.world_size > 1:
            raise StartError(
                f"KV transfer of an engine on {config.parallel_config.world_size} GPUs: our connector takes one",
                hint="set kv-transfer-config: {kv_connector: NixlConnector, kv_role: kv_both}, which needs dynamo[nixl]",
            )
        ranks = int(config.parallel_config.data_parallel_size)
        self._stats = [_IDLE] * ranks
        if self._nodes is not None:
            await self._nodes.meet(self._progress, _end)
            if not self._nodes.leads:
                return self._stand_by(config, self._nodes)
        fork = cpu and config.parallel_config.world_size == 1
        if fork:
            _prepare_fork()
        self._progress("loading the model")
        try:
            self._llm = async_llm.AsyncLLM.from_vllm_config(
                config, stat_loggers=[self._stat_logger], disable_log_stats=options.disable_log_stats
            )
        except Exception as error:
            raise StartError(f"vLLM did not start: {_first_line(error)}", hint="its own log is above") from error
        if self._nodes is not None:
            self._nodes.started()
        self._defaults = config.model_config.get_diff_sampling_param()
        self._listen(config.kv_events_config, ranks)
        cache = self._llm.vllm_config.cache_config  # as the engine cores have set it; its blocks are those of all ranks
        blocks = (cache.num_gpu_blocks or 0) // ranks
        slots = config.scheduler_config.max_num_seqs
        return EngineInfo(config.model_config.max_model_len, cache.block_size, blocks, ranks, slots)

    def _stand_by(self, config: Any, nodes: Nodes) -> EngineInfo:
        """Run this node's workers, which the leader's engine core drives."""
        self._progress("loading the model")
        executors = importlib.import_module("vllm.v1.executor.multiproc_executor")
        try:
            self._executor = executors.MultiprocExecutor(config)
        except Exception as error:
            raise StartError(f"vLLM did not start: {_first_line(error)}", hint="its own log is above") from error
        nodes.started()
        return EngineInfo(config.model_config.max_model_len, 0, 0, part_of=str(nodes))

    def _listen(self, config: Any, ranks: int) -> None:
        if self._listener is not None:
            for rank in range(ranks):
                source = vllm_events.KvEventSource(rank, config.endpoint, config.replay_endpoint, self._listener)
                self._sources.append(source)

    def _configure_transfer(self) -> bool:
        """Whether our connector is used."""
        given = self._argument("kv-transfer-config")
        if given is None:
            if not self._transfers:
                return False
            self._arguments["kv-transfer-config"] = kv_transfer.own(self._lease_s)
            if self._argument("disable-hybrid-kv-cache-manager") is None:
                self._arguments["disable-hybrid-kv-cache-manager"] = True  # one group of KV caches
            return True
        self._transfers = True
        self._arguments.pop("kv_transfer_config", None)
        self._arguments["kv-transfer-config"] = kv_transfer.completed(given)
        for name, value in kv_transfer.nixl_environment(
            given, advertised_host(os.environ.get("NATS_SERVER", ""))
        ).items():
            os.environ.setdefault(name, value)
        return False

    def _parse(self, arguments: Any, cpu: bool) -> Any:
        argparse_utils = importlib.import_module("vllm.utils.argparse_utils")

        class Parser(argparse_utils.FlexibleArgumentParser):  # type: ignore[misc, name-defined]
            def error(self, message: str) -> None:
                raise StartError(f"vLLM's arguments: {message}", hint="check the worker's keys in the configuration")

        given = {name.replace("-", "_") for name in self._arguments}
        parser = arguments.add_cli_args(Parser())
        argv = ["--model", resolve(self._model), *to_argv(self._arguments, parser)]
        if self._private_events is not None:
            argv += ["--kv-events-config", json.dumps(self._private_events)]
        if self._listener is not None and "enable_prefix_caching" not in given:
            argv.append("--enable-prefix-caching")  # off by default for some models
        if cpu and "dtype" not in given and not _fast_bfloat16():
            argv += ["--dtype", "float32"]
        share = os.environ.get("DYNAMO_GPU_SHARE")
        if share and "gpu_memory_utilization" not in given:
            argv += ["--gpu-memory-utilization", f"{USED_GPU_MEMORY * float(share):.3f}"]
        if "use_tqdm_on_load" not in given:
            argv.append("--no-use-tqdm-on-load")  # a bar in a log; progress lines tell the same
        options = parser.parse_args(argv)
        block = getattr(options, "block_size", None)
        if cpu and block and block % CPU_BLOCK_TOKENS:
            raise StartError(
                f"block-size: {block} tokens; vLLM on the CPU takes multiples of {CPU_BLOCK_TOKENS}",
                hint=f"set block-size: {CPU_BLOCK_TOKENS}",
            )
        return options

    def generate(self, request: GenerateRequest) -> Stream[Delta]:
        channel: Channel[Delta] = Channel()
        if not self._tasks:
            self._last_output = time.monotonic()
        task = asyncio.get_running_loop().create_task(self._generate(request, channel))
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)
        channel.on_cancel = task.cancel
        return Stream(channel)

    def _outputs(self, request: GenerateRequest) -> AsyncIterator[Any]:
        outputs: AsyncIterator[Any] = self._llm.generate(
            {"prompt_token_ids": request.token_ids},
            self._sampling_params(request),
            request.request_id or os.urandom(8).hex(),
            priority=request.sampling.priority,
            data_parallel_rank=request.rank,
        )
        return outputs

    async def _generate(self, request: GenerateRequest, channel: Channel[Delta]) -> None:
        first = True
        try:
            async for output in self._outputs(request):
                self._last_output = time.monotonic()
                for choice in output.outputs:
                    if not (choice.token_ids or choice.text or choice.finish_reason):
                        continue
                    channel.push(
                        Delta(
                            choice.text,
                            list(choice.token_ids),
                            choice.index,
                            choice.finish_reason,
                            choice.stop_reason,
                            len(output.prompt_token_ids) if first else None,
                            _cached_tokens(request, output) if first else None,
                            _logprobs(choice.token_ids, choice.logprobs) if choice.logprobs else None,
                        )
                    )
                    first = False
            channel.end()
        except asyncio.CancelledError:
            channel.cancel()
            if first and request.kv_transfer:
                self._release(request.kv_transfer)
            raise
        except Exception as error:
            channel.end(_translate(error))

    def _release(self, params: Mapping[str, Any]) -> None:
        """Of a request that ended before its first token: perhaps the engine core, which would tell, has not seen it."""
        task = asyncio.get_running_loop().create_task(asyncio.to_thread(release, params))
        self._releases.add(task)
        task.add_done_callback(self._releases.discard)

    def _sampling_params(self, request: GenerateRequest) -> Any:
        params = importlib.import_module("vllm.sampling_params")
        given: Sampling = request.sampling
        values: dict[str, Any] = dict(self._defaults)
        values.pop("max_tokens", None)
        for name in ("temperature", "top_p", "top_k", "min_p", "repetition_penalty"):
            value = getattr(given, name)
            if value is not None:
                values[name] = value
        kind = params.RequestOutputKind
        if given.structured:
            values["structured_outputs"] = params.StructuredOutputsParams(**given.structured)
        try:
            return params.SamplingParams(
                **values,
                n=given.n,
                max_tokens=given.max_tokens,
                min_tokens=given.min_tokens,
                presence_penalty=given.presence_penalty,
                frequency_penalty=given.frequency_penalty,
                seed=given.seed,
                stop=given.stop,
                stop_token_ids=given.stop_token_ids,
                include_stop_str_in_output=given.include_stop_str_in_output,
                ignore_eos=given.ignore_eos,
                skip_special_tokens=given.skip_special_tokens,
                logprobs=given.logprobs,
                prompt_logprobs=given.prompt_logprobs,
                logit_bias={int(k): v for k, v in given.logit_bias.items()} if given.logit_bias else None,
                output_kind=kind.FINAL_ONLY if request.final_only else kind.DELTA,
                extra_args={"kv_transfer_params": request.kv_transfer} if request.kv_transfer else None,
            )
        except (ValueError, TypeError) as error:
            raise RequestError(_first_line(error)) from None

    def _stat_logger(self, config: Any, engine_index: int = 0) -> Any:
        loggers = importlib.import_module("vllm.v1.metrics.loggers")
        engine = self

        class Recorder(loggers.StatLoggerBase):  # type: ignore[misc, name-defined]
            def __init__(self) -> None:
                self.queries = self.hits = 0

            def record(self, scheduler_stats: Any = None, iteration_stats: Any = None, *_: Any, **__: Any) -> None:
                found = scheduler_stats
                if found is not None:
                    self.queries += found.prefix_cache_stats.queries
                    self.hits += found.prefix_cache_stats.hits
                    engine._stats[engine_index] = EngineStats(
                        found.num_running_reqs, found.num_waiting_reqs, found.kv_cache_usage, self.queries, self.hits
                    )
                    for name, count in (found.kv_connector_stats or {}).items():
                        if isinstance(count, (int, float)):  # another connector's may be lists
                            engine.kv_transferred[name] = engine.kv_transferred.get(name, 0) + count

            def log_engine_initialized(self) -> None:
                return None

        return Recorder()

    async def prefill(self, request: GenerateRequest) -> dict[str, Any]:
        """Empty where a user's connector has both sides find KV by its content, without being told."""
        if not self._transfers:
            raise EngineError("this engine keeps no KV for others", hint="set kv-transfer: true for its worker")
        if not self._tasks:
            self._last_output = time.monotonic()
        task = asyncio.get_running_loop().create_task(self._prefill(request))
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)
        try:
            return await task
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
            raise _translate(error) from error
        if last is None or last.outputs[0].finish_reason != "length":
            raise EngineError("the prefill was aborted")
        if not last.kv_transfer_params:
            return {}
        return {**last.kv_transfer_params, _CACHED: last.num_cached_tokens or 0}

    async def abort(self, request_id: str) -> None:
        await self._llm.abort(request_id)

    def kv_transfers(self) -> KvTransfers | None:
        if not self._own_transfer:
            return None  # NIXL's and others' are among vLLM's own metrics
        counts = self.kv_transferred
        return KvTransfers(
            pulls=int(counts.get("pulls", 0)),
            failures=int(counts.get("failures", 0)),
            bytes=int(counts.get("bytes", 0)),
            seconds=counts.get("seconds", 0.0),
            expired=int(counts.get("expired", 0)),
        )

    def stats(self) -> list[EngineStats]:
        """vLLM tells what it does with its steps: without requests there are none, and its last word may be old."""
        if self._tasks:
            return list(self._stats)
        # while it holds KV for others it steps, and tells
        return [s._replace(running=0, waiting=0, kv_usage=s.kv_usage if self._transfers else 0.0) for s in self._stats]

    def kv_events(self, listener: KvListener) -> bool:
        """False without prefix caching, and where a kv-events-config sends the events elsewhere."""
        if self._argument("enable-prefix-caching") is False or self._argument("no-enable-prefix-caching"):
            return False
        given = self._argument("kv-events-config")
        if given is not None and not vllm_events.can_listen(given):
            return False
        self._listener = listener
        return True

    def _argument(self, name: str) -> Any:
        return self._arguments.get(name, self._arguments.get(name.replace("-", "_")))

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
            raise _translate(error) from error
        for pid in _children():
            if _state(pid) in ("T", "t"):
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
        if self._private_events is not None:
            vllm_events.remove(self._private_events)


def _face_other_nodes() -> None:
    """Have vLLM and gloo use the address that this host advertises, where nothing else was said."""
    address = advertised_host(os.environ.get("NATS_SERVER", ""))
    os.environ.setdefault("VLLM_HOST_IP", address)
    interface = interface_of(address)
    if interface:
        os.environ.setdefault("GLOO_SOCKET_IFNAME", interface)


def _end(reason: str) -> None:
    """Of a start that waits, in vLLM, for a node that has gone: nothing else gets it out of there."""
    log.error("cannot start: %s", reason)
    for pid in _children():
        with suppress(OSError):
            os.kill(pid, signal.SIGKILL)
    logging.shutdown()
    os._exit(1)


def _children() -> list[int]:
    """Processes that this one has started: the engine core, and on GPUs its workers."""
    try:
        tasks = os.listdir("/proc/self/task")
        return [int(p) for t in tasks for p in Path(f"/proc/self/task/{t}/children").read_text().split()]
    except OSError:
        return []


def _state(pid: int) -> str:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
    except OSError:
        return ""


def to_argv(arguments: Mapping[str, Any], parser: argparse.ArgumentParser) -> list[str]:
    """Configuration values as flags of vLLM's parser: `False` is `--no-flag`, a mapping JSON, a list several words.

    Flags that the parser does not know are passed on, so that its own message tells.
    """
    argv: list[str] = []
    for name, value in arguments.items():
        flag = "--" + name.replace("_", "-")
        action = parser._option_string_actions.get(flag)
        if isinstance(value, bool) and (action is None or action.nargs == 0):
            if value:
                argv.append(flag)
            elif action is None or f"--no-{flag[2:]}" in parser._option_string_actions:
                argv.append(f"--no-{flag[2:]}")
        elif isinstance(value, list) and action is not None and action.nargs in ("+", "*"):
            argv += [flag, *map(str, value)]
        elif isinstance(value, (dict, list)):
            argv += [flag, json.dumps(value)]
        elif value is not None:
            argv += [flag, str(value)]
    return argv


def _prepare_fork() -> None:
    """Import here what the engine core needs, so that the fork has it; tie the fork's life to this process."""
    for module in (
        "vllm.v1.worker.cpu_worker",
        "vllm.v1.engine.core",
        "vllm.v1.executor.uniproc_executor",
        "vllm.model_executor.models.registry",
    ):
        importlib.import_module(module)
    # after the configuration is made, which sets it to spawn
    os.environ["VLLM_WORKER_MULTIPROC_METHOD"] = "fork"
    if sys.platform == "linux":
        libc = ctypes.CDLL(None, use_errno=True)
        os.register_at_fork(after_in_child=lambda: libc.prctl(_PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0))


def _fast_bfloat16() -> bool:
    """Whether this CPU multiplies bfloat16 in hardware; without it, float32 was four times faster."""
    try:
        flags = Path("/proc/cpuinfo").read_text("utf-8")
    except OSError:
        return False
    return "avx512_bf16" in flags or "amx_bf16" in flags or "bf16" in flags.partition("Features")[2]


def _cached_tokens(request: GenerateRequest, output: Any) -> int:
    """Prompt tokens that were computed by nobody for this request: those that the engine which did its prefill found in
    its prefix cache. vLLM's own count would have them all, since none was computed here.
    """
    if request.kv_transfer:
        return int(request.kv_transfer.get(_CACHED, 0))
    return output.num_cached_tokens or 0


def _logprobs(token_ids: Sequence[int], positions: Sequence[Any]) -> list[TokenLogprob]:
    found: list[TokenLogprob] = []
    for token, candidates in zip(token_ids, positions, strict=True):
        chosen = candidates[token]
        ranked = sorted(candidates.items(), key=lambda kv: kv[1].rank or 0)
        top = [(c.decoded_token or "", int(i), float(c.logprob)) for i, c in ranked]
        found.append(TokenLogprob(chosen.decoded_token or "", int(token), float(chosen.logprob), top))
    return found


def _first_line(error: BaseException) -> str:
    return next(iter(str(error).strip().splitlines()), "") or type(error).__name__


def _translate(error: Exception) -> Exception:
    """vLLM's exceptions as ours. Its own classes moved between versions, so they are told by name."""
    if isinstance(error, (RequestError, EngineError)):
        return error
    names = {cls.__name__ for cls in type(error).__mro__}
    text = _first_line(error)
    if "context length" in text or "max_model_len" in text or "maximum model length" in text:
        return ContextLengthError(text)
    if names & {"VLLMValidationError", "VLLMClientError"} or type(error) is ValueError:
        return RequestError(text)
    if "EngineDeadError" in names:
        return EngineDeadError("vLLM's engine core has died", hint="the worker is being restarted")
    return EngineError(f"vLLM failed: {text}")


def create(model: str, arguments: Mapping[str, Any], progress: Callable[[str], None]) -> VllmEngine:
    return VllmEngine(model, arguments, progress)
