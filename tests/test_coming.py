"""The pages for who comes from elsewhere leave out nothing: each example of those documents has its counterpart.

That the counterparts run is tested in test_docs.py. Where one stands is marked by a comment, ``.. counterpart: ...``.
"""

from __future__ import annotations

import inspect
import re
from typing import Any

import pytest

import gsocketpool
from gsocketpool import Pool, TcpConnection, retry

from .test_docs import DOCS, SYBIL, run

#: What the documents of 0.1.6 show and name, in their order but for what is shown twice.
GSOCKETPOOL = [
    "basic usage",
    "implementing protocol",
    "class Connection",
    "class TcpConnection",
    "class Pool",
    "the usage of Pool",
    "acquire",
    "release",
    "size",
    "drop",
    "drop_expired",
    "PoolExhaustedError",
    "ConnectionNotFoundError",
]

#: What the readme of geventconnpool shows, in its order.
GEVENTCONNPOOL = [
    "installing",
    "_new_connection",
    "the size",
    "get",
    "exc_classes",
    "retry",
    "retry with parameters",
    "functools.partial",
    "STARTTLS and a login",
    "another library",
    "TCP keepalive",
    "_keepalive",
]

#: For these there is nothing to run.
SHOWN_ONLY = {"installing"}


def text(page: str) -> str:
    return (DOCS / "coming" / f"{page}.rst").read_text(encoding="utf-8")


@pytest.mark.parametrize(("page", "examples"), [("gsocketpool", GSOCKETPOOL), ("geventconnpool", GEVENTCONNPOOL)])
def test_each_example_of_their_documents_has_a_counterpart_that_runs(page: str, examples: list[str]) -> None:
    document = SYBIL.parse(DOCS / "coming" / f"{page}.rst")
    marks = [*re.finditer(r"^ *\.\. counterpart: (.+)$", document.text, re.MULTILINE)]
    assert [mark[1] for mark in marks] == examples
    hidden = re.findall(r"^( *)\.\. counterpart: (.+)\n\n\1 +\S", document.text, re.MULTILINE)
    assert hidden == []  # what is indented after a comment belongs to it
    starts = [example.start for example in document.examples()]
    run_at = [at for at in starts if not document.text[at:].lstrip().startswith(".. invisible")]
    shown_at = [found.start() for found in re.finditer(r"literalinclude:: \.\./\.\./examples/", document.text)]
    ends = [*(mark.start() for mark in marks[1:]), document.text.index("\n.. list-table::")]
    for mark, end in zip(marks, ends, strict=True):
        if mark[1] not in SHOWN_ONLY:
            assert any(mark.end() < at < end for at in run_at + shown_at), mark[1]


# What they could be told has its place


@pytest.mark.parametrize(
    ("ours", "theirs"),
    [
        (
            Pool,
            {
                "factory": inspect.Parameter.empty,
                "options": None,  # was one dictionary for all pools
                "initial_connections": 0,
                "max_connections": 200,
                "reap_expired_connections": True,
                "reap_interval": 180,
            },
        ),
        (Pool.acquire, {"self": inspect.Parameter.empty, "retry": 10, "retried": 0}),
        (
            TcpConnection,
            {
                "host": inspect.Parameter.empty,
                "port": inspect.Parameter.empty,
                "lifetime": 600,
                "timeout": None,
            },
        ),
    ],
    ids=["Pool", "acquire", "TcpConnection"],
)
def test_what_is_given_by_position_is_what_0_1_6_took(ours: Any, theirs: dict[str, Any]) -> None:
    parameters = inspect.signature(ours).parameters.values()
    by_position = {each.name: each.default for each in parameters if each.kind is each.POSITIONAL_OR_KEYWORD}
    assert list(by_position.items()) == list(theirs.items())


RETRY = [
    "exc_classes",
    "logger",
    "retry_log_level",
    "retry_log_message",
    "max_failures",
    "interval",
    "max_failure_log_level",
    "max_failure_log_message",
]


def test_retry_takes_the_parameters_of_geventconnpools_in_their_order() -> None:
    parameters = inspect.signature(retry).parameters.values()
    assert [each.name for each in parameters if each.kind is each.POSITIONAL_OR_KEYWORD] == ["f", *RETRY]


def test_every_parameter_of_geventconnpool_has_a_row() -> None:
    rows = re.findall(r"^   \* - (.*)$", text("geventconnpool"), re.MULTILINE)
    for name in ["size", "exc_classes", "keepalive", "_new_connection", "_keepalive", "get", "retry", *RETRY]:
        assert any(re.match(rf"``{name}\b", row) for row in rows), name


def test_every_public_name_of_0_1_6_is_on_its_page() -> None:
    page = text("gsocketpool")
    for name in ("Connection", "TcpConnection", "Pool", "PoolExhaustedError", "ConnectionNotFoundError"):
        assert hasattr(gsocketpool, name)
        assert f"``{name}" in page, name
    connection = ["open", "close", "get", "is_connected", "is_expired", "reconnect", "send", "recv", "socket"]
    pool = ["acquire", "release", "drop", "drop_expired", "connection", "size", "_create_connection", "__del__"]
    for owner, names in ((TcpConnection, connection), (Pool, pool)):
        for name in names:
            assert hasattr(owner, name)
            assert re.search(rf"``(pool\.|conn\.)?{name}\b", page), name


@pytest.mark.parametrize("page", ["gsocketpool", "geventconnpool", "socketpool", "generic-connection-pool"])
def test_no_cell_of_a_list_table_is_empty(page: str) -> None:
    assert re.findall(r"^   (?:\*| ) -\s*$", text(page), re.MULTILINE) == []


def test_the_mail_example_runs() -> None:
    first, *rest = run("coming_imap.py")
    assert first.startswith("mail: how_many() failed, 1 so far: abort(")
    assert rest == ["INBOX: 3", "Sent: 1", "connections opened: 2"]
