"""A table that fits the width of a terminal: texts wrap between words, and no name or number is cut.

rich can distribute the width by itself, but it cuts names and breaks numbers while text in another column could still
wrap, so the widths are computed here. If whole words do not fit side by side, the table becomes a list.
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

Cells = list[list[Text]]  # the cells of each column, its header first
DOTTED = re.compile(r"[\w.*]+")  # a prefix of names; other text with a dot, such as an option 0.01, is not shortened


class Fitted:
    """A table of strings and texts that adapts to the width it is shown in.

    If it is too wide, the names in its first column first lose their common prefix, which the caption then states; then
    cells wrap; then they lose their padding; last, the rows become entries of a list, with whole names again.
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
    """The cells of a table, as texts."""
    return [
        [cell if isinstance(cell, Text) else console.render_str(str(cell)) for cell in (column.header, *column.cells)]
        for column in table.columns
    ]


def rows(cells: Cells) -> Iterator[tuple[Text, ...]]:
    """The cells row by row, without the headers."""
    return zip(*(column[1:] for column in cells), strict=True)


def longest(texts: Iterable[Text], between: str | None = None) -> int:
    """The width of the longest word of some texts, or of the longest part between separators `between`."""
    return max(cell_len(part) for text in texts for part in text.plain.split(between) or [""])


def edges(cells: Cells, padding: int = 1) -> int:
    """The width of a row without its cells: the line before each cell, the last line, and the padding."""
    return (1 + 2 * padding) * len(cells) + 1


def shared_out(cells: Cells, numbers: list[bool], room: int) -> list[int]:
    """The widths of the columns, none narrower than its longest word; an empty list if they do not fit.

    Spare width goes to columns of numbers first, then to those that need the least.
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
    """The cells without the common prefix of the dotted names in the first column, and that prefix."""
    (header, *names), *others = cells
    parts = zip(*(name.plain.split(".")[:-1] for name in names), strict=False)
    prefix = "".join(f"{same[0]}." for same in takewhile(lambda found: len(set(found)) == 1, parts))
    if len(names) < 2 or not DOTTED.fullmatch(prefix):
        return cells, ""
    return [[header, *(name[len(prefix) :] for name in names)], *others], prefix


def rebuilt(table: Table, cells: Cells, widths: list[int], padding: int, caption: str | None) -> Table:
    """The table with these cells and column widths."""
    made = Table(title=table.title, caption=caption, show_lines=table.show_lines, padding=(0, padding))
    for (header, *_), width, column in zip(cells, widths, table.columns, strict=True):
        made.add_column(header, justify=column.justify, overflow="fold", width=width)
    for row in rows(cells):
        made.add_row(*row)
    return made


def entries(cells: Cells) -> Iterator[RenderableType]:
    """Each row as its first cell, unless that is empty, with the other non-empty cells indented below it."""
    headers = [(column[0].plain, "dim") for column in cells[1:]]
    for name, *others in rows(cells):
        if name.plain:
            yield Text.assemble(name, style="bold")
        said = [Text.assemble(header, " ", cell) for header, cell in zip(headers, others, strict=True) if cell.plain]
        yield Padding(Text("; ").join(said), (0, 0, 0, 2))
