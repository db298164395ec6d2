"""Write a Llama folder as GGUF with llama.cpp's quantizer and save what the gguf package reads back.
Usage: MODEL OUT.gguf EXPECTED.npz

The rows of all matrices must be multiples of 256, otherwise llama.cpp takes other types for them.
"""

import argparse
import ctypes
import json
import tempfile
import time
from importlib.metadata import version
from pathlib import Path
from typing import Any

import llama_cpp
import numpy as np
from gguf import GGUFReader
from make_with_gguf import dequantized, write

PREFIX = "LLAMA_FTYPE_MOSTLY_"
FILE_TYPES = {
    name.removeprefix(PREFIX): getattr(llama_cpp, name)
    for name in dir(llama_cpp)
    if name.startswith(PREFIX)
}


def imatrix(file: Path) -> Any:
    """The entries of an importance matrix, as llama-quantize makes them of the file."""
    stored = {each.name: each.data for each in GGUFReader(file).tensors}
    kept = {}
    for name, sums in stored.items():
        if name.endswith(".in_sum2"):
            tensor = name.removesuffix(".in_sum2")
            values = (sums / stored[f"{tensor}.counts"]).astype(np.float32).reshape(-1)
            kept[tensor.encode()] = (ctypes.c_float * len(values))(*values.tolist())
    data = (llama_cpp.llama_model_imatrix_data * (len(kept) + 1))()
    for place, (name, values) in zip(data, kept.items(), strict=False):
        place.name, place.data, place.size = name, values, len(values)
    return data


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("model", type=Path)
    parser.add_argument("out", type=Path, help="file to write")
    parser.add_argument("expected", type=Path)
    parser.add_argument("--type", choices=FILE_TYPES, default="Q4_K_M")
    parser.add_argument("--pure", action="store_true", help="one type for all matrices")
    parser.add_argument("--imatrix", type=Path, help="importance matrix, GGUF")
    options = parser.parse_args()

    start = time.perf_counter()
    settings = llama_cpp.llama_model_quantize_default_params()
    settings.nthread = 1
    settings.ftype = FILE_TYPES[options.type]
    settings.pure = options.pure
    known = None if options.imatrix is None else imatrix(options.imatrix)
    if known is not None:
        settings.imatrix = known
    with tempfile.TemporaryDirectory() as scratch:
        in_float = Path(scratch, "float.gguf")
        write(options.model, in_float, "F32")
        files = str(in_float).encode(), str(options.out).encode()
        if llama_cpp.llama_model_quantize(*files, settings):
            raise RuntimeError("llama.cpp could not quantize; see above")
    weights = dequantized(options.out, options.model)
    np.savez(options.expected, **weights)
    result = {
        "layers": len(weights),
        "seconds": time.perf_counter() - start,
        "client": f"llama-cpp-python {version('llama_cpp_python')}, gguf {version('gguf')}",
    }
    print(json.dumps(result))


if __name__ == "__main__":
    main()
