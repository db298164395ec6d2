"""Sensitivities as a plot."""

import os
from collections.abc import Mapping
from typing import TYPE_CHECKING

from bitwright.errors import printable
from bitwright.files.home import expands_home
from bitwright.precision.sensitivities import Sensitivities, precision_name
from bitwright.records.plots import new_figure, save_figure

if TYPE_CHECKING:
    from matplotlib.figure import Figure


@expands_home
def plot_sensitivities(
    sensitivities: Sensitivities, path: str | os.PathLike[str] | None = None
) -> "Figure":
    """Plot the sensitivity of every layer per million parameters, as bars in the order of the model.

    Parameters
    ----------
    sensitivities
        What `bitwright.estimate_sensitivities` returned.
    path
        File to write; its ending says how (.png, .svg, .pdf). None writes none.

    Returns
    -------
    matplotlib.figure.Figure

    Raises
    ------
    MissingExtraError
        If matplotlib is not installed.
    OutputError, ValueError
        If the file cannot be written, or its ending is unknown.

    Examples
    --------
    >>> import bitwright, tempfile
    >>> found = bitwright.Sensitivities(
    ...     {"a": 0.1}, {"a": 64}, (3, 64), (5, 64), "model", "tokens", "kl", 0.1
    ... )
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     bitwright.plot_sensitivities(found, f"{folder}/bars.svg").axes[0].get_title()
    '3:64 instead of 5:64'
    """
    values: Mapping[str, float] = sensitivities.per_million
    figure, axes = new_figure(height=max(3.0, 0.18 * len(values)))
    axes.barh([printable(name) for name in values], list(values.values()))
    axes.invert_yaxis()
    axes.tick_params(axis="y", labelsize=7)
    axes.set(
        xlabel="sensitivity per million parameters",
        title=f"{precision_name(sensitivities.low)} instead of {precision_name(sensitivities.high)}",
    )
    save_figure(figure, path)
    return figure
