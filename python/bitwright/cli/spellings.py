"""Old spellings of options, which keep working: they are read as the present ones."""

from collections.abc import Iterable, Iterator, Mapping, Sequence

import click

from bitwright.spellings import Old


def spelled_out(
    parameters: Iterable[click.Parameter], old: Sequence[Old], words: Sequence[str]
) -> tuple[list[str], list[Old]]:
    """Give every option that takes a value its long and present name.

    Parameters
    ----------
    parameters
        Of the command.
    old
        Its old spellings; of several with one name the first that holds counts.
    words
        What follows the name of the command.

    Returns
    -------
    words : list of str
        What to read in place of them.
    used : list of Old
        The old spellings among them.

    Examples
    --------
    >>> out = click.Option(["-o", "--out"])
    >>> spelled_out([out], [Old("--from", "MODEL")], ["-o", "q", "--from=m", "--quick"])
    (['m', '--out', 'q', '--quick'], [Old(name='--from', new='MODEL', beside=None)])
    """
    present = {
        name: max(each.opts, key=len)
        for each in parameters
        if isinstance(each, click.Option) and not (each.is_flag or each.count)
        for name in each.opts
    }
    present |= {each.name: each.name for each in old}
    given = list(_read(words, present))
    names = {name for name, _, _ in given}
    arguments, spelled, used = list[str](), list[str](), list[Old]()
    for name, value, joined in given:
        found = next((o for o in old if o.name == name and o.beside in (None, *names)), None)
        new = found.new if found else name
        if found:
            used.append(found)
        values = [] if value is None else [value]
        if found and not new.startswith("-"):
            # The value of an option may begin with a dash.
            arguments += [f"./{each}" if each.startswith("-") else each for each in values]
        elif joined:
            spelled.append(f"{new}={value}")
        else:
            spelled += [new, *values] if name else values
    return arguments + spelled, used


def _read(
    words: Sequence[str], present: Mapping[str, str]
) -> Iterator[tuple[str, str | None, bool]]:
    """Yield the options that take a value: present name, value, whether in one word; others nameless."""
    rest = iter(words)
    for word in rest:
        name, equals, value = word.partition("=")
        if word[:2] in present and word[:2] != word:  # -oOUT
            name, equals, value = word[:2], "=", word[2:]
        if word == "--":
            yield "", word, False
            yield from (("", each, False) for each in rest)
        elif name not in present:
            yield "", word, False
        elif equals:
            yield present[name], value, True
        else:
            yield present[name], next(rest, None), False  # without one click says what is missing
