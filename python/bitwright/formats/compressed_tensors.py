"""compressed-tensors, pack-quantized: what llm-compressor writes and vLLM reads."""

from collections.abc import Mapping
from typing import Any, Self

import ml_dtypes
import numpy as np
from numpy.typing import NDArray

from bitwright.checkpoint import Checkpoint, CheckpointSlice
from bitwright.checkpoint.writer import FileOptions
from bitwright.errors import CheckpointError, UnsupportedModelError, shown
from bitwright.formats.declared import Settings, declaration
from bitwright.formats.engine_names import EngineNames
from bitwright.formats.format import (
    INT32,
    Format,
    Precision,
    read_codes,
    read_group_index,
    read_scales,
    read_shaped,
)
from bitwright.formats.loading_code import Code, transformers_code, vllm_command
from bitwright.grids.tables import E4M3, TABLES, over_rows, row_starts
from bitwright.grids.tensor import BITS, Grid, QuantizedTensor, pack, unpack
from bitwright.warned import warn

METHOD, LAYOUT = "compressed-tensors", "pack-quantized"
FLOAT_LAYOUTS: dict[Grid, str] = {
    "mxfp4": "mxfp4-pack-quantized",
    "nvfp4_divided": "nvfp4-pack-quantized",
}
FP8_LAYOUT = "float-quantized"  # also called naive-quantized, where activations stay as they are
FP8_LAYOUTS = (FP8_LAYOUT, "naive-quantized")
STRATEGIES: dict[Grid, str] = {"fp8": "channel", "fp8_tensor": "tensor", "fp8_block": "block"}
BLOCK = [128, 128]
MIXED = "mixed-precision"
HEAD = "lm_head"  # a module of its own for loaders even where it is tied to the embedding

# Schemes that are given by name, with a list of their targets.
PRESETS = ("W4A16", "W4A16_ASYM", "W8A16")
SETTINGS = Settings(
    read="quant_method config_groups format sparsity_config kv_cache_scheme",
    harmless="""
        ignore quantization_status global_compression_ratio version run_compressed dequantize
        use_optimized_inference
    """,
    neutral={"transform_config": ({},)},  # rotations between the layers
)
SCHEME = Settings(read="weights input_activations output_activations format", harmless="targets")
WEIGHTS = Settings(
    # Bits, groups and zeros follow from the tensors.
    read="num_bits symmetric strategy group_size",
    harmless="dynamic actorder scale_dtype zp_dtype observer observer_kwargs",
    neutral={"type": ("int", "float"), "block_structure": (BLOCK,)},
)


