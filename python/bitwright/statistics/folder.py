"""A model's statistics in a folder: a manifest and a safetensors file per block, read stage by stage."""

import hashlib
import json
import os
from collections.abc import Iterable, Mapping
from contextlib import AbstractContextManager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from safetensors import SafetensorError, safe_open

from bitwright.arrays import require_finite
from bitwright.checkpoint.fingerprint import digest, model_checksum, model_fingerprint
from bitwright.checkpoint.holes import hole_in_safetensors
from bitwright.checkpoint.reader import is_plain_file_name, read_json_object
from bitwright.checkpoint.work_folder import WorkFolder, again_message, content_of
from bitwright.checkpoint.writer import SafetensorsFiles, StoredTensor
from bitwright.errors import (
    BitwrightError,
    CheckpointError,
    OutputError,
    ResumeError,
    StatisticsError,
    malformed_as,
    shown,
)
from bitwright.files.home import expands_home
from bitwright.files.links import check_manifest
from bitwright.files.replacing import output_errors, synchronize, taken, write_json
from bitwright.loading.model import Model
from bitwright.methods.moments import Moments

MANIFEST = "statistics.json"
VERSION = 1
HEAD_FILE = "head.safetensors"
MOST_CHANNELS, MOST_TOKENS = 1 << 24, 1 << 53
COMPARED_ROWS = 256  # of a gram with as many columns, to see that it is symmetric
UNFINISHED = "statistics"  # in the work folder
_DATA = ".data"  # of the file that is being written


@dataclass(frozen=True)
class StageRecord:
    """The manifest's entry of one stage: channels, tokens, and the digest of its arrays."""

    channels: int
    tokens: int
    digest: str


