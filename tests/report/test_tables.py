"""Tables of every width: no number and no heading is cut or broken, on terminals and in pipes."""

import io
import os
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from rich.console import Console

import bitwright
from bitwright.evaluation import Evaluation
from bitwright.formats import Precision
from bitwright.methods.awq import ScaleSearch
from bitwright.precision.recipe import Recipe
from bitwright.precision.sensitivities import Sensitivities
from bitwright.records.reports import (
    BlockReport,
    ConversionReport,
    ConvertedLayer,
    DwqReport,
    LayerReport,
    QuantizationReport,
)
from bitwright.report.printing import (
    print_conversion,
    print_dwq_report,
    print_evaluations,
    print_inspection,
    print_recipe,
    print_report,
    print_sensitivities,
)
from bitwright.report.tables import print_facts, print_table
from bitwright.tools.inspect import Inspection, LayerKind

DEMO = bitwright.demo_folder()
LONG = "/home/somebody/models/a-model-with-a-long-name/of-many-parts"
LAYERS = [f"model.layers.{i}.block_sparse_moe.experts.{i}.down_proj" for i in range(6)]
EVALUATION = Evaluation(
    123456.7891, 0.12345, 0.987654, 4.50781, 123456, 1.0, 98_765_432_100, reference_perplexity=98765.4321
)  # fmt: skip
SENSITIVITIES = Sensitivities(
    {name: 0.012345 * (i + 1) for i, name in enumerate(LAYERS)},
    dict.fromkeys(LAYERS, 1_000_000),
    *((3, 64), (5, 64), "m", "t", "kl", 0.54321),
)
LAYER = LayerReport(LAYERS[0], 4, 128, 0.012345, 0.0123456, error_before=0.98765)
SEARCHES = {
    name: ScaleSearch(np.ones(1, np.float32), ratio, {})
    for name, ratio in (("q_proj", 0.35), ("up_proj", 0.45))
}
BLOCK = BlockReport(12, 1.2345e-3, 2.3456e-4, True, SEARCHES)
REPORT = QuantizationReport(
    *(Path(LONG), "awq+gptq", "compressed-tensors", (LAYER,) * 5, (BLOCK, BLOCK), 4.50781, 5.12345),
    *(1_234_567_890, 9_876_543_210, 1_048_576, 12345.6, 98_765_432_100),
)
GRID = Precision(4, 64, "affine")
CASES: dict[str, tuple[Callable[[Console], None], list[str]]] = {
    "evaluation": (
        lambda console: print_evaluations({LONG: EVALUATION}, console),
        [
            "perplexity",
            "123456.7891",
            "reference",
            "98765.4321",
            "KL (nats/token)",
            "0.12345",
            "top-1",
            "98.77 %",
            "bits/weight",
            "4.508",
            "tokens/s",
            "123,456",
            "98,765.4 MB",
        ],
    ),
    "several evaluations": (
        lambda console: print_evaluations(
            dict.fromkeys(("original", "rtn", "gptq"), EVALUATION), console
        ),
        ["original", "rtn", "gptq", "123456.7891", "98765.4321", "KL (nats/token)", "98.77 %"],
    ),
    "many evaluations": (
        lambda console: print_evaluations(dict.fromkeys(map(str, range(9)), EVALUATION), console),
        ["123456.7891", "98765.4321", "KL (nats/token)", "bits/weight", "tokens/s"],
    ),
    "report": (
        lambda console: print_report(REPORT, console),
        [
            "error before",
            "after",
            "damping",
            "1.23e-02",
            "9.88e-01",
            "0.0123456",
            "4.508",
            "5.123",
            "1,234.6 MB",
            "9,876.5 MB",
            "1,048,576",
            "12345.6 s",
            "128",
            "loss before",
            "1.234e-03",
            "ratio",
            "0.190",
        ],
    ),
    "recipe": (
        lambda console: print_recipe(
            Recipe(dict.fromkeys(LAYERS, (3, 64)), 4.5, 4.49876), SENSITIVITIES, console
        ),
        ["bits:group", "layers", "weights", "3:64", "100.0 %", "4.4988 bits per weight"],
    ),
    "sensitivities": (
        lambda console: print_sensitivities(SENSITIVITIES, console),
        ["sensitivity", "0.01235", "0.07407", "0.54321"],
    ),
    "conversion": (
        lambda console: print_conversion(
            ConversionReport(
                *(Path(LONG), "compressed-tensors", "gptq"),
                tuple(ConvertedLayer(name, GRID, GRID, 0.012345) for name in LAYERS),
                *(1_234_567_890, 9_876_543_210),
            ),
            console,
        ),
        ["compressed-tensors", "gptq", "weights", "layers", "1,234.6 MB", "9,876.5 MB", "0.012"],
    ),
    "dwq": (
        lambda console: print_dwq_report(
            DwqReport(
                *(Path(LONG), "kl", 1234, 1_048_576, (0.1,), ((0, 0.54321), (5, 0.12345)), 5, "it"),
                *(12345.6, 123456.0, 98_765_432_100),
            ),
            console,
        ),
        [
            "1,048,576",
            "1234",
            "0.54321",
            "0.12345",
            "77.3 %",
            "12345.6 s",
            "123,456",
            "98,765.4 MB",
        ],
    ),
    "inspection": (
        lambda console: print_inspection(
            Inspection(
                *(Path(LONG), "deepseek_v3", "bfloat16", None, 61, 256, 671_026_419_200, 16.0),
                *(False, (LayerKind("mlp.experts.*.down_proj", (7168, 18432), 14848, True),)),
                *("awq+gptq", "default", 65536, 98_765_432_100, 123456.0, "mlx", 345_678_900_000),
            ),
            console,
        ),
        [
            "out × in",
            "7168 × 18432",
            "14848",
            "count",
            "quantized",
            "671,026,419,200",
            "16.000",
            "98,765.4 MB",
            "123,456 s",
            "65,536",
        ],
    ),
}


