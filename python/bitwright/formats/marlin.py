"""Marlin: symmetric 4 bits in the order in which tensor cores take them (IST-DASLab, AutoGPTQ, vLLM)."""

from collections.abc import Mapping
from dataclasses import replace
from itertools import product
from typing import Any, Self

import numpy as np
from numpy.typing import NDArray

from bitwright.checkpoint import Checkpoint, CheckpointSlice
from bitwright.checkpoint.writer import FileOptions
from bitwright.errors import CheckpointError, UnsupportedModelError
from bitwright.formats.declared import declaration
from bitwright.formats.format import INT32, Format, Precision, read_shaped
from bitwright.formats.gptq import SETTINGS as GPTQ
from bitwright.formats.loading_code import Code, shell_word
from bitwright.grids.tensor import QuantizedTensor

BITS, ZERO = 4, 8
GROUP = 128
TILE = 16  # input and output channels of a tile
INPUTS, OUTPUTS = 128, 64  # vLLM's kernel takes multiples of these; the second is four tiles

SETTINGS = replace(
    GPTQ, neutral={**GPTQ.neutral, "bits": (BITS,), "sym": (True,), "desc_act": (False,)}
)


class MarlinFormat(Format):
    """Reads and writes ``w = scale * (code - 8)`` as vLLM loads it up to 0.10.1.1; 0.10.2 dropped it.

    A row of ``B`` holds 16 input channels, 64 output channels after another, four tiles of 16 x 16. A tile
    is the B operand of two ``mma.m16n8k16``. Of its elements (input k, output n), thread ``4g + t`` of 32
    holds the eight with ``n mod 8 = g`` and ``k mod 8`` either ``2t`` or ``2t + 1``, in one word. Words
    follow each other by thread, then by tile. Nibble ``4 (k mod 2) + 2 (n div 8) + (k div 8)`` of a word
    is element (k, n): the kernel unpacks nibbles i and i + 4 together, two inputs that are neighbours.

    Written is IST-DASLab's ``quant_method: marlin``: every vLLM that has the kernel takes this name as it
    is. AutoGPTQ's spelling, gptq with ``is_marlin_format``, later with ``checkpoint_format: marlin``, is
    tried as plain GPTQ by versions without the kernel, and is only read.
    """

    name = "marlin"
    bits = (BITS,)
    group_sizes = (GROUP,)
    whole_row = True
    grids = ("symmetric",)
    scale_dtypes = (np.dtype(np.float16),)
    embeddings = False
    fuses_shared_inputs = True  # vLLM
    one_precision = True
    parts = ("B", "s")
    engines = "vLLM up to 0.10.1"
    metadata = "pt"

    def __init__(self, group_size: int) -> None:
        self.group_size = group_size

    @classmethod
    def loading(
        cls, folder: str, mixed: bool, unfused: bool, file: FileOptions | None = None
    ) -> list[Code]:
        run = f"vllm serve {shell_word(folder)} --dtype float16"
        return [Code("sh", f'pip install "vllm<=0.10.1.1"  # later ones dropped it\n{run}')]

    @classmethod
    def detect(cls, checkpoint: Checkpoint) -> Self | None:
        found = declaration(checkpoint)
        if found is None:
            return None
        version = found.layout("checkpoint_format", "format")[1]
        of_gptq = version == "marlin" or found.settings.get("is_marlin_format") is True
        if found.method != "marlin" and not (found.method == "gptq" and of_gptq):
            return None
        size = found.settings.get("group_size")
        if type(size) is not int or size not in (GROUP, -1):
            raise UnsupportedModelError(
                f"{found.named('group_size')}; the marlin format has {GROUP} or -1"
            )
        SETTINGS.check(found.settings, found.where)
        return cls(size)

    @classmethod
    def check(cls, name: str, shape: tuple[int, int], precision: Precision) -> None:
        super().check(name, shape, precision)
        out, channels = shape
        if out % OUTPUTS or channels % INPUTS:
            raise ValueError(
                f"{name}: the marlin format stores multiples of {OUTPUTS} output and {INPUTS} input "
                f"channels, not {out} and {channels}"
            )

    @classmethod
    def pack(cls, name: str, tensor: QuantizedTensor) -> dict[str, NDArray[Any]]:
        if tensor.grid != "symmetric" or tensor.bits != BITS or tensor.group_index is not None:
            raise ValueError(
                f"{name}: the marlin format stores {BITS} bits, symmetric grids and consecutive groups, "
                f"not {tensor.bits} bits on {tensor.grid} grids"
            )
        return {f"{name}.B": _pack_tiles(tensor.codes), **_grid(name, tensor)}

    def pack_grid(self, name: str, tensor: QuantizedTensor) -> dict[str, NDArray[Any]]:
        return _grid(name, tensor)

    @classmethod
    def config(
        cls, default: Precision, layers: Mapping[str, Precision | None], block_prefix: str
    ) -> dict[str, Any]:
        for name, precision in layers.items():
            if precision is None and name.startswith(block_prefix):
                raise ValueError(
                    f"{name}: the marlin format cannot leave a layer of a block in float; "
                    "the gptq, awq and compressed-tensors formats can"
                )
            if precision not in (None, default):
                raise ValueError(
                    f"{name}: the marlin format has one precision for all layers; an override can only "
                    "be had in the mlx, gptq, compressed-tensors and gguf formats"
                )
        return {
            "quantization_config": {
                "quant_method": "marlin",
                "bits": BITS,
                "group_size": default.group_size or -1,
                "sym": True,
                "desc_act": False,
                "checkpoint_format": "marlin",  # so that vLLM takes --quantization gptq for it, too
                "lm_head": False,
            }
        }

    @classmethod
    def spell(cls, config: Mapping[str, Any]) -> dict[str, Any]:
        """vLLM's kernel computes in float16 alone, and refuses models that declare another dtype."""
        spelled = dict(config)
        for key in ("dtype", "torch_dtype"):
            if spelled.get(key) is not None:
                spelled[key] = "float16"
        if isinstance(config.get("text_config"), dict):
            spelled["text_config"] = cls.spell(config["text_config"])
        return spelled

    def read(
        self, checkpoint: Checkpoint | CheckpointSlice, name: str, channels: int | None = None
    ) -> QuantizedTensor | None:
        if f"{name}.B" not in checkpoint:
            return None
        words = read_shaped(checkpoint, f"{name}.B", INT32)
        scales = read_shaped(checkpoint, f"{name}.s", self.scale_dtypes)
        channels, (groups, out) = words.shape[0] * TILE, scales.shape
        size = channels if self.group_size == -1 else self.group_size
        if words.shape[1] != out * TILE // 8 or out % OUTPUTS or groups * size != channels:
            raise CheckpointError(
                f"{checkpoint.file(f'{name}.B')}: layer {name}: B {list(words.shape)}, "
                f"s {list(scales.shape)} and group_size {self.group_size} contradict each other"
            )
        return QuantizedTensor(
            codes=_unpack_tiles(words, out),
            scales=np.ascontiguousarray(_swap_scales(scales).T),
            biases=None,
            zeros=np.full((out, groups), ZERO, np.uint8),
            bits=BITS,
            group_size=size,
            grid="symmetric",
        )


