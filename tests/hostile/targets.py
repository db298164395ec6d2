"""What reads files, kind by kind, and what it must make of those that were changed."""

import io
import json
import math
import tempfile
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

import click
import numpy as np

import bitwright
from bitwright.checkpoint.gguf_file import write_header
from bitwright.checkpoint.gguf_metadata import gguf_metadata
from bitwright.cli.config_file import read_settings
from bitwright.cli.quantize import quantize
from bitwright.distill.targets import DwqTargets
from bitwright.errors import BitwrightError
from bitwright.statistics.activation_file import ActivationFile
from bitwright.statistics.imatrix import ImportanceMatrix
from hostile import files
from hostile.changes import Case, Place, changed, put_in_place
from hostile.files import LAYERS, Files
from hostile.limits import MEMORY_BYTES, MEMORY_FACTOR, limited

LONGEST_MESSAGE = 2000


@dataclass(frozen=True)
class Target:
    """Files of one kind.

    Parameters
    ----------
    files
        Sound ones, by variant and name.
    edited
        Which of them are changed, by the ends of their names.
    tasks
        What reads them, given their folder and a place for an output.
    """

    files: Callable[[], Mapping[str, Files]]
    edited: tuple[str, ...]
    tasks: Mapping[str, Callable[[Path, Path], None]]


def survives(target: Target, case: Case, must_work: bool = False) -> None:
    """Read changed files: that must work or be refused in words, at once, and in little memory."""
    contents = dict(target.files()[case.variant])
    places = [edit for edit in case.edits if isinstance(edit, Place)]
    for edit in case.edits:
        if not isinstance(edit, Place):
            contents[edit.file] = changed(contents[edit.file], edit)
    with tempfile.TemporaryDirectory(prefix="hostile-") as scratch:
        folder, out = Path(scratch, "given"), Path(scratch, "out")
        folder.mkdir()
        for name, content in contents.items():
            (folder / name).parent.mkdir(exist_ok=True)
            (folder / name).write_bytes(content)
        for place in places:
            put_in_place(folder, place)
        before = set(folder.parent.iterdir())
        try:
            with limited(MEMORY_BYTES + MEMORY_FACTOR * sum(map(len, contents.values()))):
                target.tasks[case.task](folder, out)
        except (BitwrightError, ValueError, TypeError, FileNotFoundError) as error:
            refused = error
        else:
            return
        if must_work:
            raise refused
        message = str(refused)
        assert str(folder) in message, f"the message names no file: {refused!r}"
        assert message.isprintable(), f"the message holds what is not for terminals: {refused!r}"
        assert len(message) < LONGEST_MESSAGE, f"the message is {len(message)} characters long"
        left = set(folder.parent.iterdir()) - before
        assert not left, f"{left} was left behind by: {refused!r}"


def _logits(folder: Path, _out: Path) -> None:
    model = bitwright.load_model(folder)
    logits = model.logits(np.zeros((2, 3), np.int32))
    assert logits.shape == (2, 3, model.config.vocab_size)
    assert np.isfinite(logits).all()


def _weights(folder: Path, _out: Path) -> None:
    model = bitwright.load_model(folder)
    matrix = (model.config.vocab_size, model.config.hidden_size)
    shapes = {**model.linear_shapes(), model.embedding_name: matrix, model.head_name: matrix}
    for name, shape in shapes.items():
        weight = model.weight(name, shape)
        assert weight.shape == shape
        assert np.isfinite(weight).all()


def _inspected(folder: Path, _out: Path) -> None:
    found = bitwright.inspect_model(folder)
    assert found.parameters > 0
    assert found.memory_bytes > 0


def _evaluated(folder: Path, _out: Path) -> None:
    result = bitwright.evaluate(folder, np.zeros((2, 4), np.int32))
    assert result.perplexity >= 1


def _rounded(folder: Path, out: Path) -> None:
    bitwright.quantize(folder, out, "rtn", 8, -1, "compressed-tensors", progress=False)
    _check_output(out)


def _carried(folder: Path, out: Path) -> None:
    bitwright.convert(folder, out, "float", dtype="float32", progress=False)
    given, written = (
        {path.relative_to(place).as_posix() for path in place.rglob("*")} for place in (folder, out)
    )
    assert written - given <= {"README.md", "report.json"}
    assert not any(path.is_symlink() for path in out.rglob("*"))


def _in_float(folder: Path, out: Path) -> None:
    bitwright.convert(folder, out, "float", progress=False)
    _check_output(out)


def _requantized(folder: Path, out: Path) -> None:
    bitwright.convert(folder, out, "mlx", allow_requantize=True, progress=False)
    _check_output(out)


def _again(folder: Path, out: Path) -> None:
    bitwright.convert(folder, out, "gguf", progress=False)
    _weights(out, out)


def _check_output(out: Path) -> None:
    with bitwright.Checkpoint(out) as checkpoint:
        for name in checkpoint.names():
            array = checkpoint.read(name)
            if array.dtype.kind in "fV":
                assert np.isfinite(array.astype(np.float32)).all(), name
    _weights(out, out)


def _tokens_of(name: str) -> Callable[[Path, Path], None]:
    def read(folder: Path, _out: Path) -> None:
        ids = bitwright.load_tokens(folder / name, tokenizer=folder, length=4, vocab_size=512)
        assert ids.shape[1] == 4
        assert ids.dtype == np.int32
        assert 0 <= ids.min() <= ids.max() < 512

    return read


