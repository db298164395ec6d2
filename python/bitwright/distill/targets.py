"""A teacher's distributions at every position of some tokens, in files: computed once, read by batch."""

import math
import os
from collections.abc import Callable
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from safetensors import SafetensorError, safe_open

from bitwright.checkpoint.fingerprint import (
    model_checksum,
    model_fingerprint,
    tokenizer_fingerprint,
)
from bitwright.checkpoint.holes import hole_in_safetensors
from bitwright.checkpoint.hub import finds_models
from bitwright.checkpoint.reader import read_json_object
from bitwright.checkpoint.shard import Shard
from bitwright.checkpoint.work_folder import CHECKSUM, WorkFolder, content_of
from bitwright.checkpoint.writer import write_safetensors
from bitwright.distill.losses import TopTokens
from bitwright.errors import (
    CheckpointError,
    NonFiniteError,
    OutputError,
    TargetsError,
    malformed_as,
    shown,
)
from bitwright.files.home import expands_home
from bitwright.files.inputs import same_inputs
from bitwright.files.links import check_manifest
from bitwright.files.replacing import output_errors, replaced, write_json
from bitwright.files.seals import buffers_checksum
from bitwright.loading.model import Model, load_model
from bitwright.models.network import Network
from bitwright.ranks import current
from bitwright.runs.progress import Progressing, phase
from bitwright.spellings import Old, respelled
from bitwright.text.calibration import CalibrationOptions
from bitwright.text.samples import Samples, TokenSource, tokens_fingerprint

DEFAULT_K = 1024
MANIFEST = "targets.json"
VERSION = 1
ROUNDING = 1e-3  # by which probabilities may exceed their range
SHARD_BYTES = 64 << 20  # of one file, and of the hidden states that are in memory to make it
_MEANINGS = {
    "model": "another model",
    "tokenizer": "another tokenizer",
    "vocabulary": "a model with another vocabulary",
    "tokens": "other tokens",
    "samples": "another number of samples",
    "length": "samples of another length",
    "k": "another k",
    "temperature": "another temperature",
    "bos": "samples that begin with other tokens",
}


