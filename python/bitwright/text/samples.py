"""Calibration data: text, JSON lines or token arrays, as samples of equal length."""

import hashlib
import os
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, TypeAlias

import numpy as np
from numpy.typing import NDArray
from tokenizers import Tokenizer

from bitwright.errors import CalibrationError, shown
from bitwright.files.home import expands_home
from bitwright.files.inputs import InputFiles
from bitwright.files.links import check_own
from bitwright.files.text_file import TEXT_LIMIT, read_bytes
from bitwright.text.chat import Chats, MalformedChatError
from bitwright.text.data_files import ARRAY, NoValue, Record, beginning, read_data
from bitwright.text.first_tokens import first_tokens
from bitwright.text.record_shapes import ShapeError, text_or_chat
from bitwright.text.text_files import TextFiles
from bitwright.text.tokenizer_growth import check_growth
from bitwright.warned import warn

TokenSource: TypeAlias = (
    str | os.PathLike[str] | NDArray[Any] | Sequence[str] | Mapping[str, float] | TextFiles
)

DEFAULT_LENGTH = 512
TOKENIZER_LIMIT = 256 << 20  # bytes; the largest public tokenizers are below 40 MB
BUILTIN = Path(__file__).parents[1] / "calibration_data" / "calibration.jsonl"
LEFT_OUT = 10  # one of so many records may be of no use, and is left out then
Windows = Literal["whole", "llama.cpp"]


@dataclass(frozen=True, eq=False)
class Samples:
    """Tokens, and how they became samples.

    Parameters
    ----------
    tokens
        int32 ``[samples, length]``, C-contiguous.
    first
        What every sample of a text begins with, empty where the tokenizer puts nothing first or was
        asked not to; None where token ids were given, which are taken as they are.
    """

    tokens: NDArray[np.int32]
    first: tuple[int, ...] | None

    @property
    def bos(self) -> list[int] | None:
        """The same for the identity of a run: None where nothing was put first."""
        return list(self.first) if self.first else None


@expands_home
def load_tokens(
    source: TokenSource,
    *,
    tokenizer: str | os.PathLike[str] | Tokenizer | None = None,
    length: int | None = None,
    samples: int | None = None,
    seed: int | None = None,
    vocab_size: int | None = None,
    bos: bool = True,
) -> NDArray[np.int32]:
    """Load calibration samples.

    Text is tokenized as a whole and cut into consecutive samples; the rest at the end is dropped.
    Every sample begins with the token that the tokenizer puts before a text, or the tokens, if it
    puts any; a sample that begins with them by itself, as a chat whose template writes them does, is
    not given them twice. Nothing is put behind a sample.

    Parameters
    ----------
    source : str, os.PathLike, numpy.ndarray, sequence of str, mapping or TextFiles
        A file of text (UTF-8); of JSON, a list or one value in each line; a table (``.csv``, ``.tsv``) or
        Parquet; a ``.npy`` file or an array of token ids, integer [rows, row length]; or texts. What a
        file is its content tells. Several files are ``"a.jsonl:3,b.txt:1"``, or a mapping of paths to
        shares; see `TextFiles`, which also takes the key of the text.
        A record is a string, or an object with a text ("text", "content", "query") or a chat:
        "messages" of "role" and "content", "conversations" of "from" and "value", a "prompt" and a
        "completion" or "response" or what was "chosen", an "instruction" with "input" and "output", a
        "question" and its "answer". Several texts are joined by a blank line, chats by nothing. A chat
        may have "tools" and "documents". It is written by the chat template in the tokenizer's folder,
        as transformers has it. Records of no use, and chats that the template refuses, are left out
        with a warning; more than one of ten is an error.
    tokenizer : str, os.PathLike or tokenizers.Tokenizer, optional
        A tokenizer, its tokenizer.json, or the folder of that, which chats need. Needed for text
        only.
    length : int, optional
        Tokens per sample. Longer rows of token ids are cut. By default 512 for text, and the
        whole rows for token ids.
    samples : int, optional
        How many samples; by default all.
    seed : int, optional
        Choose the samples at random, without replacement; by default the first are taken.
    vocab_size : int, optional
        Token ids must be below it.
    bos : bool, optional
        False leaves out what the tokenizer puts first. Token ids are never changed.

    Returns
    -------
    numpy.ndarray
        int32 [samples, length], C-contiguous.

    Raises
    ------
    CalibrationError
        If the data cannot be read, holds wrong ids, or is too little.

    Examples
    --------
    >>> load_tokens(np.arange(12).reshape(3, 4), length=2, samples=2)
    array([[0, 1],
           [4, 5]], dtype=int32)
    """
    loaded = _load(
        source, tokenizer, length or DEFAULT_LENGTH, length, samples, seed, vocab_size, bos
    )
    return loaded.tokens


