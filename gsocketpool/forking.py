"""What becomes of a pool in the child of a fork, whose sockets are all the parent's.

What the child may still do with one, by a reference that somebody has kept or in a greenlet that was using it, must not
reach the peer. So the child's descriptor is made to lead nowhere; and the object is kept for good, since its finalizer
might say something to the peer. The pool begins anew, empty.
"""

from __future__ import annotations

import logging
import os
import socket
import weakref
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from gsocketpool.blocking import BlockingPool

__all__ = ["pools"]

logger = logging.getLogger("gsocketpool")

#: All pools of this process, by their identity: a subclass may define `__eq__` as it likes.
pools: weakref.WeakValueDictionary[int, BlockingPool[Any]] = weakref.WeakValueDictionary()


def begin_anew() -> None:
    """In the child, before anything else runs."""
    for pool in list(pools.values()):
        members = list(pool._members.values())
        for member in members:
            pool._upkeep.look_away(pool, member)
        if pool._ledger is not None:
            pool._ledger.forget(members)
        connections = pool.forget()
        pool._given_up.update((id(connection), connection) for connection in connections)
        _cut_off(pool, connections)
        if not pool.closed:
            pool._start_dials()


def _cut_off(pool: BlockingPool[Any], connections: list[Any]) -> None:
    dead_end, other = socket.socketpair()
    try:
        other.close()
        dead_end.setblocking(False)
        for connection in connections:
            try:
                descriptor = pool._operations.fileno(connection)
                if descriptor is not None and descriptor >= 0:
                    os.dup2(dead_end.fileno(), descriptor, inheritable=False)
            except Exception as error:
                logger.debug("%s: fileno() failed", pool._label, exc_info=error)
    finally:
        dead_end.close()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=begin_anew)
