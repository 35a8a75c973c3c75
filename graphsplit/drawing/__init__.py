"""Figures of a model and of its parts, as SVG and as one HTML file."""

from __future__ import annotations

from pathlib import Path

from graphsplit.drawing.division import Division
from graphsplit.drawing.outline import Outline, outline
from graphsplit.drawing.page import page
from graphsplit.drawing.svg import figure
from graphsplit.errors import UserError
from graphsplit.program import Program

__all__ = ["Outline", "check_suffix", "draw", "figure", "outline", "page", "snippet"]

SUFFIXES = {".svg": figure, ".html": page, ".htm": page}
OVERVIEW = 32
"""A notebook shows no more boxes than this."""


def check_suffix(path: Path) -> None:
    """Raise where the name of a file says of no format that there is.

    Raises:
        UserError: The name ends in neither ``.svg`` nor ``.html``.
    """
    if path.suffix.lower() not in SUFFIXES:
        raise UserError(
            f"{path} ends in neither .svg nor .html, so the format of the figure is unknown",
            hint="the .html file opens and closes modules, the .svg file is a still picture",
        )


def draw(program: Program, division: Division | None, path: Path, depth: int | None = None) -> str:
    """The text of a figure, in the format that the name of the file asks for.

    Args:
        program: What to draw.
        division: Its parts, for colours.
        path: Where the figure will stand; nothing is written.
        depth: How many levels of modules are open.

    Raises:
        UserError: There is no such format, or ``depth`` is negative.
    """
    check_suffix(path)
    if depth is not None and depth < 0:
        raise UserError(f"the depth of the figure is {depth}, expected 0 or more")
    return SUFFIXES[path.suffix.lower()](outline(program, division), depth)


def snippet(program: Program, division: Division | None = None) -> str:
    """A figure for a notebook: few boxes are open, and it scrolls."""
    picture = figure(outline(program, division), budget=OVERVIEW)
    return f'<div style="max-height: 640px; overflow: auto">{picture}</div>'