class DwqTargets:
    """Targets that `compute_dwq_targets` has written.

    Parameters
    ----------
    folder
        Where they are.

    Raises
    ------
    TargetsError
        If they are incomplete or damaged; the message names the file.
    """

    @expands_home
    def __init__(self, folder: str | os.PathLike[str]) -> None:
        self.folder = Path(folder)
        path = self.folder / MANIFEST
        manifest = read_manifest(self.folder)
        if manifest is None:
            raise TargetsError(f"{path}: is missing; compute the targets first")
        self.manifest = manifest
        with malformed_as(TargetsError, f"{path}: is damaged", "; remove the folder"):
            if self.manifest["version"] != VERSION:
                raise TargetsError(f"{path}: was written by another version of bitwright")
            for key in ("samples", "length", "k", "shard_samples", "vocabulary"):
                value = self.manifest[key]
                if type(value) is not int or not 0 < value < 1 << 31:
                    raise ValueError(f"{key} is {shown(value)}")
            self.samples: int = self.manifest["samples"]
            self.length: int = self.manifest["length"]
            self.k: int = self.manifest["k"]
            self.temperature = float(self.manifest["temperature"])
            self._shard_samples: int = self.manifest["shard_samples"]
            self._vocabulary: int = self.manifest["vocabulary"]
            bos = self.manifest.get("bos")
            if bos is not None and not (
                isinstance(bos, list)
                and all(type(each) is int and 0 <= each < self._vocabulary for each in bos)
            ):
                raise ValueError(f"bos is {shown(bos)}")
            self.bos: list[int] | None = bos
            if self.k > self._vocabulary or not 0 < self.temperature < math.inf:
                raise ValueError("k or temperature")
        for shard in range(self.shard_count):
            self._open(shard)

    @property
    def shard_count(self) -> int:
        """Number of files."""
        return -(-self.samples // self._shard_samples)

    def files(self) -> list[Path]:
        """Return the files that they are read from."""
        return [_shard_path(self.folder, shard) for shard in range(self.shard_count)]

    def read(self, samples: NDArray[np.intp]) -> TopTokens:
        """Return the targets of all positions of some samples, one sample after another."""
        parts = [self._sample(int(sample)) for sample in samples]
        return TopTokens(*(np.concatenate(part) for part in zip(*parts, strict=True)))

    def tokens(self) -> NDArray[np.int32]:
        """Return the token ids ``[samples, length]`` that these are the targets of."""
        parts = []
        for shard in range(self.shard_count):
            path = _shard_path(self.folder, shard)
            with _reading(path), _opened(path) as file:
                parts.append(file.get_tensor("tokens"))
        tokens: NDArray[np.int32] = np.concatenate(parts)
        if tokens.min() < 0 or tokens.max() >= self._vocabulary:
            raise TargetsError(f"{self.folder}: holds impossible token ids; remove the folder")
        return tokens

    def _sample(self, sample: int) -> tuple[Any, ...]:
        if not 0 <= sample < self.samples:
            raise IndexError(f"{self.folder}: has no sample {sample}, only 0 to {self.samples - 1}")
        shard, place = divmod(sample, self._shard_samples)
        path = _shard_path(self.folder, shard)
        with _reading(path), _opened(path) as file:
            ids, known, rest = (
                file.get_slice(name)[place : place + 1][0]
                for name in ("ids", "log_probabilities", "rest")
            )
        ids, known = ids.astype(np.int32), known.astype(np.float32)
        possible = ids.min() >= 0 and ids.max() < self._vocabulary and np.isfinite(known).all()
        possible &= known.max() < ROUNDING and -ROUNDING < rest.min() <= rest.max() < 1 + ROUNDING
        if not possible:
            raise TargetsError(f"{path}: holds impossible values; remove it and compute it again")
        return ids, known, rest

    def _open(self, shard: int) -> None:
        path = _shard_path(self.folder, shard)
        count = min(self._shard_samples, self.samples - shard * self._shard_samples)
        problem = _shard_problem(path, count, self.length, self.k)
        if problem:
            raise TargetsError(f"{path}: {problem}; compute the targets again to mend that")


@respelled(Old("data", "calibration"))
@expands_home
@finds_models
@same_inputs()
def compute_dwq_targets(
    model: str | os.PathLike[str] | Model,
    calibration: TokenSource,
    out: str | os.PathLike[str],
    *,
    k: int | None = None,
    temperature: float = 1.0,
    length: int | None = None,
    samples: int | None = None,
    seed: int | None = None,
    bos: bool = True,
    on_progress: Callable[[float], None] | None = None,
    progress: Progressing = True,
) -> DwqTargets:
    """Write a model's distribution at every position: its k most likely tokens, and the rest's probability.

    The model is streamed, block by block, for some samples at a time, and each file appears when it is
    complete. The same call resumes where it was interrupted, and does nothing if all is done. The ranks of
    an MPI run share the files.

    Parameters
    ----------
    model
        The teacher: a checkpoint folder or a loaded model.
    calibration
        Token ids or text, see `load_tokens`.
    out
        Folder to write.
    k
        Tokens per position; by default 1024, or the whole vocabulary if that is smaller.
    temperature
        Logits are divided by it before they become probabilities.
    length, samples, seed, bos
        See `load_tokens`; of a text, samples are no longer than the model knows positions, unless a length
        is asked for.
    on_progress
        Called with the share of the work that is done, from 0 to 1.
    progress
        Show a bar or lines on standard error, or what gets each record, see `Progress`.

    Returns
    -------
    DwqTargets

    Raises
    ------
    TargetsError
        If `out` holds targets of another model, tokenizer, text, k or temperature, or of samples that begin
        otherwise.
    ValueError
        If k is larger than the vocabulary, or the temperature is not positive.
    CheckpointError, CalibrationError, NonFiniteError, OutputError
        If the model or the data cannot be used, or the folder not be written, as by two runs at once.

    Examples
    --------
    >>> import bitwright, tempfile
    >>> demo = bitwright.demo_folder()
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     targets = bitwright.compute_dwq_targets(
    ...         demo, demo / "calibration.txt", folder, k=64, length=32, samples=2
    ...     )
    ...     targets.read([1]).ids.shape
    (32, 64)
    """
    teacher = model if isinstance(model, Model) else load_model(model)
    loaded = CalibrationOptions(calibration, samples, length, seed, bos).load(teacher, most=None)
    with phase("teaching", progress) as shown:

        def tell(share: float) -> None:
            shown.update(share)
            if on_progress is not None:
                on_progress(share)

        return write_targets(teacher, loaded, out, k, temperature, tell)


def write_targets(
    teacher: Model,
    samples: Samples,
    out: str | os.PathLike[str],
    k: int | None,
    temperature: float,
    on_progress: Callable[[float], None] | None,
) -> DwqTargets:
    """Write the targets of samples that are loaded, as `compute_dwq_targets`."""
    tokens, vocabulary = samples.tokens, teacher.config.vocab_size
    count = min(DEFAULT_K, vocabulary) if k is None else k
    if not isinstance(count, int | np.integer) or not 1 <= count <= vocabulary:
        raise ValueError(f"k: expected 1 to {vocabulary}, the size of the vocabulary, got {count}")
    if not 0 < temperature < math.inf:
        raise ValueError(f"temperature: expected more than 0 and finite, got {temperature}")
    manifest = _manifest(teacher, samples, int(count), temperature)
    folder, ranks, step = Path(out), current(), int(manifest["shard_samples"])
    shards = [tokens[first : first + step] for first in range(0, len(tokens), step)]

    def missing() -> list[int]:
        """Return the missing files; without a manifest all are missing."""
        _check_folder(folder, manifest, teacher)
        shape = tokens.shape[1], int(count)
        return [
            shard
            for shard, ids in enumerate(shards)
            if not (folder / MANIFEST).is_file()
            or _shard_problem(_shard_path(folder, shard), len(ids), *shape)
        ]

    def begin() -> list[int]:
        left = missing()
        with output_errors(folder):
            folder.mkdir(exist_ok=True)
        found = read_manifest(folder)  # whose checksum is that of the files that are there
        checksum = found.get("checksum") if found else model_checksum(teacher.checkpoint)
        write_json(folder / MANIFEST, manifest | {"checksum": checksum})
        return left

    if ranks.on_first(missing):
        with WorkFolder(folder):  # which holds nothing but the lock
            left = ranks.on_first(begin)
            share = ranks.share(len(left))
            for done, shard in enumerate(left[share.start : share.stop]):
                if on_progress is not None:
                    on_progress(1 - len(left) / len(shards) * (1 - done / len(share)))
                arrays = _teach(teacher, shards[shard], count, temperature)
                arrays["tokens"] = shards[shard]
                checksum = str(buffers_checksum(arrays[name] for name in sorted(arrays)))
                with replaced(_shard_path(folder, shard)) as partial:
                    write_safetensors(partial, arrays, {CHECKSUM: checksum})
            ranks.barrier()
    else:
        ranks.on_first(WorkFolder(folder).forget_finished)
    if on_progress is not None:
        on_progress(1.0)
    return DwqTargets(folder)


def check_targets(teacher: Model, samples: Samples, out: Path, k: int, temperature: float) -> None:
    """Raise TargetsError or OutputError where a folder holds anything but the targets of these samples."""
    _check_folder(out, _manifest(teacher, samples, k, temperature), teacher)


def _manifest(teacher: Model, samples: Samples, k: int, temperature: float) -> dict[str, Any]:
    tokens, vocabulary = samples.tokens, teacher.config.vocab_size
    id_bytes = _id_dtype(vocabulary).itemsize
    per_sample = tokens.shape[1] * max(k * (id_bytes + 2), 4 * teacher.config.hidden_size)
    return {
        "version": VERSION,
        "model": model_fingerprint(teacher.checkpoint),
        "tokenizer": tokenizer_fingerprint(teacher.checkpoint),
        "vocabulary": vocabulary,
        "bos": samples.bos,
        "tokens": tokens_fingerprint(tokens),
        "samples": tokens.shape[0],
        "length": tokens.shape[1],
        "k": k,
        "temperature": float(temperature),
        "shard_samples": max(1, SHARD_BYTES // per_sample),
    }


def read_manifest(folder: Path) -> dict[str, Any] | None:
    """Return the manifest of a folder of targets, None if there is none."""
    path = folder / MANIFEST
    check_manifest(path, TargetsError)
    try:
        return read_json_object(path) if path.is_file() else None
    except CheckpointError as error:
        raise TargetsError(f"{error}; remove the folder") from error


def _check_folder(folder: Path, manifest: dict[str, Any], teacher: Model) -> None:
    """Refuse a folder that holds anything but exactly these targets."""
    found = read_manifest(folder)
    if found is None:
        # A process that was killed while it wrote the manifest leaves a part of it.
        started = f".{MANIFEST}.partial-"
        if folder.exists() and (
            not folder.is_dir()
            or any(not each.name.startswith(started) for each in content_of(folder))
        ):
            raise OutputError(
                f"{folder}: holds no targets, but something else; choose another folder"
            )
        return
    for key, value in manifest.items():
        # The same tokens count as the same, whether they came as text or as ids.
        alike = key == "bos" and found.get("tokens") == manifest["tokens"]
        if found.get(key) != value and not alike:
            raise TargetsError(_mismatch(folder, key, found.get(key), value))
    checksum = found.get("checksum")  # which versions before did not take
    if checksum is not None and checksum != model_checksum(teacher.checkpoint):
        raise TargetsError(
            f"{folder}: the weights of {teacher.checkpoint.folder} have changed since these targets were "
            f"computed; remove the folder or choose another"
        )


def _mismatch(folder: Path, key: str, found: Any, wanted: Any) -> str:
    return (
        f"{folder}: holds targets of {_MEANINGS.get(key, f'another {key}')} ({shown(found)}, not "
        f"{shown(wanted)}); remove the folder or choose another"
    )


def _shard_path(folder: Path, shard: int) -> Path:
    return folder / f"targets-{shard + 1:05d}.safetensors"


def _opened(path: Path) -> Shard:
    return Shard(path, safe_open(path, framework="numpy", backend="pread"))  # see `Checkpoint`


def _reading(path: Path) -> AbstractContextManager[None]:
    remedy = "; was it changed or removed meanwhile?"
    return malformed_as(TargetsError, f"{path}: cannot be read", remedy, SafetensorError, OSError)


def _shard_problem(path: Path, samples: int, length: int, k: int) -> str | None:
    """Return what is wrong with a file of targets, None if nothing is."""
    if not path.is_file():
        return "is missing"
    shapes = {
        "ids": [samples, length, k],
        "log_probabilities": [samples, length, k],
        "rest": [samples, length],
        "tokens": [samples, length],
    }
    dtypes = {
        "ids": ("U16", "I32"),
        "log_probabilities": ("F16",),
        "rest": ("F32",),
        "tokens": ("I32",),
    }
    try:
        with _opened(path) as file:
            if set(file.keys()) != set(shapes):
                return "holds other tensors"
            for name, shape in shapes.items():
                header = file.get_slice(name)
                if header.get_shape() != shape or header.get_dtype() not in dtypes[name]:
                    return f"{name} has another shape or dtype than {MANIFEST} asks for"
            if problem := hole_in_safetensors(path):
                return problem
            known = (file.metadata() or {}).get(CHECKSUM)
            arrays = (file.get_tensor(name) for name in sorted(shapes))
            if known is not None and known != str(buffers_checksum(arrays)):
                return "is not what was written: its checksum is another"
    except (SafetensorError, OSError, ValueError) as error:
        return f"is damaged ({shown(str(error))})"
    return None


def _id_dtype(vocabulary: int) -> np.dtype[Any]:
    return np.dtype(np.uint16 if vocabulary <= 1 << 16 else np.int32)


def _teach(
    teacher: Model, ids: NDArray[np.int32], k: int, temperature: float
) -> dict[str, NDArray[Any]]:
    network = Network(teacher)
    parts = []
    for _, logits in network.logits(network.final_states(ids), teacher.rows(teacher.head_name)):
        if not np.isfinite(logits).all():
            raise NonFiniteError(f"{teacher.checkpoint.folder}: the logits are not finite")
        top = TopTokens.of(logits, k, temperature)
        # Float16 keeps 3 digits of each; the rest is exact for their sum.
        packed = top.ids.astype(_id_dtype(logits.shape[1]))
        parts.append((packed, top.log_probabilities.astype(np.float16), top.rest))
        del logits  # before the next ones are computed
    names = ("ids", "log_probabilities", "rest")
    return {
        name: np.concatenate(part).reshape(*ids.shape, *part[0].shape[1:])
        for name, part in zip(names, zip(*parts, strict=True), strict=True)
    }
