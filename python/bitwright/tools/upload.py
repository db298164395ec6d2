"""Puts a folder on the hub."""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from bitwright.checkpoint import open_checkpoint
from bitwright.checkpoint.front_matter import CARD_NAME, front_matter
from bitwright.checkpoint.hub import HubName, bars_in_terminals, connection_errors, is_offline
from bitwright.errors import HubError, shown
from bitwright.files.home import expands_home
from bitwright.records.card import with_base_model
from bitwright.warned import warn

LOGIN = "Log in by hf auth login, or set HF_TOKEN to a token that may write"


@expands_home
def upload(
    folder: str | os.PathLike[str],
    name: str,
    *,
    base_model: str | None = None,
    private: bool = False,
    message: str = "Upload by bitwright",
) -> str:
    """Put a folder that bitwright has written on the hub, in one commit.

    The model is made there if there is none of that name. Of what is there, files of other names stay.

    Parameters
    ----------
    folder
        Checkpoint folder.
    name
        ``ORG/NAME`` or ``ORG/NAME@BRANCH``; the branch is made if it is not there.
    base_model
        What the card names as the original, a model at the hub. By default what the card in the folder
        says; an original that the hub does not have is left out of the card, with a warning.
    private
        Make a model that only its owners see. It does not change one that is there.
    message
        The subject of the commit.

    Returns
    -------
    str
        The address of the commit.

    Raises
    ------
    HubError
        If there is no token, the name is no name, or the hub refuses; the message says what to do.
    CheckpointError
        If the folder is not a whole checkpoint.

    Examples
    --------
    >>> bitwright.upload("story-4bit", "me/story-4bit")  # doctest: +SKIP
    """
    place, target = Path(folder), check_upload(name)
    open_checkpoint(place).close()
    from huggingface_hub import CommitOperationAdd, HfApi

    api = HfApi(library_name="bitwright")
    files: dict[str, Any] = dict(_files(place))
    with _told(name):
        files |= _card(api, place, base_model)
        operations = [CommitOperationAdd(path, content) for path, content in sorted(files.items())]
        api.create_repo(target.id, private=private or None, exist_ok=True)
        if target.revision is not None:
            api.create_branch(target.id, branch=target.revision, exist_ok=True)
        with bars_in_terminals():
            found = api.create_commit(
                target.id, operations, commit_message=message, revision=target.revision
            )
    return str(found.commit_url)


def check_upload(name: str) -> HubName:
    """Return the name that something is to be put under at the hub, which must know who asks.

    Raises
    ------
    HubError
        If it is no name of a model, or the hub does not know the token.
    """
    target = HubName.of(name)
    if target is None or target.file is not None:
        raise HubError(f"{name}: is not a name at the hub, which is ORG/NAME or ORG/NAME@BRANCH")
    from huggingface_hub import HfApi

    with _told(name):
        HfApi(library_name="bitwright").whoami()
    return target


def _files(folder: Path) -> Iterator[tuple[str, str]]:
    """Yield the path of each file within a folder, and where it is; hidden ones are left out."""
    for place, folders, names in os.walk(folder):
        folders[:] = sorted(each for each in folders if not each.startswith("."))
        for each in sorted(names):
            path = Path(place, each)
            if not each.startswith(".") and path.is_file():
                yield path.relative_to(folder).as_posix(), str(path)


def _card(api: Any, folder: Path, base: str | None) -> dict[str, bytes]:
    """Return the card, if it has to say another original than it does."""
    from huggingface_hub.errors import HFValidationError, RepositoryNotFoundError

    said = next(iter(front_matter(folder).get("base_model", [])), None)
    named = base or said
    if named is None:
        return {}
    try:
        if HubName.of(named) is None:
            raise HFValidationError
        api.model_info(named)
        known: str | None = named
    except (HFValidationError, RepositoryNotFoundError):
        if base is not None:
            raise HubError(
                f"{base}: the hub has no such model, which is to be the original"
            ) from None
        warn(
            f"{folder / CARD_NAME}: the hub has no model {shown(named)}, so the card there names no "
            f"original. Tell its name there by base_model (--base-model)"
        )
        known = None
    if known == said:
        return {}
    path = folder / CARD_NAME
    text = path.read_text() if path.is_file() else ""
    return {CARD_NAME: with_base_model(text, known).encode()}


@contextmanager
def _told(name: str) -> Iterator[None]:
    """Turn what goes wrong at the hub into one line."""
    from huggingface_hub.errors import HfHubHTTPError, LocalTokenNotFoundError

    try:
        yield
    except HubError:
        raise
    except LocalTokenNotFoundError as error:
        raise HubError(f"{name}: the hub takes files only from whom it knows. {LOGIN}") from error
    except HfHubHTTPError as error:
        status = getattr(error.response, "status_code", 0)
        if status == 401:
            raise HubError(f"{name}: the hub does not know the token. {LOGIN}") from error
        reason = f": {shown(error.server_message)}" if error.server_message else ""
        raise HubError(f"{name}: the hub refuses the upload ({status}){reason}") from error
    except RuntimeError as error:  # what its threads have met
        reason = shown(str(error.__cause__ or error))
        raise HubError(
            f"{name}: the upload failed: {reason}. Try again: bitwright upload"
        ) from error
    except (OSError, connection_errors()) as error:
        if isinstance(error, OSError) and error.errno is not None and error.filename is not None:
            raise
        reason = "HF_HUB_OFFLINE is set" if is_offline() else "the hub does not answer"
        raise HubError(
            f"{name}: {reason}, so nothing can be put there. Try again when it can: bitwright upload"
        ) from error
