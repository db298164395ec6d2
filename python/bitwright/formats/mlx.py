"""MLX: affine groups with a float bias, codes along the input channels (mlx.core.quantize)."""

from collections.abc import Mapping
from typing import Any, Self

import ml_dtypes
import numpy as np
from numpy.typing import NDArray

from bitwright.checkpoint import Checkpoint, CheckpointSlice
from bitwright.errors import CheckpointError, UnsupportedModelError, shown
from bitwright.formats.declared import Settings
from bitwright.formats.format import Format, Precision, read_shaped
from bitwright.tensor import BITS, QuantizedTensor, pack, unpack

FLOATS = (np.dtype(np.float32), np.dtype(np.float16), np.dtype(ml_dtypes.bfloat16))

SETTINGS = Settings(
    read="group_size bits",
    harmless="quant_method linear_class_predicate",
    neutral={"mode": ("affine",), "quantize_input": (False,), "global_scale": (False,)},
)


class MlxFormat(Format):
    """Reads and writes what mlx-lm does."""

    name = "mlx"
    bits = BITS
    group_sizes = (32, 64, 128)
    whole_row = False
    grids = ("affine",)
    scale_dtypes = FLOATS
    embeddings = True
    stacks_experts = True
    parts = ("weight", "scales", "biases")
    engines = "mlx-lm"
    metadata = "mlx"

    def __init__(self, settings: Mapping[str, Any]) -> None:
        self.settings = settings

    @classmethod
    def detect(cls, checkpoint: Checkpoint) -> Self | None:
        settings = checkpoint.config.get("quantization")
        if not isinstance(settings, dict) or not settings.keys() & {"group_size", "bits"}:
            return None
        where = f'{checkpoint.folder / "config.json"}: "quantization'
        layers = {name: each for name, each in settings.items() if isinstance(each, dict)}
        named = [
            name for name, each in settings.items() if "." in name or type(each) in (dict, bool)
        ]
        SETTINGS.check(settings, where, named)
        for name, layer in layers.items():
            SETTINGS.check(layer, f"{where}.{shown(name)[1:-1]}")
        if checkpoint.config.get("quantize_activations"):
            raise UnsupportedModelError(
                f'{checkpoint.folder / "config.json"}: "quantize_activations" is true, which mlx-lm does '
                f"not compute with affine grids. Set it to false"
            )
        return cls(settings)

    @classmethod
    def pack(cls, name: str, tensor: QuantizedTensor) -> dict[str, NDArray[Any]]:
        if tensor.biases is None or tensor.group_index is not None:
            raise ValueError(f"{name}: the mlx format stores affine grids with consecutive groups")
        return {
            f"{name}.weight": pack(tensor.codes, tensor.bits),
            f"{name}.scales": tensor.scales,
            f"{name}.biases": tensor.biases,
        }

    def pack_grid(self, name: str, tensor: QuantizedTensor) -> dict[str, NDArray[Any]]:
        return {f"{name}.scales": tensor.scales, f"{name}.biases": np.asarray(tensor.biases)}

    @classmethod
    def config(
        cls, default: Precision, layers: Mapping[str, Precision | None], block_prefix: str
    ) -> dict[str, Any]:
        settings: dict[str, Any] = {
            "group_size": default.group_size,
            "bits": default.bits,
            "mode": "affine",
        }
        for name, precision in layers.items():
            if precision is not None and precision != default:
                settings[name] = {"group_size": precision.group_size, "bits": precision.bits}
        # mlx-lm reads the first key; the second is the one that model hubs look at.
        return {"quantization": settings, "quantization_config": settings}

    @classmethod
    def spell(cls, config: Mapping[str, Any]) -> dict[str, Any]:
        """mlx-lm reads the keys of transformers 4, and takes its defaults in silence where version 5 has
        written others."""
        old: dict[str, Any] = {}
        rope = config.get("rope_parameters")
        if isinstance(rope, dict):
            full = rope.get("full_attention", rope)
            old["rope_theta"] = full.get("rope_theta")
            if full.get("rope_type", "default") != "default":
                old["rope_scaling"] = {**full, "type": full["rope_type"]}
            if isinstance(rope.get("sliding_attention"), dict):
                old["rope_local_base_freq"] = rope["sliding_attention"].get("rope_theta")
            old["partial_rotary_factor"] = full.get("partial_rotary_factor")
        old["num_experts"] = config.get("num_local_experts")
        spelled = {key: value for key, value in old.items() if value is not None} | dict(config)
        if isinstance(config.get("text_config"), dict):
            spelled["text_config"] = cls.spell(config["text_config"])
        return spelled

    def read(self, checkpoint: Checkpoint | CheckpointSlice, name: str) -> QuantizedTensor | None:
        if f"{name}.scales" not in checkpoint:
            return None
        words = read_shaped(checkpoint, f"{name}.weight", (np.dtype(np.uint32),))
        scales = read_shaped(checkpoint, f"{name}.scales", FLOATS)
        biases = read_shaped(checkpoint, f"{name}.biases", FLOATS)
        own = self.settings.get(name)
        settings = own if isinstance(own, dict) else self.settings
        bits, group_size = settings.get("bits"), settings.get("group_size")
        if group_size is None and bits in BITS:
            group_size = words.shape[1] * 32 // bits // max(scales.shape[1], 1)
        where = f"{checkpoint.file(f'{name}.weight')}: layer {name}"
        if (
            type(bits) is not int
            or bits not in BITS
            or type(group_size) is not int
            or group_size < 1
        ):
            raise CheckpointError(
                f"{where}: config.json gives bits {shown(bits)} and group_size {shown(group_size)}"
            )
        channels = words.shape[1] * 32 // bits
        if (
            words.shape[1] * 32 % bits
            or scales.shape != (words.shape[0], channels // group_size)
            or channels % group_size
            or biases.shape != scales.shape
        ):
            raise CheckpointError(
                f"{where}: weight {list(words.shape)}, scales {list(scales.shape)} and biases "
                f"{list(biases.shape)} do not fit {bits} bits in groups of {group_size}"
            )
        return QuantizedTensor(
            codes=unpack(words, bits),
            scales=scales,
            biases=biases,
            zeros=None,
            bits=bits,
            group_size=group_size,
            grid="affine",
        )
