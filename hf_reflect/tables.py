"""Small tables of text, as they are shown on a terminal, on a card and in a page."""

import textwrap
from collections.abc import Sequence
from dataclasses import dataclass
from html import escape


_WIDTH = 100
_RIGHT = ' class="number" style="text-align: right"'  # a notebook has no style sheet of ours
_LEFT = ' style="text-align: left"'


@dataclass(frozen=True)
class Table:
    """A table of text.

    Attributes:
        title: What it shows.
        header: The names of the columns.
        rows: The cells of each row, as many as there are columns.
        note: What a reader must know to read it.
    """

    title: str
    header: Sequence[str]
    rows: Sequence[Sequence[str]]
    note: str = ""

    def to_text(self) -> str:
        """For a terminal: words to the left, numbers to the right."""
        flat = [[" ".join(cell.split()) for cell in row] for row in (self.header, *self.rows)]
        columns = list(zip(*flat, strict=True))
        padded = [_padded(column) for column in columns]
        lines = ["  " + "  ".join(line).rstrip() for line in zip(*padded, strict=True)]
        return "\n".join([self.title, *lines, *textwrap.wrap(self.note, _WIDTH)])

    def to_html(self) -> str:
        """For a page; everything in it is escaped."""
        numeric = [_numeric(column) for column in zip(self.header, *self.rows, strict=True)]
        head = _line("th", self.header, numeric)
        body = "".join(_line("td", row, numeric) for row in self.rows)
        note = f"<p>{escape(self.note)}</p>" if self.note else ""
        caption = f"<caption>{escape(self.title)}</caption>"
        return f"<table>{caption}<thead>{head}</thead><tbody>{body}</tbody></table>{note}"


def _line(kind: str, cells: Sequence[str], numeric: Sequence[bool]) -> str:
    marked = zip(cells, numeric, strict=True)
    made = (f"<{kind}{_RIGHT if number else _LEFT}>{escape(cell)}</{kind}>" for cell, number in marked)
    return f"<tr>{''.join(made)}</tr>"


def _numeric(column: Sequence[str]) -> bool:
    """Whether all cells below the head are numbers."""
    return all(not cell or cell[0] in "0123456789+-–" for cell in column[1:])


def _padded(column: Sequence[str]) -> list[str]:
    width = max(map(len, column))
    return [cell.rjust(width) if _numeric(column) else cell.ljust(width) for cell in column]
