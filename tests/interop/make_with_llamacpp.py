"""Write a Llama folder as GGUF with llama.cpp's quantizer and save what the gguf package reads back.
Usage: MODEL OUT.gguf EXPECTED.npz

The rows of all matrices must be multiples of 256, otherwise llama.cpp takes other types for them.
"""

import argparse
import json
import tempfile
import time
from importlib.metadata import version
from pathlib import Path

import llama_cpp
import numpy as np
from make_with_gguf import dequantized, write

FILE_TYPES = {
    "Q4_0": llama_cpp.LLAMA_FTYPE_MOSTLY_Q4_0,
    "Q4_1": llama_cpp.LLAMA_FTYPE_MOSTLY_Q4_1,
    "Q5_0": llama_cpp.LLAMA_FTYPE_MOSTLY_Q5_0,
    "Q5_1": llama_cpp.LLAMA_FTYPE_MOSTLY_Q5_1,
    "Q8_0": llama_cpp.LLAMA_FTYPE_MOSTLY_Q8_0,
    "Q2_K": llama_cpp.LLAMA_FTYPE_MOSTLY_Q2_K,
    "Q3_K_S": llama_cpp.LLAMA_FTYPE_MOSTLY_Q3_K_S,
    "Q3_K_M": llama_cpp.LLAMA_FTYPE_MOSTLY_Q3_K_M,
    "Q4_K_S": llama_cpp.LLAMA_FTYPE_MOSTLY_Q4_K_S,
    "Q4_K_M": llama_cpp.LLAMA_FTYPE_MOSTLY_Q4_K_M,
    "Q5_K_S": llama_cpp.LLAMA_FTYPE_MOSTLY_Q5_K_S,
    "Q5_K_M": llama_cpp.LLAMA_FTYPE_MOSTLY_Q5_K_M,
    "Q6_K": llama_cpp.LLAMA_FTYPE_MOSTLY_Q6_K,
    "IQ4_NL": llama_cpp.LLAMA_FTYPE_MOSTLY_IQ4_NL,
    "IQ4_XS": llama_cpp.LLAMA_FTYPE_MOSTLY_IQ4_XS,
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("model", type=Path)
    parser.add_argument("out", type=Path, help="file to write")
    parser.add_argument("expected", type=Path)
    parser.add_argument("--type", choices=FILE_TYPES, default="Q4_K_M")
    parser.add_argument("--pure", action="store_true", help="one type for all matrices")
    options = parser.parse_args()

    start = time.perf_counter()
    settings = llama_cpp.llama_model_quantize_default_params()
    settings.nthread = 1
    settings.ftype = FILE_TYPES[options.type]
    settings.pure = options.pure
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
