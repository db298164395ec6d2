"""What the scripts of all peers share; needs numpy and safetensors, which every peer brings."""

import argparse
import json
import resource
import shutil
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from safetensors import safe_open
from safetensors.numpy import save_file

EMBEDDING, HEAD = "model.embed_tokens.weight", "lm_head.weight"


def options_parser(description: str | None) -> argparse.ArgumentParser:
    """Return a parser of the options that every peer has."""
    parser = argparse.ArgumentParser(
        description=description, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("model", type=Path, help="folder of the original")
    parser.add_argument("tokens", type=Path, help="token ids [samples, length], .npy")
    parser.add_argument("out", type=Path, help="folder to write: dequantized weights, float32")
    parser.add_argument("--bits", type=int, default=4)
    parser.add_argument("--group-size", type=int, default=128)
    parser.add_argument("--threads", type=int, default=2)
    return parser


def peak_memory_bytes() -> int:
    """Return the largest resident memory of this process so far."""
    status = Path("/proc/self/status")
    if (
        status.exists()
    ):  # Linux's ru_maxrss begins with the peak of the process that started this one
        fields = dict(line.split(":", 1) for line in status.read_text().splitlines())
        return int(fields["VmHWM"].split()[0]) * 1024
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


def write_checkpoint(original: Path, out: Path, tensors: Mapping[str, NDArray[Any]]) -> None:
    """Write the tensors that the original has, in float32, under its names and with its config.json."""
    out.mkdir(parents=True)
    names: list[str] = []
    for shard in sorted(original.glob("*.safetensors")):
        with safe_open(shard, "numpy") as file:
            names += file.keys()
    known = dict(tensors)
    for name, tied in ((EMBEDDING, HEAD), (HEAD, EMBEDDING)):
        if name not in known and tied in known:
            known[name] = known[tied]
    written = {name: np.ascontiguousarray(known[name], np.float32) for name in names}
    save_file(written, out / "model.safetensors", metadata={"format": "pt"})
    shutil.copyfile(original / "config.json", out / "config.json")


def print_figures(seconds: float, peak: int, version: str) -> None:
    """Print the line that the caller reads."""
    figures = {"seconds": seconds, "peak_memory_bytes": peak, "version": version}
    print(json.dumps(figures), flush=True)
