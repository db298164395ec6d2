"""Streams a model through a method, block by block."""

import os
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import nullcontext
from pathlib import Path
from typing import Any, Literal

import numpy as np
from numpy.typing import DTypeLike, NDArray
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from bitwright import _kernels
from bitwright.calibration import TokenSource, load_tokens
from bitwright.checkpoint import CheckpointWriter, copy_side_files
from bitwright.errors import BitwrightError, NonFiniteError
from bitwright.evaluate import parameter_count, peak_memory_bytes
from bitwright.formats import FORMATS, Format, Precision
from bitwright.methods.gptq import GptqTensor
from bitwright.methods.grid import FLOAT_DTYPES
from bitwright.methods.solver import METHODS, MethodOptions, Solver
from bitwright.models.block import DecoderBlock, Float32, Rotation, Stage
from bitwright.models.model import Model, load_model
from bitwright.recipe import plan_layers
from bitwright.report import LayerReport, QuantizationReport
from bitwright.statistics import LayerStatistics, require_finite
from bitwright.tensor import Grid

DEFAULT_SAMPLES = 128
ERROR_ROWS = 64  # output rows that a layer's reported error is estimated on


def quantize(
    model: str | os.PathLike[str],
    out: str | os.PathLike[str],
    method: Literal["gptq", "rtn"] = "gptq",
    bits: int = 4,
    group_size: int | None = 64,
    format: Literal["mlx", "gptq"] = "mlx",
    calibration: TokenSource | None = None,
    *,
    samples: int | None = None,
    length: int | None = None,
    seed: int = 0,
    grid: Grid | None = None,
    scale_dtype: DTypeLike | None = None,
    damping: float = 0.01,
    act_order: bool = True,
    block_size: int = 128,
    grid_search: bool | None = None,
    propagate: Literal["quantized", "original"] = "quantized",
    embedding_bits: int | None = None,
    head_bits: int | None = None,
    include: Sequence[str] = (),
    exclude: Sequence[str] = (),
    overrides: Mapping[str, Mapping[str, int]] | None = None,
    overwrite: bool = False,
    threads: int | None = None,
    progress: bool = True,
) -> QuantizationReport:
    """Quantize a checkpoint folder into another one.

    Weights are read, quantized and written one decoder block at a time. Inside a block the layers are
    taken in the order of the computation, each group of layers with one input together: their statistics
    come from what the already quantized layers before them produce.

    Parameters
    ----------
    model
        Checkpoint folder in float (config.json and safetensors).
    out
        Folder to write; it appears when everything is done, or not at all.
    method
        ``"gptq"`` (needs `calibration`) or ``"rtn"``.
    bits, group_size
        Of every linear layer in the decoder blocks; group size None or -1 is the whole row.
    format
        ``"mlx"`` (mlx-lm) or ``"gptq"`` (transformers, GPTQModel, vLLM).
    calibration
        A ``.txt``, ``.jsonl`` or ``.npy`` file, token ids ``[samples, length]``, or a list of texts; see
        `bitwright.load_tokens`. For ``"rtn"`` it only serves the grid search and the reported errors.
    samples, length, seed
        Take so many samples of so many tokens, chosen by the seed. By default at most 128 samples, of 512
        tokens where `calibration` is text.
    grid
        One that the format stores; its first by default (mlx: affine; gptq: symmetric, or zero_point).
    scale_dtype
        Dtype of scales and biases, by default what the format asks for.
    damping, act_order, block_size, grid_search
        As for `quantize_gptq`; `grid_search` is on by default for gptq and off for rtn.
    propagate
        What feeds the next layers: the ``"quantized"`` ones or the ``"original"`` ones.
    embedding_bits, head_bits
        Quantize the embedding (round-to-nearest) and the head (with `method`) too; they stay in float by
        default. A tied head follows the embedding.
    include, exclude
        Shell globs over layer names: quantize only, and leave in float.
    overrides
        ``{glob: {"bits": …, "group_size": …}}`` for layers that differ; the last match wins.
    overwrite
        Replace an existing checkpoint folder `out`, once the new one is complete.
    threads
        Number of threads from now on, in the whole process.
    progress
        Show a progress bar with the time left and each block's error, on standard error.

    Returns
    -------
    QuantizationReport

    Raises
    ------
    CheckpointError, CalibrationError, NonFiniteError, OutputError, ValueError, TypeError
        If anything is wrong with what was given; the message says what and where. Nothing is written then.

    Examples
    --------
    >>> import bitwright, tempfile
    >>> demo = bitwright.demo_folder()
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     report = bitwright.quantize(
    ...         demo, f"{folder}/q", bits=4, calibration=demo / "calibration.txt", samples=8,
    ...         length=128, progress=False,
    ...     )
    >>> report.layer_bits_per_weight
    4.5
    """
    start = time.perf_counter()
    for name, value, known in (
        ("method", method, tuple(METHODS)),
        ("format", format, tuple(FORMATS)),
        ("propagate", propagate, ("quantized", "original")),
    ):
        if value not in known:
            raise ValueError(f"{name}: expected one of {', '.join(known)}, got {value!r}")
    if threads is not None:
        _kernels.set_num_threads(threads)
    options = MethodOptions(method, damping, act_order, block_size, grid_search)
    if method == "gptq" and calibration is None:
        raise ValueError("calibration: gptq needs text or token ids; method rtn does without")

    original = load_model(model)
    if original.format is not None:
        raise ValueError(
            f"{original.checkpoint.folder}: is quantized already ({original.format.name}); "
            f"start from the original"
        )
    kind = FORMATS[format]
    default = Precision(bits, None if group_size == -1 else group_size, grid or kind.grids[0])
    plan = plan_layers(
        original,
        kind,
        default,
        include=include,
        exclude=exclude,
        overrides=overrides,
        embedding_bits=embedding_bits,
        head_bits=head_bits,
    )
    dtype = kind.scale_dtype(original.dtype)
    if scale_dtype is not None:
        dtype = kind.check_scale_dtype(np.dtype(scale_dtype))
    tokens = None
    if calibration is not None:
        tokens = _calibration_tokens(original, calibration, samples, length, seed)

    with CheckpointWriter(
        out, overwrite, metadata={"format": kind.metadata}, source=original.checkpoint.folder
    ) as writer:
        run = _Run(original, writer, kind, plan, options, dtype, tokens, propagate == "quantized")
        run.go(progress)
        config = dict(original.checkpoint.config)
        config.update(kind.config(default, plan, original.architecture.block.format("")))
        writer.write_json("config.json", config)
        copy_side_files(original.checkpoint, writer)
    return run.report(Path(out), time.perf_counter() - start)


