"""The page of a report: whole by itself, its numbers those of the report, at any width."""

import json
import re
import shutil
import struct
import subprocess
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner

import bitwright
from bitwright.cli.main import cli

DEMO = bitwright.demo_folder()
TEXT = str(DEMO / "calibration.txt")
DATA = ("--calibration", TEXT, "--samples", "4", "--length", "32")
BROWSER = next(
    filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None
)
VOID = {"meta"}


class Page(HTMLParser):
    """The elements of a page, and the text of each table cell."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.elements: list[tuple[str, dict[str, str | None]]] = []
        self.open: list[str] = []
        self.cells: dict[str, str] = {}
        self.words: list[str] = []
        self.feed(text)
        self.close()
        assert not self.open, "not closed"

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.elements.append((tag, dict(attrs)))
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.elements.append((tag, dict(attrs)))

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        if data.strip() and self.open[-1] != "style":
            self.words.append(" ".join(data.split()))

    def after(self, word: str) -> str:
        """Return what stands after the first of these words."""
        return self.words[self.words.index(word) + 1]

    def sections(self) -> list[str | None]:
        return [attributes["id"] for tag, attributes in self.elements if tag == "section"]


def run(*words: str) -> None:
    done = CliRunner().invoke(cli, words, obj=list(words), catch_exceptions=False)
    assert done.exit_code == 0, done.output


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Outputs of commands, each with its page."""
    place = tmp_path_factory.mktemp("pages")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(place)
        run("quantize", str(DEMO), "--out", "q", "--method", "awq", *DATA, "--html", "q.html")
        run(
            *("dynamic", str(DEMO), "--out", "d", "--method", "rtn", "--target-bpw", "4.5", *DATA),
            *("--candidates", "3:64,5:64", "--evaluation", TEXT, "--html", "d.html"),
        )
        run(
            *("dwq", "q", "--reference", str(DEMO), "--out", "w", *DATA[:2], "--length", "32"),
            *("--tokens", "512", "--html", "w.html"),
        )
        run("evaluate", "q", "--evaluation", TEXT, *DATA[2:], "--html", "e.html")
    return place


@pytest.mark.parametrize("name", ["q", "d", "w", "e"])
def test_a_page_needs_nothing_but_itself(name: str, made: Path) -> None:
    """No address of anything, no script; well nested; and no place of this machine."""
    text = (made / f"{name}.html").read_text()
    page = Page(text)
    assert not {"script", "link", "img", "iframe", "object"} & {tag for tag, _ in page.elements}
    loading = {"src", "href", "srcset", "data", "action", "background", "poster"}
    assert not any(loading & attributes.keys() for _, attributes in page.elements)
    assert not re.search(r"https?:|//|url\(|@import", text)
    assert str(DEMO.parent) not in text
    assert str(made) not in text


def test_the_heat_map_has_the_errors_of_the_report(made: Path) -> None:
    page = Page((made / "q.html").read_text())
    report = report_of(made / "q")
    cells = {
        attributes["data-layer"]: attributes["data-error"]
        for tag, attributes in page.elements
        if tag == "td" and "data-layer" in attributes
    }
    assert cells == {layer["name"]: f"{layer['error']:.2e}" for layer in report["layers"]}
    shades = {
        float(attributes["data-error"] or 0): attributes["class"]
        for _, attributes in page.elements
        if "data-error" in attributes
    }
    assert [shades[error] for error in sorted(shades)] == sorted(shades.values(), key=str)
    assert (shades[min(shades)], shades[max(shades)]) == ("s0", "s8")
    assert page.sections() == ["figures", "errors", "awq", "settings"]


def test_numbers_are_those_of_the_report(made: Path) -> None:
    page, report = Page((made / "q.html").read_text()), report_of(made / "q")
    assert page.after("bits per weight over all tensors") == f"{report['bits_per_weight']:.5g}"
    assert page.after("calibration tokens") == f"{report['calibration_tokens']:,}"
    assert page.after("bits") == str(report["settings"]["bits"])
    assert report["command"] in page.words

    page, report = Page((made / "d.html").read_text()), report_of(made / "d")
    assert page.sections() == ["figures", "errors", "sensitivities", "settings"]
    assert page.after("original") == f"{report['before']['perplexity']:.5g}"
    assert page.after("quantized") == f"{report['after']['perplexity']:.5g}"
    assert f"{report['after']['kl_divergence']:.5g}" in page.words
    for layer, value in report["sensitivities"]["per_million"].items():
        assert page.after(layer) == f"{value:.4g}"

    page, report = Page((made / "w.html").read_text()), report_of(made / "w")
    assert page.sections() == ["figures", "training", "settings"]
    assert page.after("validation KL after training") == f"{report['kl_after']:.5g}"
    points = [attributes for tag, attributes in page.elements if tag == "circle"]
    assert len(points) == len(report["validations"])
    for step, value in report["validations"]:
        assert f"step {step}: {value:.5f}" in page.words


