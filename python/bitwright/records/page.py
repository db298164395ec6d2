"""Reports as one page of HTML, which needs nothing but itself."""

import os
import re
from collections.abc import Mapping, Sequence
from html import escape
from math import log
from pathlib import Path
from typing import Any

from bitwright.errors import OutputError, printable
from bitwright.files.home import expands_home
from bitwright.files.replacing import check_new_file, followed, replaced
from bitwright.files.text_file import read_bytes
from bitwright.markup import html_table
from bitwright.records.described import REPORT_FILE, described, megabytes, read_report

MARK = '<meta name="generator" content="bitwright">'  # identifies our pages
MOST_BYTES = 64 << 20  # of a page
TEMPLATE = Path(__file__).with_name("page.html")
_BLOCK = re.compile(
    r"^(.*?\.)(\d+)\.(.+)$"
)  # of a layer's name: the block, and what it is called in it
_EXPERT = re.compile(r"\.\d+\.")
STEPS = 9  # shades of a heat map
WIDTH, HEIGHT = 640, 220  # of a plot, in its own units
MARGIN = 44
FACTS = {
    "method": "method",
    "source_format": "converted from",
    "format": "format",
    "layer_bits_per_weight": "bits per weight of the quantized layers",
    "bits_per_weight": "bits per weight over all tensors",
    "size_bytes": "size",
    "original_bytes": "size before",
    "calibration_tokens": "calibration tokens",
    "perplexity": "perplexity",
    "reference_perplexity": "perplexity of the reference",
    "kl_divergence": "KL divergence, nats per token",
    "top1_agreement": "same first choice",
    "tokens": "tokens",
    "loss": "loss",
    "steps": "steps",
    "best_step": "best step",
    "kl_before": "validation KL before training",
    "kl_after": "validation KL after training",
    "stopped": "stopped",
}
"""What of a report is told first, by the names of its fields."""


@expands_home
def report_page(
    report: object, path: str | os.PathLike[str] | None = None, *, overwrite: bool = False
) -> str:
    """Return a report as one page of HTML: settings, sizes, errors of the layers, figures and curves.

    The page loads nothing, and is the same for the same report.

    Parameters
    ----------
    report
        Of a run or an evaluation, sensitivities, or a folder that bitwright has written, for its
        report.json.
    path
        A file to write it to, too.
    overwrite
        Whether that may take the place of a file that is no such page.

    Returns
    -------
    str
        The page.

    Raises
    ------
    OutputError
        If the file cannot be written, or the folder has no report.

    Examples
    --------
    >>> import bitwright, tempfile
    >>> demo = bitwright.demo_folder()
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     report = bitwright.quantize(demo, f"{folder}/q", "rtn", bits=3, progress=False)
    ...     page = bitwright.report_page(f"{folder}/q", f"{folder}/page.html")
    >>> page.count("<section")
    2
    """
    if isinstance(report, str | os.PathLike):
        folder = Path(report)
        if not (folder / REPORT_FILE).is_file():
            raise OutputError(
                f"{folder}: has no {REPORT_FILE}; bitwright writes one with every model"
            )
        content = read_report(folder)
    else:
        content = described(report)
    if path is not None:
        check_page(Path(path), overwrite)
        return write_page(Path(path), content)
    return page_of(content)


def check_page(path: Path, overwrite: bool) -> None:
    """Raise an error unless a page can be written there, in place of nothing or of another page."""
    check_new_file(path, _read_mark, overwrite)


def write_page(path: Path, content: Mapping[str, Any]) -> str:
    """Write the page of what `described` or `read_report` has returned, and return it."""
    page = page_of(content)
    with replaced(followed(path)) as partial:
        partial.write_text(page, encoding="utf-8")
    return page


def page_of(content: Mapping[str, Any]) -> str:
    """Return the page of what `described` or `read_report` has returned."""
    from jinja2 import Environment, StrictUndefined

    environment = Environment(autoescape=True, undefined=StrictUndefined, trim_blocks=True)
    template = environment.from_string(TEMPLATE.read_text(encoding="utf-8"))
    return template.render(mark=MARK, **_parts(content)) + "\n"