def load_samples(
    source: TokenSource,
    *,
    tokenizer: str | os.PathLike[str],
    length: int | None,
    samples: int | None,
    seed: int | None = None,
    vocab_size: int,
    positions: int | None,
    bos: bool = True,
    most: int | None = None,
    windows: Windows = "whole",
) -> Samples:
    """Load samples for a model with so many positions, as `load_tokens`.

    Where no length is asked for, text is cut into samples of 512 tokens, or of as many as there are
    positions if these are fewer; longer samples are warned of. Where no number is asked for, there
    are at most `most`. With `windows` ``"llama.cpp"`` text is cut as llama-perplexity does: see
    `bitwright.evaluate`.
    """
    usual = length or min(DEFAULT_LENGTH, positions or DEFAULT_LENGTH)
    found = _load(
        source, tokenizer, usual, length, samples, seed, vocab_size, bos, windows, most=most
    )
    if positions is not None and found.tokens.shape[1] > positions:
        warn(
            f"samples of {found.tokens.shape[1]} tokens are longer than the {positions} positions that "
            f"the model has learned (max_position_embeddings): what is computed behind these says little "
            f"of the model. Ask for a length of at most {positions}, or give shorter rows"
        )
    return found


def _load(
    source: TokenSource,
    tokenizer: str | os.PathLike[str] | Tokenizer | None,
    text_length: int,
    length: int | None,
    samples: int | None,
    seed: int | None,
    vocab_size: int | None,
    bos: bool,
    windows: Windows = "whole",
    most: int | None = None,
) -> Samples:
    """Load samples; text is cut to `text_length`, rows of token ids to `length`."""
    for name, value in (("length", length), ("samples", samples), ("vocab_size", vocab_size)):
        _check_integer(name, value, 1)
    _check_integer("seed", seed, 0)
    files = InputFiles()
    cut = _Cut(tokenizer, text_length, length, bos, windows)
    if isinstance(source, np.ndarray):
        origin = "the token array"
        found: list[Found] = [(origin, _checked_rows(source, origin, length), None)]
        shares: TextFiles | None = None
    elif isinstance(source, str | os.PathLike | Mapping | TextFiles):
        shares = TextFiles.of(source)
        paths = [existing_file(path) for path, _ in shares.files]
        files.watch(paths, recorded=True)
        found = [(str(path), *cut.file(path, shares.text_key, len(paths) == 1)) for path in paths]
    else:
        origin, shares = "the list of texts", None
        if not all(isinstance(text, str) for text in source):
            raise CalibrationError(f"{origin}: must hold strings only")
        found = [(origin, *cut.text("\n\n".join(source), origin))]
    counts = [samples]
    if len(found) > 1:
        assert shares is not None
        counts = list(_counts(shares, found, samples, most))
    elif samples is None and most is not None:
        counts = [min(most, len(found[0][1])) if len(found[0][1]) > most else None]
    tokens = []
    for number, ((origin, rows, _), count) in enumerate(zip(found, counts, strict=True)):
        own = seed if seed is None or not number else seed + number
        chosen = _chosen(len(rows), count, own, origin)
        tokens.append(rows[chosen])
        _check_ids(tokens[-1], chosen, vocab_size, origin)
    files.check()
    files.take_checksums()  # of what another stage of the command may read again
    firsts = [first for _, _, first in found]
    joined = tokens[0] if len(tokens) == 1 else np.concatenate(tokens)
    return Samples(
        np.ascontiguousarray(joined, dtype=np.int32),
        next((each for each in firsts if each is not None), None),
    )


Found = tuple[
    str, NDArray[Any], tuple[int, ...] | None
]  # where from, all rows, what each begins with


