"""The model card: README.md of every folder that is written, as model hubs have it.

It holds no times, memory or dates, so that the same command gives the same bytes."""

import inspect
import json
import os
import re
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np

from bitwright.checkpoint import Checkpoint
from bitwright.checkpoint.front_matter import CARD_NAME, front_matter
from bitwright.checkpoint.gguf import GgufCheckpoint
from bitwright.checkpoint.gguf_parts import stem_of
from bitwright.checkpoint.writer import FileOptions
from bitwright.errors import printable
from bitwright.evaluation import Evaluation
from bitwright.files.replacing import replaced
from bitwright.formats import Format
from bitwright.formats.loading_code import python_string
from bitwright.methods.registry import METHODS
from bitwright.records.described import megabytes
from bitwright.records.made_by import command_line, made_with, without_place
from bitwright.records.reports import DwqReport, QuantizationReport, error_text

REFINING = "refine"  # the method of reports of what was quantized before
WIDTH = 88  # of a call on one line
SHOWN = 200  # characters of an argument, and of a name from a file
# Entries copied from the original's card, and the form that they must have there.
CARRIED = {
    "license": r"[\w.+-]{1,64}",
    "license_name": r"[\w.+ ()-]{1,100}",
    "license_link": r"https?://[!-~]{1,300}|[\w.-]{1,100}",
    "language": r"[A-Za-z-]{2,20}",
    "pipeline_tag": r"[a-z0-9-]{2,64}",
}
_HUB_NAME = re.compile(r"([A-Za-z0-9][\w.-]{0,95}/)?[A-Za-z0-9][\w.-]{0,95}", re.ASCII)
_CACHED = "models--"  # begins the folders of the hub client's cache
_MARKUP = re.compile(r"[\\`*\[\]<>&|#~$!{}]|(?<![^\W_])_|_(?![^\W_])")


Precisions = Iterable[tuple[int, int]]
Report = QuantizationReport | DwqReport


def python_call(function: Callable[..., object], arguments: Mapping[str, object]) -> str:
    """Return the call of a function of bitwright, with those arguments that differ from the defaults.

    Parameters
    ----------
    function
        A public one.
    arguments
        All of them by name, as ``locals()`` has them at its beginning. ``progress`` changes nothing that
        is written, and is left out.

    Returns
    -------
    str
        Python, except for what has no short literal, such as ``<array of shape [8, 128]>``; of absolute
        paths the names alone.

    Examples
    --------
    >>> def quantize(model, out, bits=4, *, seed=0, progress=True, **options): ...
    >>> python_call(quantize, {"model": "m", "out": "q", "bits": 3, "seed": 0, "progress": False})
    'bitwright.quantize("m", "q", bits=3)'
    """
    given = []
    for name, parameter in inspect.signature(function).parameters.items():
        if name == "progress" or name not in arguments:
            continue
        if parameter.kind is parameter.VAR_KEYWORD:
            options = arguments[name]
            if isinstance(options, Mapping):
                given += [f"{key}={_argument(value)}" for key, value in options.items()]
            continue
        value = _argument(arguments[name])
        if parameter.default is parameter.empty:
            given.append(value)
        elif value != _argument(parameter.default):
            given.append(f"{name}={value}")
    called = f"bitwright.{function.__name__}"
    line = f"{called}({', '.join(given)})"
    if len(line) <= WIDTH:
        return line
    return "\n".join((f"{called}(", *(f"    {each}," for each in given), ")"))


