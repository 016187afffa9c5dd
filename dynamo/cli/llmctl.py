"""`dynamo llmctl`, also the command `llmctl`: names of models in etcd, as in ai-dynamo 0.3.

A worker writes the card of its model itself, under its lease. `add` registers a model, or a further name of one: it writes
a card for one type under id 0, which belongs to no lease and stays until `remove`.
"""

from __future__ import annotations

import sys
import time
from typing import TYPE_CHECKING, NamedTuple

import click

from dynamo.cli import tables
from dynamo.cli.etcd import with_etcd
from dynamo.errors import ConfigError, DynamoError

if TYPE_CHECKING:
    from dynamo.llm.protocol import ModelCard
    from dynamo.transport.etcd import Etcd

NAMESPACE = "dynamo"
NO_LEASE = 0
KINDS = {
    "chat": ("chat", "chat-model", "chat-models"),
    "completion": ("completion", "completions", "completion-model", "completion-models"),
    "embedding": ("embedding", "embeddings", "embedding-model", "embedding-models"),
}
KIND_OF = {name: kind for kind, names in KINDS.items() for name in names}
HEAD = ("MODEL TYPE", "MODEL NAME", "NAMESPACE", "COMPONENT", "ENDPOINT")


class _Address(NamedTuple):
    """The endpoint that serves a model."""

    namespace: str
    component: str
    endpoint: str


@click.group()
@click.option("-n", "--public-namespace", metavar="NAME", help=f"Namespace of endpoints; {NAMESPACE} by default.")
@click.pass_context
def llmctl(ctx: click.Context, public_namespace: str | None) -> None:
    """List, add and remove the names under which models are served.

    The names are kept in the etcd of ETCD_ENDPOINTS, or of the graph that runs on this machine.

    \b
    Examples:
      dynamo llmctl http list
      dynamo llmctl http add chat-models my-assistant dynamo.Processor.chat/completions
      dynamo llmctl http remove chat-models my-assistant
    """
    ctx.obj = public_namespace


@llmctl.group()
def http() -> None:
    """Manage the models of the HTTP frontend."""


@http.command("list")
@click.argument("kind", metavar="[TYPE]", type=click.Choice(list(KIND_OF)), required=False)
@click.pass_obj
def list_models(public_namespace: str | None, kind: str | None) -> None:
    """List the models; TYPE is chat-models, completion-models or embedding-models."""
    wanted = KIND_OF.get(kind or "")
    rows = {
        (model_type, card.name, card.namespace, card.component, card.endpoint)
        for _, card in with_etcd(_cards)
        if public_namespace in (None, card.namespace)
        for model_type in card.types
        if wanted in (None, model_type)
    }
    if rows:
        click.echo(tables.render(sorted(rows), HEAD, boxed=True))
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
    served = with_etcd(lambda etcd: _add(etcd, KIND_OF[kind], name, address))
    if not served:
        click.echo(f"note: nothing serves {'.'.join(address)} now", err=True)


@http.command()
@click.argument("kind", metavar="TYPE", type=click.Choice(list(KIND_OF)))
@click.argument("name")
def remove(kind: str, name: str) -> None:
    """Remove the entry that `add` made for model NAME. A name without an entry is not an error."""
    if with_etcd(lambda etcd: _remove(etcd, KIND_OF[kind], name)):
        click.echo(f"note: running workers serve {name!r} by themselves; it is removed when they stop", err=True)


def _parse(text: str, namespace: str) -> _Address:
    """Parse the name of an endpoint. Raises ConfigError with ai-dynamo's messages."""
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


async def _cards(etcd: Etcd) -> list[tuple[str, ModelCard]]:
    """Return etcd key and card of every model."""
    from dynamo.cli.deployments import decode_cards
    from dynamo.llm.protocol import MODELS_PREFIX

    items, _ = await etcd.get_prefix(MODELS_PREFIX)
    return decode_cards(items)


def _key(kind: str, name: str) -> str:
    from dynamo.llm.protocol import model_key

    return model_key(name, NO_LEASE, kind)


async def _add(etcd: Etcd, kind: str, name: str, address: _Address) -> bool:
    """Add a model. Return whether an instance serves the endpoint now. Raises DynamoError if the name is taken."""
    import msgspec

    from dynamo.rpc.messages import instances_prefix

    key = _key(kind, name)
    like = next((card for _, card in await _cards(etcd) if _answers(address, card)), None)
    if not await etcd.create(key, msgspec.json.encode(_card(kind, name, address, like))):
        raise DynamoError(f"failed to create key: {key} exists", hint=f"llmctl http remove {kind}-models {name}")
    instances, _ = await etcd.get_prefix(instances_prefix(*address))
    return bool(instances)


def _answers(address: _Address, card: ModelCard) -> bool:
    """Return True if requests to an endpoint reach the worker of a card: it is the worker's, or its Processor's."""
    worker = (card.component, card.endpoint) == (address.component, address.endpoint)
    return bool(card.engine) and card.namespace == address.namespace and (worker or address.component == "Processor")


def _card(kind: str, name: str, address: _Address, like: ModelCard | None) -> ModelCard:
    """Return a card with the limits of `like`, a worker's model that answers for it."""
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
        endpoint=address.endpoint,
    )


async def _remove(etcd: Etcd, kind: str, name: str) -> bool:
    """Remove a model that was added. Return whether running workers serve the name by themselves."""
    key = _key(kind, name)
    await etcd.delete(key)
    return any(card.name == name and f"/{NO_LEASE}:" not in found[len(name) :] for found, card in await _cards(etcd))


def main() -> int:
    """Run the console command `llmctl`."""
    from dynamo.cli.main import invoke

    return invoke(llmctl, "llmctl")


if __name__ == "__main__":
    sys.exit(main())
