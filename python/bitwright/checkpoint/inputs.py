"""The files that a run reads, which nobody may change meanwhile."""

from collections.abc import Iterable
from pathlib import Path

from bitwright.checkpoint.fingerprint import file_fingerprint, file_stamp
from bitwright.checkpoint.reader import INDEX_NAME, Checkpoint
from bitwright.checkpoint.side_files import READ_BESIDE
from bitwright.errors import CheckpointError
from bitwright.warned import warn


class InputFiles:
    """What files are known by while a run reads them.

    Size, time of change and inode are looked at again and again. Where one of them is another, the file's
    fingerprint decides: who touches a file, or copies it over itself, ends no run.
    """

    def __init__(self) -> None:
        self._known: dict[Path, tuple[list[int], str]] = {}

    def watch(self, paths: Iterable[Path]) -> None:
        """Note what files are like now."""
        for path in paths:
            if path not in self._known and path.is_file():
                self._known[path] = file_stamp(path), file_fingerprint(path)

    def watch_model(self, checkpoint: Checkpoint) -> None:
        """Note what a model's files are like now: weights, config, tokenizer and templates."""
        beside = ("config.json", INDEX_NAME, *READ_BESIDE) if checkpoint.owns_folder else ()
        self.watch([*checkpoint.weight_files(), *(checkpoint.folder / name for name in beside)])

    def check(self) -> None:
        """Raise CheckpointError if a file is there that is not what it was when it was first watched."""
        for path, (stamp, fingerprint) in self._known.items():
            try:
                now = file_stamp(path)
            except FileNotFoundError:  # what is open stays as it is, and what is not will be missed
                continue
            if now == stamp:
                continue
            if file_fingerprint(path) != fingerprint:  # which knows the size, too
                raise CheckpointError(
                    f"{path}: was changed while it was read, so what was made of it is not put into its "
                    f"place. Run again when nobody writes to it"
                )
            warn(
                f"{path}: was touched, or written to, while it was read; where it was looked at again its "
                f"content is the same"
            )
            self._known[path] = now, fingerprint