class Statistics:
    """Statistics that `collect_statistics` or `merge_statistics` has written, read stage by stage.

    Of each stage, that is, of linears that share an input, there are the mean products of its channels,
    their mean magnitudes, and over how many tokens. Stages go by the full name of their first linear or,
    for what routes to experts, of its norm.

    Parameters
    ----------
    folder
        Where they are. Opening it reads the manifest and the headers of all files.

    Attributes
    ----------
    folder : pathlib.Path
        As given.
    model : str
        Fingerprint of the model that was run.
    checksum : str or None
        Of all its weights; None in files of versions that took none.
    tokens : int
        How many tokens it was run on.
    samples : tuple of str
        A digest of each sample.
    first : tuple of int or None
        What each sample of text began with, see `load_tokens`: empty if with nothing of the
        tokenizer's; None if token ids were given, which are taken as they are.
    stages : dict of str to StageRecord
        In the order of the computation.
    tensors : dict of str to list of str
        The stages that the tensors of a GGUF file read; empty if llama.cpp does not know the model, and in
        files of versions that did not tell.

    Raises
    ------
    StatisticsError
        If they are incomplete or damaged; the message names the file.

    Examples
    --------
    >>> import bitwright, tempfile
    >>> demo = bitwright.demo_folder()
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     found = bitwright.collect_statistics(
    ...         demo, f"{folder}/s", demo / "calibration.txt", samples=4, length=64, progress=False
    ...     )
    ...     found.tokens, found.read("model.layers.0.mlp.gate_proj").gram.shape
    (256, (64, 64))
    """

    @expands_home
    def __init__(self, folder: str | os.PathLike[str]) -> None:
        self.folder = Path(folder)
        path = self.folder / MANIFEST
        check_manifest(path, StatisticsError)
        if not path.is_file():
            raise StatisticsError(
                f"{path}: is missing; give a folder that bitwright statistics collect has written"
            )
        damaged = f"{path}: is damaged"
        with malformed_as(StatisticsError, damaged, "; collect again", CheckpointError):
            manifest = read_json_object(path)
            if manifest["version"] != VERSION:
                raise StatisticsError(
                    f"{path}: is of version {shown(manifest['version'])}, this bitwright reads {VERSION}"
                )
            self.model = _digest_in(manifest["model"])
            checksum = manifest.get("checksum")
            self.checksum = None if checksum is None else _digest_in(checksum)
            self.tokens = _count_in("tokens", manifest["tokens"], MOST_TOKENS)
            if not isinstance(manifest["samples"], list) or not manifest["samples"]:
                raise ValueError("samples")
            self.samples = tuple(map(_digest_in, manifest["samples"]))
            self.first = _first_in(manifest.get("first"))
            self.stages: dict[str, StageRecord] = {}
            self._files: dict[str, str] = {}  # by stage
            for file, stages in manifest["files"].items():
                if not is_plain_file_name(file):
                    raise ValueError(f"{shown(file)} is not the name of a file")
                for name, content in stages.items():
                    if name in self.stages:
                        raise ValueError(f"{shown(name)} is there twice")
                    self.stages[name] = StageRecord(
                        _count_in("channels", content["channels"], MOST_CHANNELS),
                        _count_in("tokens", content["tokens"], self.tokens, 0),
                        _digest_in(content["digest"]),
                    )
                    self._files[name] = file
            self.tensors = _tensors_in(manifest.get("tensors") or {}, self.stages)
            self._fingerprint = digest(json.dumps(manifest, sort_keys=True).encode())
        for file, stages in self.by_file().items():
            problem = _file_problem(self.folder / file, stages)
            if problem:
                raise StatisticsError(f"{self.folder / file}: {problem}; collect again")

    def by_file(self) -> dict[str, dict[str, StageRecord]]:
        """Return the stages of each file, in the order of the computation."""
        files: dict[str, dict[str, StageRecord]] = {}
        for name, stage in self.stages.items():
            files.setdefault(self._files[name], {})[name] = stage
        return files

    def fingerprint(self) -> str:
        """Return the fingerprint of the statistics: a digest of digests of all arrays."""
        return self._fingerprint

    def read(self, name: str) -> Moments | None:
        """Return the statistics of a stage, None if no token was routed to it.

        Parameters
        ----------
        name
            A key of `stages`.

        Returns
        -------
        Moments or None

        Raises
        ------
        StatisticsError
            If there is no such stage, or its arrays are not what was written or cannot be moments.
        """
        stage = self.stages.get(name)
        if stage is None:
            raise StatisticsError(f"{self.folder}: has no statistics of {shown(name)}")
        if stage.tokens == 0:
            return None
        path = self.folder / self._files[name]
        problem = _file_problem(path, {name: stage}, others=True)
        if problem:
            raise StatisticsError(f"{path}: {problem}; was it changed meanwhile?")
        gram_name, magnitudes_name = _array_names(name)
        with _reading(path), safe_open(path, framework="numpy", backend="pread") as file:
            gram, mean_abs = file.get_tensor(gram_name), file.get_tensor(magnitudes_name)
        try:
            if _digest(gram, mean_abs) != stage.digest:
                raise ValueError("is not what was written")
            _check_moments(gram, mean_abs)
        except ValueError as error:
            raise StatisticsError(
                f"{path}: the statistics of {shown(name)} are damaged: {error}; collect again"
            ) from error
        return Moments(gram, None, mean_abs, stage.tokens)

    def check(self, model: Model) -> None:
        """Raise StatisticsError unless these are the statistics of a model, and complete."""
        found = model_fingerprint(model.checkpoint)
        if found != self.model:
            raise StatisticsError(
                f"{self.folder}: holds statistics of another model (fingerprint {self.model}) than "
                f"{model.checkpoint.folder} ({found}); collect them from this one"
            )
        if self.checksum is not None and self.checksum != model_checksum(model.checkpoint):
            raise StatisticsError(
                f"{self.folder}: the weights of {model.checkpoint.folder} have changed since these "
                f"statistics were collected; collect them again"
            )
        for name, channels in expected_stages(model):
            stage = self.stages.get(name)
            if stage is None or stage.channels != channels:
                state = "no" if stage is None else f"{stage.channels} channels in the"
                raise StatisticsError(
                    f"{self.folder / MANIFEST}: has {state} statistics of {name}, which reads {channels} "
                    f"channels; collect again"
                )


