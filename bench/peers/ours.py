"""One run of `bitwright.quantize` for bench/suites/quality.py, in a process of its own.

Usage: python bench/peers/ours.py '{"model": …, "out": …, "bits": 3, …}'
"""

import json
import sys

from peer import peak_memory_bytes

import bitwright


def main() -> None:
    """Quantize with the options given as JSON and print one JSON line."""
    report = bitwright.quantize(progress=False, float_embeddings=True, **json.loads(sys.argv[1]))
    figures = {
        "seconds": report.seconds,
        "peak_memory_bytes": peak_memory_bytes(),
        "version": f"bitwright {bitwright.__version__}",
        "bits_per_weight": report.layer_bits_per_weight,
    }
    print(json.dumps(figures))


if __name__ == "__main__":
    main()
