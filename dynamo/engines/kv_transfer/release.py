"""Early release of a lease from outside the engine core, for requests that ended before the core received them."""

from __future__ import annotations

import logging
import os
import socket
from collections.abc import Mapping
from typing import Any

import msgspec

from dynamo.engines.kv_transfer.session import SECRET, Done, RemoteKv, Session, SessionError, handshake_as_reader

log = logging.getLogger(__name__)

CONNECT_TIMEOUT_S = 2.0


def release(kv_transfer_params: Mapping[str, Any]) -> None:
    """Release the lease that the parameters name. Blocks, for some seconds if the holder does not respond.

    No-op for parameters of another connector, and for a lease that has ended. If the holder cannot be reached its lease
    expires later.
    """
    try:
        remote = msgspec.convert(kv_transfer_params, RemoteKv)
    except msgspec.ValidationError:
        return
    try:
        session = Session(socket.create_connection((remote.address, remote.port), CONNECT_TIMEOUT_S))
        try:
            handshake_as_reader(session, os.environ.get(SECRET, "").encode())
            session.send(Done(remote.lease_id))
        finally:
            session.close()
    except (OSError, SessionError) as error:
        log.debug("KV lease at %s:%d not released, it will expire: %s", remote.address, remote.port, error)
