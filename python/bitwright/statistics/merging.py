"""Merges statistics of several runs over different tokens into those of all tokens."""

import os
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from bitwright.checkpoint.work_folder import WorkFolder
from bitwright.checkpoint.writer import check_apart
from bitwright.errors import StatisticsError
from bitwright.files.home import expands_home
from bitwright.methods.moments import Moments
from bitwright.ranks import current
from bitwright.runs.budget import Budget
from bitwright.runs.progress import Progressing, phase
from bitwright.statistics.folder import Statistics, StatisticsWriter, check_place

MERGED_BYTES = 12  # of an entry of a gram: its sum in float64, and a part or the mean in float32


@expands_home
def merge_statistics(
    parts: Sequence[str | os.PathLike[str]],
    out: str | os.PathLike[str],
    *,
    overwrite: bool = False,
    memory: float | None = None,
    progress: Progressing = True,
) -> Statistics:
    """Merge what `collect_statistics` has written for parts of the tokens, on one machine or several.

    Every mean is weighted by its tokens, and rounded to float32 once, stage by stage. The order of the
    parts does not matter. The result is that of one run over all tokens, up to how float32 rounds sums.

    Parameters
    ----------
    parts
        Folders of statistics of one model; no sample may be in two of them.
    out
        Folder to write, whole or not at all.
    overwrite
        Replace other statistics.
    progress
        As for `bitwright.quantize`.
    memory
        Budget in gigabytes (10⁹ bytes); by default three quarters of what is free.

    Returns
    -------
    Statistics

    Raises
    ------
    StatisticsError
        If a part is damaged, of another model, or has samples of another part, or if the text of one
        was begun with the tokenizer's first token and that of another without; the message names it.
    MemoryBudgetError
        If the budget is too small, with the smallest that would work.
    OutputError
        If `out` exists and may not be replaced, or cannot be written.

    Examples
    --------
    >>> import bitwright, tempfile
    >>> demo = bitwright.demo_folder()
    >>> ids = bitwright.load_tokens(demo / "calibration.txt", tokenizer=demo, length=64, samples=6)
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     for name, samples in ("a", ids[:4]), ("b", ids[4:]):
    ...         _ = bitwright.collect_statistics(demo, f"{folder}/{name}", samples, progress=False)
    ...     bitwright.merge_statistics([f"{folder}/a", f"{folder}/b"], f"{folder}/both").tokens
    384
    """
    if not parts:
        raise ValueError("parts: there are none")
    ranks, work = current(), WorkFolder(out)
    opened = ranks.on_first(lambda: _checked([Statistics(part) for part in parts], work, overwrite))
    # In float64 while parts are added, and then as it is written.
    widest = max((stage.channels for stage in opened[0].stages.values()), default=0)
    budget = Budget.of(memory)
    budget.require(budget.base + MERGED_BYTES * widest**2, work.out)
    with work:
        # Merging does not resume, but the state of another interrupted run must not be lost.
        work.resume({"statistics": [part.fingerprint() for part in opened]})
        ranks.on_first(lambda: _write(opened, work, overwrite, progress))
    return Statistics(out)


def _checked(parts: Sequence[Statistics], work: WorkFolder, overwrite: bool) -> list[Statistics]:
    """Return the parts in the order of their fingerprints, if they belong together."""
    check_place(work, overwrite)
    first = parts[0]
    of_text = [part for part in parts if part.first is not None]
    known = next((part for part in parts if part.checksum is not None), first)
    place_of: dict[str, Path] = {}
    for part in parts:
        check_apart(work.out, part.folder, "statistics that are read")
        if part.model != first.model:
            raise StatisticsError(
                f"{part.folder}: holds statistics of another model (fingerprint {part.model}) than "
                f"{first.folder} ({first.model}); only those of one model can be merged"
            )
        if part.checksum not in (None, known.checksum):
            raise StatisticsError(
                f"{part.folder}: the model had other weights than when {known.folder} was collected; "
                f"only statistics of one model can be merged"
            )
        if _channels(part) != _channels(first):
            raise StatisticsError(
                f"{part.folder}: has other stages than {first.folder}, or in other files; collect again"
            )
        if part.first is not None and part.first != of_text[0].first:
            raise StatisticsError(
                f"{part.folder}: its samples begin with {_begun(part)}, those of {of_text[0].folder} with "
                f"{_begun(of_text[0])}. Collect both with bos (the default) or both without (--no-bos)"
            )
        twice = [sample for sample in part.samples if sample in place_of]
        if twice:
            raise StatisticsError(
                f"{part.folder}: {len(twice)} of its {len(part.samples)} samples are in "
                f"{place_of[twice[0]]}, too, and would count twice. Collect over other samples, or leave "
                f"one of the two out"
            )
        place_of |= dict.fromkeys(part.samples, part.folder)
    return sorted(parts, key=lambda part: part.fingerprint())


def _begun(part: Statistics) -> str:
    """Describe the first tokens of a part's samples."""
    return (
        f"the tokenizer's {list(part.first)}" if part.first else "no token of the tokenizer's own"
    )


def _channels(part: Statistics) -> list[tuple[str, list[tuple[str, int]]]]:
    return [
        (file, [(name, stage.channels) for name, stage in stages.items()])
        for file, stages in part.by_file().items()
    ]


def _write(
    parts: Sequence[Statistics], work: WorkFolder, overwrite: bool, progress: Progressing
) -> None:
    writer = StatisticsWriter(work, overwrite)
    files = parts[0].by_file()
    with phase("merging", progress, len(files), unit="files") as shown:
        for file, stages in files.items():
            for name, stage in stages.items():
                writer.add(name, stage.channels, _merged(parts, name))
            writer.end_file(file)
            shown.step()
    samples = [sample for part in parts for sample in part.samples]
    firsts = {part.first for part in parts}
    first = firsts.pop() if len(firsts) == 1 else None
    checksum = next((part.checksum for part in parts if part.checksum is not None), None)
    tokens = sum(part.tokens for part in parts)
    tensors = next((part.tensors for part in parts if part.tensors), None)
    writer.finish(parts[0].model, tokens, samples, first, checksum, tensors)


def _merged(parts: Sequence[Statistics], name: str) -> Moments | None:
    """Return the means over the tokens of all parts; one part is in memory at a time."""
    tokens = sum(part.stages[name].tokens for part in parts)
    gram: NDArray[np.float64] | None = None
    mean_abs = np.zeros(parts[0].stages[name].channels)
    for part in parts:
        moments = part.read(name)
        if moments is None or moments.mean_abs is None:
            continue
        if gram is None:
            gram = np.zeros(moments.gram.shape)
        for total, rows in zip(gram, moments.gram, strict=True):  # so that no copy is made
            total += moments.tokens * rows.astype(np.float64)
        mean_abs += moments.tokens * moments.mean_abs
        del moments
    if gram is None:
        return None
    gram /= tokens
    return Moments(gram.astype(np.float32), None, mean_abs / tokens, tokens)
