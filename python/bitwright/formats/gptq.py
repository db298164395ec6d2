"""GPTQ: integer zero points, codes packed along the input channels (AutoGPTQ, GPTQModel)."""

from collections.abc import Mapping
from typing import Any, Self

import numpy as np
from numpy.typing import NDArray

from bitwright.checkpoint import Checkpoint, CheckpointSlice
from bitwright.checkpoint.writer import FileOptions
from bitwright.errors import CheckpointError, UnsupportedModelError
from bitwright.formats.declared import Settings, declaration
from bitwright.formats.engine_names import EngineNames, transformers_name
from bitwright.formats.format import INT32, Format, Precision, read_group_index, read_shaped
from bitwright.formats.loading_code import PROMPT, Code, python_string, vllm_command
from bitwright.grids.tensor import QuantizedTensor, pack, unpack

SETTINGS = Settings(
    read="quant_method method checkpoint_format format is_marlin_format",
    # Bits, groups and order of the channels follow from the tensors.
    harmless="""
        bits group_size desc_act sym static_groups true_sequential act_group_aware dynamic lm_head
        modules_in_block_to_quantize modules_to_not_convert block_name_to_quantize
        module_name_preceding_first_block damp_percent damp_auto_increment mse meta model_name_or_path
        model_file_base_name tokenizer dataset model_seqlen max_input_length batch_size pad_token_id
        cache_block_outputs backend use_exllama disable_exllama exllama_config use_cuda_fp16
        use_cuda_kernel awq_gemm_checkpoint quantizer version
    """,
    neutral={"pack_dtype": ("int32",), "adapter": ({},), "rotation": ("",), "activation": ({},)},
)