def _described(folder: Path, _out: Path) -> None:
    """For llama.cpp."""
    write_header(
        io.BytesIO(), gguf_metadata(json.loads(files.wide()["config.json"]), folder, 0), []
    )


def _targets(folder: Path, _out: Path) -> None:
    known = DwqTargets(folder)
    assert known.tokens().shape == (known.samples, known.length)
    top = known.read(np.arange(known.samples)[:2])
    assert top.ids.shape[1] == known.k
    assert np.isfinite(top.log_probabilities).all()
    assert np.isfinite(top.rest).all()


def _statistics(folder: Path, _out: Path) -> None:
    known = bitwright.Statistics(folder)
    for name, stage in known.stages.items():
        moments = known.read(name)
        assert (moments is None) == (stage.tokens == 0)
        if moments is not None:
            assert moments.is_finite()
            assert moments.gram.shape == (stage.channels, stage.channels)


def _imatrix_of(name: str) -> Callable[[Path, Path], None]:
    def read(folder: Path, _out: Path) -> None:
        for entry in ImportanceMatrix.load(folder / name).entries.values():
            assert np.isfinite(entry.means(0)).all()

    return read


def _merged(folder: Path, out: Path) -> None:
    known = bitwright.Statistics(folder)
    assert bitwright.merge_statistics([folder], out).stages.keys() == known.stages.keys()
    _statistics(out, out)


def _quantized_by(folder: Path, out: Path) -> None:
    bitwright.quantize(
        files.STATISTICS_MODEL,
        out,
        "awq",
        group_size=-1,
        format="compressed-tensors",
        statistics=folder,
        progress=False,
    )
    _check_output(out)


def _sensitivities(folder: Path, out: Path) -> None:
    known = bitwright.Sensitivities.load(folder / "sensitivities.json")
    assert all(map(math.isfinite, [*known.per_million.values(), known.kl_divergence]))
    known.save(out)
    assert bitwright.Sensitivities.load(out) == known


def _recipe(folder: Path, out: Path) -> None:
    known = bitwright.Recipe.load(folder / "recipe.json")
    assert known.most_common in known.layers.values()
    known.save(out)
    assert bitwright.Recipe.load(out) == known


def _activations(folder: Path, _out: Path) -> None:
    with ActivationFile(folder / "activations.npz") as known:
        found = known.tokens(LAYERS, 64)
        assert found.shape[1] == 64
        assert np.isfinite(found).all()


def _settings(folder: Path, _out: Path) -> None:
    found = read_settings(folder / "settings.yaml", quantize, click.Context(quantize))
    assert all(name in {each.name for each in quantize.params} for name in found)


READERS = {"logits": _logits, "weights": _weights, "inspect": _inspected, "evaluate": _evaluated}
MODEL_TASKS = {**READERS, "quantize": _rounded, "convert": _in_float}
PACKED_TASKS = {**READERS, "to float": _in_float, "to mlx": _requantized}
DATA = ("tokens.npy", "list.json", "chats.json", "table.csv", "table.tsv")
TEXT_TASKS = {"text": _tokens_of("text.txt"), "chats": _tokens_of("chats.jsonl")}
GGUF_TASKS = {**PACKED_TASKS, "to gguf": _again}
TARGETS = {
    "safetensors": Target(files.families, (".safetensors",), MODEL_TASKS),
    "side files": Target(
        files.side_files,
        ("modules.json", "1_Pooling/config.json", "1_Pooling/pytorch_model.bin", ".py"),
        {"convert": _carried},
    ),
    "index": Target(files.shards, (".index.json",), READERS),
    "config": Target(files.families, ("config.json",), MODEL_TASKS),
    "gguf": Target(files.gguf, (".gguf", "config.json"), GGUF_TASKS),
    "packed": Target(files.packed, ("config.json", ".safetensors"), PACKED_TASKS),
    "tokenizer": Target(
        files.tokenizers,
        ("tokenizer.json", "_config.json", "_map.json", ".jinja"),
        {**TEXT_TASKS, "llama.cpp": _described},
    ),
    "tokens": Target(
        files.tokens,
        (".npy", ".txt", ".jsonl", ".csv", ".tsv", "list.json", "chats.json"),
        {**TEXT_TASKS, **{name: _tokens_of(name) for name in DATA}},
    ),
    "scaled": Target(files.scaled, ("config.json", ".safetensors"), MODEL_TASKS),
    "adapter": Target(files.adapters, (".json", ".safetensors"), MODEL_TASKS),
    "settings": Target(files.settings, (".yaml",), {"read": _settings}),
    "targets": Target(files.targets, (".json", ".safetensors"), {"read": _targets}),
    "statistics": Target(
        files.statistics,
        (".json", ".safetensors"),
        {"read": _statistics, "merge": _merged, "quantize": _quantized_by},
    ),
    "imatrix": Target(
        files.imatrices,
        (".gguf", ".dat"),
        {name: _imatrix_of(f"i.{name}") for name in ("gguf", "dat")},
    ),
    "sensitivities": Target(files.sensitivities, (".json",), {"load": _sensitivities}),
    "recipe": Target(files.recipes, (".json",), {"load": _recipe}),
    "activations": Target(files.activations, (".npz",), {"load": _activations}),
}
