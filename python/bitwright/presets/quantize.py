"""Quantizes a model by any method into any format."""

import os
from collections.abc import Mapping, Sequence
from typing import Any, Literal

from numpy.typing import DTypeLike

from bitwright.blocks.scaling import Clip, Objective
from bitwright.checkpoint.hub import finds_models
from bitwright.files.home import expands_home
from bitwright.files.inputs import same_inputs
from bitwright.formats import FormatName, GroupSize
from bitwright.grids.tensor import Grid
from bitwright.methods.awq import DEFAULT_GRID
from bitwright.methods.method import ActivationMethod
from bitwright.methods.metrics import Metric
from bitwright.precision.recipe import Overrides, Recipe
from bitwright.presets.best import best_quantization
from bitwright.presets.high import high_quantization
from bitwright.quantization.options import Preset, QuantizationOptions
from bitwright.quantization.quantize import check_run, run_quantization
from bitwright.records.card import python_call
from bitwright.records.made_by import made_by
from bitwright.records.reports import QuantizationReport
from bitwright.runs.progress import Progressing
from bitwright.text.samples import TokenSource
from bitwright.warned import reports_warnings


@reports_warnings
@expands_home
@finds_models
@same_inputs()
def quantize(
    model: str | os.PathLike[str],
    out: str | os.PathLike[str],
    method: str = "gptq",
    bits: int | str = 4,
    group_size: GroupSize = "auto",
    format: FormatName = "mlx",
    calibration: TokenSource | None = None,
    *,
    preset: Preset = "default",
    refine: bool | None = None,
    drift: bool | None = None,
    samples: int | None = None,
    length: int | None = None,
    seed: int = 0,
    bos: bool = True,
    grid: Grid | str | None = None,
    scale_dtype: DTypeLike | None = None,
    damping: float | None = None,
    act_order: bool = True,
    block_size: int = 128,
    grid_search: bool | None = None,
    n_grid: int = DEFAULT_GRID,
    coarse_to_fine: bool = True,
    clip: Clip = "default",
    metric: str | Metric = "mse",
    objective: Objective = "layer",
    salient_ratio: float = 0.01,
    activation_method: ActivationMethod = "rms",
    activations: str | os.PathLike[str] | None = None,
    statistics: str | os.PathLike[str] | None = None,
    imatrix: str | os.PathLike[str] | None = None,
    propagate: Literal["quantized", "original"] | None = None,
    float_embeddings: bool = False,
    embedding_bits: int | None = None,
    head_bits: int | None = None,
    include: Sequence[str] = (),
    exclude: Sequence[str] = (),
    overrides: Overrides | None = None,
    recipe: str | os.PathLike[str] | Recipe | None = None,
    type: str | None = None,
    pure: bool = False,
    tensor_types: Mapping[str, str] | None = None,
    token_embedding_type: str | None = None,
    output_tensor_type: str | None = None,
    split_max_size: int | None = None,
    target_size: int | str | None = None,
    allow_requantize: bool = False,
    allow_unfused: bool = False,
    memory: float | None = None,
    resume: bool = True,
    overwrite: bool = False,
    threads: int | None = None,
    progress: Progressing = True,
) -> QuantizationReport:
    """Quantize a checkpoint folder into another one.

    Weights are read, quantized and written one decoder block at a time. Inside a block the layers are
    taken in the order of the computation, each group of layers with one input together: their statistics
    come from what the already quantized layers before them produce.

    Parameters
    ----------
    model
        Checkpoint folder (config.json and safetensors) or GGUF file, in float.
    out
        Folder to write; it appears when everything is done, or not at all.
    method
        ``"gptq"``, ``"rtn"``, ``"awq"``, ``"awq+gptq"`` (AWQ's scales, then GPTQ on the scaled weights) or
        ``"salient"`` (see `awq_quantize`; 4 bits). All but rtn are calibrated.
    bits, group_size
        Of every linear layer in the decoder blocks; group size None or -1 is the whole row, ``"auto"`` 64
        or what the format asks for. Bits may be written with the group size, ``"4:64"``, and a grid or type
        that has its own bits stands for both: ``"IQ4_XS"``.
    format
        ``"mlx"`` (mlx-lm), ``"gptq"``, ``"awq"`` or ``"compressed-tensors"`` (transformers, vLLM),
        ``"gguf"`` (llama.cpp), ``"marlin"`` (vLLM up to 0.10.1); see docs/formats.md.
    calibration
        A file of text, JSON, tables or token ids, several with shares, an array ``[samples, length]``, or
        a list of texts; see `bitwright.load_tokens`. By default `bitwright.calibration_text`. For
        ``"rtn"`` it only serves the grid search and the reported errors.
    preset
        ``"fast"`` is the method by itself. ``"default"`` adds `refine` and `drift` to gptq, awq and
        awq+gptq. ``"high"`` then refines every layer by what its errors do to the model's predictions,
        which gradients over half of the calibration tell, see `refine_two_sided`. ``"best"`` chooses the
        precision of every layer within the same size, and trains the scales after ``"high"``; see
        `bitwright.quantize_best`.
    refine
        After a layer is quantized, improve codes and scales in the metric of its gram, see `refine`. By
        default as the preset says; for every method if it is True.
    drift
        Quantize weights that make up for what the errors of the layers before have changed in a layer's
        inputs; needs `propagate` to be ``"quantized"``. By default as the preset says.
    samples, length, seed
        Take so many samples of so many tokens, chosen by the seed. By default at most 128 samples, of 512
        tokens, or as many as the model knows positions, where `calibration` is text.
    bos
        Begin every sample of a text with what the tokenizer puts first, see `load_tokens`.
    grid
        One that the format stores; its first by default (mlx: affine; gptq: symmetric, or zero_point;
        awq: zero_point, or symmetric; gguf: k where rows are multiples of 256, or affine or symmetric), or
        a type of GGUF, such as ``"Q4_K"``.
    scale_dtype
        Dtype of scales and biases, by default what the format asks for.
    damping
        As for `quantize_gptq`, and for `bitwright.refine`; by default 0.01, and 0.05 with drift correction.
    act_order, block_size, grid_search
        As for `quantize_gptq`; `grid_search` is on by default for gptq and awq+gptq, off for the others.
    n_grid, coarse_to_fine
        AWQ's scales are searched over so many ratios, see `search_scale`; and clipping over half as many
        limits.
    clip
        Clip the range of each group, see `quantize_clipped`: by ``"default"`` of all linears but query and
        key, of ``"all"`` or of ``"none"``. For awq+gptq the grid search takes its place.
    metric
        AWQ's error metric: ``"mse"``, ``"mae"``, ``"relative"``, ``"cosine"``, ``"huber"``, or a function
        of reference and candidate outputs ``[tokens, channels]`` that returns an error per channel. All but
        mse are computed on some of the tokens.
    objective
        What AWQ's metric judges: the outputs of each ``"layer"``, which is exact through the gram, or
        the real outputs of attention and MLP (``"block"``).
    salient_ratio, activation_method
        As for `awq_quantize`; methods other than rms need `activations`.
    activations
        An .npz of layer inputs (see `collect_activations`) in place of `calibration`; not for AWQ's scales.
    statistics
        Folder of statistics of the same model (see `collect_statistics`) in place of `calibration`. They
        are those of the original's layers, so there is no drift correction.
    imatrix
        An importance matrix of llama.cpp (see `export_imatrix`), GGUF or .dat: what is known of inputs
        where nothing else is. Without `calibration` every layer is rounded by it, with a search for the
        range of each group; beside it, the embedding is.
    propagate
        What feeds the next layers: the ``"quantized"`` ones (default) or the ``"original"`` ones.
    float_embeddings
        Leave embedding and head in float, but for those whose bits are given. By default they are quantized
        where the tools of the format's engines do so: for mlx in the precision of the layers, for gguf in
        Q6_K (Q5_K beside 2 bits) or more; the other formats keep them in float.
    embedding_bits, head_bits
        Other bits for the embedding, which is rounded to nearest, and the head, which `method` quantizes. A
        tied head follows the embedding.
    include, exclude
        Shell globs over layer names, embedding and head among them: quantize only, and leave in float.
    overrides
        ``{glob: "4:64"}``, or ``{glob: {"bits": …, "group_size": …, "grid": …}}``, for layers that differ;
        the last match wins.
    recipe
        The precision of every layer, see `bitwright.Recipe`, or a file of it, in place of bits and
        group_size; `overrides` count more.
    type
        A mixture of types by llama.cpp's name, such as ``"Q4_K_M"``, in place of `bits`, `group_size` and
        `grid`: every tensor, embedding and head included, gets the type that llama-quantize gives it. The
        file is called ``NAME-TYPE.gguf``. Only for the gguf format.
    pure
        Give the type of most tensors to all.
    tensor_types
        ``{pattern: type}``: other types for tensors in whose names in the GGUF file, such as
        ``blk.0.attn_q.weight``, this regular expression is found; the first that is counts.
    token_embedding_type, output_tensor_type
        Those of embedding and head. F32, F16 and BF16 leave a tensor in float, as the model has it.
    split_max_size
        Write several GGUF files, with at most so many bytes of tensors in each.
    target_size
        For preset best, in place of `bits`: bytes of all weight files, such as ``"3.2GB"``, that the
        precisions of all layers, embedding and head among them, are chosen within.
    allow_requantize
        Take a model that is quantized already, in any format that is read, as if its weights were the
        original's. What its first rounding lost stays lost: use the original where there is one.
    allow_unfused
        Let layers differ that vLLM computes as one module (query, key and value; gate and up; all experts
        of a layer), in the formats that it loads. It refuses such a folder; other engines may not.
    memory
        Gigabytes (10⁹ bytes) that the process may take: hidden states that do not fit go to files beside
        `out`. By default three quarters of what is free.
    resume
        Go on where an interrupted run with the same arguments has stopped, after its last complete block,
        with the bytes that an undisturbed run gives; it is refused where anything else than memory, threads
        or ranks has changed. False starts over.
    overwrite
        Replace an existing checkpoint folder `out`, once the new one is complete.
    threads
        Number of threads from now on, in the whole process.
    progress
        Show bars with the time left and each block's error on standard error, or lines where that is no
        terminal; False shows nothing. Or a function, which gets a `Progress` at every step in their place.
        The log ``bitwright`` gets the lines at level INFO in any case.

    Returns
    -------
    QuantizationReport

    Raises
    ------
    MemoryBudgetError
        If the run would take more memory than it may; the message tells how much it needs.
    ResumeError
        If an interrupted run had other arguments or inputs; the message tells which.
    CheckpointError, CalibrationError, StatisticsError, NonFiniteError, OutputError, ValueError, TypeError
        If anything is wrong with what was given; the message says what and where. Nothing is written then,
        but what a run needs to resume after an interruption, in ``.NAME.work`` beside `out`.

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
    arguments = dict(locals())
    options = QuantizationOptions.of(arguments)
    with made_by(python_call(quantize, arguments)):
        if preset == "best":
            return best_quantization(model, out, options)
        if preset == "high":
            return high_quantization(model, out, options)
        return run_quantization(model, out, options)


def check_quantization(
    model: str | os.PathLike[str], out: str | os.PathLike[str], **given: Any
) -> None:
    """Raise what `quantize` would before its first block; nothing is written."""
    check_run(model, out, QuantizationOptions.of({**given, "progress": False}))
