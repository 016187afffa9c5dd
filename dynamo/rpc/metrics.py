"""Prometheus metrics of each process of a graph, which any other process of it can ask for.

A question goes over NATS to `metrics.<namespace>.<service>` of each service of the graph, and every process of the
service answers with text whose samples carry the labels `namespace`, `service`, `worker` (its number) and `worker_id` (its
instance id). So processes are found wherever they run, as calls find them, and graphs that share a NATS do not mix.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Iterator, Mapping, Sequence
from functools import cached_property
from typing import TYPE_CHECKING

import msgspec

from dynamo.errors import TransportError
from dynamo.transport.nats import Nats

if TYPE_CHECKING:
    from prometheus_client import CollectorRegistry
    from prometheus_client.core import Metric

    from dynamo.rpc.client import Client

log = logging.getLogger(__name__)

WAIT_S = 0.25
"""The longest that a scrape waits for others."""


class _Question(msgspec.Struct, array_like=True):
    worker_id: str
    """of who asks"""
    scrape: int
    inbox: str


class _Answer(msgspec.Struct, array_like=True):
    service: str
    worker_id: str
    scrape: int
    text: bytes


_decode_question = msgspec.msgpack.Decoder(_Question).decode
_decode_answer = msgspec.msgpack.Decoder(_Answer).decode


class _Scrape:
    """One question, and what came in answer to it."""

    def __init__(self, expected: set[str]) -> None:
        self.expected = expected
        self.answers: dict[str, _Answer] = {}
        self.complete = asyncio.Event()


class ProcessMetrics:
    """What this process counts, and the way to what the others of its graph count.

    The registry is made at its first use: importing prometheus_client takes 20 ms, which a start can do without.
    """

    def __init__(self, instance_id: int, clients: Mapping[tuple[str, str, str], Client]) -> None:
        self.worker_id = f"{instance_id:x}"
        self._clients = clients
        self._namespace, self._service, self._worker = "", "", 1
        self._graph: Sequence[tuple[str, str]] = ()
        self._lent: list[CollectorRegistry] = []
        self._nats: Nats | None = None
        self._inbox = f"_INBOX.metrics.{self.worker_id}"
        self._scrapes: dict[int, _Scrape] = {}
        self._count = 0
        self._known: set[str] = set()  # who answered the last time
        self._silent: set[str] = set()  # who did not, though discovery has it

    @cached_property
    def registry(self) -> CollectorRegistry:
        """For the metrics of this process's components."""
        from prometheus_client import CollectorRegistry

        return CollectorRegistry()

    def lend(self, registry: CollectorRegistry) -> None:
        """Give others the metrics of a registry that this process shows by itself, and so are not in `text`."""
        self._lent.append(registry)

    def belong(self, namespace: str, service: str, graph: Sequence[tuple[str, str]], worker: int = 1) -> None:
        """Say, before the process connects, whose process this is, and which of its service's: `graph` has namespace and
        name of all services."""
        self._namespace, self._service, self._graph, self._worker = namespace, service, graph, worker

    async def answer(self, nats: Nats) -> None:
        """Answer from now on, if this process belongs to a graph."""
        self._nats = nats
        if self._service:
            await nats.subscribe(_subject(self._namespace, self._service), self._asked)
            await nats.listen(self._inbox, self._answered)  # returns when the server knows of both

    async def _asked(self, _: str, data: bytes, __: object) -> None:
        question = _decode_question(data)
        if question.worker_id == self.worker_id:
            return  # it was meant for the other processes of this service
        answer = _Answer(self._service, self.worker_id, question.scrape, self.text(lent=True))
        assert self._nats is not None
        try:
            await self._nats.publish(question.inbox, msgspec.msgpack.encode(answer))
        except TransportError as error:
            log.warning("the metrics of this process are not shown: %s", error.message)

    def text(self, *, lent: bool = False) -> bytes:
        """What this process counts, in Prometheus text: its registry's, and prometheus_client's own registry's; those
        that were `lent` too where others ask.

        prometheus_client's own has memory, CPU and file descriptors, and what libraries such as vLLM count.
        """
        from prometheus_client import REGISTRY, disable_created_metrics
        from prometheus_client.exposition import generate_latest

        disable_created_metrics()  # type: ignore[no-untyped-call]  # one more series for each counter and histogram
        labels = {"namespace": self._namespace, "service": self._service, "worker": str(self._worker)}
        labels["worker_id"] = self.worker_id
        registries = [self.registry, *(self._lent if lent else ()), REGISTRY]
        return generate_latest(_Labelled(registries, labels))

    async def gather(self) -> list[bytes]:
        """The texts of the other processes of the graph.

        Waits until all have answered that are known from discovery or from before, at most `WAIT_S`; who did not is not
        waited for again until it answers. The first time waits in full, to learn who is there. Nothing while NATS is away.
        """
        nats = self._nats
        if nats is None or not nats.connected or not self._service:
            return []
        self._count += 1
        number, first = self._count, self._count == 1
        discovered = {
            f"{instance:x}"
            for (namespace, service, _), client in self._clients.items()
            if (namespace, service) in self._graph
            for instance in client.instance_ids()
        } - {self.worker_id}
        self._silent &= discovered
        scrape = self._scrapes[number] = _Scrape((self._known | discovered) - self._silent)
        try:
            question = msgspec.msgpack.encode(_Question(self.worker_id, number, self._inbox))
            for service in self._graph:
                await nats.publish(_subject(*service), question)
            if first:
                await asyncio.sleep(WAIT_S)
            elif scrape.expected:
                async with asyncio.timeout(WAIT_S):
                    await scrape.complete.wait()
        except TimeoutError:
            pass
        except TransportError as error:
            log.debug("others are not asked for their metrics: %s", error)
        finally:
            del self._scrapes[number]
        missing = scrape.expected - scrape.answers.keys()
        self._known -= missing
        self._silent |= missing & discovered
        answers = sorted(scrape.answers.values(), key=lambda answer: (answer.service, answer.worker_id))
        return [answer.text for answer in answers]

    def _answered(self, data: bytes) -> None:
        try:
            answer = _decode_answer(data)
        except msgspec.MsgspecError as error:  # of another version
            log.debug("metrics that cannot be read: %s", error)
            return
        self._known.add(answer.worker_id)  # an answer that is too late for its scrape counts here
        self._silent.discard(answer.worker_id)
        scrape = self._scrapes.get(answer.scrape)
        if scrape is not None:
            scrape.answers[answer.worker_id] = answer
            if scrape.answers.keys() >= scrape.expected:
                scrape.complete.set()