def model_card(
    source: Checkpoint,
    out: str | os.PathLike[str],
    format: type[Format] | None,
    reports: Sequence[Report] = (),
    *,
    precisions: Precisions = (),
    facts: Mapping[str, object] | None = None,
    unfused: bool = False,
    file: FileOptions | None = None,
) -> str:
    """Return the model card of a folder.

    Parameters
    ----------
    source
        The original. What its own card says of licence and language is carried over.
    out
        The folder, as it was given.
    format
        Of what is written; None for float.
    reports
        Of the runs that made it, in their order.
    precisions
        ``(bits, group size)`` of every quantized layer, where no report tells.
    facts
        More rows of the table of facts, such as ``{"preset": "fast"}``; None is left out.
    unfused
        Whether layers differ that vLLM computes as one module, so that it does not load the folder.
    file
        How the weight files are named.

    Returns
    -------
    str
        Markdown with YAML in front. Nothing in it comes from the clock or the machine.

    Examples
    --------
    >>> import bitwright
    >>> from bitwright.formats import FORMATS
    >>> original = bitwright.Checkpoint(bitwright.demo_folder())
    >>> model_card(original, "q", FORMATS["mlx"], precisions=[(3, 64)]).splitlines()[:3]
    ['---', 'base_model: demo_data', 'library_name: mlx']
    """
    given = list(precisions)
    for report in reports:
        if isinstance(report, QuantizationReport):
            given = [(layer.bits, layer.group_size) for layer in report.layers]
    sizes = () if format is None else format.group_sizes
    counts = Counter((bits, size if size in sizes else 0) for bits, size in given)
    stored = sorted(counts.items())  # whole rows as groups of 0, however long they are
    card = front_matter(source.folder)
    base = _base_model(source, card)
    methods = _methods(reports)
    more = dict(facts or {})
    if unfused:
        more["not for"] = "vLLM, which computes some of these layers together, and refuses them"
    name = Path(os.path.abspath(out)).name
    parts = [
        _metadata(base, card, format, methods, sorted({bits for bits, _ in given})),
        f"# {_text(name)}",
        _sentence(base, format, methods, len(given)),
        "## How it was made",
        _table(("", ""), _facts(base, format, methods, reports, stored, more)),
    ]
    command = made_with().command
    if command is not None:
        parts.append(_block("sh" if command.startswith("bitwright ") else "python", command))
    parts += _figures(reports)
    place = without_place(os.fspath(out))
    loading = Format.loading if format is None else format.loading
    codes = loading(place, len(stored) > 1, unfused, file)
    parts += ["## Loading", *(_block(code.language, code.text) for code in codes)]
    original = source.path if isinstance(source, GgufCheckpoint) else source.folder
    known = base if base is not None and "/" in base else without_place(str(original))
    evaluate = ("evaluate", place, "--reference", known, "--evaluation", "other.txt")
    parts += [
        "## Evaluation",
        "Perplexity, and how far it is from the original, on any text:",
        _block("sh", command_line(evaluate)),
    ]
    return "\n\n".join(parts) + "\n"


def add_evaluations(folder: str | os.PathLike[str], rows: Mapping[str, Evaluation]) -> None:
    """Add evaluations, by the names given, to the end of a folder's model card, unless they are there.

    Parameters
    ----------
    folder
        What `model_card` was written to.
    rows
        Such as ``{"original": …, "quantized": …}``.

    Raises
    ------
    OutputError
        If the card cannot be written.

    Examples
    --------
    >>> add_evaluations("story-3bit", {"quantized": result})  # doctest: +SKIP
    """
    headings = ("model", "perplexity", "reference", "KL (nats/token)", "top-1", "tokens", "windows")
    table = [
        (
            _text(name),
            f"{each.perplexity:.4f}",
            "" if each.reference_perplexity is None else f"{each.reference_perplexity:.4f}",
            "" if each.kl_divergence is None else f"{each.kl_divergence:.5f}",
            "" if each.top1_agreement is None else f"{100 * each.top1_agreement:.2f} %",
            f"{each.tokens:,}",
            each.windows,
        )
        for name, each in rows.items()
    ]
    path, added = Path(folder) / CARD_NAME, f"\n{_table(headings, table)}\n"
    with replaced(path) as partial:
        content = path.read_text(encoding="utf-8")
        partial.write_text(f"{content.removesuffix(added)}{added}", encoding="utf-8")


def _methods(reports: Sequence[Report]) -> list[str]:
    return ["dwq" if isinstance(each, DwqReport) else each.method for each in reports]


def _method_words(name: str) -> str:
    if name == REFINING:
        return "refinement of its codes and scales"
    return METHODS[name].description if name in METHODS else name.upper()


def _sentence(base: str | None, format: type[Format] | None, methods: list[str], count: int) -> str:
    model = "a model" if base is None else f"`{base}`"
    kind = "in float" if format is None else f"in the {format.name} format"
    how = [f"{count:,} layers quantized"] if count else []
    if methods:
        words = [_method_words(each) for each in methods]
        how.append(f"by {', then '.join(words)}")
    more = f" ({', '.join(how)})" if how else ""
    return f"This is {model} {kind}{more}, made on a CPU with bitwright {version('bitwright')}."


