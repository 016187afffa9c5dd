"""Prometheus text: merging the texts of several processes, metric families without a client library, scrape targets."""

from __future__ import annotations

import json
import re
from collections import defaultdict
from collections.abc import Awaitable, Callable, Iterable, Mapping
from statistics import fmean, pstdev

CONTENT_TYPE = "text/plain; version=0.0.4; charset=utf-8"

Pages = Mapping[str, Callable[[], Awaitable[bytes]]]
"""Path -> a function that renders the page."""

_HELP, _TYPE = b"# HELP ", b"# TYPE "


def merge(texts: Iterable[bytes]) -> bytes:
    """Merge texts into one that has each metric family once, with the samples of all texts in their order.

    Takes text as prometheus_client writes it: each family begins with its HELP line, followed by TYPE. Where texts differ
    in a family's help or type, the first one counts. Samples of another type would make the whole text invalid, so they
    are replaced by a comment.
    """
    families: dict[bytes, list[bytes]] = {}
    types: dict[bytes, bytes] = {}
    for text in texts:
        for block in (b"\n" + text).split(b"\n" + _HELP)[1:]:  # inside values and help texts a newline is escaped
            head, _, rest = block.partition(b"\n")
            kind, _, samples = rest.partition(b"\n")
            name = head.partition(b" ")[0]
            if samples and not samples.endswith(b"\n"):
                samples += b"\n"
            if name not in families:
                types[name] = kind
                families[name] = [_HELP, head, b"\n", kind, b"\n", samples]
            elif types[name] == kind:
                families[name].append(samples)
            else:
                other = kind.removeprefix(_TYPE)
                families[name].append(
                    b"# samples of another process are left out, their type differs: " + other + b"\n"
                )
    return b"".join(part for parts in families.values() for part in parts)


def http_sd(addresses: Iterable[str]) -> bytes:
    """Return the JSON of Prometheus' HTTP service discovery: each `host:port` once."""
    return json.dumps([{"targets": sorted(set(addresses)), "labels": {}}]).encode()


def family(name: str, kind: str, documentation: str, samples: Iterable[tuple[Mapping[str, str], float]]) -> bytes:
    """Render a metric family without prometheus_client, which takes 20 ms to import.

    Label values are not escaped: no quotes, backslashes or newlines.
    """
    lines = [f"# HELP {name} {documentation}", f"# TYPE {name} {kind}"]
    for labels, value in samples:
        pairs = ",".join(f'{key}="{text}"' for key, text in labels.items())
        lines.append(f"{name}{{{pairs}}} {float(value)!r}")
    return ("\n".join(lines) + "\n").encode()


_ACTIVE_BLOCKS = re.compile(r"^llm_kv_blocks_active\{(.*)\} (\S+)$", re.MULTILINE)
_LABEL = re.compile(r'\b(component|endpoint|worker_id)="([^"]*)"')


def load(texts: Iterable[bytes]) -> bytes:
    """Render `llm_load_avg` and `llm_load_std`, which ai-dynamo 0.3's metrics program had.

    They are the mean and the population standard deviation of the KV blocks in use by the workers of a component. Empty
    without a worker.
    """
    blocks_in_use: dict[tuple[str, str], dict[str, float]] = defaultdict(lambda: defaultdict(float))
    for text in texts:
        for label_text, value in _ACTIVE_BLOCKS.findall(text.decode()):
            labels = dict(_LABEL.findall(label_text))
            component_endpoint = labels.get("component", ""), labels.get("endpoint", "")
            blocks_in_use[component_endpoint][labels.get("worker_id", "")] += float(value)  # summed over its ranks
    if not blocks_in_use:
        return b""
    averages, deviations = [], []
    for (component, endpoint), workers in blocks_in_use.items():
        common = {"component": component, "endpoint": endpoint}
        averages.append((common, fmean(workers.values())))
        deviations.append((common, pstdev(workers.values())))
    return family("llm_load_avg", "gauge", "Mean of the active KV blocks of the workers.", averages) + family(
        "llm_load_std", "gauge", "Standard deviation of the active KV blocks of the workers.", deviations
    )