def _pack_tiles(codes: NDArray[np.uint8]) -> NDArray[np.int32]:
    """Return codes ``[out, in]`` as words ``[in / 16, out * 2]``."""
    out, channels = codes.shape
    # four tiles, n div 8, g | row, k div 8, k mod 8
    split = codes.reshape(out // OUTPUTS, 4, 2, 8, channels // TILE, 2, 8)
    pairs = split[..., 0, :] | split[..., 1, :] << 4
    fours = pairs[:, :, 0] | pairs[:, :, 1].astype(np.uint16) << 8
    words = fours.view(np.int32)  # neighbours along the input: four tiles, tile, g, row, t
    return np.ascontiguousarray(words.transpose(3, 0, 2, 4, 1)).reshape(channels // TILE, out * 2)


def _unpack_tiles(words: NDArray[np.int32], out: int) -> NDArray[np.uint8]:
    """Return the codes ``[out, in]`` of words ``[in / 16, out * 2]``."""
    rows = len(words)
    ordered = words.reshape(rows, out // OUTPUTS, 8, 4, 4).transpose(1, 4, 2, 0, 3)
    fours = np.ascontiguousarray(ordered).view(np.uint16)
    codes = np.empty((out // OUTPUTS, 4, 2, 8, rows, 2, 8), np.uint8)
    for half, side in product(range(2), range(2)):
        codes[:, :, half, :, :, side] = fours >> (8 * half + 4 * side) & 15
    return codes.reshape(out, rows * TILE)


def _grid(name: str, tensor: QuantizedTensor) -> dict[str, NDArray[Any]]:
    """Return the scales ``[groups, out]`` in the order in which threads need them.

    In groups, weights are scaled: thread ``4g + t`` needs output g of eight half tiles. In whole rows, sums
    are: it holds outputs ``2t`` and ``2t + 1`` of each half tile, and loads those of four at once.
    """
    return {f"{name}.s": _swap_scales(np.ascontiguousarray(tensor.scales.T))}


def _swap_scales(scales: NDArray[Any]) -> NDArray[Any]:
    """Bring scales ``[groups, out]`` into the stored order, or back: it is its own inverse."""
    # Kernels, too, tell the two orders apart by the number of groups alone.
    parts = (-1, 8, 8, 1) if len(scales) > 1 else (-1, 4, 4, 2)
    return scales.reshape(parts).swapaxes(1, 2).reshape(scales.shape)


FORMATS = (MarlinFormat,)