def fragment_of(content: Mapping[str, Any]) -> str:
    """Return the figures and errors of a report as HTML for a notebook."""
    heat = _heat(_run(content))
    rows = "" if heat is None else _heat_table(heat)
    return html_table(_facts(_run(content))) + rows


def _read_mark(path: Path) -> None:
    if MARK.encode() not in read_bytes(path, MOST_BYTES, OutputError):
        raise OutputError(f"{path}: is not a page of bitwright's")


def _run(content: Mapping[str, Any]) -> Mapping[str, Any]:
    """Return the run that has quantized: the report itself, or a part of it."""
    run: Mapping[str, Any] = content.get("quantization") or content
    return run


def _parts(content: Mapping[str, Any]) -> dict[str, Any]:
    """Return what the template shows."""
    run = _run(content)
    made = run if run.get("layers") is not None else (run.get("student") or run)
    training = run if "validations" in run else run.get("training")
    settings = content.get("settings") or {}
    title = settings.get("out") or settings.get("model") or "a report"
    sensitivities = content.get("sensitivities") or (content if "per_million" in content else None)
    rows = {"original": content.get("before"), "quantized": content.get("after")}
    return {
        "title": printable(str(title)),
        "version": content.get("bitwright"),
        "command": content.get("command"),
        "facts": _facts(run) if made is run else [*_facts(made), *_facts(run)],
        "evaluations": [
            (name, _evaluation(each)) for name, each in rows.items() if each is not None
        ],
        "heat": _heat(made),
        "blocks": made.get("blocks") if isinstance(made.get("blocks"), list) else [],
        "bars": None if sensitivities is None else _bars(sensitivities["per_million"]),
        "curves": None if training is None else _curves(training),
        "settings": [(name, _setting(value)) for name, value in settings.items()],
    }


def _facts(run: Mapping[str, Any]) -> list[tuple[str, str]]:
    known = [(label, run.get(name), name) for name, label in FACTS.items()]
    rows = [(label, _fact(name, value)) for label, value, name in known if value is not None]
    if isinstance(run.get("layers"), list):
        rows.insert(0, ("quantized layers", f"{len(run['layers']):,}"))
    return rows


def _fact(name: str, value: object) -> str:
    if isinstance(value, bool | str) or value is None:
        return printable(str(value))
    assert isinstance(value, int | float)
    if name.endswith("_bytes"):
        return megabytes(int(value))
    if name == "top1_agreement":
        return f"{100 * value:.2f} %"
    return f"{value:,}" if isinstance(value, int) else f"{value:.5g}"


def _evaluation(figures: Mapping[str, Any]) -> list[str]:
    names = ("perplexity", "kl_divergence", "top1_agreement", "bits_per_weight")
    return ["" if figures[name] is None else _fact(name, float(figures[name])) for name in names]


def _setting(value: object) -> str:
    if isinstance(value, list):
        return ", ".join(map(_setting, value))
    if isinstance(value, bool):
        return "yes" if value else "no"
    return printable(str(value))


def _heat(run: Mapping[str, Any]) -> dict[str, Any] | None:
    """Return the layers' errors by kind and block; of experts the largest. The rest of the model has a list
    of its own."""
    layers = run.get("layers")
    if not isinstance(layers, list) or not layers or "error" not in layers[0]:
        return None
    cells: dict[str, dict[int, Mapping[str, Any]]] = {}
    rest = []
    for layer in layers:
        match = _BLOCK.match(layer["name"])
        if match is None:
            rest.append(layer)
            continue
        kind = _EXPERT.sub(".*.", match[3])
        row = cells.setdefault(kind, {})
        before = row.get(int(match[2]))
        if before is None or before["error"] < layer["error"]:
            row[int(match[2])] = layer
    errors = sorted(layer["error"] for layer in layers if layer["error"] is not None)
    columns = sorted({block for row in cells.values() for block in row})
    shown = [
        (kind, [_cell(row.get(block), errors) for block in columns]) for kind, row in cells.items()
    ]
    return {
        "columns": columns,
        "rows": shown,
        "rest": [_cell(layer, errors) for layer in rest],
        "least": f"{errors[0]:.2e}" if errors else "",
        "most": f"{errors[-1]:.2e}" if errors else "",
        "steps": list(range(STEPS)),
    }