def _facts(
    base: str | None,
    format: type[Format] | None,
    methods: list[str],
    reports: Sequence[Report],
    stored: list[tuple[tuple[int, int], int]],
    more: Mapping[str, object],
) -> list[tuple[str, str]]:
    rows: list[tuple[str, str]] = []
    if base is not None:
        rows.append(("original", f"`{base}`"))
    if methods:
        rows.append(("method", ", then ".join(methods)))
    rows.append(("format", "float" if format is None else format.name))
    if stored:
        shown = [
            f"{bits} bits in {f'groups of {size}' if size else 'whole rows'}"
            + (f" (layers: {count:,})" if len(stored) > 1 else "")
            for (bits, size), count in stored
        ]
        rows.append(("precision", ", ".join(shown)))
    rows += [(_text(name), _text(str(value))) for name, value in more.items() if value is not None]
    for report in reports:
        if isinstance(report, DwqReport):
            before, after = report.kl_before, report.kl_after
            trained = f"{report.tokens:,} tokens in {report.steps} steps, loss {report.loss}"
            rows += [
                ("trained on", _text(trained)),
                ("validation KL", f"{before:.5f} before training, {after:.5f} after"),
            ]
            continue
        per_weight = f"{report.layer_bits_per_weight:.3f} in the quantized layers, "
        rows += [
            ("bits per weight", f"{per_weight}{report.bits_per_weight:.3f} over all tensors"),
            ("size", f"{megabytes(report.size_bytes)} (was {megabytes(report.original_bytes)})"),
            ("calibration", f"{report.calibration_tokens:,} tokens"),
        ]
        earlier, error = report.mean_errors()
        if earlier is not None:
            change = f"{earlier:.2e} before, {error:.2e} after, relative, mean over the layers"
            rows.append(("squared error", change))
    return [*rows, ("bitwright", version("bitwright"))]


def _figures(reports: Sequence[Report]) -> list[str]:
    parts = []
    for report in reports:
        if isinstance(report, DwqReport):
            continue
        compared = any(each.error_before is not None for each in report.layers)
        worst = [
            (
                _code(each.name),
                str(each.bits),
                str(each.group_size),
                *([error_text(each.error_before)] if compared else []),
                f"{each.error:.2e}",
            )
            for each in report.worst()
        ]
        if worst:
            over = "the calibration tokens" if report.calibration_tokens else "its weights"
            errors = ("before", "after") if compared else ("error",)
            headings = ("layer", "bits", "group", *errors)
            parts += [
                f"The layers with the largest errors (squared, relative, over {over}):",
                _table(headings, worst),
            ]
        few = len(report.experts_with_few_tokens())
        if few:
            parts.append(f"{few} layers of experts received too few calibration tokens.")
        if report.blocks:
            rows = [
                (
                    str(each.index),
                    f"{each.loss_before:.3e}",
                    f"{each.loss_after:.3e}",
                    f"{each.reduction:.3f}" if each.scaled else "not kept",
                )
                for each in report.blocks
            ]
            parts += [
                "What AWQ did to the squared error of each block's output:",
                _table(("block", "without", "with", "ratio"), rows),
            ]
    return ["## Figures", *parts] if parts else []


def _metadata(
    base: str | None,
    card: Mapping[str, list[str]],
    format: type[Format] | None,
    methods: list[str],
    bits: list[int],
) -> str:
    """Return the YAML in front."""
    from huggingface_hub import ModelCardData  # takes a fifth of a second

    name = "float" if format is None else format.name
    tags = [name, "bitwright", *(part for each in methods for part in each.split("+"))]
    tags += [f"{each}-bit" for each in bits]
    entries: dict[str, Any] = {"pipeline_tag": "text-generation"}
    entries |= {
        key: values if len(values) > 1 else values[0]
        for key, pattern in CARRIED.items()
        if (values := card.get(key))
        and all(re.fullmatch(pattern, each, re.ASCII) for each in values)
    }
    if base is not None and format is not None:
        entries["base_model_relation"] = "quantized"
    data = ModelCardData(
        library_name="transformers" if format is None else format.library,
        base_model=base,
        tags=list(dict.fromkeys(tag for tag in tags if tag != "float")),
        **entries,
    )
    return f"---\n{data.to_yaml()}\n---"


