"""vLLM's flags of 2025 with the installed vLLM: what takes their place is accepted by its own parser and configuration."""

from __future__ import annotations

import importlib
from typing import Any

import pytest

from dynamo.config.resolution import resolve_and_check
from dynamo.config.settings import declared
from dynamo.config.yaml_file import parse
from dynamo.engines.vllm.install import engine_arguments
from dynamo.engines.vllm.old_flags import FLAGS
from dynamo.engines.vllm.options import Options, set_environment
from tests.vllm.fork_server import ForkServer

pytestmark = pytest.mark.vllm

VALUES: dict[str, Any] = {
    "cuda-graph-sizes": [1, 2, 4],
    "device": "cpu",
    "guided-decoding-backend": "xgrammar:disable-any-whitespace",
    "ngram-prompt-lookup-max": 4,
    "ngram-prompt-lookup-min": 2,
    "num-redundant-experts": 0,
    "num-speculative-tokens": 2,
    "override-pooler-config": '{"pooling_type": "MEAN"}',
    "preemption-mode": "swap",
    "rope-scaling": '{"type": "yarn", "factor": 2.0, "original_max_position_embeddings": 4096}',
    "rope-theta": 5000.0,
    "speculative-draft-tensor-parallel-size": 1,
    "speculative-max-model-len": 512,
    "speculative-model": "dynamo-tiny",
    "speculative-model-quantization": "fp8",
    "swap-space": 4,
    "task": "generate",
    "eplb-window-size": 500,
    "eplb-step-interval": 500,
}
"""a value of each flag that is not a switch"""


def upgraded(**flags: Any) -> dict[str, Any]:
    """Return VllmWorker's flags as a worker gets them from a YAML file with these."""
    from components.worker import VllmWorker

    text = "\n".join(f"  {name}: {value!r}" for name, value in flags.items()).replace("True", "true")
    layer = parse(f"VllmWorker:\n{text}\n", "c.yaml")
    return resolve_and_check([layer], {"VllmWorker": declared(VllmWorker)}).services["VllmWorker"]


@pytest.fixture(scope="module")
def parsed(vllm_process: ForkServer) -> dict[str, str]:
    found: dict[str, str] = vllm_process.run("tests.vllm.test_old_flags:parse_all")
    return found


@pytest.mark.parametrize("flag", sorted(FLAGS))
def test_a_flag_of_2025_is_accepted(flag: str, parsed: dict[str, str]) -> None:
    known = engine_arguments()
    assert known is not None
    assert flag.replace("-", "_") not in known, "vLLM has it: it needs no row"
    assert parsed[flag] == ""


def parse_all() -> dict[str, str]:
    """Parse each row's flags with vLLM's parser in this process; return the error of each, empty if there is none."""
    set_environment()
    arg_utils = importlib.import_module("vllm.engine.arg_utils")
    found = {}
    for flag in FLAGS:
        flags = {flag: VALUES.get(flag, True)}
        if flag.startswith("guided-decoding-disable"):
            flags["guided-decoding-backend"] = "guidance"  # vLLM 0.9 required it, too
        try:
            Options("dynamo-tiny", upgraded(**flags))._parse(arg_utils.AsyncEngineArgs, False)
            found[flag] = ""
        except Exception as error:
            found[flag] = repr(error)
    return found


@pytest.fixture(scope="module")
def configured(vllm_process: ForkServer) -> dict[str, Any]:
    found: dict[str, Any] = vllm_process.run("tests.vllm.test_old_flags:configure")
    return found


def test_flags_keep_their_meaning(configured: dict[str, Any]) -> None:
    assert configured == {
        "rope": {
            "rope_type": "yarn",
            "factor": 2.0,
            "original_max_position_embeddings": 4096,
            "rope_theta": 100000.0,
        },
        "theta": 5000.0,
        "method": "ngram",
        "tokens": 3,
        "lookup": 5,
        "mode": 0,
        "backend": "guidance",
        "whitespace": True,
        "runner": "generate",
        "chunked": False,
    }


def configure() -> dict[str, Any]:
    """Make vLLM's configuration in this process from flags of 2025, and return what they decide."""
    set_environment()
    arg_utils = importlib.import_module("vllm.engine.arg_utils")

    def config(**flags: Any) -> Any:
        common = {"dtype": "float32", "max-model-len": 512, "kv-cache-memory-bytes": 1 << 26}
        options = Options("dynamo-tiny", upgraded(**common, **flags))
        return options.configuration(arg_utils.AsyncEngineArgs, events=False)[0]

    scaled = config(**{"rope-scaling": VALUES["rope-scaling"], "compilation-config": 0, "task": "generate"})
    speculating = config(
        **{
            "speculative-model": "[ngram]",
            "num-speculative-tokens": 3,
            "ngram-prompt-lookup-max": 5,
            "rope-theta": 5000.0,
            "guided-decoding-backend": "guidance:disable-any-whitespace",
            "enable-chunked-prefill": False,
            "max-num-batched-tokens": 1024,
        }
    )
    return {
        "rope": scaled.model_config.hf_config.rope_parameters,
        "theta": speculating.model_config.hf_config.rope_parameters["rope_theta"],
        "method": speculating.speculative_config.method,
        "tokens": speculating.speculative_config.num_speculative_tokens,
        "lookup": speculating.speculative_config.prompt_lookup_max,
        "mode": int(scaled.compilation_config.mode),
        "backend": speculating.structured_outputs_config.backend,
        "whitespace": speculating.structured_outputs_config.disable_any_whitespace,
        "runner": scaled.model_config.runner_type,
        "chunked": speculating.scheduler_config.enable_chunked_prefill,
    }
