"""The build of the kernels in use: instruction set, BLAS, threads."""

from dataclasses import dataclass

from bitwright import _kernels
from bitwright.process.processors import available_processors
from bitwright.warned import warn


@dataclass(frozen=True)
class BuildInfo:
    """The kernels in use.

    Parameters
    ----------
    instruction_set
        ``x86-64-v2``, ``x86-64-v3`` (AVX2), ``x86-64-v4`` (AVX-512), or ``plain`` elsewhere.
    blas
        The linear algebra library's description of itself.
    threads
        Threads that kernels run on.
    bfloat16
        Whether products in bfloat16 are the processor's own (AVX512-BF16).
    """

    instruction_set: str
    blas: str
    threads: int
    bfloat16: bool


def build_info() -> BuildInfo:
    """Return which build of the kernels was chosen for this processor, its BLAS and thread count.

    Examples
    --------
    >>> import bitwright
    >>> bitwright.build_info().threads >= 1
    True
    """
    return BuildInfo(
        _kernels.instruction_set,
        _kernels.blas(),
        _kernels.num_threads(),
        _kernels.multiplies_bfloat16(),
    )


def set_num_threads(threads: int) -> None:
    """Set the number of threads of all kernels, from 1 to 1024, for the whole process.

    Threads beyond the processors that there are would only keep each other waiting: so many as there are
    processors are used, with a warning.

    Parameters
    ----------
    threads
        How many.

    Raises
    ------
    ValueError
        If it is out of range.

    Examples
    --------
    >>> import bitwright
    >>> bitwright.set_num_threads(bitwright.build_info().threads)
    """
    _kernels.set_num_threads(threads)
    most = available_processors()
    if threads > most:
        warn(
            f"threads: {threads} were asked for, but there are processors for {most}; {most} are used"
        )
        _kernels.set_num_threads(most)
