"""Prometheus text of several processes as one text."""

from __future__ import annotations

from collections.abc import Iterable

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