def _calibration_tokens(
    model: Model, source: TokenSource, samples: int | None, length: int | None, seed: int
) -> NDArray[np.int32]:
    tokens = load_tokens(
        source,
        tokenizer=model.checkpoint.folder,
        length=length,
        samples=samples,
        seed=seed,
        vocab_size=model.config.vocab_size,
    )
    if samples is None and len(tokens) > DEFAULT_SAMPLES:
        tokens = load_tokens(tokens, samples=DEFAULT_SAMPLES, seed=seed)
    return tokens


class _Run:
    """One pass over a model. Of the calibration it holds the hidden states before the current block and the
    inner states of the current stage, for all tokens; of the weights, one block."""

    def __init__(
        self,
        model: Model,
        writer: CheckpointWriter,
        format: type[Format],
        plan: Mapping[str, Precision | None],
        options: MethodOptions,
        scale_dtype: np.dtype[Any],
        tokens: NDArray[np.int32] | None,
        propagate: bool,
    ) -> None:
        self.model = model
        self.writer = writer
        self.format = format
        self.plan = plan
        self.options = options
        self.scale_dtype = scale_dtype
        self.tokens = tokens
        self.propagate = propagate
        self.layers: list[LayerReport] = []
        self.layer_bytes = 0.0
        self.layer_weights = 0
        self.written_bytes = 0

    def go(self, progress: bool) -> None:
        """Quantize and write all tensors."""
        model = self.model
        count = model.config.num_hidden_layers
        prefixes = tuple(model.block_prefix(index) for index in range(count))
        hidden = self._embed()
        rope = None if self.tokens is None else model.rotation(self.tokens.shape[1])
        bar = Progress(
            TextColumn("quantizing"),
            BarColumn(),
            MofNCompleteColumn(),
            TextColumn("blocks, time left"),
            TimeRemainingColumn(),
            TextColumn("{task.fields[error]}"),
            console=Console(stderr=True),
        )
        with bar if progress else nullcontext():
            task = bar.add_task("", total=count, error="")
            for index, prefix in enumerate(prefixes):
                reported = len(self.layers)
                block = model.block(index)
                if hidden is None or rope is None:
                    for stage in block.stages:
                        self._quantize_stage(block, prefix, stage, None)
                else:
                    self._calibrate_block(block, index, hidden, rope)
                self._carry(name for name in model.checkpoint.names() if name.startswith(prefix))
                errors = [layer.error for layer in self.layers[reported:]]
                shown = f"block error {max(errors):.2e}" if errors else "block left in float"
                bar.update(task, advance=1, error=shown)
        self._quantize_head(hidden)
        self._carry(name for name in model.checkpoint.names() if not name.startswith(prefixes))

    def report(self, out: Path, seconds: float) -> QuantizationReport:
        """Sum up the run."""
        return QuantizationReport(
            out=out,
            method=self.options.method,
            format=self.format.name,
            layers=tuple(self.layers),
            layer_bits_per_weight=8 * self.layer_bytes / self.layer_weights,
            bits_per_weight=8 * self.written_bytes / parameter_count(self.model),
            size_bytes=self.written_bytes,
            original_bytes=self.model.checkpoint.nbytes(),
            calibration_tokens=0 if self.tokens is None else self.tokens.size,
            seconds=seconds,
            peak_memory_bytes=peak_memory_bytes(),
        )

    def _embed(self) -> Float32 | None:
        """Quantize the embedding if it is planned, and look up the tokens in it."""
        name = self.model.architecture.embedding
        precision = self.plan.get(name)
        if self.tokens is None and precision is None:
            return None
        matrix = self.model.embedding()
        if precision is not None:
            solver = METHODS["rtn"](None, self.options)
            matrix = self._quantize(name, matrix, solver, precision, None)
        return None if self.tokens is None else matrix[self.tokens.reshape(-1)]

    def _calibrate_block(
        self, block: DecoderBlock, index: int, hidden: Float32, rope: Rotation
    ) -> None:
        """Quantize a block stage by stage and move `hidden` past it.

        While a stage is computed chunk by chunk, the next stage's statistics are gathered from the same
        chunk: every product of the forward pass is done once, and on warm data.
        """
        prefix = self.model.block_prefix(index)
        inner = np.empty((0, 0), np.float32)
        statistics = self._statistics(block, prefix, block.stages[0])
        if statistics is not None:
            for chunk in self._chunks(hidden, rope):
                statistics.add(block.stage_input(block.stages[0], hidden[chunk], inner))
        for stage, following in zip(block.stages, (*block.stages[1:], None), strict=True):
            if statistics is not None and not statistics.is_finite():
                raise NonFiniteError(
                    f"{self.model.checkpoint.folder}: the inputs of {prefix}{stage.linears[0]} "
                    f"(block {index}) are NaN or infinite; check the model with bitwright evaluate"
                )
            self._quantize_stage(block, prefix, stage, statistics)
            if following is None and not self._is_followed(index):
                return  # nobody reads the last hidden states
            if stage.norm is not None:
                inner = np.empty((len(hidden), stage.inner_width), np.float32)
            statistics = self._statistics(block, prefix, following)
            for chunk in self._chunks(hidden, rope):
                states = block.stage_input(stage, hidden[chunk], inner[chunk])
                block.advance(stage, states, hidden[chunk], inner[chunk], rope)
                if following is not None and statistics is not None:
                    statistics.add(block.stage_input(following, hidden[chunk], inner[chunk]))

    def _is_followed(self, index: int) -> bool:
        """Tell whether something after block `index` is calibrated."""
        last = index + 1 == self.model.config.num_hidden_layers
        return not last or self.plan.get(self.model.architecture.head) is not None

    def _statistics(
        self, block: DecoderBlock, prefix: str, stage: Stage | None
    ) -> LayerStatistics | None:
        """Return empty statistics for a stage, None where nothing of it will be quantized."""
        if stage is None or not any(self.plan[prefix + name] for name in stage.linears):
            return None
        return LayerStatistics(block.weights[f"{stage.linears[0]}.weight"].shape[1])

    @staticmethod
    def _chunks(hidden: Float32, rope: Rotation) -> Iterator[slice]:
        for first in range(0, len(hidden), rope.chunk_rows):
            yield slice(first, first + rope.chunk_rows)

    def _quantize_stage(
        self, block: DecoderBlock, prefix: str, stage: Stage, statistics: LayerStatistics | None
    ) -> None:
        """Quantize and write what is planned of a stage, and put the new weights into the block."""
        planned = [name for name in stage.linears if self.plan[prefix + name]]
        if not planned:
            return
        gram = None if statistics is None else statistics.gram()
        solver = METHODS[self.options.method](gram, self.options)
        for name in planned:
            precision = self.plan[prefix + name]
            weight = block.weights[f"{name}.weight"]
            if precision is not None:
                stored = self._quantize(prefix + name, weight, solver, precision, gram)
                if self.propagate:
                    block.weights[f"{name}.weight"] = stored

    def _quantize_head(self, hidden: Float32 | None) -> None:
        name = self.model.architecture.head
        precision = self.plan.get(name)
        if precision is None:
            return
        gram = None
        if hidden is not None:
            statistics = LayerStatistics(self.model.config.hidden_size)
            statistics.add(self.model.final_norm(hidden))
            gram = statistics.gram()
        solver = METHODS[self.options.method](gram, self.options)
        self._quantize(name, self.model.head(), solver, precision, gram)

    def _quantize(
        self,
        name: str,
        weight: Float32,
        solver: Solver,
        precision: Precision,
        gram: Float32 | None,
    ) -> Float32:
        """Quantize, write and report one layer; return the weights that a reader will see."""
        try:
            tensor = solver(
                weight, precision.bits, precision.group_size, precision.grid, self.scale_dtype
            )
        except BitwrightError:
            raise
        except ValueError as error:
            raise ValueError(f"{self.model.checkpoint.folder}: layer {name}: {error}") from error
        for part, array in self.format.pack(name, tensor).items():
            self._add(part, array)
        stored = tensor.dequantize()
        self.layer_bytes += tensor.nbytes
        self.layer_weights += weight.size
        self.layers.append(
            LayerReport(
                name,
                tensor.bits,
                tensor.group_size,
                relative_error(weight, stored, gram),
                tensor.damping if isinstance(tensor, GptqTensor) else None,
            )
        )
        return stored

    def _carry(self, names: Iterable[str]) -> None:
        """Write the tensors that stay as they are; a tied matrix once, under the embedding's name."""
        model = self.model
        matrix = f"{model.embedding_name}.weight"
        for name in names:
            target = name
            if model.tied:
                target = f"{model.architecture.embedding}.weight" if name == matrix else name
                if name == f"{model.architecture.head}.weight" and name != matrix:
                    continue
            if self.plan.get(target.removesuffix(".weight")) is not None:
                continue
            array = model.checkpoint.read(name)
            if array.dtype in FLOAT_DTYPES:
                require_finite(array, f"{model.checkpoint.file(name)}: tensor {name}")
            self._add(target, array)

    def _add(self, name: str, array: NDArray[Any]) -> None:
        self.writer.add(name, array)
        self.written_bytes += array.nbytes


def relative_error(weight: Float32, stored: Float32, gram: Float32 | None) -> float:
    """Return ``tr(Δ G Δᵀ) / tr(W G Wᵀ)``, Δ = `stored` − `weight`, over at most 64 evenly spaced rows.

    Without a gram the identity takes its place. A layer of zeros has error 0.
    """
    step = -(-len(weight) // ERROR_ROWS)
    rows = np.ascontiguousarray(weight[::step])
    change = stored[::step] - rows
    energies = []
    for matrix in (change, rows):
        product = matrix
        if gram is not None:
            product = np.empty_like(matrix)
            _kernels.linear(matrix, gram, None, product, False)
        energies.append(float(np.vdot(product, matrix)))
    return energies[0] / energies[1] if energies[1] > 0 else 0.0
