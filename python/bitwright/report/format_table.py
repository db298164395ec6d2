"""The formats as a table in Markdown, made from the code."""

from bitwright.formats import FORMATS, Format
from bitwright.grids.tables import E4M3, E8M0, SPELLED, TABLES, has_superblocks, shares_rows


def format_table() -> str:
    """Return the table of docs/formats.md: format, bits, groups, grids, and what loads them.

    Returns
    -------
    str
        Markdown.

    Examples
    --------
    >>> print(format_table().splitlines()[0])
    | format | bits | groups | grid | scales | embedding and head | engines |
    """
    lines = [
        "| format | bits | groups | grid | scales | embedding and head | engines |",
        "| --- | --- | --- | --- | --- | --- | --- |",
    ]
    for name, kind in FORMATS.items():
        for bits, groups, grids in _rows(kind):
            scales = _scales(kind, grids[0])
            embeddings = "quantized or in float" if kind.embeddings else "in float"
            words = ", ".join(SPELLED.get(each, each) for each in grids)
            cells = (name, bits, groups, words, scales, embeddings, kind.engines)
            lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"


def _scales(kind: type[Format], grid: str) -> str:
    """Return how the scales of a grid are stored."""
    if has_superblocks(grid):
        return "integers times float16"
    table = TABLES.get(grid)
    if table is None or table.scale_dtype is None:
        return ", ".join(str(dtype) for dtype in kind.scale_dtypes)
    words = {E8M0: "E8M0", E4M3: "E4M3"}.get(table.scale_dtype, str(table.scale_dtype))
    return f"{words} over one float32" if table.divided else words


def _rows(kind: type[Format]) -> list[tuple[str, str, list[str]]]:
    """Return bits and groups in words, and the grids that go together with them."""
    sizes: dict[tuple[str, int], list[str]] = {}
    for each in kind.precisions():
        size = "whole row" if each.group_size is None else str(each.group_size)
        if shares_rows(each.grid):
            size = f"{size} of {TABLES[each.grid].rows} rows" if each.group_size else "whole tensor"
        sizes.setdefault((each.grid, each.bits), []).append(size)
    bits: dict[tuple[str, str], list[str]] = {}
    for (grid, number), groups in sorted(sizes.items()):
        together = ", ".join(groups)
        bits.setdefault((grid, together), []).append(str(number))
    grids: dict[tuple[str, str, str], list[str]] = {}
    for (grid, together), numbers in bits.items():
        key = ", ".join(numbers), together, _scales(kind, grid)
        grids.setdefault(key, []).append(grid)
    return [(numbers, groups, kinds) for (numbers, groups, _), kinds in grids.items()]


if __name__ == "__main__":
    print(format_table(), end="")