def _counts(
    shares: TextFiles, found: Sequence[Found], samples: int | None, most: int | None
) -> list[int]:
    """Tell how many samples each of several files gives."""
    widths = {rows.shape[1]: origin for origin, rows, _ in found}
    if len(widths) > 1:
        (one, first), (other, second) = list(widths.items())[:2]
        raise CalibrationError(
            f"{first}: gives samples of {one} tokens, but {second} of {other}. Ask for one length"
        )
    there = [len(rows) for _, rows, _ in found]
    if samples is None:
        all_of_them = sum(shares.shared(there, None))
        samples = all_of_them if most is None else min(most, all_of_them)
    counts = shares.shared(there, samples)
    for (path, share), count in zip(shares.files, counts, strict=True):
        if not count:
            raise CalibrationError(
                f"{path}: its share of {samples} samples, {share:g}, is less than one. Ask for more "
                f"samples, give it a larger share or leave it out"
            )
    return counts


@dataclass(frozen=True)
class _Cut:
    """How files and texts become rows of tokens."""

    tokenizer: str | os.PathLike[str] | Tokenizer | None
    text_length: int
    length: int | None
    bos: bool
    windows: Windows

    def file(
        self, path: Path, text_key: str | None, is_alone: bool
    ) -> tuple[NDArray[Any], tuple[int, ...] | None]:
        """Return the rows of a file, and what each begins with; None where they are taken as they are."""
        if is_array(path):
            return _checked_rows(mapped(path), str(path), self.length), None
        data = read_data(path)
        if isinstance(data, str):
            if text_key is not None and is_alone:
                raise CalibrationError(
                    f"{path}: is plain text without records, so there is no key {shown(text_key)} in it"
                )
        else:
            data = _joined(path, data, self.tokenizer, text_key)
        return self.text(data, str(path))

    def text(self, text: str, origin: str) -> tuple[NDArray[Any], tuple[int, ...] | None]:
        """Return the rows of a text, and what each begins with."""
        known = _tokenizer_of_text(text, self.tokenizer, origin)
        with _tokenizer_errors(origin):
            first = first_tokens(known) if self.bos else ()
        if self.windows == "llama.cpp":
            return _windows_of_llama_cpp(text, known, first, self.text_length, origin), first
        return _cut(_tokenized(text, known, origin), first, self.text_length, origin), first


def _check_integer(name: str, value: object, smallest: int) -> None:
    if value is None:
        return
    if isinstance(value, bool) or not isinstance(value, int | np.integer) or value < smallest:
        raise CalibrationError(
            f"{name} is {shown(value)}, but must be an integer from {smallest} up"
        )


def existing_file(path: Path) -> Path:
    """Return the path; CalibrationError unless there is a file."""
    if not os.path.isfile(path):
        raise CalibrationError(f"{path}: there is no such file")
    return path


def is_array(path: Path) -> bool:
    """Tell whether a file holds token ids."""
    return path.suffix.lower() == ".npy" or beginning(path).startswith(ARRAY)


def _joined(
    path: Path,
    records: Sequence[Record],
    tokenizer: str | os.PathLike[str] | Tokenizer | None,
    text_key: str | None,
) -> str:
    """Return the texts and chats of a file as one text."""
    texts: list[str] = []
    size, follows_chat = 0, False
    chats, left_out = Chats(_folder(tokenizer), path, len(records), path == BUILTIN), list[str]()
    for where, value in records:
        try:
            if isinstance(value, NoValue):
                raise ShapeError(value)
            found = text_or_chat(value, text_key)
            text = found if isinstance(found, str) else chats.render(found, where)
        except (ShapeError, MalformedChatError) as error:
            said = str(error)
            left_out.append(said if said.startswith(where) else f"{where}: {said}")
            if len(left_out) * LEFT_OUT > len(records):
                raise CalibrationError(_too_many(left_out, len(records))) from error
            continue
        if text is None:
            continue
        size += len(text.encode(errors="replace"))
        if size > TEXT_LIMIT:
            raise CalibrationError(
                f"{where}: the chats up to here are longer than {TEXT_LIMIT >> 20} MiB once written "
                f"out; give fewer"
            )
        chat = not isinstance(found, str)
        if texts and chat == follows_chat:
            texts.append("" if chat else "\n\n")
        elif texts and not texts[-1].endswith("\n"):
            texts.append("\n")
        texts.append(text)
        follows_chat = chat
    if left_out:
        warn(
            f"{path}: {len(left_out)} of {len(records)} records are of no use, and left out. The first: "
            f"{left_out[0]}"
        )
    chats.finish()
    return "".join(texts)


