"""Prometheus metrics of each process of a graph, which any other process of the graph can collect.

A request for metrics goes over NATS to `metrics.<namespace>.<service>` of each service of the graph. Every process of the
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

SCRAPE_WAIT_S = 0.25
"""The longest that a scrape waits for other processes."""


class _MetricsRequest(msgspec.Struct, array_like=True):
    worker_id: str
    """instance id of the process that asks"""
    scrape: int
    inbox: str


class _MetricsResponse(msgspec.Struct, array_like=True):
    service: str
    worker_id: str
    scrape: int
    text: bytes


_decode_request = msgspec.msgpack.Decoder(_MetricsRequest).decode
_decode_response = msgspec.msgpack.Decoder(_MetricsResponse).decode


class _Scrape:
    """One request to all processes, and the responses that have arrived."""

    def __init__(self, expected: set[str]) -> None:
        self.expected = expected
        self.responses: dict[str, _MetricsResponse] = {}
        self.complete = asyncio.Event()


class ProcessMetrics:
    """The metrics of this process, and the collection of those of the other processes of its graph.

    The registry is made at its first use: importing prometheus_client takes 20 ms, which a start can do without.
    """

    def __init__(self, instance_id: int, clients: Mapping[tuple[str, str, str], Client]) -> None:
        self.worker_id = f"{instance_id:x}"
        self._clients = clients
        self._namespace = ""
        self._service = ""
        self._worker = 1
        self._graph: Sequence[tuple[str, str]] = ()
        self._shared: list[CollectorRegistry] = []
        self._nats: Nats | None = None
        self._inbox = f"_INBOX.metrics.{self.worker_id}"
        self._scrapes: dict[int, _Scrape] = {}
        self._count = 0
        self._responsive: set[str] = set()  # responded to the last scrape
        self._silent: set[str] = set()  # did not, although discovery has them

    @cached_property
    def registry(self) -> CollectorRegistry:
        """The registry for the metrics of this process's components."""
        from prometheus_client import CollectorRegistry

        return CollectorRegistry()

    def share(self, registry: CollectorRegistry) -> None:
        """Add a registry to what other processes collect. It is not in `text()`: this process serves it by itself."""
        self._shared.append(registry)

    def identify(self, namespace: str, service: str, graph: Sequence[tuple[str, str]], worker: int = 1) -> None:
        """Set, before the process connects, its service, its number `worker` there, and the services of its graph.

        `graph` has the namespace and name of each.
        """
        self._namespace = namespace
        self._service = service
        self._graph = graph
        self._worker = worker

    async def serve(self, nats: Nats) -> None:
        """Answer requests for metrics from now on. No-op for a process without a service."""
        self._nats = nats
        if self._service:
            await nats.subscribe(_subject(self._namespace, self._service), self._on_request)
            await nats.listen(self._inbox, self._on_response)  # returns when the server has both subscriptions

    async def _on_request(self, _: str, data: bytes, __: object) -> None:
        request = _decode_request(data)
        if request.worker_id == self.worker_id:
            return  # this process's own request to the other processes of its service
        response = _MetricsResponse(self._service, self.worker_id, request.scrape, self.text(shared=True))
        assert self._nats is not None
        try:
            await self._nats.publish(request.inbox, msgspec.msgpack.encode(response))
        except TransportError as error:
            log.warning("cannot publish the metrics of this process: %s", error.message)

    def text(self, *, shared: bool = False) -> bytes:
        """Return this process's metrics as Prometheus text, with `shared` those of the shared registries too.

        They are those of `registry` and of prometheus_client's own registry, which has memory, CPU and file descriptors
        and the metrics of libraries such as vLLM.
        """
        from prometheus_client import REGISTRY, disable_created_metrics
        from prometheus_client.exposition import generate_latest

        disable_created_metrics()  # type: ignore[no-untyped-call]  # one more series for each counter and histogram
        labels = {"namespace": self._namespace, "service": self._service, "worker": str(self._worker)}
        labels["worker_id"] = self.worker_id
        registries = [self.registry, *(self._shared if shared else ()), REGISTRY]
        return generate_latest(_LabelledRegistries(registries, labels))

    async def gather(self) -> list[bytes]:
        """Return the texts of the other processes of the graph; none while NATS is unavailable.

        Waits until all processes have responded that discovery has or that responded before, at most `SCRAPE_WAIT_S`. A
        process that does not respond is not waited for again until it does. The first call waits in full, to learn which
        processes exist.
        """
        nats = self._nats
        if nats is None or not nats.connected or not self._service:
            return []
        self._count += 1
        number = self._count
        discovered = self._discovered()
        self._silent &= discovered
        scrape = self._scrapes[number] = _Scrape((self._responsive | discovered) - self._silent)
        try:
            request = msgspec.msgpack.encode(_MetricsRequest(self.worker_id, number, self._inbox))
            for service in self._graph:
                await nats.publish(_subject(*service), request)
            if number == 1:
                await asyncio.sleep(SCRAPE_WAIT_S)
            elif scrape.expected:
                async with asyncio.timeout(SCRAPE_WAIT_S):
                    await scrape.complete.wait()
        except TimeoutError:
            pass
        except TransportError as error:
            log.debug("cannot collect the metrics of other processes: %s", error)
        finally:
            del self._scrapes[number]
        missing = scrape.expected - scrape.responses.keys()
        self._responsive -= missing
        self._silent |= missing & discovered
        responses = sorted(scrape.responses.values(), key=lambda response: (response.service, response.worker_id))
        return [response.text for response in responses]

    def _discovered(self) -> set[str]:
        """Return the ids of the graph's other processes that can be called now."""
        return {
            f"{instance:x}"
            for (namespace, service, _), client in self._clients.items()
            if (namespace, service) in self._graph
            for instance in client.instance_ids()
        } - {self.worker_id}

    def _on_response(self, data: bytes) -> None:
        try:
            response = _decode_response(data)
        except msgspec.MsgspecError as error:  # from another version
            log.debug("dropped metrics that cannot be decoded: %s", error)
            return
        self._responsive.add(response.worker_id)  # a response that is too late for its scrape counts too
        self._silent.discard(response.worker_id)
        scrape = self._scrapes.get(response.scrape)
        if scrape is not None:
            scrape.responses[response.worker_id] = response
            if scrape.responses.keys() >= scrape.expected:
                scrape.complete.set()


