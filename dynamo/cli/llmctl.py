"""`dynamo llmctl`, also the command `llmctl`: names of models in etcd, as ai-dynamo 0.3 had it.

A worker writes its model's card itself, under its lease. `add` writes one under id 0, which no lease ends, so that a
model gets a further name; it is there until `remove`.
"""

from __future__ import annotations

import asyncio
import sys
import time
from collections.abc import Awaitable, Callable, Sequence
from typing import TYPE_CHECKING, NamedTuple, TypeVar

import click

from dynamo.errors import ConfigError, DynamoError

if TYPE_CHECKING:
    from dynamo.llm.protocol import ModelCard
    from dynamo.transport.etcd import Etcd

T = TypeVar("T")

NAMESPACE = "dynamo"
NO_LEASE = 0
KINDS = {
    "chat": ("chat", "chat-model", "chat-models"),
    "completion": ("completion", "completions", "completion-model", "completion-models"),
    "embedding": ("embedding", "embeddings", "embedding-model", "embedding-models"),
}
KIND_OF = {name: kind for kind, names in KINDS.items() for name in names}
HEAD = ("MODEL TYPE", "MODEL NAME", "NAMESPACE", "COMPONENT", "ENDPOINT")
WORKERS_ENDPOINT = "generate"


class _Address(NamedTuple):
    namespace: str
    component: str
    endpoint: str


@click.group()
@click.option("-n", "--public-namespace", metavar="NAME", help=f"Namespace of endpoints; {NAMESPACE} by default.")
@click.pass_context
def llmctl(ctx: click.Context, public_namespace: str | None) -> None:
    """List, add and remove the names under which models are served.

    It writes to the etcd of ETCD_ENDPOINTS, else to that of the graph which runs on this machine.

    \b
    Examples:
      dynamo llmctl http list
      dynamo llmctl http add chat-models my-assistant dynamo.Processor.chat/completions
      dynamo llmctl http remove chat-models my-assistant
    """
    ctx.obj = public_namespace


@llmctl.group()
def http() -> None:
    """Models of the HTTP frontend."""


@http.command("list")
@click.argument("kind", metavar="[TYPE]", type=click.Choice(list(KIND_OF)), required=False)
@click.pass_obj
def list_models(public_namespace: str | None, kind: str | None) -> None:
    """List the models; TYPE is chat-models, completion-models or embedding-models."""
    rows, wanted = set(), KIND_OF.get(kind or "")
    for _, card, endpoint in _with_etcd(_cards):
        if public_namespace in (None, card.namespace):
            kinds = [t for t in card.types if wanted in (None, t)]
            rows |= {(t, card.name, card.namespace, card.component, endpoint) for t in kinds}
    if rows:
        click.echo(_boxed([HEAD, *sorted(rows)]))
    else:
        click.echo(f"No models found in namespace: {public_namespace or NAMESPACE}")


@http.command()
@click.argument("kind", metavar="TYPE", type=click.Choice(list(KIND_OF)))
@click.argument("name")
@click.argument("endpoint")
@click.pass_obj
def add(public_namespace: str | None, kind: str, name: str, endpoint: str) -> None:
    """Serve model NAME at ENDPOINT, written as component.endpoint or namespace.component.endpoint."""
    address = _parse(endpoint, public_namespace or NAMESPACE)
    served = _with_etcd(lambda etcd: _add(etcd, KIND_OF[kind], name, address))
    if not served:
        click.echo(f"note: nothing serves {'.'.join(address)} now", err=True)


@http.command()
@click.argument("kind", metavar="TYPE", type=click.Choice(list(KIND_OF)))
@click.argument("name")
def remove(kind: str, name: str) -> None:
    """Remove what `add` wrote for model NAME; a name that is not there is no error."""
    if _with_etcd(lambda etcd: _remove(etcd, KIND_OF[kind], name)):
        click.echo(f"note: running workers serve {name!r} by themselves; it goes when they stop", err=True)


