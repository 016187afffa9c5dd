"""The cards of models in etcd, as those who serve models over HTTP read them."""

from __future__ import annotations

import logging
from collections.abc import Mapping

import msgspec

from dynamo.llm.protocol import ModelCard

log = logging.getLogger(__name__)

BACKEND = "backend"
"""type of a card whose endpoint takes tokens in plain data; see `dynamo.llm.token_worker`"""


def decode_cards(cards: Mapping[str, bytes]) -> list[ModelCard]:
    """Return the cards in the order of their etcd keys. Unreadable ones, of workers of another version, are skipped."""
    found = []
    for key in sorted(cards):
        try:
            found.append(msgspec.json.decode(cards[key], type=ModelCard))
        except msgspec.MsgspecError as error:
            log.warning("skipped unreadable model card %s: %s", key, error)
    return found


def is_native(card: ModelCard) -> bool:
    """Return True for the card of a worker of this project, which publishes its engine's name."""
    return bool(card.engine) and card.endpoint == "generate" and BACKEND not in card.types
