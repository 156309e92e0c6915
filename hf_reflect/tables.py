"""Small tables of text, as they are shown on a terminal, on a card and in a page."""

import textwrap
from collections.abc import Sequence
from dataclasses import dataclass
from html import escape


_WIDTH = 110


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
        columns = list(zip(self.header, *self.rows, strict=True))
        padded = [_padded(column) for column in columns]
        lines = ["  " + "  ".join(line).rstrip() for line in zip(*padded, strict=True)]
        return "\n".join([self.title, *lines, *textwrap.wrap(self.note, _WIDTH)])

    def to_html(self) -> str:
        """For a page; everything in it is escaped."""
        head = "".join(f'<th scope="col">{escape(name)}</th>' for name in self.header)
        body = "".join(f"<tr>{''.join(map(_cell, row))}</tr>" for row in self.rows)
        note = f"<p>{escape(self.note)}</p>" if self.note else ""
        caption = f"<caption>{escape(self.title)}</caption>"
        return f"<table>{caption}<thead><tr>{head}</tr></thead><tbody>{body}</tbody></table>{note}"


def _cell(text: str) -> str:
    return f"<td>{escape(text)}</td>"


def _padded(column: Sequence[str]) -> list[str]:
    width = max(map(len, column))
    numeric = all(not cell or cell[0] in "0123456789+-–" for cell in column[1:])
    return [cell.rjust(width) if numeric else cell.ljust(width) for cell in column]
