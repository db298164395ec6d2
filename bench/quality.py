"""KL of every method on the models, tokens and settings of shared/QUALITY.md.

Usage: python bench/quality.py ../shared
"""

import argparse
import tempfile
from pathlib import Path

import numpy as np
from rich.console import Console
from rich.table import Table

import bitwright

# model -> (its texts' name, calibration samples)
MODELS = {"story": ("story", 32), "small": ("small", 64), "small-outliers": ("small", 64)}
SETTINGS = ((3, 64), (4, 64), (2, 32))
METHODS = {
    "rtn": {"method": "rtn"},
    "awq, no clip": {"method": "awq", "clip": "none"},
    "awq": {"method": "awq"},
    "gptq, no search": {"grid_search": False},
    "gptq": {},
    "awq+gptq": {"method": "awq+gptq"},
}


def main() -> None:
    """Print one row per model and setting, one column per method."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("shared", type=Path)
    shared = parser.parse_args().shared
    table = Table()
    for heading in ("model, bits, group", *METHODS):
        table.add_column(heading)
    with tempfile.TemporaryDirectory() as scratch:
        for model, (text, samples) in MODELS.items():
            original = shared / "models" / model
            calibration = np.load(shared / "text" / f"{text}_calibration.npy")[:samples]
            for bits, group_size in SETTINGS:
                cells = [f"{model} {bits}, {group_size}"]
                for options in METHODS.values():
                    bitwright.quantize(
                        original,
                        f"{scratch}/out",
                        bits=bits,
                        group_size=group_size,
                        calibration=calibration,
                        overwrite=True,
                        progress=False,
                        **options,  # type: ignore[arg-type]
                    )
                    result = bitwright.evaluate(
                        f"{scratch}/out", shared / "text" / f"{text}_eval.npy", reference=original
                    )
                    cells.append(f"{result.kl_divergence:.4f}")
                table.add_row(*cells)
                print(*cells, flush=True)
    Console(width=120).print(table)


if __name__ == "__main__":
    main()
