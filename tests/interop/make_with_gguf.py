"""Write a Llama folder as GGUF with the gguf package and save what it reads back.
Usage: MODEL OUT.gguf EXPECTED.npz

Names, metadata and the order of the rows of queries and keys are those of llama.cpp's converter; what is
saved has names and rows as in the folder. Norms are float32 in the file, and not in what is saved.
"""

import argparse
import json
import time
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
from gguf import (
    GGML_QUANT_VERSION,
    MODEL_ARCH,
    GGMLQuantizationType,
    GGUFReader,
    GGUFWriter,
    LlamaFileType,
    SpecialVocab,
    TokenType,
    get_tensor_name_map,
)
from gguf.quants import dequantize, quantize
from gguf.utility import SafetensorsLocal
from numpy.typing import NDArray

Array = NDArray[Any]
TYPES = ["F32", "F16", "BF16", "Q4_0", "Q4_1", "Q5_0", "Q5_1", "Q8_0"]
FILE_TYPES = {"F32": "ALL_F32"}  # others are MOSTLY_ their name


def permutation(name: str, rows: int, config: dict[str, Any]) -> Array:
    """Which row of the folder is each row of the file: llama.cpp rotates neighbours, not halves."""
    order = np.arange(rows)
    heads = {"q_proj": "num_attention_heads", "k_proj": "num_key_value_heads"}
    if (key := heads.get(name.rpartition(".")[2])) is None:
        return order
    return order.reshape(config[key], 2, -1).swapaxes(1, 2).reshape(-1)


def add_tokenizer(writer: GGUFWriter, folder: Path, size: int) -> None:
    """Add the byte-level BPE of tokenizer.json."""
    content = json.loads((folder / "tokenizer.json").read_text())
    tokens = [f"[PAD{index}]" for index in range(size)]
    kinds = [TokenType.UNUSED] * size
    for token, index in content["model"]["vocab"].items():
        tokens[index], kinds[index] = token, TokenType.NORMAL
    for added in content["added_tokens"]:
        kind = TokenType.CONTROL if added["special"] else TokenType.USER_DEFINED
        tokens[added["id"]], kinds[added["id"]] = added["content"], kind
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("gpt-2")
    writer.add_token_list(tokens)
    writer.add_token_types(kinds)
    SpecialVocab(folder, load_merges=True).add_to_gguf(writer, quiet=True)


def write(folder: Path, out: Path, type_name: str) -> None:
    """Write a folder with one file of weights, all its matrices in one type."""
    config = json.loads((folder / "config.json").read_text())
    layers, heads = config["num_hidden_layers"], config["num_attention_heads"]
    writer = GGUFWriter(out, "llama")
    writer.add_name(folder.name)
    writer.add_block_count(layers)
    writer.add_context_length(config["max_position_embeddings"])
    writer.add_embedding_length(config["hidden_size"])
    writer.add_feed_forward_length(config["intermediate_size"])
    writer.add_head_count(heads)
    writer.add_head_count_kv(config["num_key_value_heads"])
    writer.add_rope_freq_base(config["rope_parameters"]["rope_theta"])
    writer.add_layer_norm_rms_eps(config["rms_norm_eps"])
    writer.add_file_type(LlamaFileType[FILE_TYPES.get(type_name, f"MOSTLY_{type_name}")])
    writer.add_vocab_size(config["vocab_size"])
    writer.add_rope_dimension_count(config.get("head_dim") or config["hidden_size"] // heads)
    writer.add_quantization_version(GGML_QUANT_VERSION)
    add_tokenizer(writer, folder, config["vocab_size"])
    names = get_tensor_name_map(MODEL_ARCH.LLAMA, layers)
    with SafetensorsLocal(folder / "model.safetensors") as tensors:
        for name, tensor in tensors.items():
            stem = name.removesuffix(".weight")
            raw = tensor.mmap_bytes().reshape(*tensor.shape[:-1], -1)
            array = dequantize(raw, GGMLQuantizationType[tensor.dtype])
            array = array[permutation(stem, len(array), config)]
            kind = GGMLQuantizationType[type_name if array.ndim == 2 else "F32"]
            writer.add_tensor(
                f"{names.get_name(stem)}.weight", quantize(array, kind), raw_dtype=kind
            )
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def dequantized(file: Path, folder: Path) -> dict[str, Array]:
    """The float32 matrices of a file, in the names and order of the folder it was made from."""
    config = json.loads((folder / "config.json").read_text())
    names = get_tensor_name_map(MODEL_ARCH.LLAMA, config["num_hidden_layers"])
    stored = {tensor.name: tensor for tensor in GGUFReader(file).tensors}
    weights = {}
    with SafetensorsLocal(folder / "model.safetensors") as tensors:
        stems = [
            n.removesuffix(".weight") for n, tensor in tensors.items() if len(tensor.shape) == 2
        ]
    for stem in stems:
        tensor = stored[f"{names.get_name(stem)}.weight"]
        array = dequantize(tensor.data, tensor.tensor_type)
        weights[stem] = np.empty(array.shape, np.float32)
        weights[stem][permutation(stem, len(array), config)] = array
    return weights


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("model", type=Path)
    parser.add_argument("out", type=Path, help="file to write")
    parser.add_argument("expected", type=Path)
    parser.add_argument("--type", choices=TYPES, default="Q4_0")
    options = parser.parse_args()

    start = time.perf_counter()
    write(options.model, options.out, options.type)
    weights = dequantized(options.out, options.model)
    np.savez(options.expected, **weights)
    result = {
        "layers": len(weights),
        "seconds": time.perf_counter() - start,
        "client": f"gguf {version('gguf')}",
    }
    print(json.dumps(result))


if __name__ == "__main__":
    main()
