"""Pages for people: links that lead somewhere, files that a clone has, examples that are the code."""

import re
from pathlib import Path

import pytest

from bitwright.methods.method import Method

PROJECT = Path(__file__).parents[2]
PAGES = sorted(
    path.relative_to(PROJECT).as_posix()
    for folder in (".", "docs", "docs/methods", "bench", "findings")
    for path in (PROJECT / folder).glob("*.md")
)
FOLDERS = ("bench", "cpp", "docs", "findings", "notebooks", "python", "tests")
PACKAGE = PROJECT / "python" / "bitwright"


def text_of(page: str) -> str:
    return (PROJECT / page).read_text()


def anchors(page: Path) -> set[str]:
    """Return the fragments of a page's headings, as GitHub makes them."""
    headings = re.findall(r"^#+ (.+)$", page.read_text(), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


@pytest.mark.parametrize("page", PAGES)
def test_links_lead_to_files_and_headings(page: str) -> None:
    for target in re.findall(r"\]\(([^)\s]+)\)", text_of(page)):
        if "://" in target:
            continue
        path, _, fragment = target.partition("#")
        found = (PROJECT / page).parent / path if path else PROJECT / page
        assert found.exists(), f"{page}: {target}"
        if fragment and not fragment.startswith("L"):
            assert fragment in anchors(found) | {"promises", "constraints"}, f"{page}: {target}"


@pytest.mark.parametrize("page", [page for page in PAGES if page != "CHANGELOG.md"])
def test_files_that_are_named_exist(page: str) -> None:
    """By their path in the project, the package or tests/; docs/engines.md names files of engines, too."""
    for name in re.findall(
        r"`(?:python )?([\w./-]+\.(?:py|md|hpp|cpp|ipynb|json))\b", text_of(page)
    ):
        first = name.partition("/")[0]
        if first in FOLDERS and "NAME" not in name:
            assert (PROJECT / name).exists(), f"{page}: {name}"
        elif "/test_" in name:
            assert (PROJECT / "tests" / name).exists(), f"{page}: {name}"
        elif "/" in name and page != "docs/engines.md" and (PACKAGE / first).is_dir():
            assert (PACKAGE / name).exists(), f"{page}: {name}"


@pytest.mark.parametrize("page", ["README.md", "CONTRIBUTING.md"])
def test_set_up_needs_nothing_outside_a_clone(page: str) -> None:
    assert "../" not in text_of(page)


def examples(heading: str) -> list[str]:
    section = text_of("docs/architecture.md").split(f"## {heading}\n")[1].split("\n## ")[0]
    return re.findall(r"```python\n(.*?)```", section, re.DOTALL)


def test_the_example_of_a_method_is_one() -> None:
    found: dict[str, tuple[Method, ...]] = {}
    for example in examples("Adding a method"):
        exec(example, found)
    (method,) = found["METHODS"]
    assert method.name == "sign"


def test_the_example_of_an_architecture_is_the_file() -> None:
    (example,) = examples("Adding an architecture")
    assert example == (PACKAGE / "models" / "families" / "olmo2.py").read_text()
