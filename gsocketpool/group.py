"""Many endpoints under one roof: a pool for each, found by its options, and one cap over all."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Hashable, Mapping
from dataclasses import fields
from time import monotonic
from types import EllipsisType
from typing import Any, ClassVar, Final, Generic, NoReturn, TypeVar

from gsocketpool.arguments import seconds
from gsocketpool.budget import Budget
from gsocketpool.driver import Driver, clear_all, close_all
from gsocketpool.exceptions import PoolClosedError, PoolError
from gsocketpool.operations import address_in
from gsocketpool.settings import Settings
from gsocketpool.stats import GroupStats
from gsocketpool.upkeep import COARSEST_TICK, Keeper, Rounds
from gsocketpool.view import draw_group

__all__ = ["Endpoint", "Group"]

C = TypeVar("C")
P = TypeVar("P")
L = TypeVar("L")

#: In so many ways a call may name one endpoint (the order of its options, say) and find its pool at once.
MOST_CALLS: Final = 8

#: What a pool takes and a group does not, and what to do instead.
REFUSED: Final = {
    "initial_connections": "use min_idle, and wait_ready() of the pool",
    "options": "give them to connection() or pool()",
}


class Endpoint(Driver[C]):
    """The pool of one endpoint of a group; a runtime mixes it with its `Pool`."""

    _rounds: _GroupRounds
    _key: Hashable
    _where: str  # its name, but for a number
    _calls: list[tuple[Any, ...]]  # that the group has noted
    _empty_since: float | None

    def __init__(self, rounds: _GroupRounds, key: Hashable, where: str, *arguments: Any, **settings: Any) -> None:
        self._rounds = rounds
        self._key = key
        self._where = where
        self._calls = []
        self._empty_since = None
        super().__init__(*arguments, **settings)

    def __del__(self) -> None:
        if hasattr(self, "_upkeep"):
            self._rounds.disown(self)
        super().__del__()

    def _keeper(self) -> Keeper:
        return self._rounds


class Group(Generic[C, P, L]):
    """A group of pools of one runtime, but for what may wait. See :class:`gsocketpool.PoolGroup`."""

    #: The class of its pools.
    _endpoint: ClassVar[type[Endpoint[Any]]]

    def __init__(
        self,
        factory: Callable[..., C],
        *,
        max_connections: int = 200,
        max_total: int | None = None,
        key: Callable[..., Hashable] | None = None,
        forget_after: float = 60,
        name: str | None = None,
        max_connecting: int | None = None,
        breaker: int | None = 5,
        budget: Budget | None = None,
        **pool_options: Any,
    ) -> None:
        if not callable(factory):
            raise TypeError(f"factory must be a Connection class or another callable, not {factory!r}")
        if key is not None and not callable(key):
            raise TypeError(f"key must be a function of the options or None, not {key!r}")
        if max_total is not None and budget is not None:
            raise ValueError("max_total and budget are two ways to say the same: give one of them")
        if not isinstance(budget, Budget | None):
            raise TypeError(f"budget must be a Budget or None, not {budget!r}")
        seconds("forget_after", forget_after, zero=True)
        for unknown in pool_options.keys() - {field.name for field in fields(Settings)} | pool_options.keys() & REFUSED:
            raise TypeError(f"a group takes no {unknown}: {REFUSED.get(unknown, 'there is no such parameter')}")
        if max_total is not None:
            budget = Budget(max_total)
        if max_connecting is None:
            max_connecting = Settings.max_connecting
            if budget is not None:
                max_connecting = max(1, min(max_connecting, budget.max_total // 4))
        settings = {
            **pool_options,
            "max_connections": max_connections,
            "max_connecting": max_connecting,
            "breaker": breaker,
            "budget": budget,
        }
        Settings(name=name, **settings)
        self._factory = factory
        self._name = name
        self._key = key
        self._forget_after = forget_after
        self._settings = settings
        self._budget = budget
        self._closed = False
        self._home = self._endpoint._home_is()
        # What pools would be called, but for their numbers: how many there are, and the last number that was given.
        self._names: dict[str, tuple[int, int]] = {}
        self._rounds = _GroupRounds(self)
        self._pools: dict[Hashable, Endpoint[C]] = {}
        # Forgotten, but somebody may still refer to one; and then it must not be made a second time.
        self._known: weakref.WeakValueDictionary[Hashable, Endpoint[C]] = weakref.WeakValueDictionary()
        self._by_call: dict[tuple[Any, ...], Endpoint[C]] = {}
        self._leaving: list[Endpoint[C]] = []  # closed, and something of it is still lent

    __init__.__qualname__ = "PoolGroup.__init__"  # what errors of a wrong call say

    def connection(self, timeout: float | EllipsisType | None = ..., /, **options: Any) -> L:
        """A context manager that borrows a connection to the endpoint which the options say, and gives it back.

        :param timeout: as for :meth:`Pool.acquire`; by position, since an option may have that name.
        :param options: keyword arguments for the factory.
        :raises PoolClosedError: the group is closed.
        :raises TypeError: two sets of options could not be told apart, since one has a value that cannot be hashed.
        """
        try:
            pool: Any = self._by_call[tuple(options.items())]
        except (KeyError, TypeError):
            if isinstance(timeout, Mapping):
                raise TypeError("options go by keyword: connection(**options); by position a timeout") from None
            pool = self.pool(**options)
        lease: L = pool._lease(pool, timeout)
        return lease

    def pool(self, /, **options: Any) -> P:
        """The pool of the endpoint which the options say. The same one each time, as long as there is anything in it,
        or somebody refers to it. Keep it at hand for as long as you have something of it that you acquired by hand.

        :param options: keyword arguments for the factory; a copy is kept.
        :raises PoolClosedError: the group is closed. What was borrowed before that can still be given back.
        :raises PoolError: the group was made in another thread.
        :raises TypeError: two sets of options could not be told apart, since one has a value that cannot be hashed.
        """
        if self._endpoint._home_is() != self._home:
            raise PoolError(f"{self._label} was made in another {self._endpoint._home_name}: make one in each")
        key = _frozen(options) if self._key is None else self._key(**options)
        if not _is_hashable(key):
            raise TypeError(f"key must answer something that can be hashed, not a {type(key).__name__}")
        pool: Any = self._pool_of(key, options)
        return pool  # type: ignore[no-any-return]

    def _pool_of(self, key: Hashable, options: dict[str, Any]) -> Endpoint[C]:
        pool = self._pools.get(key)
        if pool is None:
            pool = self._known.get(key)
            if self._closed and pool is not None and pool.in_use:
                return pool
            if self._closed:
                raise PoolClosedError(f"{self._label} is closed")
            if pool is None or pool.closed:
                where = self._where_is(options)
                pool = self._endpoint(
                    self._rounds,
                    key,
                    where,
                    self._factory,
                    _copied(options),
                    name=self._name_for(where),
                    **self._settings,
                )
                made = self._known.get(key)
                if made is not None and not made.closed:  # a listener has waited, and let somebody else make it
                    pool = made
                self._known[key] = pool
            self._pools[key] = pool
            pool._empty_since = None
            pool._upkeep.hurry(pool, monotonic())
        call = tuple(options.items())
        if len(pool._calls) < MOST_CALLS and _is_hashable(call) and call not in self._by_call:
            pool._calls.append(call)
            self._by_call[call] = pool
        return pool

    @property
    def name(self) -> str | None:
        """What logs, errors and ``repr()`` call this group, as it was given."""
        return self._name

    @property
    def pools(self) -> list[P]:
        """The pools that there are now."""
        pools: list[Any] = list(self._pools.values())
        return pools

    @property
    def budget(self) -> Budget | None:
        """The cap over all, None if there is none."""
        return self._budget

    @property
    def closed(self) -> bool:
        """Whether :meth:`close` was called."""
        return self._closed

    def stats(self) -> GroupStats:
        """The state of all pools that there are now, and their sums."""
        budget = self._budget
        return GroupStats(
            endpoints={key: pool.stats() for key, pool in self._pools.items()},
            max_total=None if budget is None else budget.max_total,
        )

    def debug(self) -> str:
        """:meth:`Pool.debug` of all pools that there are now, those in which most wait first."""
        return draw_group(self, self._pools.values())

    def __reduce_ex__(self, protocol: object) -> NoReturn:
        raise TypeError("a group cannot be copied or pickled: make another one")

    def __repr__(self) -> str:
        stats = self.stats()
        state = "closed" if self._closed else f"{len(self._pools)} endpoint{'s' * (len(self._pools) != 1)}"
        cap = "" if stats.max_total is None else f" of at most {stats.max_total}"
        return (
            f"<{self._label}: {state}, {stats.idle} idle, {stats.in_use} in use, {stats.opening} opening{cap}, "
            f"{stats.waiting} waiting>"
        )

    @property
    def _label(self) -> str:
        return f"{type(self).__name__} {self._name!r}" if self._name else type(self).__name__

    def _clear(self) -> None:
        clear_all(self._alive())

    def _close(self, timeout: float | None) -> None:
        if timeout is not None:
            seconds("timeout", timeout, zero=True)
        self._closed = True
        close_all(self._alive(), timeout)

    def _where_is(self, options: Mapping[str, Any]) -> str:
        """Not by the key: there may be a password in it."""
        where = address_in(options) or "endpoint"
        return f"{self._name} {where}" if self._name else where

    def _name_for(self, where: str) -> str:
        pools, number = self._names.get(where, (0, 0))
        self._names[where] = pools + 1, number + 1
        return f"{where} #{number + 1}" if number else where

    def _disown(self, pool: Endpoint[C]) -> None:
        """Nobody refers to it any more. It must not be found again while it goes."""
        if self._known.get(pool._key) is pool:
            del self._known[pool._key]
        pools, number = self._names.get(pool._where, (1, 0))
        if pools > 1:
            self._names[pool._where] = pools - 1, number
        else:
            self._names.pop(pool._where, None)

    def _alive(self) -> list[Endpoint[C]]:
        self._leaving = [pool for pool in self._leaving if pool.in_use]
        return list(
            {id(pool): pool for pool in (*self._leaving, *self._known.values(), *self._pools.values())}.values()
        )

    def _tended(self, pool: Endpoint[C], pause: float) -> float:
        """Forget it, if it has been empty for so long."""
        if not pool.is_empty():
            pool._empty_since = None
            if not pool.closed:  # somebody has kept it, and uses it again
                self._pools.setdefault(pool._key, pool)
            return min(pause, max(self._forget_after, COARSEST_TICK))
        now = monotonic()
        if pool._empty_since is None:
            pool._empty_since = now
        left = pool._empty_since + self._forget_after - now
        if left > 0:
            return min(pause, left)
        self._forget(pool)
        return pause

    def _forget(self, pool: Endpoint[C]) -> None:
        if self._pools.get(pool._key) is pool:
            del self._pools[pool._key]
        calls, pool._calls = pool._calls, []
        for call in calls:
            self._by_call.pop(call, None)


class _GroupRounds(Rounds):
    """Tends the pools of a group, and has it forget those that stay empty."""

    insists = True

    def __init__(self, group: Group[Any, Any, Any]) -> None:
        super().__init__()
        self._group = weakref.ref(group)

    def let_go(self, pool: Driver[Any]) -> None:
        group = self._group()
        if group is not None and group._pools.get(pool._key) is pool:  # type: ignore[attr-defined]
            group._forget(pool)
            if pool.in_use:
                group._leaving = [each for each in group._leaving if each.in_use]
                group._leaving.append(pool)
        super().let_go(pool)

    def disown(self, pool: Endpoint[Any]) -> None:
        """It goes: see `Group`."""
        group = self._group()
        if group is not None:
            group._disown(pool)

    def tended(self, pool: Driver[Any], pause: float) -> float:
        group = self._group()
        return pause if group is None else group._tended(pool, pause)  # type: ignore[arg-type]


def _is_hashable(value: object) -> bool:
    try:
        hash(value)
    except TypeError:
        return False
    return True


def _frozen(options: Mapping[str, Any]) -> Hashable:
    """Equal for equal options, in whichever order."""
    return frozenset((name, _freeze(name, value)) for name, value in options.items())


def _freeze(name: str, value: Any) -> Hashable:
    if _is_hashable(value):
        return value  # type: ignore[no-any-return]
    if isinstance(value, Mapping):
        return (dict, frozenset((key, _freeze(name, each)) for key, each in value.items()))
    if isinstance(value, (list, tuple)):
        return (type(value), tuple(_freeze(name, each) for each in value))
    if isinstance(value, (set, bytearray)):
        return (type(value), frozenset(value) if isinstance(value, set) else bytes(value))
    raise TypeError(
        f"endpoints cannot be told apart by the option {name}: a {type(value).__name__} cannot be hashed. Give the "
        "group a key=, a function of the options that answers what an endpoint is known by: "
        "key=lambda host, port, **others: (host, port), say"
    )


def _copied(options: Mapping[str, Any]) -> dict[str, Any]:
    """So that a list or the like that the caller changes later does not change what is dialled."""
    return {name: value if _is_hashable(value) else _copy(value) for name, value in options.items()}


def _copy(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {key: _copy(each) for key, each in value.items()}
    if isinstance(value, list):
        return [_copy(each) for each in value]
    if isinstance(value, tuple):
        copies = [_copy(each) for each in value]
        return value._make(copies) if hasattr(value, "_make") else tuple(copies)  # a named tuple, or not
    if isinstance(value, (set, bytearray)):
        return type(value)(value)
    return value
