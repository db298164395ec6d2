"""Whether two builds write the same bytes: digests of what one writes for normal models, and a comparison.

python bench/suites/same_bytes.py SHARED digests.json               # with each build
python bench/suites/same_bytes.py --compare before.json after.json
"""

import argparse
import hashlib
import json
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import bitwright

TINY = Path(__file__).parents[2] / "tests" / "data" / "tiny"
METHODS = ("rtn", "gptq", "awq", "awq+gptq", "salient")
FORMATS = ("mlx", "gptq", "awq", "compressed-tensors", "gguf", "marlin")


def runs(shared: Path) -> Iterator[tuple[str, Path, dict[str, Any]]]:
    """Yield the name, the model and the options of every run."""
    text = shared / "text"
    for format in FORMATS:
        group = {} if format == "gguf" else {"group_size": 128 if format == "marlin" else 32}
        for method in METHODS:
            data = {"calibration": text / "story_calibration.npy", "samples": 16}
            options = {"method": method, "format": format, **group, **data}
            if method == "rtn":
                options |= {"calibration": None, "samples": None}
            for preset in ("fast",) if method in ("rtn", "salient") else ("fast", "default"):
                name = f"story {format} {method} {preset}"
                yield name, shared / "models/story", options | {"preset": preset}
    for bits in (2, 3, 6, 8):
        for format in ("mlx", "gptq", "gguf"):
            if (bits, format) != (6, "gptq"):
                data = {"calibration": text / "small_calibration.npy", "samples": 4, "length": 256}
                name = f"small-outliers {format} {bits}"
                yield (
                    name,
                    shared / "models/small-outliers",
                    {"bits": bits, "format": format, **data},
                )
    for folder in (*sorted((shared / "models/arch").iterdir()), *sorted(TINY.iterdir())):
        for format in ("mlx", "compressed-tensors"):
            options = {"method": "rtn", "group_size": 32, "format": format}
            yield f"{folder.parent.name} {folder.name} {format}", folder, options


def digests(model: Path, options: dict[str, Any]) -> dict[str, str]:
    """Return a digest of every file of a run's output but its card, or what was wrong."""
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder, "out")
        try:
            bitwright.quantize(
                model, out, float_embeddings=True, progress=False, threads=1, **options
            )
        except ValueError as error:
            return {"error": str(error)}
        files = (path for path in sorted(out.rglob("*")) if path.is_file())
        return {
            str(path.relative_to(out)): hashlib.sha256(path.read_bytes()).hexdigest()
            for path in files
            if path.name != "README.md"
        }


def main() -> None:
    """Write the digests of this build, or compare two files of them."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("first", type=Path)
    parser.add_argument("second", type=Path)
    parser.add_argument("--compare", action="store_true")
    arguments = parser.parse_args()
    if not arguments.compare:
        found = {name: digests(model, options) for name, model, options in runs(arguments.first)}
        arguments.second.write_text(json.dumps(found, indent=1))
        return
    before, after = (json.loads(path.read_text()) for path in (arguments.first, arguments.second))
    for name in before:
        one, other = before[name], after.get(name, {})
        changed = sorted(file for file in one | other if one.get(file) != other.get(file))
        if changed:
            print(f"{name}: {', '.join(changed)}")
    print(f"{len(before)} runs compared")


if __name__ == "__main__":
    main()
