"""A worker's settings as vLLM's: environment variables, flags through vLLM's own parser, engine configuration."""

from __future__ import annotations

import argparse
import importlib
import json
import logging
import os
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from dynamo.engines.kv_transfer import configuration as kv_transfer
from dynamo.engines.vllm.events_config import can_subscribe, private_events_config
from dynamo.engines.vllm.install import cpu_build
from dynamo.engines.vllm.translation import first_line
from dynamo.errors import StartError
from dynamo.llm.model_files import resolve, tokenizer_dir
from dynamo.log import LEVELS
from dynamo.transport.network import advertised_host, interface_of

USED_GPU_MEMORY = 0.9
"""fraction of a whole GPU, vLLM's default; a worker with a share of a GPU uses this fraction of its share"""
MAX_SOCKET_DIR_BYTES = 70  # a socket's path has at most 107 bytes, and vLLM appends 37
CPU_BLOCK_TOKENS = 32  # vLLM's CPU attention requires multiples of this
ENVIRONMENT = {
    "VLLM_NO_USAGE_STATS": "1",
    "DO_NOT_TRACK": "1",
    "TOKENIZERS_PARALLELISM": "false",
    "PYTHONHASHSEED": "0",  # the same block hashes in all workers
}
CPU_ENVIRONMENT = {
    "VLLM_ENABLE_V1_MULTIPROCESSING": "0",  # keeps the executor in the engine core's process
    "VLLM_CPU_OMP_THREADS_BIND": "nobind",
    "VLLM_PLUGINS": "",
    "TORCH_CPP_LOG_LEVEL": "ERROR",
}


