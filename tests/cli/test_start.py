"""What starts at once, since it takes nothing that it does not need: the import, and the command's help."""

import subprocess
import sys

import pytest

import bitwright
from bitwright.cli.main import COMMANDS, cli

SLOW = ("huggingface_hub", "jinja2", "rich", "safetensors", "tokenizers", "bitwright._kernels")


def imported(program: str, *arguments: str) -> set[str]:
    """Return the modules that a program has imported when it ends."""
    start = "import atexit, sys; atexit.register(lambda: print('\\n', *sys.modules))\n"
    done = subprocess.run(
        [sys.executable, "-c", start + program, *arguments],
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return set(done.stdout.splitlines()[-1].split())


def test_importing_bitwright_imports_nothing_else() -> None:
    found = imported("import bitwright")
    assert not found & {"numpy", "click", "importlib.metadata", *SLOW}


@pytest.mark.parametrize("option", ["--help", "--version"])
def test_the_command_itself_imports_little(option: str) -> None:
    assert not imported("from bitwright.cli.main import main; main()", option) & set(SLOW)


def test_all_that_is_public_is_there() -> None:
    assert set(bitwright.__all__) <= set(dir(bitwright))
    assert all(hasattr(bitwright, name) for name in (*bitwright.__all__, "__version__"))
    assert not hasattr(bitwright, "nothing")


def test_modules_are_found_though_nobody_has_imported_them() -> None:
    program = "from bitwright import _kernels, ranks\nimport bitwright\nprint(bitwright.evaluate)"
    assert "bitwright.public" in imported(program)


@pytest.mark.parametrize("name", COMMANDS)
def test_help_says_of_a_command_what_its_own_help_says_first(name: str) -> None:
    command = cli.get_command(None, name)
    assert command is not None
    assert command.help is not None
    said = " ".join(command.help.split("\n\n")[0].split())
    assert said == COMMANDS[name]
