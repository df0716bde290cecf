"""Pictures of a pool's states, drawn while the manual is built from what the core does: see `pool_stage`.

``.. pool-story:: NAME`` shows a story in frames; ``.. pool-life::`` the life of a connection, as a graph and in words.
They are SVG within the page, so that the theme's colours, light or dark, are theirs as well (``_static/pictures.css``).
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from functools import cache
from html import escape
from typing import Any, ClassVar, Final, NamedTuple
from xml.etree import ElementTree

import pool_stage
from docutils import nodes
from docutils.parsers.rst import Directive, directives
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
    Move,
    Slot,
    life,
    play,
)

import gsocketpool.budget
import gsocketpool.core
import gsocketpool.lifetime
from gsocketpool.core import REASONS

__all__ = ["Arrow", "arrows", "frame_svg", "life_svg", "life_table", "setup", "story_html"]


def _element(
    tag: str, text: str | None = None, *children: ElementTree.Element, **attributes: object
) -> ElementTree.Element:
    names = {name.rstrip("_").replace("_", "-"): _written(value) for name, value in attributes.items()}
    element = ElementTree.Element(tag, names)
    element.text = text
    element.extend(children)
    return element


def _written(value: object) -> str:
    return f"{value:.1f}".removesuffix(".0") if isinstance(value, float) else str(value)


def _svg(ident: str, title: str, description: str, width: float, height: float) -> ElementTree.Element:
    """An empty picture that says in words what it shows."""
    return _element(
        "svg",
        None,
        _element("title", title, id=f"{ident}-title"),
        _element("desc", description, id=f"{ident}-desc"),
        role="img",
        aria_labelledby=f"{ident}-title {ident}-desc",
        viewBox=f"0 0 {_written(width)} {_written(height)}",
        width=width,
        height=height,
    )


def _text(text: str, x: float, y: float, kind: str = "", anchor: str = "middle") -> ElementTree.Element:
    return _element("text", text, x=x, y=y, class_=kind, text_anchor=anchor)


# A story: slots two in a row, and below them who waits.

SLOT: Final = (74.0, 44.0)
GAP: Final = 8.0
QUEUE: Final = 34.0

#: What a slot says of a connection in that state, with `who` in it.
WORDS: Final = {
    NONE: "free",
    DIALLING: "dialling",
    IDLE: "idle",
    GRANTED: "now {}'s",
    IN_USE: "in use: {}",
    TAKEN_OUT: "asked",
    DOOMED: "to be closed",
    CLOSING: "closing",
}


def _in_words(frame: Frame) -> str:
    slots = (
        f"slot {place}: {'' if slot.number is None else f'connection {slot.number}, '}{_slot_text(slot)}"
        for place, slot in enumerate(frame.slots, 1)
    )
    waiting = f"waiting: {', '.join(frame.waiting)}" if frame.waiting else "nobody waits"
    closed = ("the pool is closed",) if frame.closed else ()
    return "; ".join((*slots, waiting, *(f"{who} gets {error}" for who, error in frame.told), *closed))


def _slot_text(slot: Slot) -> str:
    return WORDS[slot.state].format(slot.who)


def frame_svg(frame: Frame, ident: str, rows: int, queue: bool) -> ElementTree.Element:
    """One moment.

    :param rows: of slots there is room for, so that all frames of a story are of one size.
    :param queue: there is room for who waits.
    """
    width, height = SLOT
    svg = _svg(ident, frame.title, _in_words(frame), 2 * width + 3 * GAP, rows * (height + GAP) + GAP + queue * QUEUE)
    for place, slot in enumerate(frame.slots):
        x, y = GAP + place % 2 * (width + GAP), GAP + place // 2 * (height + GAP)
        surplus = " surplus" if place >= frame.max_connections else ""
        box = _element("g", class_=f"slot {slot.state.replace(' ', '-')}{surplus}")
        box.append(_element("rect", x=x, y=y, width=width, height=height, rx=5))
        if slot.number is not None:
            box.append(_text(f"#{slot.number}", x + width / 2, y + 18, "number"))
        box.append(_text(_slot_text(slot), x + width / 2, y + (26 if slot.number is None else 35)))
        svg.append(box)
    if queue:
        middle = rows * (height + GAP) + GAP + QUEUE / 2 - 4
        line = _element("g", class_="queue")
        if frame.waiting:
            line.append(_text("waiting", GAP, middle + 4, anchor="start"))
        for place, name in enumerate(frame.waiting):
            x = GAP + 68 + place * 25
            line.append(_element("g", None, _element("circle", cx=x, cy=middle, r=10), _text(name, x, middle + 4)))
        svg.append(line)
    return svg


def story_html(name: str, with_calls: bool = True) -> str:
    """A story as a list of frames, each with a sentence that says what happens.

    :param with_calls: below it stand the calls of the core that led to it, and what they answered.
    """
    frames = play(name)
    rows = math.ceil(max(len(frame.slots) for frame in frames) / 2)
    queue = any(frame.waiting for frame in frames)
    items = []
    for number, frame in enumerate(frames, 1):
        svg = ElementTree.tostring(frame_svg(frame, f"story-{name}-{number}", rows, queue), encoding="unicode")
        lines = [f"<p>{escape(frame.title)}</p>"]
        lines += [f'<p class="told">{escape(who)} gets <code>{escape(error)}</code></p>' for who, error in frame.told]
        if with_calls and frame.calls:
            lines.append("<p>" + "<br>".join(f"<code>{escape(call)}</code>" for call in frame.calls) + "</p>")
        items.append(f"<li>{svg}{''.join(lines)}</li>")
    return f'<ol class="pool-story">{"".join(items)}</ol>'


# The life of a connection. Only where the states stand is written here; which arrows there are, and what stands beside
# them, comes from the walks.


class Arrow(NamedTuple):
    """From one state to another: by which calls of the core, and why, if that means that it is closed."""

    before: str
    after: str
    calls: tuple[str, ...]
    reasons: tuple[str, ...]


def arrows(moves: Iterable[Move]) -> list[Arrow]:
    """What was found, one for each pair of states, in the order of `STATES`."""
    found: dict[tuple[str, str], tuple[set[str], set[str]]] = {}
    for move in moves:
        calls, reasons = found.setdefault((move.before, move.after), (set(), set()))
        calls.add(move.call)
        if move.reason is not None:
            reasons.add(move.reason)
    pairs = sorted(found, key=lambda pair: (STATES.index(pair[0]), STATES.index(pair[1])))
    return [
        Arrow(*pair, tuple(sorted(found[pair][0])), tuple(sorted(found[pair][1], key=REASONS.index))) for pair in pairs
    ]


@cache
def _life() -> list[Arrow]:
    return arrows(life())


WIDTH: Final = 740.0
HEIGHT: Final = 560.0
BOX: Final = (92.0, 34.0)
FLOOR: Final = 516.0  # where "closing" is, as wide as the picture: whatever stands above it can fall down to it

PLACES: Final = {
    NONE: (130.0, 30.0),
    DIALLING: (130.0, 140.0),
    IDLE: (560.0, 60.0),
    GRANTED: (240.0, 240.0),
    IN_USE: (430.0, 240.0),
    TAKEN_OUT: (670.0, 240.0),
    DOOMED: (335.0, 345.0),
    CLOSING: (WIDTH / 2, FLOOR + 17),
}

#: How far an arrow bends to its left, where a straight one would run through something; and where on it, from 0 to 1,
#: its label stands.
BENDS: Final = {
    (TAKEN_OUT, GRANTED): 30.0,
    (TAKEN_OUT, DOOMED): 12.0,
}
LABELS: Final = {
    (TAKEN_OUT, GRANTED): 0.4,
    (TAKEN_OUT, DOOMED): 0.6,
    (IN_USE, IDLE): 0.35,
    (IDLE, GRANTED): 0.7,
}


def _beside(arrow: Arrow) -> tuple[str, ...]:
    """What stands at an arrow: reasons where it is closed, else calls."""
    return arrow.reasons or arrow.calls


def life_svg(found: Sequence[Arrow]) -> ElementTree.Element:
    """The graph. Each arrow and its label are one group with the two states as data."""
    text = "; ".join(f"from {each.before} to {each.after}: {', '.join(_beside(each))}" for each in found)
    svg = _svg("pool-life", "The life of a connection", text, WIDTH, HEIGHT)
    svg.set("class", "life")
    tip = _element("path", d="M0,0 L9,4 L0,8 z")
    marker = _element(
        "marker", None, tip, id="pool-life-tip", markerWidth=9, markerHeight=8, refX=8, refY=4, orient="auto"
    )
    svg.append(_element("defs", None, marker))
    pairs = {(each.before, each.after) for each in found}
    labels = []
    for each in found:
        path, label = _way(each, (each.after, each.before) in pairs)
        group = _element("g", class_="arrow", data_before=each.before, data_after=each.after)
        group.append(_element("path", d=path, marker_end="url(#pool-life-tip)"))
        svg.append(group)
        labels.append(label)
    svg.extend(labels)  # above all arrows
    for state, (x, y) in PLACES.items():
        width, height = (WIDTH - 20, 34.0) if state == CLOSING else BOX
        box = _element("rect", x=x - width / 2, y=y - height / 2, width=width, height=height, rx=6)
        svg.append(_element("g", None, box, _text(state, x, y + 4), class_=f"state {state.replace(' ', '-')}"))
    return svg


def _way(arrow: Arrow, both: bool) -> tuple[str, ElementTree.Element]:
    """Its path and its label.

    :param both: there is one the other way too.
    """
    label = _element("g", class_="label", data_before=arrow.before, data_after=arrow.after)
    (x0, y0), (x1, y1) = PLACES[arrow.before], PLACES[arrow.after]
    lines = _beside(arrow)
    if arrow.after == CLOSING:  # straight down, with its reasons one below the other
        x = x0 - 20
        top = FLOOR - 12 - 13 * (len(lines) - 1)
        label.extend(_text(line, x + 6, top + 13 * number, anchor="start") for number, line in enumerate(lines))
        return f"M{x:.0f},{y0 + BOX[1] / 2:.0f} L{x:.0f},{FLOOR:.0f}", label
    if arrow.before == CLOSING:  # along the left edge
        x = 22.0
        label.append(_text(lines[0], x + 6, (FLOOR + y1) / 2 - 20, anchor="start"))
        return f"M{x:.0f},{FLOOR:.0f} L{x:.0f},{y1 + 8:.0f} L{x1 - BOX[0] / 2:.0f},{y1 + 8:.0f}", label
    length = math.hypot(x1 - x0, y1 - y0)
    left = ((y1 - y0) / length, (x0 - x1) / length)  # a step to the left of the way
    aside = 8.0 if both else 0.0
    bend = BENDS.get((arrow.before, arrow.after), 0.0)
    start, end = (x0 - left[0] * aside, y0 - left[1] * aside), (x1 - left[0] * aside, y1 - left[1] * aside)
    middle = ((x0 + x1) / 2 + left[0] * bend * 2, (y0 + y1) / 2 + left[1] * bend * 2)
    toward = middle if bend else None
    start, end = _edge(start, toward or end, PLACES[arrow.before]), _edge(end, toward or start, PLACES[arrow.after])
    at = LABELS.get((arrow.before, arrow.after), 0.5)
    if bend:
        path = f"M{start[0]:.1f},{start[1]:.1f} Q{middle[0]:.1f},{middle[1]:.1f} {end[0]:.1f},{end[1]:.1f}"
        weights = ((1 - at) ** 2, 2 * at * (1 - at), at**2)
        x, y = (sum(w * p[i] for w, p in zip(weights, (start, middle, end), strict=True)) for i in (0, 1))
    else:
        path = f"M{start[0]:.1f},{start[1]:.1f} L{end[0]:.1f},{end[1]:.1f}"
        x, y = (start[i] + at * (end[i] - start[i]) for i in (0, 1))
    x, y = x - left[0] * aside * 1.2, y - left[1] * aside * 1.2
    anchor = "middle" if not both or abs(left[0]) < 0.5 else "start" if left[0] < 0 else "end"
    first = y + 4 - 6 * (len(lines) - 1)
    if both and abs(left[0]) < 0.5:  # above the one, below the other
        first = y + (11 if left[1] < 0 else -4 - 12 * (len(lines) - 1))
    label.extend(_text(line, x, first + 12 * number, anchor=anchor) for number, line in enumerate(lines))
    return path, label


def _edge(inside: tuple[float, float], toward: tuple[float, float], centre: tuple[float, float]) -> tuple[float, float]:
    """Where the way from within a state's box to somewhere outside leaves the box."""
    dx, dy = toward[0] - inside[0], toward[1] - inside[1]
    shares = []
    for step, at, half in ((dx, inside[0] - centre[0], BOX[0] / 2), (dy, inside[1] - centre[1], BOX[1] / 2)):
        if step:
            shares.append((math.copysign(half, step) - at) / step)
    share = min(shares)
    return inside[0] + dx * share, inside[1] + dy * share


