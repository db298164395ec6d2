"""Compares settings: a model quantized in several ways, and what each loses with its size."""

import inspect
import json
import os
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from bitwright.checkpoint.fingerprint import model_fingerprint
from bitwright.checkpoint.hub import finds_models, model_place
from bitwright.errors import CalibrationError, OutputError, shown
from bitwright.evaluation import (
    LossSums,
    bits_per_weight,
    check_text,
    compared_positions,
    final_states,
    plan_evaluation,
)
from bitwright.files.home import expanded, expands_home
from bitwright.files.replacing import output_errors, replaced, write_json
from bitwright.files.text_file import read_text
from bitwright.loading.model import Model, load_model
from bitwright.models.operations import Float32
from bitwright.presets.quantize import check_quantization, quantize
from bitwright.records.plots import check_plot, new_figure, save_figure
from bitwright.runs.progress import Progressing
from bitwright.text.samples import TokenSource, tokens_fingerprint

Setting = Mapping[str, Any]
RESULTS, REFERENCE = "comparison.json", ".reference.npy"
MOST_RESULTS = 16 << 20  # bytes
OWN = ("model", "out", "resume", "overwrite", "progress", "memory", "threads")
"""What a setting does not say, as it is the same for all."""
SETTINGS = tuple(
    name for name in inspect.signature(quantize).parameters if name not in OWN
)  # and "name", or "folder" alone


@dataclass(frozen=True)
class Compared:
    """What one setting gives.

    Parameters
    ----------
    name
        Of the setting.
    folder
        Where the quantized model is.
    size_bytes
        Of its weight files.
    bits_per_weight, perplexity, kl_divergence, top1_agreement
        See `bitwright.Evaluation`.
    seconds
        That quantizing took; None of a folder that was given.
    """

    name: str
    folder: str
    size_bytes: int
    bits_per_weight: float
    perplexity: float
    kl_divergence: float
    top1_agreement: float
    seconds: float | None


@dataclass(frozen=True)
class Comparison:
    """What several settings give.

    Parameters
    ----------
    rows
        In the order of the settings.
    reference_perplexity, reference_bytes
        Of the original.
    tokens
        Tokens of the text.
    """

    rows: tuple[Compared, ...]
    reference_perplexity: float
    reference_bytes: int
    tokens: int

    def best(self) -> tuple[Compared, ...]:
        """Return those that no other beats in both size and KL, the smallest first."""
        kept: list[Compared] = []
        for each in sorted(self.rows, key=lambda row: (row.size_bytes, row.kl_divergence)):
            if not kept or each.kl_divergence < kept[-1].kl_divergence:
                kept.append(each)
        return tuple(kept)


def setting_grid(**choices: Sequence[Any]) -> list[dict[str, Any]]:
    """Return a setting for every way to choose one value of each argument.

    Examples
    --------
    >>> setting_grid(bits=[3, 4], format=["mlx"])
    [{'bits': 3, 'format': 'mlx'}, {'bits': 4, 'format': 'mlx'}]
    """
    return [dict(zip(choices, chosen, strict=True)) for chosen in product(*choices.values())]


def setting_name(setting: Setting) -> str:
    """Return what a setting is called: its own name, or its values."""
    if "name" in setting:
        return str(setting["name"])
    if "folder" in setting:
        return Path(setting["folder"]).name
    words = [Path(each).stem if isinstance(each, Path) else each for each in setting.values()]
    text = "-".join(str(each) for each in words) or "default"
    return "".join(each if each.isalnum() or each in "-_.+" else "-" for each in text)


