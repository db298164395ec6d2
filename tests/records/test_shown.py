"""What is printed and shown of reports and models: short, and with the figures that matter."""

from html.parser import HTMLParser
from pathlib import Path

import pytest

import bitwright

DEMO = bitwright.demo_folder()
TEXT = DEMO / "calibration.txt"
FEW = {"samples": 4, "length": 32, "progress": False}


@pytest.fixture(scope="module")
def shown(tmp_path_factory: pytest.TempPathFactory) -> dict[str, object]:
    """Everything that a user may print."""
    place = tmp_path_factory.mktemp("shown")
    q = place / "q"
    return {
        "model": bitwright.load_model(DEMO),
        "quantize": bitwright.quantize(DEMO, q, "rtn", 3, progress=False),
        "convert": bitwright.convert(q, place / "f", "float", progress=False),
        "evaluate": bitwright.evaluate(q, TEXT, reference=DEMO, **FEW),
        "sensitivities": bitwright.estimate_sensitivities(DEMO, TEXT, **FEW),
        "dynamic": bitwright.dynamic_quantize(
            *(DEMO, place / "d", 4.5, [(3, 64), (5, 64)], "rtn"), calibration=TEXT, **FEW
        ),
        "dwq": bitwright.dwq_quantize(
            DEMO, q, place / "w", TEXT, length=32, tokens=512, progress=False
        ),
    }


SAID = {
    "model": "llama in float, 3 blocks",
    "quantize": "22 layers by rtn in the mlx format, 3.500 bits per weight",
    "convert": "22 layers from mlx to float",
    "evaluate": "bits per weight",
    "sensitivities": "sensitivities of 21 layers to 3:64 in place of 5:64",
    "dynamic": "22 layers by rtn",
    "dwq": "after 512 tokens in 4 steps",
}


@pytest.mark.parametrize("name", SAID)
def test_print(name: str, shown: dict[str, object]) -> None:
    text = str(shown[name])
    assert SAID[name] in text
    assert len(text) < 400
    assert "\n" not in text


@pytest.mark.parametrize("name", SAID)
def test_notebooks(name: str, shown: dict[str, object]) -> None:
    """A table that is well formed and has the figures."""
    html = shown[name]._repr_html_()  # type: ignore[attr-defined]
    opened: list[str] = []

    class Reader(HTMLParser):
        def handle_starttag(self, tag: str, attrs: object) -> None:
            opened.append(tag)

        def handle_endtag(self, tag: str) -> None:
            assert opened.pop() == tag

    Reader().feed(html)
    assert not opened
    assert html.startswith("<table>")
    if name in ("quantize", "convert", "dynamic"):
        assert "relative squared error of each layer" in html
    if name == "evaluate":
        assert f"{shown[name].perplexity:.5g}" in html  # type: ignore[attr-defined]


def test_plots_are_figures(shown: dict[str, object], tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    from matplotlib.figure import Figure

    found = bitwright.plot_sensitivities(shown["sensitivities"])  # type: ignore[arg-type]
    curves = bitwright.plot_dwq(shown["dwq"], tmp_path / "c.svg")  # type: ignore[arg-type]
    assert isinstance(found, Figure)
    assert isinstance(curves, Figure)
    assert len(found.axes[0].get_yticklabels()) == 21
    assert [path.name for path in tmp_path.iterdir()] == ["c.svg"]
