"""The guarantees by their numbers, each against a real server. See also `test_kills`, which tests most of them at every
switch point, and `test_peers`, which tests them against Valkey, PostgreSQL and nginx."""

from __future__ import annotations

import gc
import logging
import random
import threading
import weakref
from collections import Counter, deque
from typing import Any

import gevent
import pytest
from gevent.event import Event

from gsocketpool import Connection, Pool, PoolClosedError, PoolExhaustedError, TcpConnection
from tests.conftest import Crashed, Logged
from tests.servers import LineEchoServer, Server, refused_port

BOUND = 30.0


def line_pool(server: Server, **options: Any) -> Pool[TcpConnection]:
    return Pool(TcpConnection, {"host": "127.0.0.1", "port": server.port}, **options)


def ask(connection: TcpConnection, text: str) -> str:
    connection.send(text.encode() + b"\n")
    return connection.recv_until(b"\n").decode()


def join(greenlets: list[gevent.Greenlet[..., Any]]) -> None:
    gevent.joinall(greenlets, timeout=BOUND, raise_error=True)
    assert all(greenlet.ready() for greenlet in greenlets), "somebody was never served"


def test_g1_g2_g3_g4_two_hundred_greenlets_of_which_a_third_is_killed_or_timed_out_at_random(
    rng: random.Random,
) -> None:
    """The test in which 0.1.6 gave 181 wrong replies and let the server see 198 sockets at a cap of 8."""
    cap, greenlets, requests = 8, 200, 20
    wrong: list[tuple[str, str]] = []
    using: Counter[int] = Counter()
    shared: list[int] = []
    with LineEchoServer() as server, line_pool(server, max_connections=cap) as pool:

        def borrow(who: int) -> None:
            for turn in range(requests):
                text = f"{who}.{turn}"
                try:
                    with gevent.Timeout(rng.choice([None, None, 0.0005, 0.002])), pool.connection(timeout=BOUND) as c:
                        using[id(c)] += 1
                        try:
                            if using[id(c)] > 1:
                                shared.append(who)
                            c.send(text.encode() + b"\n")
                            gevent.sleep(0)
                            reply = c.recv_until(b"\n").decode()
                        finally:
                            using[id(c)] -= 1
                        if reply != text:
                            wrong.append((text, reply))
                except gevent.Timeout:
                    pass

        def kill() -> None:
            for victim in rng.sample(borrowers, greenlets // 3):
                gevent.sleep(0)
                victim.kill(block=False)

        borrowers = [gevent.spawn(borrow, who) for who in range(greenlets)]
        join([*borrowers, gevent.spawn(kill)])

        assert wrong == []
        assert shared == []
        assert server.most <= cap
        assert pool.faults() == []
        entered = 0
        everybody = Event()

        def hold() -> None:
            nonlocal entered
            with pool.connection(timeout=BOUND) as connection:
                entered += 1
                if entered == cap:
                    everybody.set()
                assert everybody.wait(BOUND)
                assert ask(connection, "still served") == "still served"

        join([gevent.spawn(hold) for _ in range(cap)])


def test_g1_a_slot_is_not_given_to_a_new_connection_before_the_old_one_is_closed() -> None:
    may_close = Event()

    class SlowToClose(TcpConnection):
        def close(self) -> None:
            may_close.wait(BOUND)
            super().close()

    with LineEchoServer() as server:
        pool = Pool(SlowToClose, {"host": "127.0.0.1", "port": server.port}, max_connections=1)
        with pytest.raises(KeyError), pool.connection():
            raise KeyError
        with pytest.raises(PoolExhaustedError, match="1 closing"):
            pool.acquire(timeout=0.001)
        assert server.accepted == 1
        late = gevent.spawn(pool.acquire, timeout=BOUND)
        gevent.sleep(0)
        may_close.set()
        pool.release(late.get(timeout=BOUND))
        assert (server.accepted, server.most) == (2, 1)
        pool.close()


def test_by_the_rule_of_016_a_slot_that_is_being_emptied_is_room() -> None:
    with LineEchoServer() as server, line_pool(server, initial_connections=2, max_connections=2) as pool:
        server.hang_up()
        gevent.idle()
        pool.cool(0.0)
        connection = pool.acquire(retry=0)  # both that idled are stale, and being closed now
        assert ask(connection, "alive") == "alive"
        pool.release(connection)


@pytest.mark.parametrize("interruption", [gevent.GreenletExit, gevent.Timeout, KeyError])
@pytest.mark.parametrize("by_hand", [False, True])
def test_g3_the_connection_of_an_interrupted_borrower_is_never_lent_again(
    interruption: type[BaseException], by_hand: bool, crashed: Crashed
) -> None:
    asked = Event()
    with LineEchoServer() as server, line_pool(server, max_connections=1) as pool:

        def be_interrupted() -> None:
            if by_hand:
                connection = pool.acquire()
                try:
                    connection.send(b"the reply to this must reach nobody else\n")
                    asked.set()
                    gevent.sleep(BOUND)
                except KeyError:
                    pool.drop(connection)  # an Exception, by hand, is the caller's to judge
                    raise
                finally:
                    if interruption is not KeyError:
                        pool.release(connection)
            else:
                with pool.connection() as connection:
                    connection.send(b"the reply to this must reach nobody else\n")
                    asked.set()
                    gevent.sleep(BOUND)

        borrower = gevent.spawn(be_interrupted)
        assert asked.wait(BOUND)
        borrower.kill(interruption)
        assert [type(error) for error in crashed.take()] in ([], [interruption])  # to end by a kill is no error
        with pool.connection(timeout=BOUND) as connection:
            assert ask(connection, "mine") == "mine"
        assert pool.stats().opened == 2


def test_g3_by_hand_a_kill_is_noticed_while_others_wait_too() -> None:
    """A release that has somebody to serve takes another path than one that has not."""
    asked = Event()
    with LineEchoServer() as server, line_pool(server, max_connections=1) as pool:

        def be_killed() -> None:
            connection = pool.acquire()
            try:
                connection.send(b"the reply to this must reach nobody else\n")
                asked.set()
                gevent.sleep(BOUND)
            finally:
                pool.release(connection)

        def borrow() -> str:
            with pool.connection(timeout=BOUND) as connection:
                return ask(connection, "mine")

        victim = gevent.spawn(be_killed)
        assert asked.wait(BOUND)
        waiter = gevent.spawn(borrow)
        gevent.sleep(0)
        assert pool.waiting == 1
        victim.kill()
        assert waiter.get(timeout=BOUND) == "mine"


def test_g4_dials_that_fail_one_after_the_other_lose_no_slot() -> None:
    pool = Pool(TcpConnection, {"host": "127.0.0.1", "port": refused_port()}, max_connections=2)
    for _ in range(10):
        with pytest.raises(ConnectionRefusedError):
            pool.acquire()
    assert pool.total == 0
    assert pool.stats().open_failures == 10
    pool.close()


def test_g5_waiters_are_served_in_the_order_in_which_they_came() -> None:
    served: list[int] = []
    with LineEchoServer() as server, line_pool(server, max_connections=3) as pool:

        def borrow(number: int) -> None:
            with pool.connection(timeout=BOUND) as connection:
                served.append(number)
                ask(connection, str(number))

        held = [pool.acquire() for _ in range(3)]
        waiters = [gevent.spawn(borrow, number) for number in range(100)]
        gevent.sleep(0)
        assert pool.waiting == 100
        for connection in held:
            pool.release(connection)
        join(waiters)
        assert served == sorted(served)


def test_g5_who_comes_in_the_moment_of_a_release_does_not_barge_past_who_waits() -> None:
    with LineEchoServer() as server, line_pool(server, max_connections=1) as pool:
        held = pool.acquire()
        order: list[str] = []

        def wait() -> None:
            with pool.connection(timeout=BOUND):
                order.append("waiter")

        waiter = gevent.spawn(wait)
        gevent.sleep(0)
        pool.release(held)
        with pytest.raises(PoolExhaustedError):
            pool.acquire(timeout=0)  # free, as it were, but promised
        with pool.connection(timeout=BOUND):
            order.append("latecomer")
        join([waiter])
        assert order == ["waiter", "latecomer"]


def test_g4_g5_the_waiter_behind_one_who_was_killed_just_before_the_release_is_woken() -> None:
    """The lost wake-up: the head of the queue dies with the grant in his hand."""
    with LineEchoServer() as server, line_pool(server, max_connections=1) as pool:
        held = pool.acquire()
        head = gevent.spawn(pool.acquire, timeout=None)
        behind = gevent.spawn(pool.acquire, timeout=None)
        gevent.sleep(0)
        head.kill(block=False)
        pool.release(held)  # to `head`, who does not live to see it
        assert behind.get(timeout=BOUND) is held
        pool.release(held)


def test_g4_what_a_waiter_did_not_live_to_collect_is_handed_on_without_another_reset() -> None:
    resets = []

    class Resetting(TcpConnection):
        def reset(self) -> None:
            resets.append(self)

    with LineEchoServer() as server:
        pool = Pool(Resetting, {"host": "127.0.0.1", "port": server.port}, max_connections=1)
        held = pool.acquire()
        head = gevent.spawn(pool.acquire, timeout=None)
        behind = gevent.spawn(pool.acquire, timeout=None)
        gevent.sleep(0)
        head.kill(block=False)
        pool.release(held)
        assert behind.get(timeout=BOUND) is held
        assert resets == [held]
        pool.release(held)
        pool.close()


def test_g6_a_waiter_is_woken_by_the_release_itself() -> None:
    """Not by a clock: between the release and the waiter's turn the hub runs no timer of the pool's."""
    with LineEchoServer() as server, line_pool(server, max_connections=1, check_after_idle=None) as pool:
        held = pool.acquire()
        waiter = gevent.spawn(pool.acquire, timeout=None)
        gevent.sleep(0)
        pool.release(held)
        gevent.sleep(0)
        gevent.sleep(0)
        assert waiter.ready()
        pool.release(waiter.get())


def test_g7_acquire_raises_by_its_deadline_though_the_dial_hangs() -> None:
    may_open = Event()

    class Hanging(TcpConnection):
        def open(self) -> None:
            may_open.wait(BOUND)
            super().open()

    with LineEchoServer() as server:
        pool = Pool(Hanging, {"host": "127.0.0.1", "port": server.port}, max_connections=1)
        with gevent.Timeout(BOUND), pytest.raises(PoolExhaustedError) as raised:
            pool.acquire(timeout=0.01)
        assert raised.value.stats is not None
        assert raised.value.stats.opening == 1
        assert raised.value.waited >= 0.01
        may_open.set()
        with pool.connection(timeout=BOUND) as connection:  # by the dial that was left alone
            assert ask(connection, "late") == "late"
        assert pool.stats().opened == 1
        pool.close()


@pytest.mark.parametrize("how", ["hang_up", "reset"])
def test_g8_a_connection_whose_peer_hung_up_while_it_idled_is_not_lent(how: str) -> None:
    with LineEchoServer() as server, line_pool(server, max_connections=4, initial_connections=4) as pool:
        getattr(server, how)()
        server.wait_open(0)
        gevent.idle()
        pool.cool(0.0)  # the tick of `check_after_idle`
        with pool.connection(timeout=BOUND) as connection:
            assert ask(connection, "alive") == "alive"
        assert pool.stats().closed["stale"] == 4


def test_g8_the_tick_comes_by_itself() -> None:
    ticked = Event()

    class Checked(TcpConnection):
        def check(self) -> bool:
            ticked.set()
            return super().check()

        def fileno(self) -> None:
            """None known: so the hub cannot notice by itself that the peer hung up."""

    with LineEchoServer() as server:
        pool = Pool(Checked, {"host": "127.0.0.1", "port": server.port}, check_after_idle=0.05)
        with pool.connection():
            pass
        server.hang_up()
        with gevent.Timeout(BOUND):
            while not pool._cold:
                gevent.sleep(0.01)
        with pool.connection(timeout=BOUND) as connection:
            assert ask(connection, "alive") == "alive"
        assert ticked.is_set()
        pool.close()


def test_g8_stray_bytes_that_nobody_asked_for_discard_an_idle_connection() -> None:
    greeted = Event()

    def greet_late(sock: Any) -> None:
        greeted.wait(BOUND)
        sock.sendall(b"unasked\n")
        while data := sock.recv(1000):
            sock.sendall(data)

    with Server(greet_late) as server, line_pool(server, max_connections=1, check_after_idle=0) as pool:
        with pool.connection() as first:
            pass
        greeted.set()
        while first.check():
            gevent.sleep(0)
        with pool.connection(timeout=BOUND) as second:
            assert second is not first


def test_g9_a_pool_that_nobody_refers_to_is_collected_and_its_connections_closed() -> None:
    with LineEchoServer() as server:
        pool = line_pool(server, initial_connections=3)
        ref = weakref.ref(pool)
        server.wait_accepted(3)
        del pool
        gc.collect()
        server.wait_open(0)
        assert ref() is None


def test_g9_a_pool_that_is_collected_in_another_thread_is_closed_in_its_own() -> None:
    with LineEchoServer() as server:
        pools = [line_pool(server, initial_connections=2)]
        thread = threading.Thread(target=pools.clear)
        thread.start()
        gevent.get_hub().threadpool.apply(thread.join)
        server.wait_open(0)


def test_g9_a_pool_does_not_keep_the_program_alive() -> None:
    """`gevent.wait()` returns when nothing is left to do; the pool's own upkeep is nothing to wait for."""
    pool = Pool(TcpConnection, {"host": "127.0.0.1", "port": refused_port()})
    assert gevent.wait(timeout=BOUND) is True
    pool.close()


def test_g11_close_wakes_every_waiter_and_closes_what_idles_now_and_what_is_borrowed_as_it_returns(
    crashed: Crashed,
) -> None:
    with LineEchoServer() as server:
        pool = line_pool(server, max_connections=2, initial_connections=2)
        held, idle = pool.acquire(), pool.acquire()
        waiters = [gevent.spawn(pool.acquire, timeout=None) for _ in range(5)]
        gevent.sleep(0)
        pool.close()
        pool.close()
        gevent.joinall(waiters, timeout=BOUND)
        assert [type(error) for error in crashed.take()] == [PoolClosedError] * 5
        assert pool.closed
        assert held.is_connected()
        assert ask(held, "still mine") == "still mine"
        pool.release(held)
        pool.release(idle)
        server.wait_open(0)
        with pytest.raises(PoolClosedError, match="closed"):
            pool.acquire()


def test_g11_a_dial_that_ends_after_the_close_is_closed_too() -> None:
    may_open, opening = Event(), Event()

    class Late(TcpConnection):
        def open(self) -> None:
            opening.set()
            may_open.wait(BOUND)
            super().open()

    def borrow() -> None:
        with pytest.raises(PoolClosedError):
            pool.acquire(timeout=None)

    with LineEchoServer() as server:
        pool = Pool(Late, {"host": "127.0.0.1", "port": server.port})
        borrower = gevent.spawn(borrow)
        assert opening.wait(BOUND)
        pool.close()
        join([borrower])
        may_open.set()
        server.wait_accepted(1)
        server.wait_open(0)
        assert pool.total == 0


def test_g12_what_goes_wrong_in_the_background_is_logged_once_with_the_name_of_the_pool(logged: Logged) -> None:
    class BadToClose(TcpConnection):
        def close(self) -> None:
            super().close()
            raise RuntimeError("no good bye")

    with LineEchoServer() as server:
        pool = Pool(BadToClose, {"host": "127.0.0.1", "port": server.port}, name="orders")
        with pytest.raises(KeyError), pool.connection():
            raise KeyError
        [record] = logged.take(1)
        assert record.name == "gsocketpool"
        assert record.levelno == logging.WARNING
        assert "'orders'" in record.getMessage()
        assert "no good bye" in record.getMessage()
        pool.close()
    assert pool.faults() == []


def test_g12_a_dial_that_fails_for_a_borrower_who_is_gone_is_logged_once(logged: Logged) -> None:
    may_fail = Event()

    class Doomed(Connection):
        def open(self) -> None:
            may_fail.wait(BOUND)
            raise OSError("no such luck")

        def is_connected(self) -> bool:
            return False

    pool = Pool(Doomed)
    with pytest.raises(PoolExhaustedError):
        pool.acquire(timeout=0.001)
    may_fail.set()
    [record] = logged.take(1)
    assert "no such luck" in record.getMessage()
    with pytest.raises(OSError, match="no such luck"):
        pool.acquire()
    pool.close()


def test_a_thousand_greenlets_take_turns_without_one_of_them_being_forgotten() -> None:
    turns = 5
    done: deque[int] = deque()
    with LineEchoServer() as server, line_pool(server, max_connections=10) as pool:

        def borrow(number: int) -> None:
            for turn in range(turns):
                with pool.connection(timeout=None) as connection:
                    assert ask(connection, f"{number}.{turn}") == f"{number}.{turn}"
            done.append(number)

        gevent.joinall([gevent.spawn(borrow, number) for number in range(1000)], timeout=60, raise_error=True)
        assert sorted(done) == list(range(1000))
        assert server.most <= 10
        assert pool.stats().acquired == 1000 * turns


def test_g4_ctrl_c_in_the_middle_of_a_dial_reaches_the_main_greenlet_and_loses_no_slot() -> None:
    class Interrupted(Connection):
        def open(self) -> None:
            raise KeyboardInterrupt

        def is_connected(self) -> bool:
            return False

    pool = Pool(Interrupted, max_connections=1)
    with pytest.raises(KeyboardInterrupt):
        pool.acquire(timeout=None)
    assert pool.faults() == []
    assert pool.total == 0
    pool.close()


@pytest.mark.parametrize("where", ["close", "is_expired"])
def test_g4_ctrl_c_in_the_middle_of_the_pools_own_work_reaches_the_main_greenlet_and_loses_no_slot(where: str) -> None:
    class Interrupted(TcpConnection):
        def close(self) -> None:
            super().close()
            if where == "close":
                raise KeyboardInterrupt

        def is_expired(self) -> bool:
            raise KeyboardInterrupt

    with LineEchoServer() as server:
        options = {"host": "127.0.0.1", "port": server.port}
        pool = Pool(Interrupted, options, max_connections=1, initial_connections=1, reap_interval=0.01)
        with pytest.raises(KeyboardInterrupt):
            if where == "close":
                pool.drop(pool.acquire())
            gevent.sleep(BOUND)
        server.wait_open(0)
        gevent.idle()
        assert pool.faults() == []
        assert pool.total == 0
        pool.close()


def test_g4_a_round_of_the_reaper_that_is_interrupted_closes_what_it_had_found_expired() -> None:
    asked: list[TcpConnection] = []
    second = Event()

    class Expired(TcpConnection):
        def is_expired(self) -> bool:
            asked.append(self)
            if len(asked) == 2:
                second.set()
                gevent.sleep(BOUND)
            return True

    with LineEchoServer() as server:
        options = {"host": "127.0.0.1", "port": server.port}
        pool = Pool(Expired, options, max_connections=3, initial_connections=3)
        reaper = gevent.spawn(pool.drop_expired)
        assert second.wait(BOUND)
        reaper.kill()
        server.wait_open(1)  # the first was expired, the second interrupted, the third not looked at
        gevent.idle()
        assert (pool.total, pool.idle) == (1, 1)
        assert pool.faults() == []
        pool.close()


def test_g4_a_dial_that_cannot_be_begun_gives_its_permit_back() -> None:
    class Failing(Pool[TcpConnection]):
        pass

    def spawn(pool: Any, job: Any, *args: object) -> object:
        if getattr(job, "__name__", "") == "_dial":
            raise RecursionError
        return Pool._spawn(pool, job, *args)

    Failing._spawn = spawn  # type: ignore[method-assign, assignment]
    pool = Failing(TcpConnection, {"host": "127.0.0.1", "port": refused_port()}, max_connections=1)
    with pytest.raises(RecursionError):
        pool.acquire()
    assert (pool.total, pool.waiting) == (0, 0)
    assert pool.faults() == []
    pool.close()


def test_g7_checks_that_fail_one_after_the_other_do_not_go_on_after_the_deadline() -> None:
    class SlowToCheck(TcpConnection):
        def check(self) -> bool:
            gevent.sleep(0.02)
            return False

    with LineEchoServer() as server:
        options = {"host": "127.0.0.1", "port": server.port}
        pool = Pool(SlowToCheck, options, max_connections=50, initial_connections=50, check_after_idle=0)
        with pytest.raises(PoolExhaustedError):
            pool.acquire(timeout=0.01)
        assert pool.stats().closed["stale"] == 1
        pool.close()


def test_g9_g12_a_pool_that_outlives_the_hub_of_its_thread_is_collected_in_silence(
    capfd: pytest.CaptureFixture[str],
) -> None:
    pools: list[Pool[TcpConnection]] = []

    def live_and_die() -> None:
        pools.append(Pool(TcpConnection, {"host": "127.0.0.1", "port": 1}))
        gevent.get_hub().destroy(destroy_loop=True)

    thread = threading.Thread(target=live_and_die)
    thread.start()
    gevent.get_hub().threadpool.apply(thread.join)
    pools.clear()
    gc.collect()
    assert capfd.readouterr() == ("", "")