def printed(print_it: Callable[[Console], None], width: int, terminal: bool) -> str:
    file = io.StringIO()
    print_it(Console(file=file, width=width, force_terminal=terminal, color_system=None))
    return file.getvalue()


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("terminal", [True, False])
def test_nothing_is_cut_at_any_width(case: str, terminal: bool) -> None:
    print_it, whole = CASES[case]
    for width in (*range(40, 201, 7), 60, 80, 120):
        text = printed(print_it, width, terminal)
        without_breaks = " ".join(text.split())
        for each in whole:
            assert each in without_breaks, f"{each} at {width}:\n{text}"
            pieces = each.split()
            assert all(re.search(rf"(?<!\S)\W*{re.escape(piece)}", text) for piece in pieces)
        assert "…" not in text
        if terminal:
            assert max(map(len, text.splitlines())) <= width


def test_pipes_get_one_line_a_row() -> None:
    rows = dict.fromkeys(("original", LONG), EVALUATION)
    text = printed(lambda console: print_evaluations(rows, console), 80, False)
    line = next(line for line in text.splitlines() if LONG in line)
    assert line.split()[1:4] == ["123456.7891", "98765.4321", "0.12345"]


CELLS = st.text(st.characters(codec="ascii", categories=("L", "N", "P")), min_size=1, max_size=9)


@given(
    headings=st.lists(CELLS, min_size=1, max_size=6, unique=True),
    data=st.data(),
    width=st.integers(40, 120),
    terminal=st.booleans(),
)
def test_any_table_keeps_its_cells(
    headings: list[str], data: st.DataObject, width: int, terminal: bool
) -> None:
    row = st.lists(CELLS, min_size=len(headings), max_size=len(headings))
    rows = data.draw(st.lists(row, min_size=1, max_size=6))
    words = data.draw(st.sets(st.integers(0, len(headings) - 1)))
    text = printed(
        lambda console: print_table(headings, rows, console, words=words), width, terminal
    )
    for each in (*headings, *(cell for row in rows for cell in row)):
        assert each in text


def test_markup_in_names_is_text() -> None:
    for terminal in (True, False):
        text = printed(
            lambda console: print_facts({"[red]a": "[bold]b[/bold] [c]"}, console), 80, terminal
        )
        assert "[red]a" in text
        assert "[bold]b[/bold] [c]" in text


@pytest.mark.parametrize("columns", ["60", "120"])
def test_evaluate_in_a_pipe(columns: str) -> None:
    environment = {**os.environ, "COLUMNS": columns}

    def output(*arguments: str) -> str:
        command = [sys.executable, "-m", "bitwright", *arguments]
        return subprocess.run(
            command, env=environment, capture_output=True, text=True, check=True
        ).stdout

    text = str(DEMO / "evaluation.txt")
    shown = output(
        *("evaluate", str(DEMO), "--evaluation", text, "--reference", str(DEMO), "--samples", "2")
    )
    result: Any = bitwright.evaluate(DEMO, text, samples=2)
    for each in ("perplexity", "reference", "KL (nats/token)", "bits/weight", "0.00000"):
        assert each in shown
    assert shown.count(f"{result.perplexity:.4f}") == 2
