"""A word to a holder from outside the engine core: for requests that ended before the core knew of them."""

from __future__ import annotations

import logging
import os
import socket
from collections.abc import Mapping
from typing import Any

import msgspec

from dynamo.engines.kv_transfer.session import SECRET, Done, Offer, Session, SessionError, greet_as_reader

log = logging.getLogger(__name__)

CONNECT_TIMEOUT_S = 2.0


def release(kv_transfer_params: Mapping[str, Any]) -> None:
    """Blocks for some seconds at most. Does nothing for another connector's parameters, or for what is free already."""
    try:
        offer = msgspec.convert(kv_transfer_params, Offer)
    except msgspec.ValidationError:
        return
    try:
        session = Session(socket.create_connection((offer.address, offer.port), CONNECT_TIMEOUT_S))
        try:
            greet_as_reader(session, os.environ.get(SECRET, "").encode())
            session.send(Done(offer.holding))
        finally:
            session.close()
    except (OSError, SessionError) as error:
        log.debug("KV at %s:%d cannot be released, its lease will end: %s", offer.address, offer.port, error)
