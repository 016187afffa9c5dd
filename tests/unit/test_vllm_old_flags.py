"""vLLM's flags of 2025: what becomes of them depends on what the installed vLLM lacks. tests/vllm tries it on vLLM itself."""

from __future__ import annotations

from typing import Any

import pytest

from dynamo.engines.vllm.old_flags import FLAGS, changed_flag, is_flag

TODAY = {
    "compilation_config",
    "cudagraph_capture_sizes",
    "eplb_config",
    "hf_overrides",
    "limit_mm_per_prompt",
    "max_model_len",
    "mm_encoder_tp_mode",
    "mm_processor_cache_gb",
    "pooler_config",
    "runner",
    "convert",
    "speculative_config",
    "structured_outputs_config",
}


@pytest.mark.parametrize(
    ("flag", "value", "settings"),
    [
        ("cuda-graph-sizes", "1 2 4", {"cudagraph-capture-sizes": [1, 2, 4]}),
        ("cuda-graph-sizes", "1,x", {"cudagraph-capture-sizes": [1, "x"]}),
        ("disable-mm-preprocessor-cache", True, {"mm-processor-cache-gb": 0}),
        ("disable-mm-preprocessor-cache", False, {}),
        ("disable-mm-preprocessor-cache", "False", {}),
        ("no-disable-mm-preprocessor-cache", True, {}),
        ("no_enable_reasoning", True, {}),
        ("enable-multimodal-encoder-data-parallel", True, {"mm-encoder-tp-mode": "data"}),
        ("guided-decoding-backend", "xgrammar", {"structured-outputs-config": {"backend": "xgrammar"}}),
        (
            "guided_decoding_backend",
            "guidance:disable-any-whitespace",
            {"structured-outputs-config": {"backend": "guidance", "disable_any_whitespace": True}},
        ),
        ("num-redundant-experts", 2, {"eplb-config": {"num_redundant_experts": 2}}),
        ("override-pooler-config", '{"pooling_type": "MEAN"}', {"pooler-config": {"pooling_type": "MEAN"}}),
        (
            "rope-scaling",
            '{"type": "yarn", "factor": 4.0}',
            {"hf-overrides": {"rope_parameters": {"rope_type": "yarn", "factor": 4.0}}},
        ),
        ("rope-theta", 1e6, {"hf-overrides": {"rope_parameters": {"rope_theta": 1e6}}}),
        ("speculative-model", "[ngram]", {"speculative-config": {"method": "ngram"}}),
        ("speculative-model", "m", {"speculative-config": {"model": "m"}}),
        ("num-speculative-tokens", 5, {"speculative-config": {"num_speculative_tokens": 5}}),
        ("task", "generate", {"runner": "generate"}),
        ("task", "embedding", {"runner": "pooling", "convert": "embed"}),
        ("task", "auto", {}),
        ("task", "draft", {"runner": "draft"}),
        ("task", None, {}),
        ("rope-scaling", None, {}),
        ("preemption-mode", "swap", {}),
        ("swap-space", 4, {}),
        ("device", "cuda", {}),
        ("use-v2-block-manager", True, {}),
        ("enable-reasoning", True, {}),
        ("disable_log_requests", True, {}),
    ],
)
def test_a_removed_flag(flag: str, value: Any, settings: dict[str, Any]) -> None:
    change = changed_flag(flag, value, TODAY)
    assert change is not None
    assert change.settings == settings
    assert change.note.startswith("not in vLLM since 0.")


@pytest.mark.parametrize("flag", FLAGS)
def test_a_flag_that_vllm_has_passes_untouched(flag: str) -> None:
    assert changed_flag(flag, True, {flag.replace("-", "_")}) is None


@pytest.mark.parametrize("flag", FLAGS)
def test_a_flag_without_a_successor_in_this_vllm_is_ignored(flag: str) -> None:
    change = changed_flag(flag, 1, set())
    assert change is not None
    assert not change.settings
    assert change.note.endswith("remove it")


@pytest.mark.parametrize(
    ("key", "value", "new"),
    [
        ("compilation-config", 3, {"mode": 3}),
        ("compilation-config", "3", {"mode": 3}),
        (
            "compilation_config",
            '{"level": 3, "cudagraph_capture_sizes": [1]}',
            {"mode": 3, "cudagraph_capture_sizes": [1]},
        ),
        ("compilation-config", {"full_cuda_graph": True, "use_inductor": True}, {"cudagraph_mode": "FULL"}),
        ("compilation-config", {"use_cudagraph": False}, {"cudagraph_mode": "NONE"}),
        ("limit-mm-per-prompt", "image=2,video=1", {"image": 2, "video": 1}),
    ],
)
def test_a_value_in_the_form_of_2025(key: str, value: Any, new: Any) -> None:
    change = changed_flag(key, value, TODAY)
    assert change is not None
    assert change.settings == {key: new}


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("max-model-len", 1),
        ("compilation-config", '{"cudagraph_capture_sizes": [1, 2]}'),
        ("compilation-config", {"mode": 3}),
        ("compilation-config.mode", 3),
        ("compilation-config", "not JSON"),
        ("limit-mm-per-prompt", '{"image": 2}'),
        ("limit-mm-per-prompt", "image=2,video=many"),
        ("max-modl-len", 1),
    ],
)
def test_what_stays_as_it_is(key: str, value: Any) -> None:
    assert changed_flag(key, value, TODAY) is None


def test_flags_of_vllm_are_known_in_every_form() -> None:
    for key in ("max-num-seqs", "max_num_seqs", "no-enable-prefix-caching", "task", "enable_reasoning"):
        assert is_flag(key)
    for key in ("block-sise", "router-num-threads"):
        assert not is_flag(key)
