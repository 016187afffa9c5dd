"""One YAML file of ai-dynamo 0.3 for several `dynamo serve` commands, each of which reads its own sections of it."""

from __future__ import annotations

import os
import re
from pathlib import Path

from tests.graph.test_disagg import ask_all, prompt, remote
from tests.served import Start, until

FILE = """
Common:
  model: dynamo-tiny
  block-size: 64
  kv-transfer-config: '{"kv_connector":"DynamoNixlConnector"}'
  disable-log-requests: true

Frontend:
  served_model_name: dynamo-tiny
  endpoint: dynamo.Processor.chat/completions

Processor:
  router: round-robin
  router-num-threads: 4
  common-configs: [model, block-size]

VllmWorker:
  engine: mock
  speedup-ratio: 0
  max-model-len: 32768
  remote-prefill: true
  conditional-disagg: false
  common-configs: [model, block-size, kv-transfer-config, disable-log-requests]

PrefillWorker:
  engine: mock
  speedup-ratio: 0
  max-model-len: 32768
  common-configs: [model, block-size, kv-transfer-config, disable-log-requests]

Planner:
  environment: local
  no-operation: true
"""


def test_prefill_workers_of_another_command_compute_the_prompts(serve_graph: Start, tmp_path: Path) -> None:
    file = tmp_path / "disagg.yaml"
    file.write_text(FILE)
    agg = serve_graph("-f", str(file), "--Planner.no-operation=true").ready()
    text = agg.output
    assert len(re.findall(r"^warning: ", text, re.MULTILINE)) == 6
    for key in ("Planner", "PrefillWorker", "Processor.router-num-threads", "Common.disable-log-requests"):
        assert re.search(rf"^warning: {file}:\d+ {key}: ignored: ", text, re.MULTILINE), text
    assert "VllmWorker.remote-prefill: this graph has no PrefillWorker: " in text
    assert "Common.kv-transfer-config: read as dynamo's own connector: " in text
    prompts = [prompt() for _ in range(3)]
    ask_all(agg, prompts)  # without prefill workers, decode workers compute all
    assert remote(agg) == 0
    env = {**os.environ, **agg.servers}
    command = ("-f", str(file), "--infra", "external")
    prefill = serve_graph(*command, graph="components.prefill_worker:PrefillWorker", env=env)
    prefill.wait_for("ready in", 60)
    assert "PrefillWorker: ignored" not in prefill.output
    assert re.search(r"VllmWorker: ignored", prefill.output)

    def computed_elsewhere() -> bool:
        ask_all(agg, [prompt()])
        return remote(agg) > 0

    until(computed_elsewhere, "a prompt that a prefill worker computes")
    prefill.end()
    before = remote(agg)
    ask_all(agg, [prompt()])
    assert remote(agg) == before
    assert agg.stop() == 0
