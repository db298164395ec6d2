"""What is noted in the context of a command, by its keys."""

import click

SAVED = "bitwright.saved"  # in a context: a file to write the settings to
SETTINGS = "bitwright.settings"  # in a context: all of them, as `--config` takes them
JSON_ASKED = "bitwright.json_asked"  # in a context: whether JSON is asked for
JSON = "bitwright.json"  # in a context: what the one object of JSON holds, once it is known
PAGE = "bitwright.page"  # in a context: a page to write
PUSH = "bitwright.push"  # in a context: the name at the hub that the output goes to
TEXT_KEY = "bitwright.text_key"  # in a context: the key of texts in records
COMMAND = "bitwright.command"  # in a context: as it was typed, in present spellings


def is_json(context: click.Context) -> bool:
    """Tell whether a command prints JSON."""
    return bool(context.meta.get(JSON_ASKED))
