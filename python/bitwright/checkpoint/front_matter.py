"""What a model card says for machines, in front of its text."""

import re
from pathlib import Path

from bitwright.files.links import is_own_file

CARD_NAME = "README.md"
CARD_LIMIT = 64 << 10  # bytes of a card that are read


def front_matter(folder: Path) -> dict[str, list[str]]:
    """Return the simple entries of a card's YAML: scalars, as lists of one, and lists of them.

    Whatever is more than that is left out, and of a strange file everything.

    Parameters
    ----------
    folder : pathlib.Path
        Where the card is, if there is one.

    Returns
    -------
    dict of str to list of str
        By the names of the entries.
    """
    import yaml
    from huggingface_hub.repocard import REGEX_YAML_BLOCK

    path = folder / CARD_NAME
    try:
        if not is_own_file(path, folder):
            return {}
        with open(path, "rb") as file:
            text = file.read(CARD_LIMIT).decode("utf-8-sig", errors="replace")
    except OSError:
        return {}
    block = REGEX_YAML_BLOCK.match(re.sub(r"\r\n?", "\n", text))
    try:
        # Its loader of plain strings: no other type, and no object, can be asked for.
        found = yaml.load(block[2], yaml.BaseLoader) if block else None
    except (yaml.YAMLError, ValueError, RecursionError):
        return {}
    entries = found.items() if isinstance(found, dict) else ()
    lists = {key: value if isinstance(value, list) else [value] for key, value in entries}
    return {
        key: values
        for key, values in lists.items()
        if isinstance(key, str) and values and all(isinstance(each, str) for each in values)
    }