def set_environment() -> None:
    """Set the variables that vLLM reads while it is imported and started, unless they are set already."""
    cpu = cpu_build()
    run_dir = os.environ.get("DYNAMO_RUN_DIR", "")
    if 0 < len(run_dir) <= MAX_SOCKET_DIR_BYTES:
        # vLLM does not remove its sockets; this directory is removed with the graph
        os.environ.setdefault("VLLM_RPC_BASE_PATH", run_dir)
    for name, value in {**ENVIRONMENT, **(CPU_ENVIRONMENT if cpu else {})}.items():
        os.environ.setdefault(name, value)
    if logging.getLogger().getEffectiveLevel() > logging.DEBUG:
        # on the CPU it warns of what is chosen here on purpose: eager mode, no Triton, no preloaded libraries
        os.environ.setdefault("VLLM_LOGGING_LEVEL", "ERROR" if cpu else "WARNING")
        warnings.filterwarnings("ignore", category=FutureWarning)
        os.environ.setdefault("TORCH_LOGS", "-all")
        level = LEVELS.get(os.environ["VLLM_LOGGING_LEVEL"].lower(), logging.INFO)
        logging.getLogger("vllm").setLevel(level)  # for the lines that it logs while it is imported
    if os.environ.get("VLLM_CONFIGURE_LOGGING", "1") != "0":  # all of vLLM's processes log as this one does
        os.environ.setdefault("VLLM_LOGGING_CONFIG_PATH", str(Path(__file__).with_name("logging.json")))
    if cpu:
        os.environ.setdefault("OMP_NUM_THREADS", str(max(1, (os.cpu_count() or 1) // 2)))


def set_network_environment() -> None:
    """Make vLLM and gloo use the address that this host advertises, unless variables name another one.

    For engines of several nodes.
    """
    address = _own_address()
    os.environ.setdefault("VLLM_HOST_IP", address)
    interface = interface_of(address)
    if interface:
        os.environ.setdefault("GLOO_SOCKET_IFNAME", interface)


def _own_address() -> str:
    return advertised_host(os.environ.get("NATS_SERVER", ""))


class Options:
    """One engine's flags, and what is derived from them."""

    def __init__(self, model: str, given: Mapping[str, Any]) -> None:
        """`given` are vLLM's flags and ours, as for `VllmEngine`."""
        self._model = model
        self.flags = dict(given)
        self.transfers_kv = bool(self.flags.pop("kv-transfer", False))
        """whether the engine computes KV for other engines; `configuration` sets it if a user configured a connector"""
        self._lease_s = float(self.flags.pop("kv-transfer-lease-s", kv_transfer.LEASE_S))
        self.uses_own_connector = False
        """whether KV is transferred by our connector; set by `configuration`"""
        self.private_events: dict[str, Any] | None = None
        """kv-events-config of our subscription if the user gave none; set by `configuration`"""

    def get(self, name: str) -> Any:
        """Return a flag's value, written with `-` or `_`; None if it is not given."""
        return self.flags.get(name, self.flags.get(name.replace("-", "_")))

    def publishes_kv_events(self) -> bool:
        """Return False without prefix caching, and if a kv-events-config sends the events elsewhere."""
        if self.get("enable-prefix-caching") is False or self.get("no-enable-prefix-caching"):
            return False
        given = self.get("kv-events-config")
        return given is None or can_subscribe(given)

    def configuration(self, engine_args: Any, *, events: bool) -> tuple[Any, bool]:
        """Return vLLM's configuration, and True if it keeps no statistics.

        `engine_args` is vLLM's class AsyncEngineArgs; `events` is True if KV events are subscribed to. Raises StartError
        if vLLM or our connector rejects the flags.
        """
        usage = importlib.import_module("vllm.usage.usage_lib")
        if events and self.get("kv-events-config") is None:
            self.private_events = private_events_config()
        self._configure_transfer()
        parsed = self._parse(engine_args, events)
        try:
            config = engine_args.from_cli_args(parsed).create_engine_config(
                usage_context=usage.UsageContext.OPENAI_API_SERVER
            )
        except (ValueError, OSError) as error:
            raise StartError(f"vLLM rejected the configuration: {first_line(error)}") from error
        if self.uses_own_connector and config.parallel_config.world_size > 1:
            raise StartError(
                f"KV transfer of an engine on {config.parallel_config.world_size} GPUs: dynamo's connector supports one",
                hint="set kv-transfer-config: {kv_connector: NixlConnector, kv_role: kv_both}, which needs dynamo[nixl]",
            )
        return config, bool(parsed.disable_log_stats)

    def _configure_transfer(self) -> None:
        """Set kv-transfer-config: a user's with defaults added, or our connector's if `kv-transfer` is on."""
        given = self.get("kv-transfer-config")
        if given is not None:
            self.transfers_kv = True
            self.flags.pop("kv_transfer_config", None)
            self.flags["kv-transfer-config"] = kv_transfer.with_defaults(given)
            for name, value in kv_transfer.nixl_environment(given, _own_address()).items():
                os.environ.setdefault(name, value)
        elif self.transfers_kv:
            self.uses_own_connector = True
            self.flags["kv-transfer-config"] = kv_transfer.pull_connector_config(self._lease_s)
            if self.get("disable-hybrid-kv-cache-manager") is None:
                self.flags["disable-hybrid-kv-cache-manager"] = True  # which makes one KV cache group

    def _complete_rope(self) -> None:
        """Complete RoPE parameters in hf-overrides from the model's config.json: vLLM replaces all of them by those given.

        So `rope-scaling` and `rope-theta`, which became such parameters, keep the meaning that they had.
        """
        overrides = kv_transfer.mapping(self.get("hf-overrides")) or {}
        given = overrides.get("rope_parameters")
        if not isinstance(given, Mapping) or ("rope_theta" in given and "rope_type" in given):
            return
        config = json.loads((tokenizer_dir(self._model) / "config.json").read_text("utf-8"))
        own = config.get("rope_parameters") or {
            **(config.get("rope_scaling") or {}),
            "rope_theta": config.get("rope_theta"),
        }
        if "rope_type" in given:
            own = {"rope_theta": own.get("rope_theta")}
        self.flags.pop("hf_overrides", None)
        self.flags["hf-overrides"] = {**overrides, "rope_parameters": {**own, **given}}

    def _parse(self, engine_args: Any, events: bool) -> Any:
        """Return the namespace of vLLM's parser for the flags and our defaults. Raises StartError for invalid flags."""
        argparse_utils = importlib.import_module("vllm.utils.argparse_utils")

        class Parser(argparse_utils.FlexibleArgumentParser):  # type: ignore[misc, name-defined]
            def error(self, message: str) -> None:
                raise StartError(f"vLLM's arguments: {message}", hint="check the worker's keys in the configuration")

        self._complete_rope()
        given = {name.replace("-", "_") for name in self.flags}
        parser = engine_args.add_cli_args(Parser())
        cpu = cpu_build()
        argv = ["--model", resolve(self._model), *to_argv(self.flags, parser)]
        if self.private_events is not None:
            argv += ["--kv-events-config", json.dumps(self.private_events)]
        if events and "enable_prefix_caching" not in given:
            argv.append("--enable-prefix-caching")  # off by default for some models
        if cpu and "dtype" not in given and not _has_fast_bfloat16():
            argv += ["--dtype", "float32"]
        share = os.environ.get("DYNAMO_GPU_SHARE")
        if share and "gpu_memory_utilization" not in given:
            argv += ["--gpu-memory-utilization", f"{USED_GPU_MEMORY * float(share):.3f}"]
        if "use_tqdm_on_load" not in given:
            argv.append("--no-use-tqdm-on-load")  # a progress bar does not suit a log
        parsed = parser.parse_args(argv)
        block = getattr(parsed, "block_size", None)
        if cpu and block and block % CPU_BLOCK_TOKENS:
            raise StartError(
                f"block-size: {block} tokens; vLLM on the CPU requires a multiple of {CPU_BLOCK_TOKENS}",
                hint=f"set block-size: {CPU_BLOCK_TOKENS}",
            )
        return parsed


def to_argv(arguments: Mapping[str, Any], parser: argparse.ArgumentParser) -> list[str]:
    """Convert settings to arguments of vLLM's parser: `False` to `--no-flag`, mappings to JSON, lists to several words.

    None is left out. Unknown flags are kept, so that the parser reports them.
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


def _has_fast_bfloat16() -> bool:
    """Return True if this CPU multiplies bfloat16 in hardware; without that, float32 was four times faster."""
    try:
        flags = Path("/proc/cpuinfo").read_text("utf-8")
    except OSError:
        return False
    return "avx512_bf16" in flags or "amx_bf16" in flags or "bf16" in flags.partition("Features")[2]
