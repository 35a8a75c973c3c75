"""The figure as SVG: cards for closed boxes and ops, frames for open ones, lines between them.

Colours never stand alone: every strip carries the numbers of the sub-models or a word.
"""

from __future__ import annotations

import colorsys
import html
import itertools
import re
from collections.abc import Iterator, Sequence
from dataclasses import replace

from graphsplit.drawing.division import LOOKS, Look
from graphsplit.drawing.layout import GAP, HEAD, PAD, Placed, card_size, place
from graphsplit.drawing.outline import Band, Box, Outline

COLOURS = ("#0072b2", "#e69f00", "#009e73", "#cc79a7", "#56b4e9", "#d55e00", "#f0e442")
"""Told apart by people with any kind of colour vision (Okabe & Ito, 2008)."""

BUDGET = 120
"""A figure opens modules as long as it does not show more boxes than this."""

STYLE = """
.graphsplit { font: 12px system-ui, -apple-system, "Segoe UI", Helvetica, Arial, sans-serif; }
.graphsplit text { fill: #1f2328; }
.graphsplit .soft { fill: #59636e; font-size: 10.5px; font-weight: 400; }
.graphsplit .name { font-weight: 600; }
.graphsplit .title { font-weight: 600; font-size: 18px; }
.graphsplit .paper { fill: #fff; }
.graphsplit .card rect { fill: #fff; stroke: #afb8c1; }
.graphsplit .frame { fill: #57759a; fill-opacity: .05; stroke: #afb8c1; }
.graphsplit .bar { fill: #57759a; fill-opacity: .13; }
.graphsplit .way { fill: none; stroke: #6e7781; stroke-width: 1.2; }
.graphsplit .card .strip rect { stroke: none; }
.graphsplit .strip text { font-size: 9px; font-weight: 600; text-anchor: middle; }
.graphsplit .strip .word { fill: #1f2328; }
.graphsplit .card .strip .all { fill: #c4cbd3; }
.graphsplit .card .strip .none { fill: #e8ebef; }
@media (prefers-color-scheme: dark) {
.graphsplit text { fill: #e6edf3; }
.graphsplit .soft { fill: #9da7b1; }
.graphsplit .paper { fill: #0d1117; }
.graphsplit .card rect { fill: #1c232d; stroke: #4a5460; }
.graphsplit .frame { fill: #9db7d8; fill-opacity: .06; stroke: #4a5460; }
.graphsplit .bar { fill: #9db7d8; fill-opacity: .13; }
.graphsplit .way { stroke: #8b949e; }
.graphsplit .card .strip .all { fill: #8b949e; }
.graphsplit .card .strip .none { fill: #c4cbd3; }
}
"""


def figure(outline: Outline, depth: int | None = None, budget: int = BUDGET) -> str:
    """A whole SVG file: title, sub-models, legend and drawing.

    Args:
        outline: What to draw.
        depth: How many levels of modules are open; as many as fit in ``budget`` unless given.
        budget: Most boxes to show.
    """
    root = _folded(outline.root)
    placed = place(root, open_boxes(root, depth, budget).__contains__)
    head, height, least = _heading(outline)
    width = max(placed.width, least) + 2 * PAD
    placed.x, placed.y = (width - placed.width) / 2, height
    total = height + placed.height + PAD
    name = text(f"{outline.model}, divided into {outline.k}" if outline.k else outline.model)
    return "\n".join(
        [
            f'<svg xmlns="http://www.w3.org/2000/svg" class="graphsplit" role="img" aria-label="{name}" '
            f'width="{width:.0f}" height="{total:.0f}" viewBox="0 0 {width:.0f} {total:.0f}">',
            f"<style>{STYLE}</style>",
            '<rect class="paper" width="100%" height="100%"/>',
            *head,
            *drawing(placed, details=True),
            "</svg>\n",
        ]
    )


def open_boxes(root: Box, depth: int | None, budget: int) -> set[Box]:
    """Boxes to open, level by level; several that are alike stay closed."""
    opened = {root}
    level = [root]
    shown = len(root.children)
    for number in itertools.count(1):
        level = [child for box in level for child in box.children if child.role == "module"]
        shown += sum(len(box.children) for box in level)
        if not level or (number > depth if depth is not None else shown > budget):
            return opened
        opened.update(level)
    return opened


def _folded(box: Box) -> Box:
    """With the first of several that are alike in the place of all."""
    if box.role == "alike":
        first = box.children[0]
        note = f"first of {box.note}"
        box = replace(box, role="module", note=note, children=first.children, nets=first.nets)
    return replace(box, children=tuple(map(_folded, box.children)))


# Boxes


