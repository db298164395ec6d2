"""One file per family; each holds an `Architecture` (or several) under FAMILIES and nothing else."""

import importlib
import pkgutil

from bitwright.models.architecture import Architecture


def known_families() -> dict[str, Architecture]:
    """Return the families of all files in this folder by model type."""
    return {
        model_type: family
        for module in pkgutil.iter_modules(__path__)
        for family in importlib.import_module(f"{__name__}.{module.name}").FAMILIES
        for model_type in family.model_types
    }
