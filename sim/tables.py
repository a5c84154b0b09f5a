"""Tables and lines on a terminal or in a pipe. No figure is ever cut: a table that needs more columns takes them."""

from __future__ import annotations

from rich.console import Console
from rich.measure import measure_renderables
from rich.table import Table

WIDE = 160
"""Columns where the output is no terminal: nothing is folded, a pipe may cut."""
LONGEST_WORD = 24
"""Words of text up to this length stay whole, longer ones are folded; figures always stay."""


def show(*parts: Table | str) -> None:
    """Print tables and lines. Lines are left whole for the terminal to fold."""
    console = Console(highlight=False, markup=False)
    if not console.is_terminal:
        console = Console(highlight=False, markup=False, width=WIDE, color_system=None)
    for part in parts:
        if isinstance(part, str):
            console.print(part, soft_wrap=True)
        else:
            put(console, part)


def put(console: Console, table: Table) -> None:
    """Print a table; where the console is too narrow for its figures, at the least width that has room for them."""
    screen = console.width
    console.width = max(screen, _lay_out(table, console))
    try:
        console.print(table)
    finally:
        console.width = screen


def _lay_out(table: Table, console: Console) -> int:
    """Give columns their widths, and say how many they make. Left to itself, rich cuts what does not fit with an ellipsis."""
    room = console.width - 3 * len(table.columns) - 1  # what padding and borders leave
    ranges = []
    for column in table.columns:
        column.overflow = "fold"
        found = measure_renderables(
            console, console.options.update(max_width=10_000), [column.header, *column.cells]
        )
        least = found.minimum if column.justify == "right" else min(found.minimum, LONGEST_WORD)
        ranges.append((found.maximum if column.no_wrap else least, found.maximum))
    if sum(most for _, most in ranges) <= room:
        widths = [most for _, most in ranges]
    else:
        cap = 1
        while sum(min(max(cap, least), most) for least, most in ranges) <= room:
            cap += 1
        widths = [min(max(cap - 1, least), most) for least, most in ranges]
    for column, width in zip(table.columns, widths, strict=True):
        column.width = width
    return sum(widths) + 3 * len(widths) + 1
