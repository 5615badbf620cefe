"""Tables in the one style of this project: ASCII, a line under the header, text as it is."""

from __future__ import annotations

from rich.box import Box
from rich.table import Table
from rich.text import Text

from avl_fx._words import ascii_only

__all__ = ["ascii_table", "cell"]

ASCII_LINES = Box("    \n    \n -- \n    \n    \n -- \n    \n    \n", ascii=True)
"""A line under the header, and no others."""


def ascii_table(*columns: str) -> Table:
    """An empty table in the one style."""
    table = Table(box=ASCII_LINES, header_style="dim", padding=(0, 1), show_edge=False)
    for column in columns:
        table.add_column(column, overflow="fold")
    return table


def cell(text: str, style: str = "") -> Text:
    """Text as it is: brackets are no markup, and everything is ASCII."""
    return Text(ascii_only(text), style=style)