def _subject(namespace: str, service: str) -> str:
    return f"metrics.{namespace}.{service}"


class _Labelled:
    """Registries as one, with labels for every sample. A family that several have is taken from the first."""

    def __init__(self, registries: Sequence[CollectorRegistry], labels: dict[str, str]) -> None:
        self._registries, self._labels = registries, labels

    def collect(self) -> Iterator[Metric]:
        from prometheus_client.core import Metric

        seen: set[str] = set()
        for registry in self._registries:
            families = [family for family in registry.collect() if family.name not in seen]
            seen.update(family.name for family in families)
            for family in families:
                found = Metric(family.name, family.documentation, family.type)
                found.samples = [s._replace(labels=label(s.labels, self._labels)) for s in family.samples]
                yield found


def label(given: Mapping[str, str], added: Mapping[str, str]) -> dict[str, str]:
    """Both together; a given label that says something else is renamed, as Prometheus does: `exported_<name>`.

    A given `worker` stays: of the router's metrics it is the worker that they are about.
    """
    if given.keys().isdisjoint(added):
        return {**given, **added}
    if "worker" in given:
        added = {**added, "worker": given["worker"]}
    kept = {f"exported_{k}" if added.get(k, value) != value else k: value for k, value in given.items()}
    return kept | dict(added)
