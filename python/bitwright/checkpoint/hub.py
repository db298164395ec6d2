"""Models by their names at the hub: what is needed of them is fetched into the cache of the hub's client.

Token, cache, endpoint and offline mode are the client's own (``HF_TOKEN``, ``HF_HUB_CACHE``,
``HF_ENDPOINT``, ``HF_HUB_OFFLINE``), and an interrupted download goes on where it stopped."""

import glob
import inspect
import json
import os
import re
import sys
from collections.abc import Callable, Collection, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from functools import wraps
from pathlib import Path
from typing import Any, ParamSpec, TypeVar

from bitwright.checkpoint.reader import INDEX_NAME, SINGLE_NAME, missing_model, pickles_refused
from bitwright.checkpoint.side_files import SIDE_FILE_LIMIT, travels
from bitwright.errors import (
    CheckpointError,
    CheckpointNotFoundError,
    UnsupportedModelError,
    shown,
)
from bitwright.files.home import expanded
from bitwright.warned import warn

P = ParamSpec("P")
R = TypeVar("R")
ADAPTER_NAME = "adapter_model.safetensors"
SCHEME = "hf://"  # before a name that is the hub's whatever lies here
MODELS = ("model", "reference")
"""The parameters of public functions that are models."""
_PART = r"[A-Za-z0-9](?:[\w.-]*[A-Za-z0-9_])?"
_NAME = re.compile(
    rf"(?P<id>{_PART}/{_PART})(?:@(?P<revision>[\w./-]+))?(?::(?P<file>[^:]+\.gguf))?", re.ASCII
)
_READ = ("config.json", "README.md", "adapter_config.json")


class _PicklesError(ValueError):
    """The weights are there only as pickles."""


@dataclass(frozen=True)
class HubName:
    """A model at the hub.

    Parameters
    ----------
    id
        Owner and name.
    revision
        A branch, a tag or a commit; None is the branch that is there by default.
    file
        The GGUF file that is meant, of several.
    """

    id: str
    revision: str | None = None
    file: str | None = None

    @classmethod
    def of(cls, text: str) -> "HubName | None":
        """Return what a text names, None if it cannot be such a name.

        Examples
        --------
        >>> HubName.of("org/name@v1"), HubName.of("models/")
        (HubName(id='org/name', revision='v1', file=None), None)
        """
        found = _NAME.fullmatch(text.removeprefix(SCHEME))
        return cls(**found.groupdict()) if found else None

    def __str__(self) -> str:
        return f"{self.id}@{self.revision}" if self.revision else self.id


def model_place(model: str | os.PathLike[str]) -> Path:
    """Return the folder or file of a model, which is fetched if it is one at the hub.

    Parameters
    ----------
    model : str or os.PathLike
        A folder or file, or ``ORG/NAME``, ``ORG/NAME@REVISION`` or ``ORG/NAME:FILE.gguf``. What lies here
        counts more than what the hub has, unless the name begins with ``hf://``.

    Returns
    -------
    pathlib.Path
        Where it is: what was given, or a folder or file in the cache of the hub's client.

    Raises
    ------
    CheckpointNotFoundError
        If nothing is there, at the hub neither; the message says why, and what may be meant.
    UnsupportedModelError
        If the hub has the model's weights only in files that are not read.

    Examples
    --------
    >>> model_place(".").name
    ''
    """
    given = os.fspath(model)
    place = Path(expanded(given))
    is_asked = given.startswith(SCHEME)
    if not is_asked and os.path.exists(place):
        return place
    name = HubName.of(given)
    near = "" if is_asked else missing_model(place)
    if name is None or near:
        if is_asked:
            raise CheckpointNotFoundError(
                f"{given}: is not the name of a model at the hub, which is {SCHEME}ORG/NAME, with "
                f"@REVISION or :FILE.gguf behind it where one is meant"
            )
        hint = f" To take the model of that name at the hub, write {SCHEME}{given}" if name else ""
        raise CheckpointNotFoundError(
            f"{place}: there is no such folder.{near or ' A model at the hub is named ORG/NAME'}{hint}"
        )
    return _fetched(name)


