"""What a checkpoint and its tokenizer are known by again, without reading all of their bytes."""

import hashlib
import json
import os

from bitwright.checkpoint.reader import Checkpoint
from bitwright.errors import CheckpointError

PIECE, PIECES = 1 << 16, 64  # bytes, and how many places of a weight file are looked at


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
    digest = hashlib.sha256(json.dumps(checkpoint.config, sort_keys=True).encode())
    for path in sorted({checkpoint.file(name) for name in checkpoint.names()}):
        try:
            with open(path, "rb") as file:
                size = os.fstat(file.fileno()).st_size
                digest.update(size.to_bytes(8, "little"))
                header = int.from_bytes(file.read(8), "little")  # checked when it was opened
                digest.update(file.read(min(header, size)))
                for piece in range(PIECES):
                    file.seek(max(0, size - PIECE) * piece // (PIECES - 1))
                    digest.update(file.read(PIECE))
        except OSError as error:
            raise CheckpointError(f"{path}: cannot be read: {error.strerror}") from error
    return digest.hexdigest()[:16]


def tokenizer_fingerprint(checkpoint: Checkpoint) -> str | None:
    """Return a digest of tokenizer.json, None where there is none."""
    path = checkpoint.folder / "tokenizer.json"
    if not path.is_file():
        return None
    try:
        with open(path, "rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest()[:16]
    except OSError as error:
        raise CheckpointError(f"{path}: cannot be read: {error.strerror}") from error