class GptqFormat(Format):
    """Reads and writes both versions of the layout.

    Version 1 (``checkpoint_format: gptq``) stores each zero less one and has no room for a zero of
    0, version 2 (``gptq_v2``) stores it as it is. Symmetric grids are written as version 1, which
    every engine reads, zero_point grids as version 2.
    """

    name = "gptq"
    bits = (2, 3, 4, 8)
    group_sizes = (32, 64, 128)
    whole_row = True
    grids = ("symmetric", "zero_point")
    scale_dtypes = (np.dtype(np.float16),)
    embeddings = False
    fuses_shared_inputs = True  # vLLM
    one_grid = True
    reorders = True
    parts = ("qweight", "qzeros", "scales", "g_idx")
    engines = "transformers with GPTQModel, vLLM"
    needs = "gptqmodel"
    metadata = "pt"

    def __init__(self, settings: Mapping[str, Any], subtracted: int) -> None:
        self.settings = settings
        self.subtracted = subtracted

    @classmethod
    def loading(
        cls, folder: str, mixed: bool, unfused: bool, file: FileOptions | None = None
    ) -> list[Code]:
        if not mixed:  # transformers reads one precision per folder
            return super().loading(folder, mixed, unfused)
        text = (
            "from gptqmodel import GPTQModel  # pip install gptqmodel\n\n"
            f"model = GPTQModel.load({python_string(folder)})\n"
            f'print(model.tokenizer.decode(model.generate("{PROMPT}")[0]))'
        )
        return [Code("python", text), *([] if unfused else [vllm_command(folder)])]

    @classmethod
    def detect(cls, checkpoint: Checkpoint) -> Self | None:
        found = declaration(checkpoint)
        if found is None or found.method != "gptq":
            return None
        key, layout = found.layout("checkpoint_format", "format")
        version = layout or "gptq"
        if version == "marlin" or found.settings.get("is_marlin_format") is True:
            return None  # AutoGPTQ's name for the layout of another format
        if version not in ("gptq", "gptq_v2"):
            raise UnsupportedModelError(f"{found.named(key)}; supported are: gptq, gptq_v2")
        SETTINGS.check(found.settings, found.where)
        return cls(found.settings, subtracted=1 if version == "gptq" else 0)

    @classmethod
    def check(cls, name: str, shape: tuple[int, int], precision: Precision) -> None:
        super().check(name, shape, precision)
        if shape[0] % 32 or shape[1] % 32:
            raise ValueError(
                f"{name}: the gptq format stores multiples of 32 channels, not {list(shape)}"
            )

    @classmethod
    def name_written(cls, name: str, nested: bool) -> str:
        return transformers_name(name) if nested else name

    @classmethod
    def pack(cls, name: str, tensor: QuantizedTensor) -> dict[str, NDArray[Any]]:
        if tensor.zeros is None:
            raise ValueError(
                f"{name}: the gptq format stores integer zeros, not {tensor.grid} grids"
            )
        subtracted = 1 if tensor.grid == "symmetric" else 0
        groups = tensor.group_index
        if groups is None:
            groups = np.arange(tensor.shape[1], dtype=np.int32) // np.int32(tensor.group_size)
        return {
            f"{name}.qweight": np.ascontiguousarray(pack(tensor.codes, tensor.bits).T).view(
                np.int32
            ),
            f"{name}.g_idx": groups,
            **_grid(name, tensor, subtracted),
        }

    def pack_grid(self, name: str, tensor: QuantizedTensor) -> dict[str, NDArray[Any]]:
        return _grid(name, tensor, self.subtracted)

    @classmethod
    def config(
        cls, default: Precision, layers: Mapping[str, Precision | None], block_prefix: str
    ) -> dict[str, Any]:
        symmetric = default.grid == "symmetric"
        settings: dict[str, Any] = {
            "quant_method": "gptq",
            "bits": default.bits,
            "group_size": default.group_size or -1,
            "desc_act": False,  # groups are consecutive channels, whatever order they were solved in
            "sym": symmetric,
            "checkpoint_format": "gptq" if symmetric else "gptq_v2",
            "lm_head": False,
        }
        names = EngineNames(layers)
        in_blocks = {name: kind for name, kind in layers.items() if name.startswith(block_prefix)}
        if None in in_blocks.values() or names.has_fused_layers:
            # transformers reads the list of modules, GPTQModel and vLLM the rules; but a layer that vLLM
            # treats as several it looks up in a list, under their names.
            quantized = [name for name, kind in in_blocks.items() if kind is not None]
            settings["modules_in_block_to_quantize"] = [names.listed(quantized)]
        others: dict[Precision | None, list[str]] = {}
        for name, kind in layers.items():
            if kind != default:
                others.setdefault(kind, []).append(name)
        rules: dict[str, Any] = {}
        for kind, chosen in others.items():
            for pattern in names.patterns(chosen):
                if kind is None:
                    rules[f"-:^{pattern}$"] = {}
                else:
                    changes = {"bits": kind.bits, "group_size": kind.group_size or -1}
                    rules[f"+:^{pattern}$"] = changes
        if rules:
            settings["dynamic"] = rules
        return {"quantization_config": settings}

    def read(
        self, checkpoint: Checkpoint | CheckpointSlice, name: str, channels: int | None = None
    ) -> QuantizedTensor | None:
        if f"{name}.qweight" not in checkpoint:
            return None
        words = read_shaped(checkpoint, f"{name}.qweight", INT32)
        scales = read_shaped(
            checkpoint, f"{name}.scales", (*self.scale_dtypes, np.dtype(np.float32))
        )
        zero_words = read_shaped(checkpoint, f"{name}.qzeros", INT32)
        groups, out = scales.shape
        where = f"{checkpoint.file(f'{name}.qweight')}: layer {name}"
        bits = zero_words.shape[1] * 32 // out
        channels = words.shape[0] * 32 // bits if bits else 0
        if (
            bits not in self.bits
            or zero_words.shape != (groups, out * bits // 32)
            or words.shape != (channels * bits // 32, out)
            or channels % groups
        ):
            raise CheckpointError(
                f"{where}: qweight {list(words.shape)}, qzeros {list(zero_words.shape)} and scales "
                f"{list(scales.shape)} contradict each other"
            )
        zeros = unpack(_moved(zero_words.view(np.uint32), bits, self.subtracted), bits)
        return QuantizedTensor(
            codes=unpack(np.ascontiguousarray(words.T).view(np.uint32), bits),
            scales=np.ascontiguousarray(scales.T),
            biases=None,
            zeros=np.ascontiguousarray(zeros.T),
            bits=bits,
            group_size=channels // groups,
            grid="symmetric" if (zeros == 1 << (bits - 1)).all() else "zero_point",
            group_index=read_group_index(checkpoint, f"{name}.g_idx", channels, groups),
        )


def _grid(name: str, tensor: QuantizedTensor, subtracted: int) -> dict[str, NDArray[Any]]:
    zeros = pack(np.ascontiguousarray(np.asarray(tensor.zeros).T), tensor.bits)
    return {
        f"{name}.qzeros": _moved(zeros, tensor.bits, -subtracted).view(np.int32),
        f"{name}.scales": np.ascontiguousarray(tensor.scales.T),
    }


def _moved(words: NDArray[np.uint32], bits: int, by: int) -> NDArray[np.uint32]:
    """Add `by` to each of the packed zeros, as GPTQModel does between the two versions: to whole words, so
    that a zero of 0 borrows from the next; but zeros of 3 bits lie across words, and are taken modulo 8."""
    if not by:
        return words
    if bits == 3:
        return pack(unpack(words, bits) + np.uint8(by % 8) & np.uint8(7), bits)
    ones = sum(1 << place for place in range(0, 32, bits))
    return words + np.uint32(by * ones % (1 << 32))


FORMATS = (GptqFormat,)
