"""Symbolic links in models' folders: which are followed, so that an untrusted folder leaks no other files.

Only weights and their index may lie elsewhere, and the arrays of statistics and targets. In the hub
client's cache all files are links to blobs beside the folder, and older clients link to them from other
folders, too: these belong to the model."""

import os
import re
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from pathlib import Path

from bitwright.errors import BitwrightError, CheckpointError, shown

PACKAGE = Path(__file__).parent  # whose files installers may link to
DEPTH = 5  # folders within each other that files are taken from
_follow: ContextVar[bool | None] = ContextVar("follow", default=None)
# The name is a digest of the content, so whoever links to it knows that.
_BLOB = re.compile(r".*/models--[^/]+/blobs/([0-9a-f]{40}|[0-9a-f]{64})", re.DOTALL)
REMEDY = "put the file itself there, or follow links (follow_links, --links) if the folder is yours"


@contextmanager
def follow_links(follow: bool) -> Iterator[None]:
    """Follow all links out of the folders of models, statistics and targets inside the block, or none.

    Without it, weights and their index may be links to files anywhere, and so may the arrays of
    statistics and targets, but not what tells of them. Of links to anything else out of
    the folder, those to what is read (config.json, the tokenizer, chat templates) are refused, and what
    is only carried over to the output is left out with a warning. The hub client's cache is no other
    place than the folders in it.

    Parameters
    ----------
    follow : bool
        True for folders of one's own, where links are one's own, too. False refuses every folder with a
        link out of it, whatever it is, weights included. It holds in this thread.

    Examples
    --------
    >>> import bitwright
    >>> with bitwright.follow_links(False):
    ...     bitwright.inspect_model(bitwright.demo_folder()).model_type
    'llama'
    """
    token = _follow.set(follow)
    try:
        yield
    finally:
        _follow.reset(token)


def leads_out(path: Path, folder: Path) -> bool:
    """Tell whether a path in a model's folder resolves outside of it and of the hub cache that it lies in.

    Parameters
    ----------
    path : pathlib.Path
        The place, which may be a link, or within one.
    folder : pathlib.Path
        Of the model; may be reached through links itself.

    Examples
    --------
    >>> leads_out(Path("model/../LICENSE"), Path("model")), leads_out(Path("model/a"), Path("model"))
    (True, False)
    """
    if Path(os.path.abspath(folder)).is_relative_to(PACKAGE):
        return False
    real, home = os.path.realpath(path), Path(os.path.realpath(folder))
    if Path(real).is_relative_to(home) or _BLOB.fullmatch(real):
        return False
    return not any(Path(real).is_relative_to(cache) for cache in _caches(folder, home))


def is_own_file(path: Path, folder: Path) -> bool:
    """Tell whether there is a regular file, and not by a link out of the model's folder unless all are
    followed."""
    return os.path.isfile(path) and (_follow.get() is True or not leads_out(path, folder))


def check_own(path: Path, folder: Path, kind: type[BitwrightError] = CheckpointError) -> None:
    """Raise an error of a kind for a link out of a folder, unless all are followed."""
    if _follow.get() is not True and leads_out(path, folder):
        raise kind(
            f"{path}: leads out of its folder, of which only weights, their index, statistics and targets "
            f"may lie elsewhere: {REMEDY}"
        )


def check_no_links(
    folder: Path,
    paths: Iterable[Path] | None = None,
    kind: type[BitwrightError] = CheckpointError,
) -> None:
    """Raise an error if none may be followed and there are links out of a folder.

    Parameters
    ----------
    folder : pathlib.Path
        Of a model, of statistics or of targets.
    paths : iterable of pathlib.Path, optional
        What is asked about; by default everything in the folder.
    kind : type, optional
        Of the error.
    """
    if _follow.get() is not False:
        return
    out = [path for path in paths or _links(folder) if leads_out(path, folder)]
    if out:
        names = [path.relative_to(folder).as_posix() for path in out]
        raise kind(
            f"{folder}: {len(out)} links lead out of it ({', '.join(map(shown, names[:3]))}"
            f"{', …' if len(out) > 3 else ''}), and none are followed (follow_links, --no-links). Put the "
            f"files themselves there"
        )


def check_manifest(path: Path, kind: type[BitwrightError]) -> None:
    """Raise an error of a kind for links that may not be followed out of a folder with a manifest, which
    may not be one itself."""
    check_no_links(path.parent, kind=kind)
    check_own(path, path.parent, kind)


def _caches(folder: Path, home: Path) -> Iterator[Path]:
    """Yield the folder of the hub client's cache that a model lies in, by its own name or by a link's."""
    for place in (home, Path(os.path.abspath(folder))):
        for each in (place, *place.parents):
            if each.parent.name == "snapshots" and each.parent.parent.name.startswith("models--"):
                yield Path(os.path.realpath(each.parent.parent))


def _links(folder: Path) -> Iterator[Path]:
    depth = len(folder.parts)
    for place, folders, files in os.walk(folder):
        inner = Path(place)
        yield from (
            inner / name for name in sorted((*folders, *files)) if (inner / name).is_symlink()
        )
        folders[:] = [
            name
            for name in folders
            if not name.startswith(".") and len(inner.parts) - depth < DEPTH
        ]