@expands_home
@finds_models
def compare(
    model: str | os.PathLike[str],
    settings: Sequence[Setting],
    out: str | os.PathLike[str],
    evaluation: TokenSource,
    *,
    length: int | None = None,
    samples: int | None = None,
    bos: bool = True,
    plot: str | os.PathLike[str] | None = None,
    memory: float | None = None,
    progress: Progressing = True,
    on_result: Callable[[Compared], None] | None = None,
) -> Comparison:
    """Quantize a model in several ways, and compare what each loses with its size.

    The original is computed once. Each result is kept in `out` as soon as it is there, with its folder: a
    run that was interrupted goes on, and one with more settings computes only these.

    Parameters
    ----------
    model
        Checkpoint folder or GGUF file, in float.
    settings
        Arguments of `bitwright.quantize` by name, with or without a "name"; or "folder", a model that is
        quantized already. See `setting_grid`.
    out
        Folder for the results and the quantized models.
    evaluation
        Text or token ids; not what is calibrated on.
    length, samples, bos
        Of `evaluation`, as for `bitwright.evaluate`; settings have their own `bos`.
    plot
        File for a plot of KL divergence over size; its ending says how (.png, .svg, .pdf).
    memory
        Budget in gigabytes (10⁹ bytes); by default three quarters of what is free.
    progress
        Show the progress of each run on standard error.
    on_result
        Called with each result when it is there.

    Returns
    -------
    Comparison

    Raises
    ------
    ValueError
        If a setting is not one, or two have one name.
    OutputError
        If `out` holds something else, or a comparison of another model or text.
    BitwrightError
        What `bitwright.quantize` and `bitwright.evaluate` raise.

    Examples
    --------
    >>> import bitwright, tempfile
    >>> demo = bitwright.demo_folder()
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     found = bitwright.compare(
    ...         demo, [{"method": "rtn", "bits": 8}, {"method": "rtn", "bits": 3}], folder,
    ...         demo / "evaluation.txt", samples=2, progress=False,
    ...     )
    >>> [row.name for row in found.rows]
    ['rtn-8', 'rtn-3']
    """
    named = checked_settings(settings)
    if plot is not None:
        check_plot(plot)
    comparison = _Folder.of(
        Path(expanded(out)), load_model(model), evaluation, (length, samples, bos)
    )
    for name, setting in named.items():
        if "folder" not in setting and comparison.known(name, setting) is None:
            place = comparison.out / name
            if not place.exists():
                check_quantization(model, place, memory=memory, **_arguments(setting))
    rows = []
    for name, setting in named.items():
        found = comparison.known(name, setting)
        if found is None:
            found = comparison.computed(name, setting, memory, progress)
        rows.append(found)
        if on_result is not None:
            on_result(found)
    reference = comparison.reference(memory)
    result = Comparison(
        tuple(rows),
        reference[1],
        comparison.model.checkpoint.stored_bytes(),
        comparison.tokens.size,
    )
    if plot is not None:
        plot_comparison(result, plot)
    return result


def checked_settings(settings: Sequence[Setting]) -> dict[str, Setting]:
    """Return settings by name; ValueError if one is not sound."""
    named: dict[str, Setting] = {}
    for setting in settings:
        name, own = setting_name(setting), set(setting) - {"name"}
        unknown = sorted(own - {"folder", *SETTINGS})
        if unknown:
            raise ValueError(
                f"setting {name}: {shown(unknown[0])} is no argument of bitwright.quantize"
                + (", or is the same for all settings" if unknown[0] in OWN else "")
            )
        if "folder" in own and len(own) > 1:
            raise ValueError(f"setting {name}: a folder is compared as it is, without other keys")
        if not name or name in (".", "..", RESULTS) or "/" in name or name.startswith("."):
            raise ValueError(f"setting {shown(name)}: its name must be that of a folder")
        if name in named:
            raise ValueError(f"settings: two are called {name}; give one another name")
        named[name] = setting
    if not named:
        raise ValueError("settings: there are none to compare")
    return named


def plot_comparison(comparison: Comparison, path: str | os.PathLike[str]) -> None:
    """Plot KL divergence over size, with a line through what no other setting beats."""
    figure, axes = new_figure()
    for row in comparison.rows:
        place = (row.size_bytes / 1e6, max(row.kl_divergence, 1e-9))
        axes.plot(*place, marker="o", color="C0")
        axes.annotate(row.name, place, xytext=(4, 4), textcoords="offset points", fontsize=7)
    best = comparison.best()
    axes.plot(
        [row.size_bytes / 1e6 for row in best],
        [max(row.kl_divergence, 1e-9) for row in best],
        color="C0",
        alpha=0.4,
    )
    axes.set(xlabel="size (MB)", ylabel="KL divergence (nats per token)", yscale="log")
    save_figure(figure, path)


def _arguments(setting: Setting) -> dict[str, Any]:
    return {name: value for name, value in setting.items() if name != "name"}


