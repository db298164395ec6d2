"""Salient-weight AWQ of whole models, from a file of activations."""

import os
from collections.abc import Mapping, Sequence

from bitwright.files.home import expands_home
from bitwright.formats import FormatName
from bitwright.methods.method import ActivationMethod
from bitwright.presets.quantize import quantize
from bitwright.records.reports import QuantizationReport
from bitwright.runs.progress import Progressing
from bitwright.warned import reports_warnings


@reports_warnings
@expands_home
def awq_quantize_model(
    model_path: str | os.PathLike[str],
    output_path: str | os.PathLike[str],
    activations_path: str | os.PathLike[str],
    group_size: int = 128,
    salient_ratio: float = 0.01,
    activation_method: ActivationMethod = "rms",
    verbose: Progressing = True,
    *,
    format: FormatName = "awq",
    exclude: Sequence[str] = (),
    overrides: Mapping[str, Mapping[str, int]] | None = None,
    allow_unfused: bool = False,
    memory: float | None = None,
    overwrite: bool = False,
    resume: bool = True,
) -> QuantizationReport:
    """Quantize all linear layers of a model's blocks to symmetric INT4, protecting the salient weights.

    Parameters
    ----------
    model_path
        Checkpoint folder in float.
    output_path
        Folder to write.
    activations_path
        An .npz of layer inputs, for example from `collect_activations`.
    group_size, salient_ratio, activation_method
        As for `awq_quantize`.
    verbose
        As `progress` of `quantize`.
    format
        ``"awq"`` (transformers, vLLM), ``"mlx"`` or ``"gptq"``: all hold the same codes and scales.
    exclude, overrides, allow_unfused
        As for `quantize`.
    memory
        Budget in gigabytes (10⁹ bytes); by default three quarters of what is free.
    overwrite
        Replace an existing checkpoint folder.
    resume
        Go on where the same call was interrupted.

    Returns
    -------
    QuantizationReport

    Raises
    ------
    MemoryBudgetError
        If the run would take more memory than it may; the message tells how much it needs.
    CheckpointError, CalibrationError, NonFiniteError, OutputError, ValueError
        If anything is wrong with what was given; nothing is written then.

    Examples
    --------
    >>> import bitwright, tempfile
    >>> demo = bitwright.demo_folder()
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     seen = bitwright.collect_activations(
    ...         demo, f"{folder}/a.npz", demo / "calibration.txt", length=64
    ...     )
    ...     report = bitwright.awq_quantize_model(
    ...         demo, f"{folder}/q", f"{folder}/a.npz", group_size=32, verbose=False
    ...     )
    >>> report.layer_bits_per_weight
    4.625
    """
    return quantize(
        model_path,
        output_path,
        method="salient",
        group_size=group_size,
        format=format,
        salient_ratio=salient_ratio,
        activation_method=activation_method,
        activations=activations_path,
        exclude=exclude,
        overrides=overrides,
        allow_unfused=allow_unfused,
        memory=memory,
        overwrite=overwrite,
        resume=resume,
        progress=verbose,
    )
