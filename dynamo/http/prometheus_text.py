"""What Prometheus reads: the text of several processes as one text, and the list of where to scrape."""

from __future__ import annotations

import json
import re
from collections import defaultdict
from collections.abc import Awaitable, Callable, Iterable, Mapping
from statistics import fmean, pstdev

CONTENT_TYPE = "text/plain; version=0.0.4; charset=utf-8"

Pages = Mapping[str, Callable[[], Awaitable[bytes]]]
"""what a process or a host tells, by path"""

_HELP, _TYPE = b"# HELP ", b"# TYPE "


def merge(texts: Iterable[bytes]) -> bytes:
    """Each metric family once, with the samples of all texts in their order.

    Takes text as prometheus_client writes it: each family begins with its HELP line, and TYPE follows. Where texts differ
    in a family's help or type, the first one counts; samples of another type would make the whole text invalid, so they
    are left out, and a comment says so.
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
    """The JSON of Prometheus' HTTP service discovery: each `host:port` once."""
    return json.dumps([{"targets": sorted(set(addresses)), "labels": {}}]).encode()


def family(name: str, kind: str, documentation: str, samples: Iterable[tuple[Mapping[str, str], float]]) -> bytes:
    """A family in Prometheus text without prometheus_client, which takes 20 ms to import. For labels with plain values:
    nothing is escaped."""
    lines = [f"# HELP {name} {documentation}", f"# TYPE {name} {kind}"]
    for labels, value in samples:
        told = ",".join(f'{key}="{text}"' for key, text in labels.items())
        lines.append(f"{name}{{{told}}} {float(value)!r}")
    return ("\n".join(lines) + "\n").encode()


_ACTIVE_BLOCKS = re.compile(r"^llm_kv_blocks_active\{(.*)\} (\S+)$", re.MULTILINE)
_LABEL = re.compile(r'\b(component|endpoint|worker_id)="([^"]*)"')


def load(texts: Iterable[bytes]) -> bytes:
    """`llm_load_avg` and `llm_load_std`, as the metrics program of ai-dynamo 0.3 had them: mean and population standard
    deviation of the KV blocks that the workers of a component have in use. Empty without a worker."""
    places: dict[tuple[str, str], dict[str, float]] = defaultdict(lambda: defaultdict(float))
    for text in texts:
        for labels, value in _ACTIVE_BLOCKS.findall(text.decode()):
            found = dict(_LABEL.findall(labels))
            place = found.get("component", ""), found.get("endpoint", "")
            places[place][found.get("worker_id", "")] += float(value)  # the ranks of a worker together
    if not places:
        return b""
    averages, deviations = [], []
    for (component, endpoint), workers in places.items():
        of = {"component": component, "endpoint": endpoint}
        averages.append((of, fmean(workers.values())))
        deviations.append((of, pstdev(workers.values())))
    return family("llm_load_avg", "gauge", "Mean of the active KV blocks of the workers.", averages) + family(
        "llm_load_std", "gauge", "Standard deviation of the active KV blocks of the workers.", deviations
    )