def _base_model(source: Checkpoint, card: Mapping[str, list[str]]) -> str | None:
    """Return the original's name at the hub as far as its path tells, None if no part can be such a name.

    That is what it was made from, if its own card says that it is quantized; what the hub's client calls
    its folder; what config.json says that it was loaded from, unless its card says that it was trained
    from that; the name of its folder or file.
    """
    place = Path(os.path.abspath(source.folder))
    parents = card.get("base_model", [])
    names = parents[:1] if card.get("base_model_relation") == ["quantized"] else []
    names += [
        part.removeprefix(_CACHED).replace("--", "/")
        for part in reversed(place.parts)
        if part.startswith(_CACHED)
    ]
    loaded = source.config.get("_name_or_path")
    if isinstance(loaded, str) and "/" in loaded and loaded not in parents:
        names.append(loaded)
    names.append(stem_of(source.path) if isinstance(source, GgufCheckpoint) else place.name)
    return next((name for name in names if _HUB_NAME.fullmatch(name)), None)


def with_base_model(card: str, base: str | None) -> str:
    """Return a card whose YAML names another original, or none."""
    import yaml
    from huggingface_hub.repocard import REGEX_YAML_BLOCK

    block = REGEX_YAML_BLOCK.match(card)
    entries = yaml.safe_load(block[2]) if block else {}
    rest = card[block.end() :] if block else f"\n{card}"
    if base is None:
        entries = {
            key: value
            for key, value in entries.items()
            if key not in ("base_model", "base_model_relation")
        }
    else:
        entries = {**entries, "base_model": base}
    text = yaml.safe_dump(entries, sort_keys=False, allow_unicode=True)
    return f"---\n{text}---\n{rest}"


def _argument(value: object) -> str:
    """Write an argument of a call; of an absolute path its name."""
    return _literal(without_place(os.fspath(value)) if isinstance(value, str | Path) else value)


def _literal(value: object) -> str:
    """Write an argument in Python, or its type in brackets."""
    if isinstance(value, np.generic):
        value = value.item()
    if value is None or isinstance(value, bool | int | float | complex):
        return repr(value)
    if isinstance(value, os.PathLike):
        value = os.fspath(value)
    if isinstance(value, str):
        return python_string(value)
    if isinstance(value, np.dtype) or (isinstance(value, type) and issubclass(value, np.generic)):
        return json.dumps(np.dtype(value).name)
    if isinstance(value, Mapping):
        pairs = (f"{_literal(key)}: {_literal(each)}" for key, each in value.items())
        return _short("{" + ", ".join(pairs) + "}", value)
    if isinstance(value, list | tuple):
        return _short("[" + ", ".join(map(_literal, value)) + "]", value)
    shape = getattr(value, "shape", None)
    if isinstance(shape, tuple):
        return f"<array of shape {list(shape)}>"
    name = getattr(value, "__name__", None)
    return f"<{printable(str(name))}>" if name else f"<{type(value).__name__}>"


def _short(literal: str, value: list[Any] | tuple[Any, ...] | Mapping[Any, Any]) -> str:
    kind = "dict" if isinstance(value, Mapping) else "list"
    return literal if len(literal) <= SHOWN else f"<{kind} of {len(value)}>"


def _text(text: str) -> str:
    """Escape text for Markdown."""
    return _MARKUP.sub(lambda each: f"&#{ord(each[0])};", printable(text)[:SHOWN])


def _code(text: str) -> str:
    """Write a name as code; one with signs that would end it, as text."""
    return (
        _text(text) if set(text) & set("`|") or not text.strip() else f"`{printable(text)[:SHOWN]}`"
    )


def _block(language: str, code: str) -> str:
    """Write a block of code, whatever is in it."""
    code = "\n".join(map(printable, code.split("\n")))
    longest = max((len(run) for run in re.findall("`+", code)), default=0)
    fence = "`" * max(3, longest + 1)
    return f"{fence}{language}\n{code}\n{fence}"


def _table(headings: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    lines = [headings, ["---"] * len(headings), *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)