def finds_models(function: Callable[P, R]) -> Callable[P, R]:
    """Replace those arguments of a function that name models by the models' places; see `model_place`."""
    signature = inspect.signature(function)

    @wraps(function)
    def call(*args: P.args, **kwargs: P.kwargs) -> R:
        bound = signature.bind(*args, **kwargs)
        for each, value in bound.arguments.items():
            if each in MODELS and isinstance(value, str | os.PathLike):
                place = model_place(value)
                # What lies here stays as it was spelled.
                bound.arguments[each] = value if os.fspath(place) == os.fspath(value) else place
        return function(*bound.args, **bound.kwargs)

    return call


def needed_files(sizes: Mapping[str, int], index: Collection[str] = ()) -> tuple[list[str], str]:
    """Tell which files of a model at the hub are needed.

    Parameters
    ----------
    sizes
        The bytes of all of its files.
    index
        The weight files that its index names, if it has one.

    Returns
    -------
    list of str, str
        The files, and what is read of a folder with them: "" for the folder, the name of a GGUF file.

    Raises
    ------
    ValueError
        If the weights are there only in files that are not read, or in several GGUF files. The message is
        to stand behind the model's name.

    Examples
    --------
    >>> needed_files(
    ...     {"config.json": 1, "model.safetensors": 9, "model.fp16.safetensors": 5, "pytorch_model.bin": 9}
    ... )
    (['config.json', 'model.safetensors'], '')
    """
    here = [each for each in sizes if "/" not in each]
    weights = [each for each in here if each.endswith(".safetensors") and each != ADAPTER_NAME]
    found = side_files_of(sizes)
    if ADAPTER_NAME in here:
        found.append(ADAPTER_NAME)
    if index:
        return sorted({*found, INDEX_NAME, *index}), ""
    if SINGLE_NAME in weights:
        return sorted({*found, SINGLE_NAME}), ""
    if weights or ADAPTER_NAME in here:
        return sorted({*found, *weights}), ""
    files = sorted(each for each in here if each.endswith(".gguf"))
    if len(files) == 1:
        return sorted({*found, *files}), files[0]
    if files:
        raise ValueError(
            f"has {len(files)} GGUF files ({', '.join(files[:4])}{', …' if len(files) > 4 else ''}); add "
            f"the one that is meant, as NAME:{files[0]}"
        )
    if any(each.endswith((".bin", ".pt", ".pth")) for each in here):
        raise _PicklesError
    raise ValueError(
        f"has no weights that are read, safetensors or GGUF, among its {len(sizes)} files"
    )


def side_files_of(sizes: Mapping[str, int]) -> list[str]:
    """Return those files of a model at the hub that are no weights and are needed."""
    return [
        each
        for each, size in sizes.items()
        if each in _READ or (travels(each) and size <= SIDE_FILE_LIMIT)
    ]


def _fetched(name: HubName) -> Path:
    """Return the folder or file of a model at the hub, fetched into its client's cache."""
    with _told(name):
        from huggingface_hub import HfApi
        from huggingface_hub.errors import (
            GatedRepoError,
            HfHubHTTPError,
            RepositoryNotFoundError,
            RevisionNotFoundError,
        )

        try:
            found = HfApi(library_name="bitwright").model_info(
                name.id, revision=name.revision, files_metadata=True
            )
        except RevisionNotFoundError:
            raise
        except (HfHubHTTPError, OSError, connection_errors()) as error:
            cached = _cached(name)
            if cached is None:
                raise
            denied = isinstance(error, RepositoryNotFoundError | GatedRepoError)
            if denied or not is_offline():
                what = "does not give it" if denied else "does not answer"
                warn(f"{name}: the hub {what}; what its client's cache holds is taken")
            return cached
        files = {each.rfilename: each.size or 0 for each in found.siblings or ()}
        wanted, file = _wanted(name, files)
        return Path(_snapshot(name, wanted), file)


def _wanted(name: HubName, sizes: Mapping[str, int]) -> tuple[list[str], str]:
    """Return the files that are needed, and what is read of the folder with them, as `needed_files`."""
    from huggingface_hub import hf_hub_download

    if name.file is not None:
        if name.file not in sizes:
            raise CheckpointNotFoundError(f"{name}: has no file {shown(name.file)}")
        return [*side_files_of(sizes), name.file], name.file
    index: Collection[str] = ()
    if INDEX_NAME in sizes:
        index = _shards(hf_hub_download(name.id, INDEX_NAME, revision=name.revision), sizes)
    try:
        return needed_files(sizes, index)
    except _PicklesError:
        raise UnsupportedModelError(pickles_refused(name.id, name.revision)) from None
    except ValueError as error:
        raise UnsupportedModelError(f"{name}: {error}") from None