def drawing(placed: Placed, *, details: bool) -> Iterator[str]:
    """A box as it is shown, and all that is shown in it.

    Args:
        placed: The box with its place.
        details: Also write what is known of it, which viewers show beside the pointer. Without, an open box
            has its card, too, which a style hides as long as it is open.
    """
    box = placed.box
    state = " open" if placed.is_open else " closed" if box.children else ""
    spot = "" if placed.x == placed.y == 0 else f' transform="translate({placed.x:.1f} {placed.y:.1f})"'
    yield f'<g class="box {box.role}{state}"{spot}>'
    if details:
        yield f"<title>{text(chr(10).join(box.details))}</title>"
    if not (placed.is_open and details):
        yield _card(box)
    if placed.is_open:
        yield from inside(placed, details=details)
    yield "</g>"


def inside(placed: Placed, *, details: bool) -> Iterator[str]:
    """What an open box shows: its frame, its name, lines and children."""
    box = placed.box
    width, height = f"{placed.width:.1f}", f"{placed.height:.1f}"
    yield '<g class="inside">'
    yield f'<rect class="frame" width="{width}" height="{height}" rx="6"/>'
    yield f'<g class="head"><rect class="bar" width="{width}" height="{HEAD}" rx="6"/>'
    yield f'<text class="name" x="{PAD}" y="17">{text(box.name)}'
    yield f'<tspan class="soft" dx="8">{text(box.note)}</tspan></text></g>'
    for way in placed.ways:
        yield f'<path class="way" d="{way}"/>'
    for child in placed.children:
        yield from drawing(child, details=details)
    yield "</g>"


def _card(box: Box) -> str:
    width, height = card_size(box)
    behind = (6, 3, 0) if box.role == "alike" else (0,)
    frame = "".join(f'<rect x="{d}" y="{d}" width="{width}" height="{height}" rx="6"/>' for d in behind)
    if box.role == "move":
        words = _line(8, 14, width - 16, box.name, box.shape)
        strip = _strip(box.bands, 8, height - 8, width - 16, 4)
    else:
        size = count(box.parameters) if box.parameters else ""
        words = _line(8, 15, width - 16, box.name, box.note) + _line(8, 29, width - 16, "", size, box.shape)
        strip = _strip(box.bands, 8, height - 14, width - 16)
    return f'<g class="card">{frame}{words}{strip}</g>'


def _line(x: int, y: int, width: int, name: str, right: str, left: str = "") -> str:
    """Text at the left, the name of something or less than that, and at the right."""
    parts = []
    room = width - (6.2 * len(right) + 6 if right else 0)
    if name:
        parts.append(f'<text class="name" x="{x}" y="{y}">{text(fitting(name, room / 7.8))}</text>')
    if left:
        parts.append(f'<text class="soft" x="{x}" y="{y}">{text(fitting(left, room / 6.2))}</text>')
    if right:
        parts.append(
            f'<text class="soft" x="{x + width}" y="{y}" text-anchor="end">'
            f"{text(fitting(right, width / 6.2 - 4))}</text>"
        )
    return "".join(parts)


def _strip(bands: Sequence[Band], x: float, y: float, width: float, height: float = 10) -> str:
    """What the results are to the sub-models, the bands as wide as there are ops."""
    if not bands:
        return ""
    ops = sum(band.ops for band in bands)
    least = min(18.0, width / len(bands) / 2)
    rest = width - 4 * (len(bands) - 1) - least * len(bands)
    drawn: list[str] = []
    for band in bands:
        wide = least + rest * band.ops / ops
        drawn += _band(band, x, y, wide, height)
        x += wide + 4
    return f'<g class="strip">{"".join(drawn)}</g>'


def _band(band: Band, x: float, y: float, width: float, height: float) -> Iterator[str]:
    words = height >= 10
    if band.look == "common":
        yield _cell(x, y, width, height, "", "all" if words and width > 24 else "", ' class="all"')
        return
    if band.look == "mean":
        yield _cell(x, y, width, height - 2, "", "", ' class="none"')
        if words and width > 32:
            yield f'<text x="{x + width / 2:.1f}" y="{y + height - 2.8:.1f}" class="word">mean</text>'
        y, height, words = y + height - 2, 2, False
    gap = {"apart": 2.0, "own": 4.0}.get(band.look, 0.0)
    room = width - gap * (len(band.shares) - 1)
    if room < len(band.shares):
        gap, room = 0.0, width
    for part, share in enumerate(band.shares):
        wide = room * share
        if wide > 0:
            word = f"{part}" if words and wide >= 4 + 5.6 * len(f"{part}") else ""
            rounded = f' rx="{height / 2:g}"' if band.look in ("own", "critic") else ""
            yield _cell(x, y, wide, height, colour(part), word, rounded)
        x += wide + gap