class StatisticsWriter:
    """Writes statistics, stage by stage and file by file, that appear as a whole.

    Parameters
    ----------
    work
        The work folder of the output, entered already.
    overwrite
        Whether other statistics may be replaced.
    """

    def __init__(self, work: WorkFolder, overwrite: bool = False) -> None:
        self._work = work
        self._overwrite = overwrite
        self._folder = folder = work.path / UNFINISHED
        self._files: dict[str, dict[str, StageRecord]] = {}
        self._open: dict[str, StageRecord] = {}
        self._waiting: list[StoredTensor] = []
        with output_errors(folder):
            folder.mkdir(exist_ok=True)

    def add(self, name: str, channels: int, moments: Moments | None) -> None:
        """Add a stage to the current file; None if no token was routed to it."""
        arrays: tuple[NDArray[Any], ...] = ()
        tokens = 0 if moments is None else moments.tokens
        if moments is not None and tokens:
            if moments.mean_abs is None:
                raise ValueError(f"{name}: the mean magnitudes were not gathered")
            arrays = (moments.gram, moments.mean_abs)
        self._open[name] = StageRecord(channels, tokens, _digest(*arrays))
        path = self._folder / _DATA
        with output_errors(path), open(path, "ab") as data:
            for part, array in zip(_array_names(name), arrays, strict=False):
                self._waiting.append(StoredTensor(part, array.dtype, array.shape, data.tell()))
                data.write(array.reshape(-1).view(np.uint8).data)

    def end_file(self, name: str) -> None:
        """Write the file of the stages that were added, by its name."""
        path, waiting = self._folder / name, self._folder / _DATA
        with output_errors(path):
            with open(waiting, "rb") as data, open(path, "wb") as file:
                SafetensorsFiles().write(file, 0, self._waiting, data, {})
            synchronize(path)
            waiting.unlink()
        self._files[name], self._open, self._waiting = self._open, {}, []

    def state(self) -> dict[str, Any]:
        """Return what `restore` needs, for JSON, between two files."""
        with output_errors(self._folder):
            synchronize(self._folder)
        return {
            file: {name: asdict(stage) for name, stage in stages.items()}
            for file, stages in self._files.items()
        }

    def files(self) -> dict[Path, int]:
        """Return the files that a state counts on, and their sizes."""
        paths = [self._folder / name for name in self._files]
        return {path: path.stat().st_size for path in paths}

    def committed(self) -> None:
        """Do nothing: files are only ever added, so earlier states leave none behind."""

    def restore(self, state: Mapping[str, Any] | None) -> None:
        """Resume from a state, or start; what was written later is removed."""
        self._files = {
            file: {name: StageRecord(**stage) for name, stage in stages.items()}
            for file, stages in (state or {}).items()
        }
        with output_errors(self._folder):
            for path in self._folder.iterdir():
                if path.name not in self._files:
                    path.unlink()
        for name, stages in self._files.items():
            problem = _file_problem(self._folder / name, stages)
            if problem:
                raise ResumeError(
                    f"{self._folder / name}: {problem}; {again_message(self._work.path)}"
                )

    def finish(
        self,
        model: str,
        tokens: int,
        samples: Iterable[str],
        first: tuple[int, ...] | None = None,
        checksum: str | None = None,
        tensors: Mapping[str, list[str]] | None = None,
    ) -> None:
        """Write the manifest and move the folder to its place."""
        content = {
            "version": VERSION,
            "model": model,
            "checksum": checksum,
            "tokens": tokens,
            "samples": list(samples),
            "first": None if first is None else list(first),
            "files": self.state(),
        }
        if tensors:
            content["tensors"] = dict(tensors)
        write_json(self._folder / MANIFEST, content)
        check_place(self._work, self._overwrite)  # hours may have passed since it was looked at
        with output_errors(self._work.out):
            synchronize(self._folder)
        self._work.put_into_place(UNFINISHED, last=MANIFEST)


def expected_stages(model: Model) -> list[tuple[str, int]]:
    """Return name and channels of every stage that has an input of its own, and of the head."""
    found = [
        (model.block_prefix(index) + stage.name, layout.channels(stage))
        for index, layout in enumerate(model.layouts)
        for stage in layout.stages
        if stage.has_own_input
    ]
    return [*found, (model.names.head, model.config.hidden_size)]