class CompressedTensorsFormat(Format):
    """Reads and writes the layout that packs codes along the input channels, ``w = scale * (code - zero)``.

    Its codes and zeros are signed, and stored with half their range added: what is stored are ours. Bits
    other than 4 and 8 are read, too; engines have no kernels for them.
    """

    name = METHOD
    bits = (4, 8)
    group_sizes = (32, 64, 128)
    whole_row = True
    grids = ("symmetric", "zero_point", *FLOAT_LAYOUTS, *STRATEGIES)
    scale_dtypes = (np.dtype(np.float16), np.dtype(ml_dtypes.bfloat16), np.dtype(np.float32))
    embeddings = False
    fuses_shared_inputs = True  # vLLM
    parts = (
        "weight",
        "weight_packed",
        "weight_scale",
        "weight_zero_point",
        "weight_shape",
        "weight_g_idx",
        "weight_global_scale",
    )
    engines = "transformers with compressed-tensors, vLLM"
    needs = "compressed-tensors"
    metadata = "pt"

    @classmethod
    def loading(
        cls, folder: str, mixed: bool, unfused: bool, file: FileOptions | None = None
    ) -> list[Code]:
        if mixed:  # with several precisions transformers takes them only as they are
            return [transformers_code(folder, cls.needs) if unfused else vllm_command(folder)]
        code = transformers_code(
            folder,
            cls.needs,
            "CompressedTensorsConfig",
            "quantization_config=CompressedTensorsConfig(dequantize=True)",
        )
        return [code] if unfused else [code, vllm_command(folder)]

    @classmethod
    def detect(cls, checkpoint: Checkpoint) -> Self | None:
        found = declaration(checkpoint)
        if found is None or found.method != METHOD:
            return None
        where, settings = found.where, found.settings
        groups = settings.get("config_groups")
        if not isinstance(groups, dict):
            raise CheckpointError(f'{where}.config_groups" is {shown(groups)}')
        for name, group in groups.items():
            place = f"{where}.config_groups.{shown(name)[1:-1]}"
            if isinstance(group, list) and name.upper() in PRESETS:
                group = {}
            if not isinstance(group, dict):
                raise CheckpointError(f'{place}" is {shown(group)}')
            layout = group.get("format") or settings.get("format")
            known = (LAYOUT, *FLOAT_LAYOUTS.values(), *FP8_LAYOUTS)
            if layout not in known:
                raise UnsupportedModelError(
                    f'{where}.format" is {shown(layout)}; only {", ".join(known)} are supported'
                )
            _check_scheme(group, place)
            weights = group.get("weights")
            kind = weights.get("type", "int") if isinstance(weights, dict) else "int"
            if isinstance(weights, dict) and (kind == "float") != (layout != LAYOUT):
                raise UnsupportedModelError(
                    f'{place}.weights.type" is {shown(kind)}, which is not what {layout} holds'
                )
        sparse, rotations = settings.get("sparsity_config"), settings.get("transform_config")
        if isinstance(sparse, dict) and sparse.get("format", "dense") != "dense":
            raise UnsupportedModelError(
                f'{where}.sparsity_config.format" is {shown(sparse["format"])}; only dense is supported'
            )
        if isinstance(rotations, dict) and not any(rotations.values()):
            settings = {key: value for key, value in settings.items() if key != "transform_config"}
        SETTINGS.check(settings, where)
        if settings.get("kv_cache_scheme"):
            warn(
                f'{where}.kv_cache_scheme" rounds keys and values, too; bitwright computes with the '
                f"weights alone, and engines with both come out somewhat worse"
            )
        return cls()

    @classmethod
    def check(cls, name: str, shape: tuple[int, int], precision: Precision) -> None:
        super().check(name, shape, precision)
        if shape[0] % 8 or shape[1] % 8:
            raise ValueError(
                f"{name}: the {cls.name} format is written for multiples of 8 channels, not {list(shape)}"
            )

    @classmethod
    def pack(cls, name: str, tensor: QuantizedTensor) -> dict[str, NDArray[Any]]:
        if tensor.grid in FLOAT_LAYOUTS and tensor.table is not None:
            floats = tensor.table.floats[tensor.codes]
            pairs = floats[:, ::2] | floats[:, 1::2] << 4
            return {f"{name}.weight_packed": pairs, **_float_grid(name, tensor)}
        if tensor.grid in STRATEGIES and tensor.table is not None:
            floats = tensor.table.floats[tensor.codes]
            return {f"{name}.weight": floats.view(E4M3), **_fp8_grid(name, tensor)}
        if tensor.zeros is None or tensor.group_index is not None:
            raise ValueError(
                f"{name}: the {cls.name} format stores integer zeros and consecutive groups, "
                f"not {tensor.grid} grids"
            )
        return {
            f"{name}.weight_packed": pack(tensor.codes, tensor.bits).view(np.int32),
            f"{name}.weight_shape": np.array(tensor.shape, np.int64),
            **_grid(name, tensor),
        }

    def pack_grid(self, name: str, tensor: QuantizedTensor) -> dict[str, NDArray[Any]]:
        if tensor.grid in STRATEGIES:
            return _fp8_grid(name, tensor)
        return _float_grid(name, tensor) if tensor.grid in FLOAT_LAYOUTS else _grid(name, tensor)

    @classmethod
    def config(
        cls, default: Precision, layers: Mapping[str, Precision | None], block_prefix: str
    ) -> dict[str, Any]:
        names = EngineNames([*layers, HEAD])
        kinds: dict[Precision, list[str]] = {default: []}
        for name, kind in layers.items():
            if kind is not None:
                kinds.setdefault(kind, []).append(name)
        # With several groups each lists its layers by name, so that exactly one group matches a layer.
        targets = ["Linear"] if len(kinds) == 1 else None
        in_float = [name for name, kind in layers.items() if kind is None]
        groups = {
            f"group_{number}": {
                "targets": targets or names.targets(chosen),
                "weights": _weights(kind),
                "input_activations": None,
                "output_activations": None,
                "format": _layout(kind.grid),
            }
            for number, (kind, chosen) in enumerate(kinds.items())
        }
        layouts = {str(group["format"]) for group in groups.values()}
        return {
            "quantization_config": {
                "quant_method": METHOD,
                "format": layouts.pop() if len(layouts) == 1 else MIXED,
                "quantization_status": "compressed",
                "config_groups": groups,
                "ignore": names.targets([*in_float, *({HEAD} - set(layers))]),
                "kv_cache_scheme": None,
                "global_compression_ratio": None,
            }
        }

    def read(
        self, checkpoint: Checkpoint | CheckpointSlice, name: str, channels: int | None = None
    ) -> QuantizedTensor | None:
        if f"{name}.weight_packed" not in checkpoint:
            return self._read_fp8(checkpoint, name)
        words = read_shaped(checkpoint, f"{name}.weight_packed", (*INT32, np.dtype(np.uint8)))
        if words.dtype == np.uint8:
            return _read_floats(checkpoint, name, words)
        scales = read_shaped(checkpoint, f"{name}.weight_scale", self.scale_dtypes)
        shape = read_shaped(
            checkpoint, f"{name}.weight_shape", (np.dtype(np.int64), *INT32), dimensions=1
        ).tolist()
        zero_words = None
        if f"{name}.weight_zero_point" in checkpoint:
            zero_words = read_shaped(checkpoint, f"{name}.weight_zero_point", INT32)
        where = f"{checkpoint.file(f'{name}.weight_packed')}: layer {name}"
        (out, row), (rows, groups) = words.shape, scales.shape
        channels = shape[-1]
        bits = row * 32 // channels if channels > 0 else 0
        if (
            bits not in BITS
            or shape != [out, channels]
            or row * 32 != channels * bits
            or rows != out
            or channels % groups
            or (zero_words is not None and zero_words.shape != (out * bits // 32, groups))
        ):
            zeros_shape = None if zero_words is None else list(zero_words.shape)
            raise CheckpointError(
                f"{where}: weight_packed {list(words.shape)}, weight_shape {shape}, weight_scale "
                f"{list(scales.shape)} and weight_zero_point {zeros_shape} contradict each other"
            )
        if zero_words is None:
            zeros = np.full(scales.shape, 1 << (bits - 1), np.uint8)
        else:
            packed = np.ascontiguousarray(zero_words.T).view(np.uint32)
            zeros = np.ascontiguousarray(unpack(packed, bits).T)
        return QuantizedTensor(
            codes=unpack(words.view(np.uint32), bits),
            scales=scales,
            biases=None,
            zeros=zeros,
            bits=bits,
            group_size=channels // groups,
            grid="symmetric" if zero_words is None else "zero_point",
            group_index=read_group_index(checkpoint, f"{name}.weight_g_idx", channels, groups),
        )

    def _read_fp8(
        self, checkpoint: Checkpoint | CheckpointSlice, name: str
    ) -> QuantizedTensor | None:
        tensor, place = f"{name}.weight", f"{name}.weight_scale"
        if tensor not in checkpoint or place not in checkpoint:
            return None
        floats = read_shaped(checkpoint, tensor, (E4M3,))
        stored = checkpoint.read(place)
        grid = fp8_grid(floats.shape, stored.shape)
        if grid is None or stored.dtype not in self.scale_dtypes:
            raise CheckpointError(
                f"{checkpoint.file(place)}: layer {name}: weight {list(floats.shape)} and weight_scale "
                f"{list(stored.shape)} ({stored.dtype}) contradict each other"
            )
        table, (out, channels) = TABLES[grid], floats.shape
        rows = len(row_starts(grid, out))
        where = f"{checkpoint.file(place)}: layer {name}: weight_scale"
        scales = over_rows(grid, read_scales(stored.reshape(rows, -1), table, where), out)
        where = f"{checkpoint.file(tensor)}: layer {name}: weight"
        return QuantizedTensor(
            codes=read_codes(floats.view(np.uint8), table, where),
            scales=np.ascontiguousarray(scales),
            biases=None,
            zeros=None,
            bits=table.bits,
            group_size=table.group_size or channels,
            grid=grid,
        )


def _layout(grid: Grid) -> str:
    return FP8_LAYOUT if grid in STRATEGIES else FLOAT_LAYOUTS.get(grid, LAYOUT)


def _weights(kind: Precision) -> dict[str, Any]:
    """Return what a scheme says of weights."""
    settings: dict[str, Any] = {
        "num_bits": kind.bits,
        "type": "int",
        "symmetric": kind.grid == "symmetric",
        "strategy": "group" if kind.group_size else "channel",
        "group_size": kind.group_size,
        "dynamic": False,
    }
    if kind.grid in STRATEGIES:
        settings |= {"type": "float", "symmetric": True, "strategy": STRATEGIES[kind.grid]}
        block = {"block_structure": BLOCK} if kind.grid == "fp8_block" else {}
        return settings | {"group_size": None} | block
    if kind.grid not in FLOAT_LAYOUTS:
        return settings
    table = TABLES[kind.grid]
    return settings | {
        "type": "float",
        "symmetric": True,
        "strategy": "tensor_group" if table.divided else "group",
        "scale_dtype": "torch.float8_e4m3fn" if table.scale_dtype == E4M3 else "torch.uint8",
    }


def _fp8_grid(name: str, tensor: QuantizedTensor) -> dict[str, NDArray[Any]]:
    scales = tensor.scales[row_starts(tensor.grid, len(tensor.scales))]
    return {f"{name}.weight_scale": scales[0] if tensor.grid == "fp8_tensor" else scales}


def _float_grid(name: str, tensor: QuantizedTensor) -> dict[str, NDArray[Any]]:
    if tensor.table is None or not tensor.table.divided:
        return {f"{name}.weight_scale": tensor.scales.view(np.uint8)}
    return {
        f"{name}.weight_scale": tensor.scales,
        f"{name}.weight_global_scale": np.array([tensor.divisor], np.float32),
    }


def _read_floats(
    checkpoint: Checkpoint | CheckpointSlice, name: str, pairs: NDArray[np.uint8]
) -> QuantizedTensor:
    """Read a layer of one of the float layouts: two floats in a byte, the first in the lower nibble."""
    tensor, whole = f"{name}.weight_scale", f"{name}.weight_global_scale"
    where = f"{checkpoint.file(tensor)}: layer {name}"
    grid: Grid = "nvfp4_divided" if whole in checkpoint else "mxfp4"
    table, divisor = TABLES[grid], 1.0
    stored = read_shaped(checkpoint, tensor, (E4M3 if table.divided else np.dtype(np.uint8),))
    if table.divided:
        known = read_shaped(checkpoint, whole, (np.dtype(np.float32),), dimensions=1)
        divisor = float(known[0])
        if len(known) != 1 or not (divisor > 0 and np.isfinite(divisor)):
            raise CheckpointError(
                f"{where}: weight_global_scale is {known.tolist()}, not one positive number. The file "
                f"is damaged: fetch or make it again"
            )
    channels = 2 * pairs.shape[1]
    if stored.shape != (len(pairs), channels // (table.group_size or 1)):
        raise CheckpointError(
            f"{where}: weight_packed {list(pairs.shape)} and weight_scale {list(stored.shape)} "
            f"contradict each other; {grid} has groups of {table.group_size}"
        )
    floats = np.stack([pairs & 15, pairs >> 4], axis=-1).reshape(len(pairs), channels)
    return QuantizedTensor(
        codes=read_codes(floats, table, where),
        scales=read_scales(stored, table, f"{where}: weight_scale"),
        biases=None,
        zeros=None,
        bits=table.bits,
        group_size=channels // stored.shape[1],
        grid=grid,
        divisor=divisor,
    )


def fp8_grid(shape: tuple[int, ...], scales: tuple[int, ...]) -> Grid | None:
    """Return the grid of a matrix in 8 bits by the shape of its scales, None where it is none of ours."""
    if len(shape) != 2:
        return None
    out, channels = shape
    if scales in ((), (1,)):
        return "fp8_tensor"
    if scales == (out, 1):
        return "fp8"
    whole = channels % BLOCK[1] == 0 and scales == (-(-out // BLOCK[0]), channels // BLOCK[1])
    return "fp8_block" if whole else None


def _check_scheme(scheme: Mapping[str, Any], where: str) -> None:
    SCHEME.check(scheme, where)
    if isinstance(weights := scheme.get("weights"), dict):
        WEIGHTS.check(weights, f"{where}.weights")
    rounded = [key for key in ("input_activations", "output_activations") if scheme.get(key)]
    if rounded:
        warn(
            f'{where}.{rounded[0]}" rounds activations, too; bitwright computes with the weights alone, '
            f"and engines with both come out somewhat worse"
        )


def _grid(name: str, tensor: QuantizedTensor) -> dict[str, NDArray[Any]]:
    arrays: dict[str, NDArray[Any]] = {f"{name}.weight_scale": tensor.scales}
    if tensor.grid != "symmetric":
        zeros = np.ascontiguousarray(np.asarray(tensor.zeros).T)
        words = pack(zeros, tensor.bits).view(np.int32)
        arrays[f"{name}.weight_zero_point"] = np.ascontiguousarray(words.T)
    return arrays


FORMATS = (CompressedTensorsFormat,)
