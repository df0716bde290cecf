"""What the documents show works: every example is run, and what they claim of tests and names is looked up."""

from __future__ import annotations

import doctest
import importlib
import inspect
import os
import re
import subprocess
import sys
from pathlib import Path

import gevent
import pytest
from sybil import Sybil
from sybil.parsers.rest import DocTestParser, PythonCodeBlockParser

import gsocketpool
import gsocketpool.asyncio
from gsocketpool.blocking import BlockingPool

from .conformance.limits import table
from .conftest import Logged
from .peers import Postgres

ROOT = Path(__file__).parent.parent
DOCS = ROOT / "docs"
PAGES = [
    *(ROOT / name for name in ("README.rst", "CHANGES.rst", "CONTRIBUTING.rst")),
    *sorted(page for page in DOCS.rglob("*.rst") if DOCS / "_build" not in page.parents),
]
SYBIL = Sybil(parsers=[PythonCodeBlockParser(), DocTestParser(doctest.ELLIPSIS)])

#: What a page's examples make the pool log: each of these, at least once, and nothing else.
LOGGED = {
    "docs/howto/warm.rst": {r"a dial for min_idle=\d failed; the next one in \d+\.\d\d s: ConnectionRefusedError\("},
    "docs/howto/leaks.rst": {
        # The forgetful one, and whoever holds one beside him while the machine stands still.
        r"has held a connection for \d+\.\d s, longer than leak_threshold=0\.5: ",
        r"ended without releasing a connection, which is closed: ",
    },
    "docs/howto/endpoints.rst": {
        r"5 dials in a row have failed; the next one in \d+\.\d\d s: ConnectionRefusedError\("
    },
}


def relative(path: Path) -> str:
    return str(path.relative_to(ROOT))


@pytest.mark.parametrize("page", PAGES, ids=relative)
def test_every_example_of_a_page_runs(page: Path, logged: Logged) -> None:
    document = SYBIL.parse(page)
    try:
        for example in document.examples():
            example.evaluate()
    finally:
        document.namespace.clear()
    gevent.sleep(0)  # some of it is said in the background
    expected = LOGGED.get(relative(page), set())
    texts = [record.getMessage() for record in logged.take()]
    assert [text for text in texts if not any(re.search(regex, text) for regex in expected)] == []
    assert {regex for regex in expected if not any(re.search(regex, text) for text in texts)} == set()


def test_the_pages_that_teach_have_examples() -> None:
    pages = [ROOT / "README.rst", *(DOCS / name for name in ("index.rst", "tutorial.rst", "connections.rst"))]
    for page in [*pages, *(DOCS / "howto").glob("*.rst"), *(DOCS / "coming").glob("*.rst")]:
        assert list(SYBIL.parse(page).examples()) or "literalinclude:: ../../examples/" in page.read_text(), page


def test_the_table_of_what_a_runtime_cannot_promise_is_the_one_that_the_tests_go_by() -> None:
    written = (DOCS / "runtimes-limits.inc").read_text(encoding="utf-8")
    assert written == table(), "python -m tests.conformance.limits > docs/runtimes-limits.inc"


def run(example: str, *arguments: str) -> list[str]:
    """The lines that an example prints; it has to end well, without a warning."""
    ended = subprocess.run(
        [sys.executable, "-W", "error", str(ROOT / "examples" / example), *arguments],
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        timeout=50,
    )
    assert (ended.returncode, ended.stderr) == (0, ""), ended.stderr
    return ended.stdout.splitlines()


def test_the_echo_example_runs() -> None:
    assert run("echo.py") == [
        "100 replies, the last is b'hello 99'",
        "<Pool 'echo': 10 idle, 0 in use, 0 opening, 0 waiting, max 10>",
        "100 times lent, 10 connections opened",
    ]


def test_the_kill_example_runs() -> None:
    assert run("kill.py") == ['bob gets: b"bob\'s account"', "closed since alice was interrupted: 1"]


def test_the_line_protocol_example_runs() -> None:
    assert run("line_protocol.py") == [
        "key7 is 49",
        "refused: GET: such thing",
        "4 logins for 52 uses",
        "0 discarded",
    ]


def test_the_endpoints_example_runs(postgres: Postgres) -> None:
    replica = f"{postgres.dsn} dbname=template1"  # of the same server, and yet another place
    assert run("endpoints.py", postgres.dsn, replica, replica) == [
        "primary: ('postgres',)",
        "replica-1: ('template1',)",
        "1 time lent to who asked for primary",
        "1 time lent to who asked for replica-1",
    ]


def test_the_endpoints_example_for_threads_runs(postgres: Postgres) -> None:
    replica = f"{postgres.dsn} dbname=template1"
    assert run("endpoints_threads.py", postgres.dsn, replica, replica) == [
        "primary: ('postgres',)",
        "replica-1: ('template1',)",
        "1 time lent to who asked for primary",
        "1 time lent to who asked for replica-1",
    ]


def test_the_retry_example_runs() -> None:
    assert run("retry.py") == [
        "300 requests answered, the last with b'question 9.29'",
        "connections that broke: some",
    ]


def test_the_fork_example_runs() -> None:
    assert run("fork.py") == [
        "the parent on connection 1",
        "<Pool of TcpConnection: 0 idle, 0 in use, 0 opening, 0 waiting, max 200>",
        "the child on connection 2",
        "the parent on connection 1",
    ]


