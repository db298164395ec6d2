"""AWQ GEMM: 4 bits, integer zero points, codes packed along the output channels (AutoAWQ, GPTQModel)."""

from collections.abc import Mapping
from typing import Any, Self

import numpy as np
from numpy.typing import NDArray

from bitwright.checkpoint import Checkpoint, CheckpointSlice
from bitwright.errors import CheckpointError, UnsupportedModelError
from bitwright.formats.declared import Settings, declaration
from bitwright.formats.engine_names import EngineNames, transformers_name
from bitwright.formats.format import INT32, Format, Precision, read_shaped
from bitwright.grids.tensor import QuantizedTensor, pack, unpack

BITS = 4
ORDER = (0, 2, 4, 6, 1, 3, 5, 7)  # which of eight output channels each nibble of a word holds

SETTINGS = Settings(
    read="quant_method method version checkpoint_format format",
    harmless="""
        group_size q_group_size zero_point modules_to_not_convert sym desc_act lm_head dynamic meta
        do_fuse fuse_max_seq_len modules_to_fuse exllama_config modules_in_block_to_quantize
        tokenizer dataset damp_percent act_group_aware true_sequential model_seqlen batch_size
        block_name_to_quantize module_name_preceding_first_block max_input_length pad_token_id
        cache_block_outputs
    """,
    neutral={
        "bits": (BITS,),
        "w_bit": (BITS,),
        "backend": ("auto", "autoawq"),  # what packed it; llm-awq has a layout of its own
        "pack_dtype": ("int32",),
        "adapter": ({},),
        "rotation": ("",),
        "activation": ({},),
    },
)


class AwqFormat(Format):
    """Reads and writes the layout that AutoAWQ calls GEMM: ``w = scale * (code - zero)``."""

    name = "awq"
    bits = (BITS,)
    group_sizes = (32, 64, 128)
    whole_row = False
    grids = ("zero_point", "symmetric")
    scale_dtypes = (np.dtype(np.float16),)
    embeddings = False
    fuses_shared_inputs = True  # vLLM
    one_precision = True
    parts = ("qweight", "qzeros", "scales")
    engines = "transformers with GPTQModel, vLLM"
    needs = "gptqmodel"
    metadata = "pt"

    @classmethod
    def detect(cls, checkpoint: Checkpoint) -> Self | None:
        found = declaration(checkpoint)
        if found is None or found.method != "awq":
            return None
        for key in ("checkpoint_format", "version", "format"):
            if found.layout(key)[1] not in (None, "gemm"):
                raise UnsupportedModelError(f"{found.named(key)}; only gemm is supported")
        SETTINGS.check(found.settings, found.where)
        return cls()

    @classmethod
    def check(cls, name: str, shape: tuple[int, int], precision: Precision) -> None:
        super().check(name, shape, precision)
        if shape[0] % len(ORDER):
            raise ValueError(
                f"{name}: the awq format stores multiples of 8 output channels, not {shape[0]}"
            )

    @classmethod
    def name_written(cls, name: str, nested: bool) -> str:
        return transformers_name(name) if nested else name

    @classmethod
    def pack(cls, name: str, tensor: QuantizedTensor) -> dict[str, NDArray[Any]]:
        if tensor.zeros is None or tensor.group_index is not None:
            raise ValueError(
                f"{name}: the awq format stores integer zeros and consecutive groups, "
                f"not {tensor.grid} grids"
            )
        return {
            f"{name}.qweight": _pack_columns(tensor.codes.T),
            f"{name}.qzeros": _pack_columns(tensor.zeros.T),
            f"{name}.scales": np.ascontiguousarray(tensor.scales.T),
        }

    def pack_grid(self, name: str, tensor: QuantizedTensor) -> dict[str, NDArray[Any]]:
        return {
            f"{name}.qzeros": _pack_columns(np.asarray(tensor.zeros).T),
            f"{name}.scales": np.ascontiguousarray(tensor.scales.T),
        }

    @classmethod
    def config(
        cls, default: Precision, layers: Mapping[str, Precision | None], block_prefix: str
    ) -> dict[str, Any]:
        for name, precision in layers.items():
            if precision not in (None, default):
                raise ValueError(
                    f"{name}: the awq format has one precision for all layers; an override can only "
                    "be had in the mlx, gptq, compressed-tensors and gguf formats"
                )
        in_float = [name for name, precision in layers.items() if precision is None]
        return {
            "quantization_config": {
                "quant_method": "awq",
                "bits": BITS,
                "group_size": default.group_size,
                "zero_point": True,  # symmetric grids are stored with their zeros, too
                "version": "gemm",
                "modules_to_not_convert": EngineNames(layers).beginnings(in_float) or None,
            }
        }

    def read(
        self, checkpoint: Checkpoint | CheckpointSlice, name: str, channels: int | None = None
    ) -> QuantizedTensor | None:
        if f"{name}.qweight" not in checkpoint:
            return None
        words = read_shaped(checkpoint, f"{name}.qweight", INT32)
        zero_words = read_shaped(checkpoint, f"{name}.qzeros", INT32)
        scales = read_shaped(
            checkpoint, f"{name}.scales", (*self.scale_dtypes, np.dtype(np.float32))
        )
        (channels, packed), (groups, out) = words.shape, scales.shape
        if packed * len(ORDER) != out or zero_words.shape != (groups, packed) or channels % groups:
            raise CheckpointError(
                f"{checkpoint.file(f'{name}.qweight')}: layer {name}: qweight {list(words.shape)}, "
                f"qzeros {list(zero_words.shape)} and scales {list(scales.shape)} contradict each other"
            )
        zeros = _unpack_columns(zero_words)
        return QuantizedTensor(
            codes=_unpack_columns(words),
            scales=np.ascontiguousarray(scales.T),
            biases=None,
            zeros=zeros,
            bits=BITS,
            group_size=channels // groups,
            grid="symmetric" if (zeros == 1 << (BITS - 1)).all() else "zero_point",
        )


def _pack_columns(values: NDArray[np.uint8]) -> NDArray[np.int32]:
    """Return ``[rows, out]`` codes as ``[rows, out / 8]`` words."""
    rows, out = values.shape
    nibbles = values.reshape(rows, out // len(ORDER), len(ORDER))[:, :, ORDER]
    return pack(np.ascontiguousarray(nibbles).reshape(rows, out), BITS).view(np.int32)


def _unpack_columns(words: NDArray[np.int32]) -> NDArray[np.uint8]:
    """Return the codes ``[out, rows]`` of words ``[rows, out / 8]``."""
    nibbles = unpack(words.view(np.uint32), BITS).reshape(len(words), -1, len(ORDER))
    values = np.empty_like(nibbles)
    values[:, :, ORDER] = nibbles
    return np.ascontiguousarray(values.reshape(len(words), -1).T)


FORMATS = (AwqFormat,)