def _too_many(left_out: Sequence[str], records: int) -> str:
    if records < LEFT_OUT:
        return left_out[0]
    return (
        f"{left_out[0]} ({len(left_out)} of {records} records are of no use up to here; one of {LEFT_OUT} "
        f"would be left out)"
    )


def _folder(tokenizer: str | os.PathLike[str] | Tokenizer | None) -> Path | None:
    if tokenizer is None or isinstance(tokenizer, Tokenizer):
        return None
    return Path(tokenizer) if os.path.isdir(tokenizer) else Path(tokenizer).parent


def mapped(path: Path) -> NDArray[Any]:
    try:
        with np.errstate(over="ignore"):
            return np.lib.format.open_memmap(path, mode="r")
    # The header is parsed as Python, and damaged ones raise many kinds of exceptions.
    except Exception as error:
        raise CalibrationError(
            f"{path}: is not a sound .npy file of token ids: {shown(str(error))}"
        ) from error


def _checked_rows(rows: NDArray[Any], origin: str, length: int | None) -> NDArray[Any]:
    """Rows cut to length; a view of a mapped file, nothing of which has been read yet."""
    if rows.ndim != 2 or rows.dtype.kind not in "iu":
        raise CalibrationError(
            f"{origin}: must hold integer token ids in two dimensions [samples, length], but is "
            f"{rows.dtype} {list(rows.shape)}"
        )
    if rows.size == 0:
        raise CalibrationError(f"{origin}: is empty, {list(rows.shape)}")
    if length is not None and rows.shape[1] < length:
        raise CalibrationError(
            f"{origin}: has rows of {rows.shape[1]} tokens, fewer than the length {length}. Ask "
            f"for a length of at most {rows.shape[1]}"
        )
    return rows[:, :length]


def _tokenizer_of_text(
    text: str, tokenizer: str | os.PathLike[str] | Tokenizer | None, origin: str
) -> Tokenizer:
    if not text:
        raise CalibrationError(f"{origin}: is empty")
    if tokenizer is None:
        raise CalibrationError(
            f"{origin}: is text, which needs a tokenizer. Give one, or a .npy of token ids"
        )
    with _tokenizer_errors(origin):
        return load_tokenizer(tokenizer)


def _tokenized(text: str, tokenizer: Tokenizer, origin: str) -> NDArray[Any]:
    with _tokenizer_errors(origin):
        check_growth(tokenizer, text, origin)
        encoding = tokenizer.encode_batch_fast([text], add_special_tokens=False)[0]
        return np.array(encoding.ids, dtype=np.uint32)


def _cut(ids: NDArray[Any], first: tuple[int, ...], length: int, origin: str) -> NDArray[Any]:
    """Cut tokens into samples that begin with `first`, which is not put before itself."""
    body = length - len(first)
    if body < 1:
        raise CalibrationError(
            f"length is {length}, which leaves no place behind what the tokenizer puts first, "
            f"{len(first)} tokens. Ask for a larger length, or for samples without it: bos=False "
            f"(--no-bos)"
        )
    begins = np.zeros(len(ids), bool)
    if first and len(ids) >= len(first):
        places = np.lib.stride_tricks.sliding_window_view(ids, len(first))
        begins[: len(places)] = (places == np.array(first, ids.dtype)).all(axis=1)
    repeats = bool(begins.any())
    starts: list[int] = []  # of what follows the first tokens
    place = 0
    while repeats and place < len(ids):
        own = len(first) if begins[place] else 0
        if place + own + body <= len(ids):
            starts.append(place + own)
        place += own + body
    count = len(starts) if repeats else len(ids) // body
    if not count:
        raise CalibrationError(
            f"{origin}: has {len(ids)} tokens, too few for one sample of {length}. Give more text "
            f"or ask for a smaller length"
        )
    rows = np.empty((count, length), ids.dtype)
    rows[:, : len(first)] = first
    if starts:
        rows[:, len(first) :] = [ids[start : start + body] for start in starts]
    else:
        rows[:, len(first) :] = ids[: count * body].reshape(count, body)
    return rows


