"""The files that travel with a model beside weights and config.json: all small ones, with exceptions."""

import json
import os
from collections.abc import Iterable, Iterator
from contextlib import suppress
from fnmatch import fnmatchcase
from pathlib import Path

from bitwright.checkpoint.reader import READ_BESIDE, Checkpoint, is_plain_file_name
from bitwright.errors import shown
from bitwright.files.links import DEPTH, is_own_file
from bitwright.models.config import SEPARATE_FILES
from bitwright.warned import warn

SIDE_FILE_LIMIT = 64 << 20  # bytes of one; the largest public tokenizers are below 40 MB
SIDE_FILES_LIMIT = 512 << 20  # bytes of all
SIDE_FILES = 1000  # how many; models with much code of their own have some tens
SIDE_FOLDERS = 1000
SHOWN = 8  # names in a warning
LEADING_OUT = "links out of the folder, which are followed only if asked for: follow_links, --links"
_WEIGHTS = """
    safetensors bin pt pth ckpt gguf ggml h5 hdf5 msgpack npz onnx onnx_data onnx.data tflite ot pdparams
    nemo engine distcp
"""
WEIGHTS = tuple(f".{suffix}" for suffix in _WEIGHTS.split())
INDEX = ".index.json"
# The same weights in other forms, leftovers of training, and Python's caches.
_LEFT_FOLDERS = (
    *("original", "onnx", "openvino", "coreml", "metal", "runs", "wandb", "logs", "__pycache__"),
    *("checkpoint-*", "global_step*"),
)
# Of an earlier quantization, of a training, and of an adapter.
_LEFT_FILES = (
    *(*SEPARATE_FILES, "hf_quant_config.json", "quant_log*"),
    *("recipe.yaml", "dwq.json", "*imatrix*"),
    *("optimizer.*", "scheduler.*", "rng_state*", "trainer_state.json", "trainer_log.jsonl"),
    *("training_args.*", "*_results.json", "events.out.tfevents*", "zero_to_fp32.py", "latest"),
    *("adapter_config.json", "adapter_model.*"),
)
CARD = "README.md"  # the new card copies some of its entries
_WRITTEN_ANEW = ("config.json", "readme*", "report.json", "bitwright.yaml")  # in the folder itself


class SideFiles:
    """The files that travel with a model, and reasons why others that may be needed do not.

    Parameters
    ----------
    folder : pathlib.Path
        Of the model.
    besides : pathlib.Path, optional
        A folder within that is skipped: the output.

    Attributes
    ----------
    names : list of str
        Paths within the folder, with slashes, in the order of copying.
    missed : list of str
        A line for each kind of files that are left out and may be needed.

    Examples
    --------
    >>> import bitwright
    >>> SideFiles(bitwright.demo_folder()).names[-2:]
    ['tokenizer.json', 'tokenizer_config.json']
    """

    def __init__(self, folder: Path, besides: Path | None = None) -> None:
        self.names: list[str] = []
        self._folder = folder
        self._besides = besides
        self._modules = _modules(folder)
        self._missed: dict[str, list[str]] = {}
        self._folders_left = SIDE_FOLDERS
        bytes_left = SIDE_FILES_LIMIT
        for name in self._walk("", DEPTH):
            path = folder / name
            try:
                size = path.stat().st_size
            except OSError:
                size = -1
            if size < 0 or not os.access(path, os.R_OK):
                self._miss("cannot be read", name)
            elif size > SIDE_FILE_LIMIT:
                self._miss(f"larger than {SIDE_FILE_LIMIT >> 20} MiB", name)
            elif size > bytes_left or len(self.names) == SIDE_FILES:
                self._miss(
                    f"behind the first {SIDE_FILES} files or {SIDE_FILES_LIMIT >> 20} MiB", name
                )
            else:
                self.names.append(name)
                bytes_left -= size

    @property
    def missed(self) -> list[str]:
        """Lines for warnings."""
        return [_line(self._folder, matter, names) for matter, names in self._missed.items()]

    def _miss(self, matter: str, name: str) -> None:
        self._missed.setdefault(matter, []).append(name)

    def _walk(self, within: str, depth: int) -> Iterator[str]:
        """Yield the files of a folder, then those of its subfolders, except those left out by name."""
        try:
            with os.scandir(self._folder / within) as found:
                entries = sorted(found, key=lambda entry: entry.name)
        except OSError:
            self._miss("cannot be read", within)
            return
        folders = []
        for entry in entries:
            name = f"{within}{entry.name}"
            if entry.name.startswith(".") or not is_plain_file_name(entry.name):
                continue
            # Not by the entry's own test, which raises on links in circles.
            if os.path.isdir(entry.path):
                if not _matches(entry.name, _LEFT_FOLDERS) and not self._is_besides(entry.path):
                    folders.append((name, entry.is_symlink()))
            elif os.path.isfile(entry.path):
                left = self._is_left_out(within, entry.name)
                is_read = not left or (not within and entry.name == CARD)
                if is_read and not is_own_file(Path(entry.path), self._folder):
                    self._miss(LEADING_OUT, name)
                elif not left:
                    yield name
        for name, is_link in folders:
            if is_link:
                self._miss("a link to another folder", name)
            elif not depth:
                self._miss(f"more than {DEPTH} folders deep", name)
            elif not self._folders_left:
                self._miss(f"in more than {SIDE_FOLDERS} folders", name)
            else:
                self._folders_left -= 1
                yield from self._walk(f"{name}/", depth - 1)

    def _is_besides(self, path: str) -> bool:
        return self._besides is not None and Path(os.path.realpath(path)) == self._besides

    def _is_left_out(self, within: str, name: str) -> bool:
        lower = name.lower()
        if lower == "adapter_config.json":
            self._miss("an adapter, which the weights do not hold", f"{within}{name}")
        if lower.endswith(WEIGHTS) and within:
            if within in self._modules:
                return False
            self._miss("other weights", f"{within}{name}")
        return _is_left_out(within, lower)