def test_the_example_of_an_own_runtime_runs() -> None:
    assert run("own_runtime.py") == [
        "30 replies over 3 connections",
        "none to be had in 0.1 s",
        "killed: 1; the next one hears 'is it my turn?'",
        "<Pool of TcpConnection: 0 idle, 0 in use, 0 opening, 0 waiting, closed>",
    ]


def test_no_example_file_goes_untested() -> None:
    text = "".join(file.read_text(encoding="utf-8") for file in (ROOT / "tests").rglob("*.py"))
    for example in (ROOT / "examples").iterdir():
        assert example.stem in text or example.name == "__pycache__", example.name


@pytest.mark.parametrize("name", ["README.rst", "CHANGES.rst", "CONTRIBUTING.rst"])
def test_a_page_that_others_render_is_plain_rest(name: str) -> None:
    ended = subprocess.run(
        [sys.executable, "-m", "docutils", "--report=info", "--halt=warning", str(ROOT / name), os.devnull],
        capture_output=True,
        text=True,
        timeout=50,
    )
    assert (ended.returncode, ended.stderr) == (0, ""), ended.stderr


def test_every_public_name_is_in_the_reference_and_in_the_changes() -> None:
    reference = (DOCS / "api.rst").read_text(encoding="utf-8")
    changes = (ROOT / "CHANGES.rst").read_text(encoding="utf-8")
    for name in gsocketpool.__all__:
        assert re.search(rf"^\.\. auto\w+:: gsocketpool\.{name}$", reference, re.MULTILINE), name
        assert f"``{name}" in changes, name


def test_every_public_method_of_the_pool_is_in_the_reference() -> None:
    reference = (DOCS / "api.rst").read_text(encoding="utf-8")
    names = {name for name in vars(BlockingPool) if not name.startswith("_")} | {"size", "idle", "in_use", "waiting"}
    for name in names:
        assert re.search(rf"^ *\.\. auto\w+:: gsocketpool\.Pool\.{name}$", reference, re.MULTILINE), name


@pytest.mark.parametrize("runtime", ["threading", "asyncio", "eventlet"])
def test_every_name_that_a_runtime_has_of_its_own_is_in_its_reference(runtime: str) -> None:
    module = importlib.import_module(f"gsocketpool.{runtime}")
    reference = (DOCS / "api" / f"{runtime}.rst").read_text(encoding="utf-8")
    assert sorted(module.__all__) == sorted(gsocketpool.__all__)
    own = [name for name in module.__all__ if getattr(module, name) is not getattr(gsocketpool, name)]
    assert {"Pool", "PoolGroup", "TcpConnection", "UnixConnection", "StreamConnection", "retry"} <= {*own}
    for name in own:
        assert re.search(rf"^\.\. auto\w+:: gsocketpool\.{runtime}\.{name}$", reference, re.MULTILINE), name


def test_every_method_that_is_awaited_is_in_the_reference() -> None:
    reference = (DOCS / "api" / "asyncio.rst").read_text(encoding="utf-8")
    for name, method in vars(gsocketpool.asyncio.Pool).items():
        if not name.startswith("_") and inspect.iscoroutinefunction(method):
            assert f".. automethod:: gsocketpool.asyncio.Pool.{name}\n" in reference, name


def test_the_page_for_who_writes_a_runtime_names_each_primitive() -> None:
    source = (ROOT / "gsocketpool" / "driver.py").read_text(encoding="utf-8")
    primitives = source.partition("# What a runtime supplies")[2].partition("\ndef ")[0]
    page = (DOCS / "howto" / "own-runtime.rst").read_text(encoding="utf-8")
    needed, _, optional = page.partition("These may be left out:")
    found = re.findall(r"def (_\w+)\((?:.|\n)*?(?=\n    def|\n    @|\Z)", primitives)
    assert {"_park", "_end"} <= {*found}
    for name in found:
        body = primitives.partition(f"def {name}(")[2].partition("\n    def ")[0]
        where = needed if "raise NotImplementedError" in body else optional
        assert f"``{name}(" in where, name


def test_the_proof_of_each_guarantee_exists() -> None:
    page = (DOCS / "guarantees.rst").read_text(encoding="utf-8")
    proofs = dict(re.findall(r"^G(\d+): .*?^:The proof: (.*?)\n\n", page, re.MULTILINE | re.DOTALL))
    assert sorted(map(int, proofs)) == [*range(1, 13)]
    for number, proof in proofs.items():
        files = re.findall(r"``(tests/[\w/]+\.py)``", proof)
        assert files, f"G{number} names no file"
        for name in files:
            text = (ROOT / name).read_text(encoding="utf-8")
            assert re.search(rf"def test_(g\d+_)*g{number}_", text), f"no test_g{number}_... in {name}"


def test_the_make_targets_that_the_pages_name_exist() -> None:
    targets = set(re.findall(r"^(\w+):", (ROOT / "Makefile").read_text(encoding="utf-8"), re.MULTILINE))
    for page in PAGES:
        for target in re.findall(r"``make (\w+)``", page.read_text(encoding="utf-8")):
            assert target in targets, f"{page.name}: make {target}"
