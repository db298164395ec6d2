"""One file per family; each holds its description (or several) under FAMILIES and nothing else."""

import importlib
import pkgutil

from bitwright.models.architecture import Architecture, Relative, Wrapper


def known_families() -> dict[str, Architecture]:
    """Return the families of all files in this folder by model type.

    A model of several kinds of input is there once for each family that its text part may be of, as
    ``"OUTER/TEXT"``.
    """
    entries = [
        entry
        for module in pkgutil.iter_modules(__path__)
        for entry in importlib.import_module(f"{__name__}.{module.name}").FAMILIES
    ]
    found = {
        model_type: entry
        for entry in entries
        if isinstance(entry, Architecture)
        for model_type in entry.model_types
    }
    relatives = [entry for entry in entries if isinstance(entry, Relative)]
    while ready := [entry for entry in relatives if entry.of in found]:
        relatives = [entry for entry in relatives if entry not in ready]
        for entry in ready:
            found |= dict.fromkeys(entry.model_types, entry.of_family(found[entry.of]))
    texts = dict(found)
    for entry in entries:
        if isinstance(entry, Wrapper):
            for text in filter(texts.__contains__, entry.texts):
                whole = entry.around(texts[text])
                found |= {f"{outer}/{text}": whole for outer in entry.model_types}
    return found
