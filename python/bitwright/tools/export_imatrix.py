"""Statistics of a model's layers as an importance matrix, for llama-quantize."""

import os
from pathlib import Path

from bitwright.errors import StatisticsError
from bitwright.files.home import expands_home
from bitwright.files.replacing import check_new_file
from bitwright.loading.model import load_model
from bitwright.statistics.folder import Statistics
from bitwright.statistics.imatrix import ImportanceMatrix, imatrix_of, stages_of_tensors


@expands_home
def export_imatrix(
    statistics: str | os.PathLike[str],
    imatrix: str | os.PathLike[str],
    *,
    model: str | os.PathLike[str] | None = None,
    overwrite: bool = False,
) -> ImportanceMatrix:
    """Write the mean squares of all layers' inputs as llama.cpp's tools take them.

    Parameters
    ----------
    statistics
        Folder that `collect_statistics` or `merge_statistics` has written.
    imatrix
        File to write: GGUF, or in llama.cpp's older way if its name ends in ``.dat``.
    model
        What the statistics are of; only asked for where they do not tell themselves, since a bitwright of
        before has collected them.
    overwrite
        Replace another importance matrix.

    Returns
    -------
    ImportanceMatrix

    Raises
    ------
    StatisticsError, UnsupportedModelError, OutputError
        If the statistics are damaged or of another model, llama.cpp does not know the model, or the file
        cannot be written.

    Examples
    --------
    >>> import bitwright, tempfile
    >>> demo = bitwright.demo_folder()
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     known = bitwright.collect_statistics(
    ...         demo, f"{folder}/s", demo / "calibration.txt", samples=4, length=64, progress=False
    ...     )
    ...     made = bitwright.export_imatrix(known.folder, f"{folder}/imatrix.gguf")
    >>> made.entries["blk.0.attn_q.weight"].sums.shape
    (1, 64)
    """
    known, target = Statistics(statistics), Path(imatrix)
    check_new_file(target, ImportanceMatrix.load, overwrite)
    tensors = known.tensors
    if model is not None:
        opened = load_model(model)
        known.check(opened)
        tensors = stages_of_tensors(opened)
    if not tensors:
        raise StatisticsError(
            f"{known.folder}: does not tell which tensors of llama.cpp its groups of layers are; name "
            f"the model (model, --model)"
        )
    found = imatrix_of(known, tensors, known.folder.name)
    found.save(target)
    return found
