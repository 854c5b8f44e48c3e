"""Aligned plain text: what can be pasted into an issue."""

from __future__ import annotations

import shutil
import textwrap
from collections.abc import Sequence

COLUMNS = 100  # where there is no terminal
INDENT, GAP = "   ", "  "
NARROWEST = 6


def table(title: str, rows: Sequence[Sequence[str]]) -> str:
    """Rows under a title, column under column. What is wider than the terminal is wrapped within its column."""
    cells = [[cell.splitlines() or [""] for cell in row] for row in rows]
    widths = [max(len(line) for cell in column for line in cell) for column in zip(*cells, strict=True)]
    room = shutil.get_terminal_size((COLUMNS, 0)).columns - len(INDENT) - len(GAP) * (len(widths) - 1)
    while sum(widths) > room and max(widths) > NARROWEST:
        widths[widths.index(max(widths))] -= 1
    lines = [title]
    for row in cells:
        wrapped = [_wrap(cell, width) for cell, width in zip(row, widths, strict=True)]
        for i in range(max(map(len, wrapped))):
            parts = (
                (cell[i] if i < len(cell) else "").ljust(width) for cell, width in zip(wrapped, widths, strict=True)
            )
            lines.append((INDENT + GAP.join(parts)).rstrip())
    return "\n".join(lines)


def _wrap(cell: list[str], width: int) -> list[str]:
    return [part for line in cell for part in textwrap.wrap(line, width, break_on_hyphens=False) or [""]]
