"""Fingerprints of checkpoints, tokenizers and files, without reading all of their bytes."""

import hashlib
import json
import os
from pathlib import Path
from typing import Any

from bitwright.checkpoint.reader import JSON_LIMIT, Checkpoint
from bitwright.errors import CheckpointError
from bitwright.files.inputs import whole_checksum
from bitwright.files.links import is_own_file
from bitwright.files.text_file import read_bytes

PIECE, PIECES = 1 << 16, 64  # bytes of a sample, and samples of a weight file
HEADER_LIMIT = 100_000_000  # bytes; MAX_HEADER_SIZE of the safetensors library


def model_fingerprint(checkpoint: Checkpoint) -> str:
    """Return a digest of config.json, all headers and some of the weights.

    Parameters
    ----------
    checkpoint
        An open checkpoint.

    Returns
    -------
    str
        16 hexadecimal digits.

    Raises
    ------
    CheckpointError
        If a weight file cannot be read.
    """
    known = hashlib.sha256(json.dumps(checkpoint.settings, sort_keys=True).encode())
    for path in _weight_files(checkpoint):
        _add_pieces(known, path)
    return known.hexdigest()[:16]


def model_checksum(checkpoint: Checkpoint) -> str:
    """Return a digest of all bytes of the weight files, which a command reads once for it.

    By it files that outlive a command know their model, beside the fingerprint, which is soon compared.

    Parameters
    ----------
    checkpoint
        An open checkpoint.

    Returns
    -------
    str
        16 hexadecimal digits.

    Raises
    ------
    CheckpointError
        If a weight file cannot be read, or changes meanwhile.
    """
    checksums = [whole_checksum(path) for path in _weight_files(checkpoint)]
    return digest(json.dumps(checksums).encode())


def _weight_files(checkpoint: Checkpoint) -> list[Path]:
    return sorted({checkpoint.file(name) for name in checkpoint.names()})


def file_stamp(path: Path) -> list[int]:
    """Return what a file keeps when it is moved, and loses when it is changed: inode, size and time of
    change in nanoseconds."""
    found = os.stat(path)
    return [found.st_ino, found.st_size, found.st_mtime_ns]


def digest(content: Any) -> str:
    """Return a digest of a contiguous buffer: 16 hexadecimal digits."""
    return hashlib.sha256(content).hexdigest()[:16]


def _add_pieces(known: Any, path: Path) -> None:
    try:
        with open(path, "rb") as file:
            size = os.fstat(file.fileno()).st_size
            known.update(size.to_bytes(8, "little"))
            header = int.from_bytes(file.read(8), "little")
            if header <= min(size, HEADER_LIMIT):  # of other files that is no length
                known.update(file.read(header))
            for piece in range(PIECES):
                file.seek(max(0, size - PIECE) * piece // (PIECES - 1))
                known.update(file.read(PIECE))
    except OSError as error:
        raise CheckpointError(f"{path}: cannot be read: {error.strerror}") from error


def tokenizer_fingerprint(checkpoint: Checkpoint) -> str | None:
    """Return a digest of tokenizer.json, None where the folder has none of its own."""
    path = checkpoint.folder / "tokenizer.json"
    if not is_own_file(path, checkpoint.folder):
        return None
    return digest(read_bytes(path, JSON_LIMIT, CheckpointError))
