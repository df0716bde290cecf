"""Connections to nowhere, for the cases that measure the pool alone."""

from __future__ import annotations

from gsocketpool import Connection


class Fake(Connection):
    """Opens and closes at once."""

    connected = False

    def open(self) -> None:
        """Remember that it is open."""
        self.connected = True

    def close(self) -> None:
        """Remember that it is closed."""
        self.connected = False

    def is_connected(self) -> bool:
        """Say whether it is open."""
        return self.connected


class Expired(Fake):
    """Has reached the end of its life."""

    def is_expired(self) -> bool:
        """Say that it has."""
        return True
