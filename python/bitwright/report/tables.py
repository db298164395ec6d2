"""Tables for terminals of any width, and for files, in which no number and no heading is ever cut."""

from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager

from rich import box
from rich.cells import cell_len
from rich.console import Console
from rich.table import Table
from rich.text import Text

from bitwright.errors import printable

NARROWEST = 16  # of a column whose words may go on in the next line
MOST_TURNED = 4  # rows that become columns
_BETWEEN = 3  # columns of the terminal


def print_table(
    headings: Sequence[str],
    rows: Sequence[Sequence[str]],
    console: Console,
    title: str | None = None,
    *,
    words: Collection[int] = (),
) -> None:
    """Print rows below headings. Where a terminal is too narrow for that, a few rows become columns, and of
    more each is printed by itself.

    Parameters
    ----------
    headings
        One for each column.
    rows
        Their cells. The first names its row.
    console
        Where to. What is no terminal gets whole lines, however long.
    title
        Printed above.
    words
        The columns that hold names or words, which may go on in the next line. All others are numbers,
        which stay in one piece.
    """
    lines = [[printable(cell) for cell in line] for line in (headings, *rows)]
    headings, *rows = lines
    with _wide_enough(console, _width(zip(*lines, strict=True))):
        if _fits(lines, words, (), console):
            _print(lines, console, title, words, ())
            return
        columns = enumerate(zip(*lines, strict=True))
        turned = {i: column for i, column in columns if any(column[1:])}  # without what is empty
        long_lines = [line for line, i in enumerate(turned) if i in words]
        if len(rows) <= MOST_TURNED and _fits([*turned.values()], (), long_lines, console):
            _print([*turned.values()], console, title, (), long_lines)
            return
        if title is not None:
            console.print(Text(title), style="table.title")
        for name, *cells in rows:
            console.print(Text(f"{headings[0]} {name}", overflow="fold"))
            print_facts(dict(zip(headings[1:], cells, strict=True)), console)


def print_facts(facts: Mapping[str, str], console: Console) -> None:
    """Print what is known, one fact a line, by names; facts that are empty are left out."""
    known = [(printable(name), printable(value)) for name, value in facts.items() if value]
    names = max((cell_len(name) for name, _ in known), default=0)
    word = max((cell_len(word) for _, value in known for word in value.split()), default=0)
    with _wide_enough(console, _width(zip(*known, strict=True))):
        if names + min(word, NARROWEST) + 2 * _BETWEEN + 1 > console.width:
            for name, value in known:
                console.print(Text(f"  {name}: {value}", overflow="fold"))
            console.print()
            return
        table = Table(box=box.SIMPLE, show_header=False)
        table.add_column(no_wrap=True, min_width=names)
        table.add_column(overflow="fold")
        for name, value in known:
            table.add_row(Text(name), Text(value))
        console.print(table)


def print_sentence(sentence: str, console: Console) -> None:
    """Print a sentence, which a terminal breaks where a line ends, and a pipe nowhere."""
    console.print(
        printable(sentence), soft_wrap=not console.is_terminal, highlight=False, markup=False
    )


def _print(
    lines: Sequence[Sequence[str]],
    console: Console,
    title: str | None,
    long_columns: Collection[int],
    long_lines: Collection[int],
) -> None:
    """Print lines, the first as the heading; what is long may go on in the next line."""
    table = Table(box=box.SIMPLE, title=title, title_justify="left")
    for i, column in enumerate(zip(*lines, strict=True)):
        is_text = i in long_columns or (i == 0 and bool(long_lines))
        table.add_column(
            Text(column[0], overflow="fold"),
            justify="left" if is_text else "right",
            overflow="fold",
            min_width=_least(column, i in long_columns, () if i == 0 else long_lines),
        )
    for line in lines[1:]:
        table.add_row(*map(Text, line))
    console.print(table)


def _fits(
    lines: Sequence[Sequence[str]],
    long_columns: Collection[int],
    long_lines: Collection[int],
    console: Console,
) -> bool:
    least = [
        _least(column, i in long_columns, () if i == 0 else long_lines)
        for i, column in enumerate(zip(*lines, strict=True))
    ]
    return sum(least) + _BETWEEN * len(least) + 1 <= console.width


def _least(cells: Sequence[str], is_long: bool, long_cells: Collection[int]) -> int:
    """Return how wide a column must be; a heading is broken only where it is a cell of a long line."""
    return max(
        min(cell_len(each), NARROWEST) if (is_long and i > 0) or i in long_cells else cell_len(each)
        for i, each in enumerate(cells)
    )


def _width(columns: Iterator[Sequence[str]]) -> int:
    widths = [max(map(cell_len, column)) for column in columns]
    return sum(widths) + _BETWEEN * len(widths) + 1


@contextmanager
def _wide_enough(console: Console, width: int) -> Iterator[None]:
    """Let lines be so wide, unless there is a terminal that is not."""
    before = console.width
    if not console.is_terminal:
        console.width = max(before, width)
    try:
        yield
    finally:
        console.width = before
