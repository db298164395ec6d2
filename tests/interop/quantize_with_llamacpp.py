"""Quantize a GGUF file with llama.cpp's quantizer. Usage: FLOAT.gguf TYPE OUT.gguf"""

import ctypes
import sys

import llama_cpp


def main(source: str, kind: str, out: str) -> None:
    quiet = llama_cpp.llama_log_callback(lambda *_: None)
    llama_cpp.llama_log_set(quiet, ctypes.c_void_p(0))
    settings = llama_cpp.llama_model_quantize_default_params()
    settings.nthread = 1
    settings.ftype = getattr(llama_cpp, f"LLAMA_FTYPE_MOSTLY_{kind}")
    if llama_cpp.llama_model_quantize(source.encode(), out.encode(), settings):
        raise RuntimeError("llama.cpp could not quantize")


if __name__ == "__main__":
    main(*sys.argv[1:])