def _parse(text: str, namespace: str) -> _Address:
    """Raises ConfigError in ai-dynamo's words."""
    form = "Format should be 'component.endpoint' or 'namespace.component.endpoint'"
    parts = text.split(".")
    if len(parts) == 2:
        parts = [namespace, *parts]
    if len(parts) != 3:
        length = "short" if len(parts) < 3 else "long"
        raise ConfigError(f"Endpoint name '{text}' is too {length}. {form}", hint="for example dynamo.Processor.chat")
    if not all(parts):
        raise ConfigError(f"Endpoint name '{text}' has an empty part. {form}", hint="for example dynamo.Processor.chat")
    return _Address(*parts)


def _with_etcd(work: Callable[[Etcd], Awaitable[T]]) -> T:
    from dynamo.cli.deployments import one_deployment

    async def run() -> T:
        async with one_deployment().etcd() as etcd:
            return await work(etcd)

    return asyncio.run(run())


async def _cards(etcd: Etcd) -> list[tuple[str, ModelCard, str]]:
    """Key, card and endpoint of every model."""
    import msgspec

    from dynamo.cli.deployments import decode_cards
    from dynamo.llm.protocol import MODELS_PREFIX

    items, _ = await etcd.get_prefix(MODELS_PREFIX)
    endpoints = {}
    for item in items:
        try:
            endpoints[item.key] = str(msgspec.json.decode(item.value, type=dict).get("endpoint") or WORKERS_ENDPOINT)
        except msgspec.MsgspecError:
            continue
    return [(key, card, endpoints[key]) for key, card in decode_cards(items)]


async def _add(etcd: Etcd, kind: str, name: str, address: _Address) -> bool:
    """Whether anything serves that endpoint now. Raises DynamoError when the name is taken."""
    from dynamo.llm.protocol import model_key
    from dynamo.rpc.messages import instances_prefix

    key = model_key(name, NO_LEASE)
    cards = await _cards(etcd)
    known = next(((card, endpoint) for k, card, endpoint in cards if k == key), None)
    taken = DynamoError(f"failed to create key: {key} exists", hint=f"llmctl http remove {kind}-models {name}")
    if known is None:
        like = next((c for _, c, _ in cards if c.namespace == address.namespace), None)
        if not await etcd.create(key, _encode(_card(kind, name, address, like), address.endpoint)):
            raise taken
    else:  # another type of the same model
        card, endpoint = known
        if kind in card.types or (card.namespace, card.component, endpoint) != address:
            raise taken
        card.types = [*card.types, kind]
        await etcd.put(key, _encode(card, endpoint))
    instances, _ = await etcd.get_prefix(instances_prefix(*address))
    return bool(instances)


def _card(kind: str, name: str, address: _Address, like: ModelCard | None) -> ModelCard:
    """Its limits are those of a worker's model in the same namespace, on which it will run."""
    from dynamo.llm.protocol import ModelCard

    return ModelCard(
        name=name,
        source=like.source if like else "",
        namespace=address.namespace,
        component=address.component,
        context_length=like.context_length if like else 0,
        kv_block_size=like.kv_block_size if like else 0,
        engine=like.engine if like else "",
        created=int(time.time()),
        types=[kind],
    )


def _encode(card: ModelCard, endpoint: str) -> bytes:
    import msgspec

    return msgspec.json.encode({**msgspec.to_builtins(card), "endpoint": endpoint})


async def _remove(etcd: Etcd, kind: str, name: str) -> bool:
    """Whether running workers serve the name all the same."""
    from dynamo.llm.protocol import model_key

    key = model_key(name, NO_LEASE)
    cards = await _cards(etcd)
    for found, card, endpoint in cards:
        if found == key and kind in card.types:
            card.types = [t for t in card.types if t != kind]
            await (etcd.put(key, _encode(card, endpoint)) if card.types else etcd.delete(key))
    return any(card.name == name and found != key for found, card, _ in cards)


def _boxed(rows: Sequence[Sequence[str]]) -> str:
    """A table with lines of ASCII around its cells; the first row is the head."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    line = "+" + "+".join("-" * (width + 2) for width in widths) + "+"
    drawn = ["| " + " | ".join(f"{c:<{w}}" for c, w in zip(row, widths, strict=True)) + " |" for row in rows]
    return "\n".join([line, drawn[0], line, *drawn[1:], line])


def main() -> int:
    """The console command `llmctl`."""
    from dynamo.cli.main import invoke

    return invoke(llmctl, "llmctl")


if __name__ == "__main__":
    sys.exit(main())