def _shards(path: str, names: Collection[str]) -> Collection[str]:
    """Return the weight files that an index names, as far as there are any; the reader judges the rest."""
    try:
        named = set(json.loads(Path(path).read_bytes())["weight_map"].values())
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError):
        return ()
    return sorted(each for each in named if isinstance(each, str) and each in names)


def _snapshot(name: HubName, files: Collection[str]) -> str:
    """Fetch files."""
    from huggingface_hub import snapshot_download

    with bars_in_terminals():
        patterns = [glob.escape(each) for each in files]
        return snapshot_download(name.id, revision=name.revision, allow_patterns=patterns)


@contextmanager
def bars_in_terminals() -> Iterator[None]:
    """Show the bars of the hub's client in a terminal only."""
    from huggingface_hub.utils.tqdm import (
        are_progress_bars_disabled,
        disable_progress_bars,
        enable_progress_bars,
    )

    silent = not are_progress_bars_disabled() and not (sys.stderr and sys.stderr.isatty())
    if silent:
        disable_progress_bars()
    try:
        yield
    finally:
        if silent:
            enable_progress_bars()


def _cached(name: HubName) -> Path | None:
    """Return the place of a model in the client's cache, None if it is not there."""
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import LocalEntryNotFoundError

    try:
        # No pattern: whatever was fetched before, of which the reader says what is missing.
        folder = Path(
            snapshot_download(
                name.id, revision=name.revision, allow_patterns=[], local_files_only=True
            )
        )
    except (LocalEntryNotFoundError, OSError):
        return None
    place = folder / (name.file or "")
    return place if os.path.exists(place) else None


def is_offline() -> bool:
    """Tell whether the hub's client asks nobody."""
    from huggingface_hub import constants

    return bool(constants.HF_HUB_OFFLINE)


def connection_errors() -> type[Exception]:
    """Return the base of the errors of connections of the library that the client is built on, which its
    own errors derive from."""
    from huggingface_hub.errors import HfHubHTTPError

    http = inspect.getmro(HfHubHTTPError)[1]
    module = sys.modules[http.__module__.partition(".")[0]]
    found: Any = getattr(module, "TransportError", None) or getattr(
        module, "RequestException", http
    )
    return found if issubclass(found, Exception) else http


@contextmanager
def _told(name: HubName) -> Iterator[None]:
    """Turn what goes wrong at the hub into one line."""
    from huggingface_hub.errors import (
        GatedRepoError,
        HfHubHTTPError,
        HFValidationError,
        RepositoryNotFoundError,
        RevisionNotFoundError,
    )

    try:
        yield
    except CheckpointError:
        raise
    except GatedRepoError as error:
        raise CheckpointNotFoundError(
            f"{name}: the model is gated: accept its conditions on its page at the hub, then log in as the "
            f"one who did (hf auth login, or HF_TOKEN)"
        ) from error
    except RevisionNotFoundError as error:
        raise CheckpointNotFoundError(
            f"{name}: the hub has no such revision of {name.id}; give a branch, a tag or a commit of it"
        ) from error
    except RepositoryNotFoundError as error:
        raise CheckpointNotFoundError(
            f"{name}: there is no such folder, and no model of that name at the hub. If it is private, log "
            f"in first (hf auth login, or HF_TOKEN)"
        ) from error
    except HFValidationError as error:
        raise CheckpointNotFoundError(
            f"{name}: there is no such folder, and a model at the hub cannot be called so"
        ) from error
    except HfHubHTTPError as error:
        status = getattr(error.response, "status_code", "an error")
        raise CheckpointNotFoundError(
            f"{name}: there is no such folder, and the hub answers {status} to what was asked for. Try "
            f"again later, or give a folder"
        ) from error
    except (OSError, connection_errors()) as error:
        if isinstance(error, OSError) and error.errno is not None and error.filename is not None:
            raise  # of the disk
        reason = "HF_HUB_OFFLINE is set" if is_offline() else "the hub does not answer"
        raise CheckpointNotFoundError(
            f"{name}: there is no such folder, {reason}, and the cache of the hub's client does not hold a "
            f"model of that name. Go online, or give a folder (hf download {name.id} fetches one)"
        ) from error