def _cell(layer: Mapping[str, Any] | None, errors: Sequence[float]) -> dict[str, str] | None:
    """Return a cell; its shade is the place of its error among all, in logarithms."""
    if layer is None:
        return None
    error = layer["error"] or 0.0
    positive = [each for each in errors if each > 0]
    shade = 0
    if error > 0 and positive[-1] > positive[0]:
        shade = round((STEPS - 1) * log(error / positive[0]) / log(positive[-1] / positive[0]))
    stored = layer.get("bits") or (layer.get("after") or {}).get("bits") or ""
    return {
        "name": printable(layer["name"]),
        "error": f"{error:.2e}",
        "short": f"{error:.0e}".replace("e-0", "e-"),
        "bits": str(stored),
        "shade": str(shade),
    }


def _heat_table(heat: Mapping[str, Any]) -> str:
    """Return the heat map as a table with colours of its own, for notebooks."""
    head = "".join(f"<th>{block}</th>" for block in heat["columns"])
    lines = []
    for kind, row in heat["rows"]:
        cells = "".join(
            "<td></td>"
            if cell is None
            else f"<td title='{escape(cell['name'])}' style='background:rgba(214,94,20,"
            f"{(1 + int(cell['shade'])) / (STEPS + 4):.2f})'>{cell['short']}</td>"
            for cell in row
        )
        lines.append(f"<tr><th style='text-align:left'>{escape(kind)}</th>{cells}</tr>")
    caption = "<caption>relative squared error of each layer, by block</caption>"
    return f"<table>{caption}<tr><th></th>{head}</tr>{''.join(lines)}</table>"


def _bars(values: Mapping[str, float]) -> list[dict[str, Any]]:
    """Return sensitivities as bars, in the order of the model."""
    most = max((value for value in values.values() if value), default=0.0)
    return [
        {
            "name": printable(name),
            "value": f"{value or 0.0:.4g}",
            "share": f"{100 * max(value or 0.0, 0.0) / most if most > 0 else 0:.2f}",
        }
        for name, value in values.items()
    ]


def _curves(training: Mapping[str, Any]) -> dict[str, Any] | None:
    """Return the losses and the validation KL over the steps as points of a plot."""
    losses = list(enumerate(training["losses"], start=1))
    checks = [(int(step), value) for step, value in training["validations"]]
    known = [value for _, value in (*losses, *checks) if value is not None]
    if not known:
        return None
    steps = max(1, training["steps"])
    top = max(known) * 1.05 or 1.0

    def place(step: float, value: float) -> str:
        across = MARGIN + (WIDTH - MARGIN - 8) * step / steps
        return f"{across:.1f},{8 + (HEIGHT - 36) * (1 - value / top):.1f}"

    return {
        "width": WIDTH,
        "height": HEIGHT,
        "left": MARGIN,
        "losses": " ".join(place(step, value) for step, value in losses if value is not None),
        "checks": " ".join(place(step, value) for step, value in checks if value is not None),
        "points": [
            (*place(step, value).split(","), f"step {step}: {value:.5f}")
            for step, value in checks
            if value is not None
        ],
        "ticks": [
            (f"{top * part / 4:.3g}", place(0, top * part / 4).split(",")[1]) for part in range(5)
        ],
        "steps": [
            (str(round(steps * part / 4)), place(steps * part / 4, 0).split(",")[0])
            for part in range(5)
        ],
        "floor": place(0, 0).split(",")[1],
        "loss": training["loss"],
        "table": [(str(step), f"{value:.5f}") for step, value in checks if value is not None],
    }
