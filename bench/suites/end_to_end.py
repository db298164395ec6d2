"""Quantizes one model with bitwright and with a peer in turn, on the same tokens and threads.

Usage::

    python3 -m venv /tmp/peer && /tmp/peer/bin/pip install torch==2.13.0
    /tmp/peer/bin/pip install llmcompressor==0.14.0.1
    python bench/models/make_llama.py /tmp/llama98
    python bench/suites/end_to_end.py /tmp/llama98 --peer-python /tmp/peer/bin/python [--rounds 3]
    python bench/suites/end_to_end.py /tmp/llama98 --peer-python /tmp/peer/bin/python \\
        --method awq --samples 8

    python3 -m venv /tmp/mlx && /tmp/mlx/bin/pip install "mlx[cpu]==0.32.4" mlx-lm==0.32.2
    python bench/suites/end_to_end.py SHARED/models/story --peer-python /tmp/mlx/bin/python --peer mlx \\
        --method awq --bits 3 --group-size 64 --tokens SHARED/text/story_calibration.npy --samples 16

bitwright's time is that of the whole run, reading and writing included; the peer's that of its algorithm
alone. Memory is the peak of each process.
"""

import argparse
import json
import subprocess
import sys
import tempfile
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np

PEERS = Path(__file__).parents[1] / "peers"
OURS = """
import json, sys, bitwright
report = bitwright.quantize(progress=False, float_embeddings=True, **json.loads(sys.argv[1]))
print(json.dumps({"seconds": report.seconds, "peak_memory_bytes": report.peak_memory_bytes,
                  "version": "bitwright " + bitwright.__version__}))
"""


def run(command: list[str]) -> dict[str, Any]:
    """Run a command whose last line is a JSON object of figures."""
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        raise SystemExit(done.stderr[-3000:])
    figures: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return figures


def main() -> None:
    """Run both in turn and print medians and ratios."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("model", type=Path)
    parser.add_argument("--peer-python", required=True)
    parser.add_argument("--peer", choices=["llmcompressor", "mlx"], default="llmcompressor")
    parser.add_argument("--method", choices=["gptq", "awq"], default="gptq")
    parser.add_argument("--tokens", type=Path, help="token ids, .npy; random ones by default")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--samples", type=int, default=32)
    parser.add_argument("--length", type=int, default=512)
    parser.add_argument("--bits", type=int, default=4)
    parser.add_argument("--group-size", type=int, default=128)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument(
        "--preset", default="fast", help="of bitwright; fast is the method by itself"
    )
    options = parser.parse_args()
    vocabulary = json.loads((options.model / "config.json").read_text())["vocab_size"]
    peer_script = str(PEERS / f"peer_{options.peer}.py")
    # The peers' grids: llm-compressor's as its users have them, MLX's own.
    formats = {"gptq": "gptq", "awq": "awq"} if options.peer == "llmcompressor" else {"awq": "mlx"}
    symmetric = ["--symmetric"] if options.method == "gptq" else []
    results: list[tuple[dict[str, Any], dict[str, Any]]] = []
    with tempfile.TemporaryDirectory() as scratch:
        tokens = Path(scratch, "tokens.npy")
        shape = (options.samples, options.length)
        ids = np.random.default_rng(0).integers(0, vocabulary, shape, dtype=np.int32)
        np.save(tokens, np.load(options.tokens)[: options.samples] if options.tokens else ids)
        settings = {
            "model": str(options.model),
            "bits": options.bits,
            "group_size": options.group_size,
            "method": options.method,
            "preset": options.preset,
            "format": formats[options.method],
            "calibration": str(tokens),
            "threads": options.threads,
        }
        for round_number in range(options.rounds):
            settings["out"] = f"{scratch}/ours-{round_number}"
            ours = run([sys.executable, "-c", OURS, json.dumps(settings)])
            peer = run(
                [
                    *(options.peer_python, peer_script, str(options.model), str(tokens)),
                    *(f"{scratch}/peer-{round_number}", "--method", options.method, *symmetric),
                    *("--bits", str(options.bits), "--group-size", str(options.group_size)),
                    *("--threads", str(options.threads)),
                ]
            )
            results.append((ours, peer))
            print(ours, peer, flush=True)
    for key, unit, scale in (("seconds", "s", 1.0), ("peak_memory_bytes", "MB", 1e6)):
        mine, theirs = ([each[side][key] / scale for each in results] for side in (0, 1))
        ratio = median(b / a for a, b in zip(mine, theirs, strict=True))
        print(
            f"{key}: {results[0][0]['version']} {median(mine):.1f} {unit}, "
            f"{results[0][1]['version']} {median(theirs):.1f} {unit}, ratio {ratio:.2f}"
        )


if __name__ == "__main__":
    main()