def travels(name: str) -> bool:
    """Tell whether a file travels with a model, by its path within the folder and for all that can be told
    from that.

    Examples
    --------
    >>> [travels(each) for each in ("tokenizer.json", "onnx/config.json", "pytorch_model.bin")]
    [True, False, False]
    """
    *folders, last = name.split("/")
    return (
        not any(each.startswith(".") for each in (*folders, last))
        and len(folders) <= DEPTH
        and not any(_matches(each, _LEFT_FOLDERS) for each in folders)
        and not _is_left_out("/".join(folders), last.lower())
    )


def _is_left_out(within: str, lower: str) -> bool:
    left = _LEFT_FILES if within else _LEFT_FILES + _WRITTEN_ANEW
    return lower.endswith((*WEIGHTS, INDEX, ".pyc")) or _matches(lower, left)


def side_files(checkpoint: Checkpoint, besides: Path | None = None) -> list[str]:
    """Return the paths of the files that travel with a checkpoint, within its folder.

    Others that may be needed are named in a warning.

    Around a GGUF file without a config.json of its model, only the files that are read here count as its
    own.
    """
    if not checkpoint.owns_folder:
        folder = checkpoint.folder
        there = [name for name in READ_BESIDE if os.path.isfile(folder / name)]
        out = [name for name in there if not is_own_file(folder / name, folder)]
        if out:
            warn(_line(folder, LEADING_OUT, out))
        return [name for name in there if name not in out]
    found = SideFiles(checkpoint.folder, besides)
    for line in found.missed:
        warn(line)
    return found.names


def _line(folder: Path, matter: str, names: list[str]) -> str:
    return (
        f"{folder}: {len(names)} files or folders are not copied to the output ({matter}): "
        f"{', '.join(map(shown, names[:SHOWN]))}{', …' if len(names) > SHOWN else ''}. Copy them yourself "
        f"if the model needs them"
    )


def _matches(name: str, patterns: Iterable[str]) -> bool:
    return any(fnmatchcase(name, pattern) for pattern in patterns)


def _modules(folder: Path) -> set[str]:
    """Return the folders of sentence-transformers' modules, whose weights nobody quantizes."""
    found: set[str] = set()
    path = folder / "modules.json"
    with suppress(OSError, ValueError, RecursionError):
        if is_own_file(path, folder) and path.stat().st_size <= SIDE_FILE_LIMIT >> 6:
            modules = json.loads(path.read_bytes())
            for module in modules if isinstance(modules, list) else ():
                place = module.get("path") if isinstance(module, dict) else None
                if isinstance(place, str) and place:
                    found.add(f"{place}/")
    return found
