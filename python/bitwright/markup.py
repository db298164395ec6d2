"""Facts as HTML, for notebooks."""

from collections.abc import Iterable
from html import escape

from bitwright.errors import printable


def html_table(facts: Iterable[tuple[str, object]]) -> str:
    """Return a table with a row for each fact; None is left out.

    Examples
    --------
    >>> html_table([("blocks", 3), ("experts", None)])
    "<table><tr><th style='text-align:left'>blocks</th><td style='text-align:left'>3</td></tr></table>"
    """
    left = "style='text-align:left'"
    rows = (
        f"<tr><th {left}>{escape(printable(name))}</th><td {left}>{escape(printable(str(value)))}</td></tr>"
        for name, value in facts
        if value is not None
    )
    return f"<table>{''.join(rows)}</table>"