def check_place(work: WorkFolder, overwrite: bool = False) -> None:
    """Raise OutputError unless the output can be put into its place, that of other statistics if they may
    be replaced."""
    out = work.out
    work.take_back()
    with output_errors(out):
        content = content_of(out) if out.is_dir() else []
        is_taken = bool(content) or (os.path.lexists(out) and not out.is_dir())
    if is_taken and not overwrite:
        work.forget_finished()
        raise taken(out)
    files = {entry.name for entry in content if entry.is_file(follow_symlinks=False)}
    others = [
        entry.name for entry in content if not entry.name.endswith((MANIFEST, ".safetensors"))
    ]
    if is_taken and (MANIFEST not in files or others or len(files) < len(content)):
        raise OutputError(
            f"{out}: is not a folder of statistics, so it is not overwritten. Remove it yourself or write "
            f"elsewhere"
        )
    work.check_place()


def _array_names(stage: str) -> tuple[str, str]:
    return f"{stage}.gram", f"{stage}.mean_abs"


def _digest(*arrays: NDArray[Any]) -> str:
    known = hashlib.sha256()
    for array in arrays:
        known.update(array.data)
    return known.hexdigest()[:16]


def _digest_in(value: object) -> str:
    if not isinstance(value, str) or len(value) != 16 or not set(value) <= set("0123456789abcdef"):
        raise ValueError(f"{shown(value)} is not a digest")
    return value


def _tensors_in(value: object, stages: Mapping[str, StageRecord]) -> dict[str, list[str]]:
    if not isinstance(value, dict):
        raise ValueError("tensors")
    for name, each in value.items():
        sound = isinstance(each, list) and each and all(stage in stages for stage in each)
        if not sound or len({stages[stage].channels for stage in each}) > 1:
            raise ValueError(f"tensors: {shown(name)} is {shown(each)}")
    return value


def _first_in(value: object) -> tuple[int, ...] | None:
    if value is None:
        return None
    if not isinstance(value, list) or any(type(each) is not int or each < 0 for each in value):
        raise ValueError(f"first is {shown(value)}")
    return tuple(value)


def _count_in(name: str, value: object, most: int, least: int = 1) -> int:
    if type(value) is not int or not least <= value <= most:
        raise ValueError(f"{name} is {shown(value)}")
    return value


def _file_problem(
    path: Path, stages: Mapping[str, StageRecord], others: bool = False
) -> str | None:
    """Return what is wrong with a file's header, None if nothing is; `others` may be in it, too."""
    if not path.is_file():
        return "is missing"
    expected: dict[str, tuple[list[int], str]] = {}
    for name, stage in stages.items():
        if stage.tokens:
            gram, mean_abs = _array_names(name)
            expected[gram] = ([stage.channels, stage.channels], "F32")
            expected[mean_abs] = ([stage.channels], "F64")
    try:
        with safe_open(path, framework="numpy", backend="pread") as file:
            names = set(file.keys())
            if not (names >= set(expected) if others else names == set(expected)):
                return "holds other arrays"
            for name, (shape, dtype) in expected.items():
                header = file.get_slice(name)
                if header.get_shape() != shape or header.get_dtype() != dtype:
                    return f"{shown(name)} has another shape or dtype than {MANIFEST} asks for"
        return hole_in_safetensors(path)
    except (SafetensorError, OSError, ValueError) as error:
        return f"is damaged ({shown(str(error))})"


def _reading(path: Path) -> AbstractContextManager[None]:
    remedy = "; was it changed or removed meanwhile?"
    return malformed_as(
        StatisticsError, f"{path}: cannot be read", remedy, SafetensorError, OSError
    )


def _check_moments(gram: NDArray[np.float32], mean_abs: NDArray[np.float64]) -> None:
    """Raise ValueError unless arrays can be second moments: finite, symmetric, diagonal not negative."""
    try:
        require_finite(gram, "gram")
        require_finite(mean_abs, "mean |x|")
    except BitwrightError as error:
        raise ValueError(str(error)) from error
    if (gram.diagonal() < 0).any() or (mean_abs < 0).any():
        raise ValueError("a mean of squares or magnitudes is negative")
    for first in range(0, len(gram), COMPARED_ROWS):
        rows = slice(first, first + COMPARED_ROWS)
        if not np.array_equal(gram[rows, : rows.stop], gram[: rows.stop, rows].T):
            raise ValueError("the gram is not symmetric")
