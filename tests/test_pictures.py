"""The manual's pictures show what the core does, all of it and nothing else."""

from __future__ import annotations

import re
from collections import Counter
from functools import cache
from pathlib import Path
from xml.etree import ElementTree

import pool_pictures
import pytest
from docutils import nodes
from pool_stage import (
    CLOSING,
    DIALLING,
    DOOMED,
    GRANTED,
    IDLE,
    IN_USE,
    NONE,
    STATES,
    STORIES,
    TAKEN_OUT,
    Frame,
    Slot,
    Stage,
    life,
    play,
)

from gsocketpool.budget import Budget
from gsocketpool.core import REASONS, Core

DOCS = Path(__file__).parent.parent / "docs"

#: What is written here as it is there: `1` idles, `1A` is A's, `1>A` is granted to A, `1?` is dialled, `1x` is being
#: closed, `.` is free; then who waits, and who was told what. The sentences below the pictures say the same.
TOLD = {
    "lending": [
        ". . |",
        "1? . | A",
        "1A . |",
        "1 . |",
        "1B . |",
        "1B 2? | C",
        "1B 2C | D",
        "1D 2C |",
    ],
    "interrupted": ["1A 2B | C", "1x 2B | C", "3? 2B | C", "3C 2B |"],
    "queue": ["1A | B C D", "1A | C D", "1>C | D", "1>D |"],
    "dials": ["1? 2? | A B C", "1B 2? | C", "1B 3? | C", "1B . | C:ConnectionRefusedError"],
    "resize": ["1A 2B 3C 4D |", "1A 2B 3C 4D |", "1x 2x 3C 4D |", "3 4D |"],
    "drain": ["1A 2 3? |", "1A 2x 3? |", "1A . 3x | D:PoolClosedError", "1x . . |"],
}


#: What one walk finds, for several tests.
walked = cache(life)


def noted(slot: Slot) -> str:
    marks = {NONE: ".", DIALLING: "?", IDLE: "", GRANTED: f">{slot.who}", IN_USE: f"{slot.who}", CLOSING: "x"}
    return f"{slot.number or ''}{marks[slot.state]}"


def line(frame: Frame) -> str:
    words = [*map(noted, frame.slots), "|", *frame.waiting, *(f"{who}:{error}" for who, error in frame.told)]
    return " ".join(words)


def test_each_story_has_its_place_in_the_manual() -> None:
    shown = [
        name
        for page in DOCS.rglob("*.rst")
        for name in re.findall(r"^\.\. pool-story:: (\w+)$", page.read_text(encoding="utf-8"), re.MULTILINE)
    ]
    assert sorted(shown) == sorted(STORIES) == sorted(TOLD)  # each once, so that no page has an id twice


@pytest.mark.parametrize("name", STORIES)
def test_what_a_story_says_is_what_the_core_does(name: str) -> None:
    assert [line(frame) for frame in play(name)] == TOLD[name]


@pytest.mark.parametrize("name", STORIES)
def test_the_numbers_in_each_picture_are_the_cores_own(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    counted: list[tuple[int, ...]] = []

    def tells(stage: Stage, title: str) -> None:
        draw(stage, title)
        core = stage.core
        free = max(0, core._max_connections - core.total)
        counted.append((core.idle, core.in_use, core._dialling, core._closing, free, core.waiting))

    draw = Stage.tells
    monkeypatch.setattr(Stage, "tells", tells)
    story = ElementTree.fromstring(pool_pictures.story_html(name).replace("<br>", "<br/>"))
    shown = []
    for picture in story.iter("svg"):
        kinds: Counter[str] = Counter()
        for group in picture.iter("g"):
            kinds.update((group.get("class") or "").split())
        in_use = kinds["in-use"] + kinds["granted"]
        waiting = len([*picture.iter("circle")])
        shown.append((kinds["idle"], in_use, kinds["dialling"], kinds["closing"], kinds["no-socket"], waiting))
    assert shown == counted


def test_a_picture_that_is_not_what_the_core_counts_is_never_drawn() -> None:
    stage = Stage(2)
    stage.borrows("A")
    stage.core._dialling += 1
    with pytest.raises(AssertionError, match=r"shows \(0, 1, 0, 0\), the core counts \(0, 1, 1, 0\)"):
        stage.opens(stage.socket(1))


def test_the_graph_has_all_arrows_that_another_walk_finds_and_no_others() -> None:
    found = {(each.before, each.after): each for each in pool_pictures.arrows(walked(seed=2))}
    shown = [*pool_pictures.life_svg(pool_pictures.arrows(life())).iter("g")]
    drawn = [(each.get("data-before"), each.get("data-after")) for each in shown if each.get("class") == "arrow"]
    assert sorted(drawn) == sorted(found)
    labels = {
        (each.get("data-before"), each.get("data-after")): tuple(text.text for text in each.iter("text"))
        for each in shown
        if each.get("class") == "label"
    }
    assert labels == {pair: each.reasons or each.calls for pair, each in found.items()}


def test_the_table_says_the_same_as_the_graph() -> None:
    found = pool_pictures.arrows(life(seed=3, worlds=300))
    rows = [*pool_pictures.life_table(found).findall(nodes.row)][1:]
    assert [tuple(entry.astext() for entry in row.findall(nodes.entry)) for row in rows] == [
        (each.before, each.after, ", ".join(each.calls), ", ".join(each.reasons)) for each in found
    ]


def test_the_walks_go_through_all_states_and_close_for_all_reasons() -> None:
    found = walked(seed=2)
    assert {move.before for move in found} == {move.after for move in found} == set(STATES)
    assert {move.reason for move in found} == {*REASONS, None}
    assert all((move.after == CLOSING) == (move.reason is not None) for move in found)
    for call in {move.call for move in found} - {"collect"}:
        assert hasattr(Core, call) or hasattr(Budget, call), call


def test_a_connection_never_skips_its_close() -> None:
    found = {(move.before, move.after) for move in life(seed=5, worlds=300)}
    assert {before for before, after in found if after == NONE} == {CLOSING, DIALLING}  # the latter was never open
    assert {after for before, after in found if before == CLOSING} == {NONE}
    assert {after for before, after in found if before == DOOMED} == {CLOSING}
    assert (TAKEN_OUT, IN_USE) not in found


@pytest.mark.parametrize("name", STORIES)
def test_each_picture_says_in_words_what_it_shows(name: str) -> None:
    story = ElementTree.fromstring(pool_pictures.story_html(name).replace("<br>", "<br/>"))
    pictures = [*story.iter("svg")]
    for frame, picture in zip(play(name), pictures, strict=True):
        title, description = picture.find("title"), picture.find("desc")
        assert title is not None
        assert description is not None
        assert picture.get("role") == "img"
        assert picture.get("aria-labelledby") == f"{title.get('id')} {description.get('id')}"
        assert title.text == frame.title
        for who in frame.waiting:
            assert who in (description.text or "")
    assert len({picture.get("aria-labelledby") for picture in pictures}) == len(pictures)


def test_the_colours_are_the_themes() -> None:
    style = (DOCS / "_static" / "pictures.css").read_text(encoding="utf-8")
    colours = re.findall(r"^ *(?:fill|stroke|color|background): (.*);$", style, re.MULTILINE)
    assert colours
    assert [colour for colour in colours if colour != "none" and not colour.startswith("var(--color-")] == []
    drawn = "".join(pool_pictures.story_html(name) for name in STORIES)
    assert not re.search(r"(fill|stroke|style)=", drawn)
