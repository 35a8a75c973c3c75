"""The figure as one HTML file that needs nothing else: boxes open and close, can be searched and zoomed."""

from __future__ import annotations

import base64
import hashlib
import json
from importlib import resources
from typing import Any

from graphsplit.drawing.division import LOOKS
from graphsplit.drawing.layout import (
    CARD,
    GAP,
    HEAD,
    LANE,
    PAD,
    PILL,
    Placed,
    card_size,
    grid,
    head_width,
    place,
)
from graphsplit.drawing.outline import Box, Outline
from graphsplit.drawing.svg import (
    STYLE,
    drawing,
    inside,
    looks,
    open_boxes,
    part_sample,
    parts,
    sample,
    summary,
    text,
)

BUDGET = 32
"""A page opens modules at the start as long as it does not show more boxes than this."""


def page(outline: Outline, depth: int | None = None) -> str:
    """A whole HTML file; without scripts it is the figure as it is at the start.

    Args:
        outline: What to draw.
        depth: How many levels of modules are open at the start; as many as can be read at once unless given.
    """
    script = _file("page.js")
    digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    policy = f"default-src 'none'; style-src 'unsafe-inline'; script-src 'sha256-{digest}'"
    opened = open_boxes(outline.root, depth, BUDGET)
    placed = place(outline.root, opened.__contains__)
    placed.x = placed.y = PAD
    size = f"{placed.width + 2 * PAD:.1f}", f"{placed.height + 2 * PAD:.1f}"
    name = text(outline.model)
    lines = [
        "<!DOCTYPE html>",
        '<html lang="en"><head><meta charset="utf-8">',
        f'<meta http-equiv="Content-Security-Policy" content="{policy}">',
        '<meta name="viewport" content="width=device-width, initial-scale=1">',
        f"<title>{name}</title>",
        f"<style>{_file('page.css')}{STYLE}</style></head><body>",
        f"<header><h1>{name}</h1><p>{text(summary(outline))}</p>{_TOOLS}</header>",
        '<div id="canvas" tabindex="-1">'
        f'<svg xmlns="http://www.w3.org/2000/svg" class="graphsplit" width="{size[0]}" height="{size[1]}" '
        f'viewBox="0 0 {size[0]} {size[1]}" role="group" aria-label="{name}">',
        *drawing(placed, details=False),
        "</svg></div>",
        f"<aside>{_aside(outline)}</aside>",
        f'<script type="application/json" id="data">{_data(outline.root, opened)}</script>',
        f"<script>{script}</script>",
        "</body></html>\n",
    ]
    return "\n".join(lines)


_TOOLS = """
<div id="tools" role="search">
<span id="found" role="status"></span>
<input id="search" type="search" placeholder="search: Enter for the next"
 aria-label="Search modules, ops, shapes, parameters and code; Enter goes to the next">
<button type="button" id="open">open all</button>
<button type="button" id="close">close all</button>
<button type="button" id="out" aria-label="smaller">&minus;</button>
<button type="button" id="scale" title="back to full size">100 %</button>
<button type="button" id="in" aria-label="larger">+</button>
<button type="button" id="fit">fit</button>
</div>"""


def _aside(outline: Outline) -> str:
    """Details of a box, sub-models, legend and notes."""
    hint = (
        "Point at a box to see its shapes, parameters and source line; click on a module to open or close it."
    )
    lines = [f'<section id="details" aria-live="polite"><pre>{hint}</pre></section>']
    if outline.k:
        rows = [(part_sample(part), f"{words} parameters") for part, words in parts(outline)]
        lines.append(f"<h2>{outline.part.capitalize()}s</h2>{_list(rows)}")
        rows = [(sample(look, outline.k), f"{look}: {LOOKS[look]}") for look in looks(outline)]
        lines.append(f"<h2>Results</h2>{_list(rows)}")
    lines += [f"<p>{text(note)}</p>" for note in outline.notes]
    return "\n".join(lines)


def _list(rows: list[tuple[str, str]]) -> str:
    items = (
        f'<dt><svg class="graphsplit" width="78" height="13"><g class="card">{picture}</g></svg></dt>'
        f"<dd>{text(words)}</dd>"
        for picture, words in rows
    )
    return f"<dl>{''.join(items)}</dl>"


def _data(root: Box, opened: set[Box]) -> str:
    """What the script needs to know of every box, outer ones first, and what closed ones show when opened."""
    numbers = {box: number for number, box in enumerate(root.boxes())}
    entries: list[list[Any]] = []
    for box in numbers:
        entry: list[Any] = [box.role, "\n".join(box.details)]
        if box.children:
            cells = grid(box)
            children = [numbers[child] for child in box.children]
            content = None if box in opened else "".join(inside(_blank(box), details=False))
            values = [net.value for net in box.nets]
            entry += [head_width(box), children, values, cells.rows, cells.ties, content]
        entries.append(entry)
    sizes = {"card": CARD, "pill": PILL, "gap": GAP, "lane": LANE, "pad": PAD, "head": HEAD}
    data = json.dumps({"sizes": sizes, "boxes": entries}, separators=(",", ":"))
    return data.replace("<", "\\u003c")  # nothing in it ends the script


def _blank(box: Box) -> Placed:
    """An open box before the script places what is in it."""
    children = tuple(Placed(child, False, *card_size(child)) for child in box.children)
    return Placed(box, True, 0, 0, children=children, ways=("",) * len(box.nets))


def _file(name: str) -> str:
    return resources.files("graphsplit.drawing").joinpath(name).read_text(encoding="utf-8")