def _subject(namespace: str, service: str) -> str:
    return f"metrics.{namespace}.{service}"


class _LabelledRegistries:
    """Several registries as one, with labels for every sample. A family that several have is taken from the first."""

    def __init__(self, registries: Sequence[CollectorRegistry], labels: dict[str, str]) -> None:
        self._registries = registries
        self._labels = labels

    def collect(self) -> Iterator[Metric]:
        from prometheus_client.core import Metric

        seen: set[str] = set()
        for registry in self._registries:
            families = [family for family in registry.collect() if family.name not in seen]
            seen.update(family.name for family in families)
            for family in families:
                labelled = Metric(family.name, family.documentation, family.type)
                labelled.samples = [s._replace(labels=label(s.labels, self._labels)) for s in family.samples]
                yield labelled


def label(given: Mapping[str, str], added: Mapping[str, str]) -> dict[str, str]:
    """Return the given labels and the added ones.

    A given label of the same name and another value is renamed to `exported_<name>`, as Prometheus does; except `worker`,
    which is kept: in the router's metrics it names the worker that they describe.
    """
    if given.keys().isdisjoint(added):
        return {**given, **added}
    if "worker" in given:
        added = {**added, "worker": given["worker"]}
    kept = {f"exported_{k}" if added.get(k, value) != value else k: value for k, value in given.items()}
    return kept | dict(added)