@dataclass(eq=False)
class _Folder:
    """The folder of a comparison, and what is known there."""

    out: Path
    model: Model
    tokens: NDArray[np.int32]
    results: dict[str, Any]
    reference_perplexity: float | None = None

    @classmethod
    def of(
        cls,
        out: Path,
        model: Model,
        text: TokenSource,
        reading: tuple[int | None, int | None, bool],
    ) -> "_Folder":
        loaded = check_text([model], text, *reading)
        about = {
            "model": model_fingerprint(model.checkpoint),
            "tokens": tokens_fingerprint(loaded.tokens),
        }
        results: dict[str, Any] = {"about": about, "settings": {}}
        path = out / RESULTS
        if path.is_file():
            try:
                known = json.loads(read_text(path, MOST_RESULTS))
                sound = isinstance(known["about"], dict) and isinstance(known["settings"], dict)
            except (ValueError, KeyError, TypeError) as error:
                raise OutputError(f"{path}: is not a comparison; choose another folder") from error
            if not sound or known["about"] != about:
                raise OutputError(
                    f"{path}: is a comparison of another model or on another text; choose another folder, "
                    f"or delete it"
                )
            results = known
        elif out.exists() and (not out.is_dir() or any(out.iterdir())):
            raise OutputError(
                f"{out}: is there already and holds no comparison; choose another folder"
            )
        with output_errors(out):
            out.mkdir(parents=True, exist_ok=True)
        return cls(out, model, loaded.tokens, results)

    def known(self, name: str, setting: Setting) -> Compared | None:
        """Return a result that is there; OutputError if that of another setting has its name."""
        held = self.results["settings"].get(name)
        if held is None:
            return None
        try:
            if held["setting"] != _written(setting):
                raise OutputError(
                    f"{self.out / RESULTS}: {name} was another setting; give this one another name"
                )
            return Compared(**held["result"])
        except (KeyError, TypeError) as error:
            raise OutputError(
                f"{self.out / RESULTS}: the result of {name} is damaged; delete the file"
            ) from error

    def computed(
        self, name: str, setting: Setting, memory: float | None, progress: Progressing
    ) -> Compared:
        """Compute a result, and keep it."""
        seconds = None
        folder = Path(expanded(setting["folder"])) if "folder" in setting else self.out / name
        if "folder" in setting:
            folder = model_place(folder)
        elif not folder.exists():
            start = time.perf_counter()
            quantize(
                self.model.checkpoint.folder,
                folder,
                memory=memory,
                progress=progress,
                **_arguments(setting),
            )
            seconds = time.perf_counter() - start
        states, _ = self.reference(memory)
        judged = load_model(folder)
        if judged.config.vocab_size != self.model.config.vocab_size:
            raise CalibrationError(
                f"{folder}: its vocabulary has {judged.config.vocab_size} entries, the model's "
                f"{self.model.config.vocab_size}; compare folders of one model"
            )
        total = LossSums()
        for rows, part, hidden in self._passed(judged, memory):
            known = states[rows].astype(np.float32)
            whole = compared_positions(part.shape, "whole")
            total.add([judged, self.model], [hidden, known], part, whole)
        followed = len(self.tokens) * (self.tokens.shape[1] - 1)
        result = Compared(
            name=name,
            folder=str(folder),
            size_bytes=judged.checkpoint.stored_bytes(),
            bits_per_weight=bits_per_weight(judged),
            perplexity=float(np.exp(total.losses[0] / followed)),
            kl_divergence=total.divergence / self.tokens.size,
            top1_agreement=total.agreed / self.tokens.size,
            seconds=seconds,
        )
        self._keep(name, setting, result)
        return result

    def reference(self, memory: float | None) -> tuple[NDArray[Any], float]:
        """Return the original's states before its head ``[tokens, hidden_size]``, and its perplexity; both
        are computed when there are none."""
        path = self.out / REFERENCE
        shape = (self.tokens.size, self.model.config.hidden_size)
        held = self.results.get("reference_perplexity")
        if path.is_file() and isinstance(held, float):
            states = np.load(path, mmap_mode="r", allow_pickle=False)
            if states.shape == shape and states.dtype == np.float32:
                return states, held
        with replaced(path) as partial:
            states = np.lib.format.open_memmap(partial, "w+", np.float32, shape)
            total = LossSums()
            for rows, part, hidden in self._passed(self.model, memory):
                states[rows] = hidden
                whole = compared_positions(part.shape, "whole")
                total.add([self.model], [hidden], part, whole)
            states.flush()
            del states
        followed = len(self.tokens) * (self.tokens.shape[1] - 1)
        held = self.results["reference_perplexity"] = float(np.exp(total.losses[0] / followed))
        write_json(self.out / RESULTS, self.results)
        return np.load(path, mmap_mode="r", allow_pickle=False), held

    def _passed(
        self, model: Model, memory: float | None
    ) -> Iterator[tuple[slice, NDArray[np.int32], Float32]]:
        """Yield tokens, as many samples at a time as memory has room for, and a model's states."""
        count, length = self.tokens.shape
        step, _ = plan_evaluation([model, self.model], count, length, memory)
        for first in range(0, count, step):
            part = self.tokens[first : first + step]
            rows = slice(first * length, (first + len(part)) * length)
            yield rows, part, final_states(model, part, lambda: None)

    def _keep(self, name: str, setting: Setting, result: Compared) -> None:
        self.results["settings"][name] = {"setting": _written(setting), "result": asdict(result)}
        write_json(self.out / RESULTS, self.results)


def _written(setting: Setting) -> str:
    """Return a setting so that equal ones are equal."""
    return json.dumps(_arguments(setting), sort_keys=True, default=str)