def _cell(x: float, y: float, width: float, height: float, fill: str, word: str, extra: str) -> str:
    style = f' style="fill:{fill}"' if fill else ""
    shape = f'<rect x="{x:.1f}" y="{y:.1f}" width="{width:.1f}" height="{height:.1f}"{style}{extra}/>'
    if not word:
        return shape
    ink = f' style="fill:{_ink(fill)}"' if fill else ' class="word"'
    return f'{shape}<text x="{x + width / 2:.1f}" y="{y + height - 2.2:.1f}"{ink}>{word}</text>'


# Heading


def _heading(outline: Outline) -> tuple[list[str], float, float]:
    """Title, sub-models and legend; their height and their width."""
    y = 32.0
    lines = [f'<text class="title" x="{PAD}" y="{y:g}">{text(outline.model)}</text>']
    y += 20
    lines.append(f'<text class="soft" x="{PAD}" y="{y:g}">{text(summary(outline))}</text>')
    widths = [11.0 * len(outline.model), 5.8 * len(summary(outline))]
    chips = parts(outline)
    for row in (chips[start : start + 4] for start in range(0, len(chips), 4)):
        y += 20
        for column, (part, words) in enumerate(row):
            x = PAD + 210 * column
            lines.append(f'<g class="card" transform="translate({x} {y - 10:g})">{part_sample(part)}</g>')
            lines.append(f'<text class="soft" x="{x + 34}" y="{y:g}">{text(words)}</text>')
        widths.append(210.0 * len(row))
    for look in looks(outline):
        y += 18
        lines.append(f'<g class="card" transform="translate({PAD} {y - 9:g})">{sample(look, outline.k)}</g>')
        lines.append(f'<text class="soft" x="{PAD + 84}" y="{y:g}">{look}: {LOOKS[look]}</text>')
        widths.append(84 + 5.8 * (len(look) + len(LOOKS[look]) + 2))
    for note in outline.notes:
        y += 18
        lines.append(f'<text class="soft" x="{PAD}" y="{y:g}">{text(fitting(note, 140))}</text>')
        widths.append(5.8 * min(len(note), 140))
    return lines, y + GAP, max(widths)


def summary(outline: Outline) -> str:
    """Size and division in one line."""
    size = f"{outline.parameters:,} parameters"
    return f"{size}, {outline.title}" if outline.k else size


def parts(outline: Outline) -> list[tuple[int, str]]:
    """Number and size of every sub-model."""
    full = max(outline.parameters, 1)
    return [(part, f"{held:,} ({held / full:.1%})") for part, held in enumerate(outline.held)]


def looks(outline: Outline) -> list[Look]:
    """What there is in the figure, for its legend."""
    return [band.look for band in outline.root.bands]


def sample(look: Look, k: int) -> str:
    """A strip for the legend, 76 wide and 10 high."""
    return _strip((Band(look, 1, (1 / k,) * k),), 0, 0, 76)


def part_sample(part: int) -> str:
    """The colour and the number of a sub-model, 28 wide and 12 high."""
    return f'<g class="strip">{_cell(0, 0, 28, 12, colour(part), f"{part}", "")}</g>'


# Words and colours


def colour(part: int) -> str:
    """Of a sub-model."""
    if part < len(COLOURS):
        return COLOURS[part]
    turn = (part * 0.618034) % 1.0  # the golden angle: neighbours in number are far from each other in hue
    rgb = colorsys.hls_to_rgb(turn, 0.35 + 0.3 * (part % 2), 0.6)
    return "#" + "".join(f"{round(255 * channel):02x}" for channel in rgb)


def _ink(fill: str) -> str:
    """Black or white, whichever is easier to read on a colour."""
    red, green, blue = (int(fill[i : i + 2], 16) for i in (1, 3, 5))
    return "#000" if 0.299 * red + 0.587 * green + 0.114 * blue > 130 else "#fff"


def count(number: int) -> str:
    """``1.2 M`` for a number of parameters."""
    for size, unit in ((1e9, " B"), (1e6, " M"), (1e3, " k")):
        if number >= size:
            return f"{number / size:.3g}{unit}"
    return f"{number}"


def fitting(words: str, letters: float) -> str:
    """As much of a text as there is room for."""
    room = max(int(letters), 2)
    return words if len(words) <= room else f"{words[: room - 1]}…"


def text(words: str) -> str:
    """Safe as text and in quotes, in HTML and XML; signs that XML has no place for become question marks."""
    legal = re.sub(r"[^\t\n\r\x20-\ud7ff\ue000-\ufffd\U00010000-\U0010ffff]", "?", words)
    return html.escape(legal)
