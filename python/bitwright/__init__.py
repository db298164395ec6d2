"""bitwright quantizes language models on any CPU."""

from bitwright.process import startup as _startup  # noqa: F401, before all that takes time

# isort: split
import sys as _sys
from importlib import import_module as _import_module
from importlib.util import find_spec as _find_spec

TYPE_CHECKING = False  # to whom that is true; typing itself takes longer than all of this
if TYPE_CHECKING:
    from bitwright.public import *  # noqa: F403
    from bitwright.public import __version__ as __version__


def __getattr__(name: str) -> object:
    """Import what is public when it is first asked for, which takes half a second."""
    module = f"bitwright.{name}"
    if module in _sys.modules or _find_spec(module):  # of which the package has no attribute yet
        raise AttributeError(name)
    found = globals()[name] = getattr(_import_module("bitwright.public"), name)
    return found


def __dir__() -> list[str]:
    public: list[str] = _import_module("bitwright.public").__all__
    return public
