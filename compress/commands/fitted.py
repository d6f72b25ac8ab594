"""A table as wide as a terminal: texts fold between words, and no name or number is cut.

rich shares out the width by itself, but cuts names and breaks numbers while a text beside them could still fold, so it
is shared out here. Where whole words do not fit beside each other, the table becomes a list.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator
from itertools import takewhile

from rich.cells import cell_len
from rich.console import Console, ConsoleOptions, RenderableType
from rich.markup import escape
from rich.padding import Padding
from rich.table import Table
from rich.text import Text

Cells = list[list[Text]]  # of each column, its header first
DOTTED = re.compile(r"[\w.*]+")  # of names: not the start of an option such as 0.01


class Fitted:
    """A table of strings and texts that gives way to the width it is shown in.

    First the names in its first column lose the beginning that all share, which the caption then says; then cells fold;
    then they lose the space around them; last, the rows become entries of a list, with whole names again.
    """

    def __init__(self, table: Table) -> None:
        self.table = table

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> Iterator[RenderableType]:
        table, room = self.table, options.max_width
        cells, numbers = cells_of(console, table), [column.justify == "right" for column in table.columns]
        if edges(cells) + sum(longest(column, "\n") for column in cells) <= room:
            yield table
            return
        cells, prefix = (cells, "") if numbers[0] else shortened(cells)
        caption = escape(f"all begin with {prefix}") if prefix else None
        for padding in (1, 0):
            if widths := shared_out(cells, numbers, room - edges(cells, padding)):
                yield rebuilt(table, cells, widths, padding, caption)
                return
        yield from [*([table.title] if table.title else []), *entries(cells_of(console, table))]


def cells_of(console: Console, table: Table) -> Cells:
    """What stands in a table, as texts."""
    return [
        [cell if isinstance(cell, Text) else console.render_str(str(cell)) for cell in (column.header, *column.cells)]
        for column in table.columns
    ]


def rows(cells: Cells) -> Iterator[tuple[Text, ...]]:
    """The same row by row, without the headers."""
    return zip(*(column[1:] for column in cells), strict=True)


def longest(texts: Iterable[Text], between: str | None = None) -> int:
    """The width of the longest word of some texts, or of their longest part with something else between."""
    return max(cell_len(part) for text in texts for part in text.plain.split(between) or [""])


def edges(cells: Cells, padding: int = 1) -> int:
    """What a row takes beside its cells: a line before each and one behind the last, and the padding."""
    return (1 + 2 * padding) * len(cells) + 1


def shared_out(cells: Cells, numbers: list[bool], room: int) -> list[int]:
    """The widths of the columns, none narrower than a word in it; nothing if there is no room for them.

    Numbers are served first, then who lacks little.
    """
    widths, wanted = [longest(column) for column in cells], [longest(column, "\n") for column in cells]
    left = room - sum(widths)
    if left < 0:
        return []
    order = sorted(range(len(cells)), key=lambda i: (not numbers[i], wanted[i] - widths[i]))
    for served, i in enumerate(order):
        more = min(wanted[i] - widths[i], left if numbers[i] else left // (len(order) - served))
        widths[i], left = widths[i] + more, left - more
    return widths


def shortened(cells: Cells) -> tuple[Cells, str]:
    """The cells with what all dotted names of the first column begin with taken off, and that beginning."""
    (header, *names), *others = cells
    parts = zip(*(name.plain.split(".")[:-1] for name in names), strict=False)
    prefix = "".join(f"{same[0]}." for same in takewhile(lambda found: len(set(found)) == 1, parts))
    if len(names) < 2 or not DOTTED.fullmatch(prefix):
        return cells, ""
    return [[header, *(name[len(prefix) :] for name in names)], *others], prefix


def rebuilt(table: Table, cells: Cells, widths: list[int], padding: int, caption: str | None) -> Table:
    """The table with other cells, as wide as they are told to be."""
    made = Table(title=table.title, caption=caption, show_lines=table.show_lines, padding=(0, padding))
    for (header, *_), width, column in zip(cells, widths, table.columns, strict=True):
        made.add_column(header, justify=column.justify, overflow="fold", width=width)
    for row in rows(cells):
        made.add_row(*row)
    return made


def entries(cells: Cells) -> Iterator[RenderableType]:
    """Each row as its first cell, unless that is empty, and below it, indented, the others that say something."""
    headers = [(column[0].plain, "dim") for column in cells[1:]]
    for name, *others in rows(cells):
        if name.plain:
            yield Text.assemble(name, style="bold")
        said = [Text.assemble(header, " ", cell) for header, cell in zip(headers, others, strict=True) if cell.plain]
        yield Padding(Text("; ").join(said), (0, 0, 0, 2))
