"""Tables and prose on a terminal or in a pipe. No figure is ever cut: a table that needs more columns takes them.

Prose breaks between words only. Terminals, and what shows a file, would break a long line wherever their last column is.
"""

from __future__ import annotations

import io
import os
import re
import textwrap
from typing import Any

from rich.console import Console
from rich.measure import measure_renderables
from rich.table import Table
from rich.text import Text

WIDE = 160
"""Columns of tables where the output is no terminal: nothing is folded, a pipe may cut."""
PROSE = 80
"""Columns of prose there, where COLUMNS does not say otherwise."""
LEAST_PROSE = 24
"""Columns of prose on the narrowest screen."""
_TIE = "\N{NO-BREAK SPACE}"
_TIED = re.compile(r"`[^`]*`|\d (?:ns|us|ms|s|bytes|KiB|MiB|GiB|GB/s)\b")
"""What no line ends in the middle of, though it has a space."""
LONGEST_WORD = 24
"""Words of text up to this length stay whole, longer ones are folded; figures always stay."""


def plain(**given: Any) -> Console:
    """A console that prints text as it is: a name may have brackets, or colons around a word."""
    return Console(highlight=False, markup=False, emoji=False, **given)


def show(*parts: Table | str) -> None:
    """Print tables and prose."""
    console = plain()
    if not console.is_terminal:
        console = plain(width=WIDE, color_system=None)
    for part in parts:
        put(console, part) if isinstance(part, Table) else say(console, part)


def as_text(*parts: Table | str) -> str:
    """As `show` prints where the output is no terminal."""
    text = io.StringIO()
    console = plain(file=text, width=WIDE, color_system=None)
    for part in parts:
        put(console, part) if isinstance(part, Table) else say(console, part)
    return text.getvalue()


def say(console: Console, prose: str, bold: int = 0) -> None:
    """Print prose, each of its lines wrapped at word ends; its first `bold` characters stand out.

    What a line goes on with is indented by two. A number stays with its unit, a command with its options; and a word that is
    longer than a line (a path, a name) stays whole.
    """
    width = console.width if console.is_terminal else _piped_columns()
    text = Text("\n".join(_wrapped(line, max(LEAST_PROSE, width)) for line in prose.splitlines()))
    text.stylize("bold", 0, bold)
    console.print(text, soft_wrap=True)


def _wrapped(line: str, width: int) -> str:
    tied = _TIED.sub(lambda found: found[0].replace(" ", _TIE), line)
    whole = textwrap.fill(tied, width, subsequent_indent="  ", break_long_words=False, break_on_hyphens=False)
    return whole.replace(_TIE, " ")


def _piped_columns() -> int:
    columns = os.environ.get("COLUMNS", "")
    return int(columns) if columns.isascii() and columns.isdigit() and len(columns) < 6 else PROSE


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