def report_of(folder: Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((folder / "report.json").read_text())
    return found


def test_the_same_page_from_python(made: Path, tmp_path: Path) -> None:
    place = tmp_path / "page.html"
    text = bitwright.report_page(made / "q", place)
    assert place.read_text() == text == (made / "q.html").read_text()
    bitwright.report_page(made / "d", place)  # in place of another page
    place.write_text("a file of somebody's")
    with pytest.raises(bitwright.OutputExistsError):
        bitwright.report_page(made / "q", place)
    assert place.read_text() == "a file of somebody's"
    bitwright.report_page(made / "q", place, overwrite=True)
    with pytest.raises(bitwright.OutputError, match=r"has no report\.json"):
        bitwright.report_page(DEMO)


def test_names_of_strangers_are_text(tmp_path: Path) -> None:
    layer = bitwright.LayerReport("model.layers.0.<script>x</script>", 4, 64, 0.1, None)
    rest = bitwright.LayerReport("<b>head</b>", 4, 64, float("nan"), None)
    report = bitwright.QuantizationReport(
        *(tmp_path, "rtn", "<i>mlx</i>", (layer, rest), (), 4.5, 5.0, 100, 200, 0, 1.0, 1)
    )
    for text in (bitwright.report_page(report), report._repr_html_()):
        assert "<script>" not in text
        assert "<b>" not in text
        assert "<i>mlx" not in text
        assert "&lt;script&gt;" in text


def test_a_page_is_refused_before_anything_is_computed(
    made: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("p.html").write_text("mine")
    words = ["quantize", str(DEMO), "--out", "q", *DATA, "--html", "p.html"]
    done = CliRunner().invoke(cli, words, obj=words)
    assert isinstance(done.exception, bitwright.OutputExistsError)
    assert [path.name for path in tmp_path.iterdir()] == ["p.html"]


@pytest.mark.slow
@pytest.mark.skipif(BROWSER is None, reason="there is no browser")
@pytest.mark.parametrize("name", ["q", "d", "w"])
@pytest.mark.parametrize("width", [390, 1280])
def test_a_browser_shows_it_whole(name: str, width: int, made: Path, tmp_path: Path) -> None:
    """Nothing is wider than the window, but for tables that scroll by themselves; and there are colours."""
    measure = "<script>document.title = document.documentElement.scrollWidth</script></body>"
    text = (made / f"{name}.html").read_text().replace("</body>", measure)
    (tmp_path / "page.html").write_text(text)
    frame = f"<iframe src='page.html' width='{width}' height='900'></iframe>"
    frame += "<script>onload = () => document.body.append(frames[0].document.title)</script>"
    (tmp_path / "frame.html").write_text(f"<body>{frame}</body>")
    assert BROWSER is not None
    words = [
        BROWSER,
        "--headless",
        "--no-sandbox",
        "--disable-gpu",
        f"--user-data-dir={tmp_path}/u",
    ]
    words += ["--allow-file-access-from-files", f"--window-size={width + 200},1000"]
    address = (tmp_path / "frame.html").as_uri()
    done = subprocess.run(
        [*words, "--dump-dom", address], capture_output=True, text=True, timeout=120, check=True
    )
    found = re.search(r"</script>(\d+)", done.stdout)
    assert found, done.stdout
    assert int(found[1]) <= width
    picture = tmp_path / "page.png"
    subprocess.run(
        [*words, f"--screenshot={picture}", (made / f"{name}.html").as_uri()],
        capture_output=True,
        timeout=120,
        check=True,
    )
    assert struct.unpack(">I", picture.read_bytes()[16:20])[0] == width + 200
    assert picture.stat().st_size > 10_000