def life_table(found: Sequence[Arrow]) -> nodes.table:
    """The same in words."""
    table = nodes.table(classes=["may-break"])
    group = nodes.tgroup(cols=4)
    group.extend(nodes.colspec(colwidth=width) for width in (16, 16, 34, 34))
    head, body = nodes.thead(), nodes.tbody()
    head.append(_row(*(nodes.paragraph("", text) for text in ("From", "To", "Calls", "Reasons"))))
    for each in found:
        body.append(
            _row(
                nodes.paragraph("", each.before),
                nodes.paragraph("", each.after),
                _listed([nodes.literal("", call) for call in each.calls]),
                _listed([nodes.Text(reason) for reason in each.reasons]),
            )
        )
    table.append(group)
    group.extend([head, body])
    return table


def _row(*cells: nodes.Node) -> nodes.row:
    row = nodes.row()
    row.extend(nodes.entry("", cell) for cell in cells)
    return row


def _listed(items: Sequence[nodes.Node]) -> nodes.paragraph:
    paragraph = nodes.paragraph()
    for number, item in enumerate(items):
        paragraph.extend([nodes.Text(", "), item] if number else [item])
    return paragraph


def _depends(directive: Directive) -> None:
    """The page is made anew if one of the files has changed that its pictures come from."""
    for module in (gsocketpool.core, gsocketpool.budget, gsocketpool.lifetime, pool_stage):
        directive.state.document.settings.record_dependencies.add(str(module.__file__))
    directive.state.document.settings.record_dependencies.add(__file__)


class PoolStory(Directive):
    """``.. pool-story:: NAME``; with ``:without-calls:`` where nobody asks what the core does."""

    required_arguments = 1
    option_spec: ClassVar = {"without-calls": directives.flag}

    def run(self) -> list[nodes.Node]:
        name = self.arguments[0]
        if name not in STORIES:
            raise self.error(f"there is no story {name!r}; there are {', '.join(STORIES)}")
        _depends(self)
        return [nodes.raw("", story_html(name, "without-calls" not in self.options), format="html")]


class PoolLife(Directive):
    """``.. pool-life::``"""

    def run(self) -> list[nodes.Node]:
        _depends(self)
        svg = ElementTree.tostring(life_svg(_life()), encoding="unicode")
        label = "The life of a connection, a wide picture"
        frame = f'<div class="pool-life" role="region" aria-label="{label}" tabindex="0">{svg}</div>'
        return [nodes.raw("", frame, format="html"), life_table(_life())]


def setup(app: Any) -> dict[str, Any]:
    app.add_directive("pool-story", PoolStory)
    app.add_directive("pool-life", PoolLife)
    app.add_css_file("pictures.css")
    return {"parallel_read_safe": True, "parallel_write_safe": True}