def _windows_of_llama_cpp(
    text: str, tokenizer: Tokenizer, first: tuple[int, ...], length: int, origin: str
) -> NDArray[Any]:
    """Cut a text as llama-perplexity does: once tokenized, with what the tokenizer puts first, into
    windows whose first token then gives way to it. Special tokens that the text spells out are text, and
    a line's end at the very end does not count."""
    if len(first) > 1:
        raise CalibrationError(
            f"{origin}: the tokenizer puts {len(first)} tokens first, and llama-perplexity replaces one. "
            f"Evaluate whole samples instead"
        )
    tokenizer.encode_special_tokens = True
    ids = _tokenized(text.removesuffix("\n"), tokenizer, origin)
    ids = np.concatenate([np.array(first, ids.dtype), ids])
    if len(ids) < 2 * length:
        raise CalibrationError(
            f"{origin}: has {len(ids)} tokens, and llama-perplexity asks for at least two windows, "
            f"{2 * length}. Give more text or ask for a smaller length"
        )
    count = len(ids) // length
    rows = ids[: count * length].reshape(count, length)
    rows[:, : len(first)] = first
    return rows


def load_tokenizer(tokenizer: str | os.PathLike[str] | Tokenizer) -> Tokenizer:
    """Return a private tokenizer that neither cuts nor pads, whatever its file asks for."""
    if isinstance(tokenizer, Tokenizer):
        content = tokenizer.to_str()
    else:
        path = Path(tokenizer)
        if os.path.isdir(path):
            path = path / "tokenizer.json"
            check_own(path, path.parent, CalibrationError)
        if not os.path.isfile(path):
            raise CalibrationError(_without_tokenizer(path))
        with _tokenizer_errors(str(path)):
            content = read_bytes(path, TOKENIZER_LIMIT).decode()
            Tokenizer.from_str(content)
    private = Tokenizer.from_str(content)
    private.no_truncation()
    private.no_padding()
    return private


def _without_tokenizer(path: Path) -> str:
    """Return what to say where there is no tokenizer.json."""
    old = path.with_name("tokenizer.model")
    if not os.path.isfile(old):
        return (
            f"{path}: is missing, and text cannot be tokenized without it. Copy it there, or "
            f"calibrate on a .npy of token ids"
        )
    place = repr(str(path.parent))
    return (
        f"{old}: is a tokenizer of sentencepiece or tiktoken, which are not read, and {path.name} is not "
        f"beside it. Make that: pip install transformers sentencepiece tiktoken protobuf && python "
        f'-c "from transformers import AutoTokenizer as T; '
        f'T.from_pretrained({place}).save_pretrained({place})"'
    )


@contextmanager
def _tokenizer_errors(origin: str) -> Iterator[None]:
    try:
        yield
    except CalibrationError:
        raise
    except BaseException as error:
        # The library's panics derive from BaseException; interrupts must pass.
        if not isinstance(error, Exception) and type(error).__name__ != "PanicException":
            raise
        raise CalibrationError(
            f"{origin}: the tokenizers library failed on it: {shown(str(error))}"
        ) from error


def _chosen(total: int, samples: int | None, seed: int | None, origin: str) -> NDArray[np.int64]:
    count = total if samples is None else samples
    if count > total:
        raise CalibrationError(
            f"{origin}: {count} samples were asked for, but there are {total}. Ask for fewer or "
            f"shorter ones, or give more data"
        )
    if seed is None:
        return np.arange(count, dtype=np.int64)
    return np.random.default_rng(seed).choice(total, count, replace=False)


def _check_ids(
    tokens: NDArray[Any], chosen: NDArray[np.int64], vocab_size: int | None, origin: str
) -> None:
    end = 2**31 if vocab_size is None else min(vocab_size, 2**31)
    smallest, largest = int(tokens.min()), int(tokens.max())
    if smallest >= 0 and largest < end:
        return
    wrong = smallest if smallest < 0 else largest
    row, column = np.argwhere(tokens == wrong)[0]
    raise CalibrationError(
        f"{origin}: token id {wrong} in sample {chosen[row]}, position {column} is not in "
        f"0..{end - 1}. Do the tokens belong to this model?"
    )


DEFAULT_SAMPLES = 128


def tokens_fingerprint(tokens: NDArray[np.int32]) -> str:
    """Return a digest of some samples."""
    return hashlib.sha256(np.ascontiguousarray(tokens).tobytes()).hexdigest()[:16]
