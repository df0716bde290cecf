"""What becomes of the pools in the child of a fork, where all sockets are the parent's.

What the child may still do with one must not reach the peer: by a reference that somebody has kept, in a greenlet that
was using it and was carried over, or in a finalizer. So the child's descriptors are made to lead nowhere, whatever the
pools themselves were doing with a connection is ended, and the objects are kept for good. The pools begin anew, empty.
"""

from __future__ import annotations

import _socket
import logging
import os
import socket
import weakref
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from gsocketpool.log import say
from gsocketpool.operations import descriptor_of

if TYPE_CHECKING:
    from gsocketpool.driver import Driver

__all__ = ["first_of_all", "kept", "pools"]

#: All pools of this process, by their identity: a subclass may define `__eq__` as it likes.
pools: weakref.WeakValueDictionary[int, Driver[Any]] = weakref.WeakValueDictionary()

#: What a runtime must do in the child before its pools begin anew.
first_of_all: list[Callable[[], None]] = []

#: The parent's connections: their finalizers might say something to the peer.
kept: list[Any] = []


def begin_anew() -> None:
    """In the child, before anything else runs. One pool's trouble must not keep the others from being cut off."""
    for prepare in first_of_all:
        prepare()
    forgotten = []
    for pool in list(pools.values()):
        members = list(pool._members.values())
        connections, places = pool.forget()
        forgotten.append((pool, members, connections, places))
        kept.extend(connections)
    _cut_off([descriptor for pool, _, connections, _ in forgotten for descriptor in _descriptors(pool, connections)])
    for pool, members, connections, places in forgotten:
        try:
            pool._after_fork(members, connections, places)
        except BaseException as error:
            pool._report("it did not begin anew after a fork", error)


def _descriptors(pool: Driver[Any], connections: list[Any]) -> list[int]:
    found = []
    for connection in connections:
        try:
            descriptor = descriptor_of(pool._operations, connection)
            if descriptor is not None:
                found.append(descriptor)
        except BaseException as error:
            say(logging.DEBUG, "%s: fileno() failed", pool._label, error=error)
    return found


def _cut_off(descriptors: list[int]) -> None:
    if not descriptors:
        return
    try:
        dead_end = _dead_end()
    except OSError:  # no descriptor is free
        for descriptor in descriptors[:2]:
            _socket.close(descriptor)  # not os.close(), which gevent may have patched to wait for the hub
        dead_end = _dead_end() if len(descriptors) > 1 else socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM).detach()
    for descriptor in descriptors:
        if descriptor != dead_end:
            try:
                os.dup2(dead_end, descriptor, inheritable=False)
            except OSError as error:
                say(logging.DEBUG, "descriptor %d cannot be cut off", descriptor, error=error)
    if dead_end not in descriptors:
        _socket.close(dead_end)


def _dead_end() -> int:
    """A descriptor on which whatever is done is an error at once, and wakes who waits for it. Not an end of the stream,
    which might be taken for the end of a reply; nor a socket that is not connected, where OpenSSL tries for ever."""
    read_end, dead_end = os.pipe()
    _socket.close(read_end)
    os.set_blocking(dead_end, False)
    return dead_end


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=begin_anew)
