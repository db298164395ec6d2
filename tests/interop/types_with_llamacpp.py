"""Print the types that llama-quantize gives the tensors of models, as JSON. Usage: SHAPES.json

SHAPES.json has `models`: each with `architecture`, `heads`, `key_heads`, `experts`, `blocks`, `width`, and
the shapes of its `tensors`, where * stands for the numbers of all blocks, and perhaps the only `mixes`; and
`options` for some of the mixtures. Types are printed by model, mixture, + with an importance matrix, and
the number of options, as one letter for each tensor, in the order of their names; null where llama.cpp
refuses. Tensors of one dimension are left out, and what an importance matrix does not change.
"""

import ctypes
import json
import sys
import tempfile
from importlib.metadata import version
from pathlib import Path
from typing import Any

import llama_cpp
import numpy as np
from gguf import GGMLQuantizationType, GGUFReader, GGUFWriter

PREFIX = "LLAMA_FTYPE_MOSTLY_"
MIXES = {
    name.removeprefix(PREFIX): getattr(llama_cpp, name)
    for name in dir(llama_cpp)
    if name.startswith(PREFIX) and name.removeprefix(PREFIX) not in ("NVFP4", "Q1_0", "Q2_0")
}


def tensors_of(model: dict[str, Any]) -> dict[str, list[int]]:
    """The shapes of all tensors by name."""
    return {
        name.replace("*", str(block)): shape
        for name, shape in model["tensors"].items()
        for block in range(model["blocks"] if "*" in name else 1)
    }


def write(model: dict[str, Any], path: Path) -> dict[str, np.ndarray[Any, Any]]:
    """Write a model of random matrices with as few rows as quantization takes for one."""
    random = np.random.default_rng(0)
    writer = GGUFWriter(path, model["architecture"])
    width = model["width"]
    writer.add_block_count(model["blocks"])
    writer.add_context_length(64)
    writer.add_embedding_length(width)
    writer.add_feed_forward_length(width)
    writer.add_head_count(model["heads"])
    writer.add_head_count_kv(model["key_heads"])
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_rope_dimension_count(width // model["heads"])
    writer.add_vocab_size(64)
    if model["experts"]:
        writer.add_expert_count(model["experts"])
        writer.add_expert_used_count(2)
        writer.add_expert_feed_forward_length(width)
        writer.add_expert_shared_feed_forward_length(width)
    if model["architecture"] == "gemma2":
        writer.add_sliding_window(32)
    tensors = {
        name: random.standard_normal(shape).astype(np.float32)
        for name, shape in tensors_of(model).items()
    }
    for name, tensor in tensors.items():
        writer.add_tensor(name, tensor)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return tensors


def imatrix(tensors: dict[str, np.ndarray[Any, Any]]) -> Any:
    """An importance matrix of ones."""
    kept = {}
    for name, tensor in tensors.items():
        stacked = tensor.shape[0] if tensor.ndim == 3 else 1
        kept[name.encode()] = (ctypes.c_float * (stacked * tensor.shape[-1]))(
            *[1.0] * (stacked * tensor.shape[-1])
        )
    data = (llama_cpp.llama_model_imatrix_data * (len(kept) + 1))()
    for place, (name, values) in zip(data, kept.items(), strict=False):
        place.name, place.data, place.size = name, values, len(values)
    return data


def settings_of(number: int, options: dict[str, Any]) -> tuple[Any, list[object]]:
    """Settings for the quantizer, and what must live as long."""
    settings = llama_cpp.llama_model_quantize_default_params()
    settings.nthread, settings.ftype, settings.pure = 1, number, options.get("pure", False)
    for key, field in (("embedding", "token_embedding_type"), ("output", "output_tensor_type")):
        if key in options:
            setattr(settings, field, GGMLQuantizationType[options[key]])
    pairs = options.get("tensor_types", [])
    overrides = (llama_cpp.llama_model_tensor_override * (len(pairs) + 1))()
    for place, (pattern, kind) in zip(overrides, pairs, strict=False):
        place.pattern, place.type = pattern.encode(), GGMLQuantizationType[kind]
    settings.tt_overrides = overrides
    return settings, [overrides]


def main(shapes: str) -> None:
    quiet = llama_cpp.llama_log_callback(lambda *_: None)
    llama_cpp.llama_log_set(quiet, ctypes.c_void_p(0))
    given = json.loads(Path(shapes).read_text())
    letters: dict[str, str] = {}
    found: dict[str, dict[str, str | None]] = {}
    cases = [(f"{mix}{mark}", mix, mark, {}) for mix in sorted(MIXES) for mark in ("", "+")]
    for number, (mix, options) in enumerate(given["options"]):
        cases.append((f"{mix}+ {number}", mix, "+", options))
    for title, model in given["models"].items():
        with tempfile.TemporaryDirectory() as scratch:
            source, out = Path(scratch, "float.gguf"), Path(scratch, "out.gguf")
            tensors = write(model, source)
            known = imatrix(tensors)
            found[title] = {}
            for name, mix, mark, options in cases:
                if mix not in model.get("mixes", MIXES) or (options and model["width"] % 256):
                    continue  # llama.cpp aborts where a type that is asked for does not fit
                settings, kept = settings_of(MIXES[mix], options)
                if mark:
                    settings.imatrix = known
                files = str(source).encode(), str(out).encode()
                if llama_cpp.llama_model_quantize(*files, settings):
                    found[title][name] = None
                    continue
                del kept
                types = {
                    each.name: GGMLQuantizationType(each.tensor_type).name
                    for each in GGUFReader(out).tensors
                    if tensors[each.name].ndim > 1
                }
                for kind in types.values():
                    letters.setdefault(kind, chr(ord("A") + len(letters)))
                word = "".join(letters[types[each]] for each in sorted(types))
                if options or word != found[title].get(mix):
                    found[title][name] = word
    client = f"llama-cpp-python {version('llama_cpp_python')}"
    print(json.dumps({"client": client, "letters": letters, "types": found}))


if __name__ == "__main__":
    main(*sys.argv[1:])
