"""Where the data is that lies beside the project, not in it."""

from pathlib import Path

import pytest

TESTS = Path(__file__).parents[1]
SHARED = TESTS.parents[1] / "shared"

TINY = sorted((TESTS / "data" / "tiny").iterdir())
ARCH = sorted((SHARED / "models" / "arch").glob("*"))

needs_shared = pytest.mark.skipif(
    not SHARED.is_dir(), reason=f"{SHARED} with models and texts is not beside the project"
)
