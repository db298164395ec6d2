"""MLX: affine groups with a float bias, codes along the input channels (mlx.core.quantize)."""

import re
from collections.abc import Callable, Iterator, Mapping
from typing import Any, Self

import ml_dtypes
import numpy as np
from numpy.typing import DTypeLike, NDArray

from bitwright.checkpoint import Checkpoint, CheckpointSlice
from bitwright.checkpoint.writer import FileOptions
from bitwright.errors import CheckpointError, UnsupportedModelError, shown
from bitwright.formats.declared import Settings
from bitwright.formats.engine_names import mlx_name
from bitwright.formats.format import Format, Precision, read_codes, read_scales, read_shaped
from bitwright.formats.loading_code import PROMPT, Code, shell_word
from bitwright.grids.tables import TABLES
from bitwright.grids.tensor import BITS, Grid, QuantizedTensor, pack, unpack
from bitwright.warned import warn

# Families that mlx-lm never builds with a head of their own, and always.
ALWAYS_TIED = ("gemma", "gemma2")
NEVER_TIED = ("deepseek_v2", "deepseek_v3", "glm4", "kimi_k2", "qwen2_moe", "qwen3_vl_moe")
EIGHT_BIT_HEADS = ("granite", "granitemoe")  # in mlx-lm's own conversion
LATENT = ("deepseek_v3", "kimi_k2", "glm4_moe_lite")  # whose latent attention it computes absorbed
FLOATS = (np.dtype(np.float32), np.dtype(np.float16), np.dtype(ml_dtypes.bfloat16))

MODES: tuple[Grid, ...] = ("affine", "mxfp4", "nvfp4", "mxfp8")
SHIFTED = re.compile(r"(layernorm|model\.norm|[qk]_norm)\.weight$")

SETTINGS = Settings(
    read="group_size bits",
    harmless="quant_method linear_class_predicate",
    neutral={"mode": MODES, "quantize_input": (False,), "global_scale": (False,)},
)


def _head_dim(config: Mapping[str, Any]) -> Any:
    return config.get("head_dim") or config["hidden_size"] // config["num_attention_heads"]


# What mlx-lm asks for where transformers has defaults, or leaves out.
_ASKED: Mapping[str, Callable[[Mapping[str, Any]], dict[str, Any]]] = {
    "exaone4": lambda config: {
        "head_dim": _head_dim(config),
        "rope_scaling": {},
        "sliding_window_pattern": _pattern(config.get("sliding_window_pattern")),
    },
    "gemma4_text": lambda config: {
        f"global_{name}" if name == "head_dim" else "num_global_key_value_heads": value
        for layer in list((config.get("per_layer_config") or {}).values())[:1]
        for name, value in layer.items()
    },
    "glm4_moe": lambda config: {"head_dim": _head_dim(config), "rope_scaling": {}},
    "granitemoehybrid": lambda config: {
        "layer_types": [
            {"linear_attention": "mamba", "full_attention": "attention"}.get(each, each)
            for each in config.get("layer_types") or config.get("layers_block_type") or []
        ],
    },
    "internlm3": lambda config: {
        "bias": config.get("mlp_bias"),
        "qkv_bias": config.get("attention_bias"),
    },
    "lfm2": lambda config: {"block_dim": config.get("hidden_size")},
    "minimax_m2": lambda config: {
        "shared_intermediate_size": 0,
        "rotary_dim": _rotary_dim(config),
    },
    "solar_open": lambda config: {
        "first_k_dense_replace": 0,
        "partial_rotary_factor": 1.0,
        "intermediate_size": config.get("moe_intermediate_size"),
    },
}


def _pattern(every: Any) -> Any:
    """Return the letters of local and global layers, where only the distance of global ones is said."""
    return "L" * (every - 1) + "G" if type(every) is int and 0 < every < 100 else every


def _rotary_dim(config: Mapping[str, Any]) -> int:
    rope = config.get("rope_parameters") or {}
    return int(_head_dim(config) * rope.get("partial_rotary_factor", 1.0))


class MlxFormat(Format):
    """Reads and writes what mlx-lm does."""

    name = "mlx"
    bits = BITS
    group_sizes = (32, 64, 128)
    whole_row = False
    grids = MODES
    scale_dtypes = FLOATS
    embeddings = True
    stacks_experts = True
    refuses_unknown = True
    parts = ("weight", "scales", "biases")
    engines = "mlx-lm"
    library = "mlx"
    metadata = "mlx"

    def __init__(self, settings: Mapping[str, Any]) -> None:
        self.settings = settings

    @classmethod
    def loading(
        cls, folder: str, mixed: bool, unfused: bool, file: FileOptions | None = None
    ) -> list[Code]:
        run = f'mlx_lm.generate --model {shell_word(folder)} --prompt "{PROMPT}"'
        return [Code("sh", f"pip install mlx-lm\n{run}")]

    @classmethod
    def detect(cls, checkpoint: Checkpoint) -> Self | None:
        config = checkpoint.config
        settings: Any = config.get("quantization")
        if not isinstance(settings, dict) or not {"bits", "group_size"} <= settings.keys():
            if not settings:
                settings = config.get("quantization_config") or {}
                if isinstance(settings, dict) and settings.get("quant_method") is not None:
                    return None
            if not isinstance(settings, dict) or not _holds_layers(checkpoint):
                return None
            warn(
                f'{checkpoint.folder / "config.json"}: "quantization" lacks bits or group_size, so mlx-lm '
                f"refuses the folder. Here they are read from the tensors; bitwright convert --format mlx "
                f"writes a complete one"
            )
        where = f'{checkpoint.folder / "config.json"}: "quantization'
        layers = {name: each for name, each in settings.items() if isinstance(each, dict)}
        named = [
            name for name, each in settings.items() if "." in name or type(each) in (dict, bool)
        ]
        SETTINGS.check(settings, where, named)
        for name, layer in layers.items():
            SETTINGS.check(layer, f"{where}.{shown(name)[1:-1]}")
        _check_modes(checkpoint, settings, where)
        if config.get("quantize_activations"):
            raise UnsupportedModelError(
                f'{checkpoint.folder / "config.json"}: "quantize_activations" is true, which mlx-lm does '
                f"not compute with affine grids. Set it to false"
            )
        return cls(settings)

    @classmethod
    def name_written(cls, name: str, nested: bool) -> str:
        return mlx_name(name) if nested else name

    @classmethod
    def pack(cls, name: str, tensor: QuantizedTensor) -> dict[str, NDArray[Any]]:
        if tensor.grid not in MODES or tensor.group_index is not None:
            raise ValueError(
                f"{name}: the mlx format stores {', '.join(MODES)} grids with consecutive groups"
            )
        if tensor.table is not None:
            floats = tensor.table.floats[tensor.codes]
            return {f"{name}.weight": pack(floats, tensor.bits), **_float_scales(name, tensor)}
        return {
            f"{name}.weight": pack(tensor.codes, tensor.bits),
            f"{name}.scales": tensor.scales,
            f"{name}.biases": np.asarray(tensor.biases),
        }

    def pack_grid(self, name: str, tensor: QuantizedTensor) -> dict[str, NDArray[Any]]:
        if tensor.table is not None:
            return _float_scales(name, tensor)
        return {f"{name}.scales": tensor.scales, f"{name}.biases": np.asarray(tensor.biases)}

    @classmethod
    def config(
        cls, default: Precision, layers: Mapping[str, Precision | None], block_prefix: str
    ) -> dict[str, Any]:
        settings: dict[str, Any] = {
            "group_size": default.group_size,
            "bits": default.bits,
            "mode": default.grid,
        }
        for name, precision in layers.items():
            if precision is not None and precision != default:
                settings[name] = {"group_size": precision.group_size, "bits": precision.bits}
                if precision.grid != default.grid:
                    settings[name]["mode"] = precision.grid
        # mlx-lm reads the first key, model hubs the second.
        return {"quantization": settings, "quantization_config": settings}

    @classmethod
    def keeps_in_float(cls, model_type: str, layer: str) -> bool:
        # mlx-lm splits it into stacks when it is loaded, and rounds these again, in other groups.
        absorbed = model_type in LATENT and layer.endswith("self_attn.kv_b_proj")
        # It renames the weights of these when it loads them, but not their scales.
        renamed = model_type == "lfm2_moe" and re.search(r"feed_forward\.w[123]$", layer)
        return absorbed or bool(renamed)

    @classmethod
    def check_head(cls, model_type: str, tied: bool) -> None:
        if model_type in (NEVER_TIED if tied else ALWAYS_TIED):
            known, here = "with", "the embedding is the head"
            if not tied:
                known, here = "without", "the head differs from the embedding"
            raise ValueError(
                f"format: mlx-lm knows {model_type} only {known} a head of its own, but {here} here. "
                f"Choose another format"
            )

    @classmethod
    def chosen_scale_dtype(
        cls, model_dtype: np.dtype[Any], asked: DTypeLike | None
    ) -> np.dtype[Any]:
        # Scales of 32 bits would make a 4-bit model of floats of 32 bits larger than one of 16.
        half = asked is None and model_dtype == np.float32
        return super().chosen_scale_dtype(model_dtype, np.float16 if half else asked)

    @classmethod
    def ends(
        cls, model_type: str, default: Precision, channels: int
    ) -> tuple[Precision | None, Precision | None]:
        if model_type in EIGHT_BIT_HEADS and default.bits < 8:
            return default, Precision(8, 64, "affine")
        return default, default

    @classmethod
    def array_written(cls, name: str, array: NDArray[Any], family: str) -> NDArray[Any]:
        """mlx-lm reads stacked experts of Qwen 3 Next together with what its own conversion makes of the
        rest: gains of norms that are not less one, and convolutions with the channels last."""
        if family != "qwen3_next":
            return array
        if name.endswith("conv1d.weight") and array.ndim == 3:
            return np.ascontiguousarray(array.swapaxes(1, 2))
        if SHIFTED.search(name):
            gain = (array.astype(np.float32) + 1).astype(array.dtype)
            narrow = gain.astype(ml_dtypes.bfloat16)
            return narrow if (narrow.astype(gain.dtype) == gain).all() else gain
        return array

    @classmethod
    def spell(cls, config: Mapping[str, Any]) -> dict[str, Any]:
        """mlx-lm reads the keys of transformers 4, and silently takes its defaults where version 5 has
        written others."""
        old: dict[str, Any] = {}
        rope = config.get("rope_parameters")
        if isinstance(rope, dict):
            full = rope.get("full_attention", rope)
            old["rope_theta"] = full.get("rope_theta")
            by_share = full.get("rope_type") == "proportional"  # which has no older spelling
            if full.get("rope_type", "default") != "default" and not by_share:
                old["rope_scaling"] = {**full, "type": full["rope_type"]}
            if isinstance(rope.get("sliding_attention"), dict):
                old["rope_local_base_freq"] = rope["sliding_attention"].get("rope_theta")
            old["partial_rotary_factor"] = None if by_share else full.get("partial_rotary_factor")
        old["num_experts"] = config.get("num_local_experts")
        types = config.get("layer_types")
        if isinstance(types, list) and "linear_attention" in types and "full_attention" in types:
            old["full_attention_interval"] = types.index("full_attention") + 1
        spelled = {key: value for key, value in old.items() if value is not None} | dict(config)
        asked = _ASKED.get(str(config.get("model_type")))
        for key, value in ({} if asked is None else asked(config)).items():
            if config.get(key) is None or isinstance(value, str | list):
                spelled[key] = value
        if isinstance(config.get("text_config"), dict):
            spelled["text_config"] = cls.spell(config["text_config"])
            if "vocab_size" in config["text_config"]:  # the outer one wins, and has a default
                spelled.setdefault("vocab_size", config["text_config"]["vocab_size"])
        return spelled

    def read(
        self,
        checkpoint: Checkpoint | CheckpointSlice,
        name: str,
        channels: int | None = None,
    ) -> QuantizedTensor | None:
        if f"{name}.scales" not in checkpoint:
            return None
        words = read_shaped(checkpoint, f"{name}.weight", (np.dtype(np.uint32),))
        if f"{name}.biases" not in checkpoint:
            return self._read_floats(checkpoint, name, words, channels)
        scales = read_shaped(checkpoint, f"{name}.scales", FLOATS)
        biases = read_shaped(checkpoint, f"{name}.biases", FLOATS)
        bits, group_size = self._precision(checkpoint, name, words.shape, scales.shape, channels)
        if biases.shape != scales.shape:
            raise CheckpointError(
                f"{checkpoint.file(f'{name}.biases')}: layer {name}: scales {list(scales.shape)} and "
                f"biases {list(biases.shape)} contradict each other"
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

    def _read_floats(
        self,
        checkpoint: Checkpoint | CheckpointSlice,
        name: str,
        words: NDArray[np.uint32],
        channels: int | None,
    ) -> QuantizedTensor:
        scales = read_shaped(checkpoint, f"{name}.scales", (np.dtype(np.uint8),))
        own = self.settings.get(name)
        mode = self.settings.get("mode")
        if isinstance(own, dict):
            mode = own.get("mode", mode)
        where = f"{checkpoint.file(f'{name}.scales')}: layer {name}"
        if mode not in MODES or mode == "affine":
            raise CheckpointError(
                f"{where} has no biases, as of a float mode, but config.json gives mode {shown(mode)}"
            )
        bits, group_size = self._precision(checkpoint, name, words.shape, scales.shape, channels)
        table = TABLES[mode]
        if (bits, group_size) != (table.bits, table.group_size):
            raise CheckpointError(
                f"{where} has {bits} bits in groups of {group_size} by its shapes; {mode} has "
                f"{table.bits} in groups of {table.group_size}"
            )
        return QuantizedTensor(
            codes=read_codes(unpack(words, bits), table, f"{where}: {name}.weight"),
            scales=read_scales(scales, table, f"{where}: {name}.scales"),
            biases=None,
            zeros=None,
            bits=bits,
            group_size=group_size,
            grid=mode,
        )

    def _precision(
        self,
        checkpoint: Checkpoint | CheckpointSlice,
        name: str,
        words: tuple[int, ...],
        scales: tuple[int, ...],
        channels: int | None,
    ) -> tuple[int, int]:
        """Return bits and group size as mlx-lm takes them: those of the shapes, whatever config.json has
        for the whole model; but what it says of the very layer must agree."""
        own = self.settings.get(name)
        said = self.settings if own is None or own is True else own
        parts = said if isinstance(said, dict) else {}
        given = parts.get("bits"), parts.get("group_size")
        key = '"quantization"' if said is self.settings else f'"quantization.{name}"'
        stated = (
            f"config.json's {key} gives bits {shown(given[0])} and group_size {shown(given[1])}"
        )
        if said is not self.settings and not parts:
            word = "false" if own is False else shown(own)
            stated = f"config.json's {key} is {word}, as of a layer in float"
        where = f"{checkpoint.file(f'{name}.weight')}: layer {name}"
        (rows, width), groups = words, scales[1]
        if channels is None:  # then only config.json tells
            own = True
            if type(given[0]) is int and given[0] > 0:
                channels = width * 32 // given[0]
            elif given[0] is None and type(given[1]) is int:
                channels = groups * given[1]
            else:
                raise CheckpointError(f"{where}: {stated}; its shapes alone do not tell them")
        bits, group_size = (width * 32 // channels, channels // groups) if channels > 0 else (0, 0)
        if (
            bits not in BITS
            or scales[0] != rows
            or (bits * channels, group_size * groups) != (width * 32, channels)
        ):
            raise CheckpointError(
                f"{where}: weight {list(words)} and scales {list(scales)} do not fit {channels} input "
                f"channels in any bits and group size; {stated}"
            )
        found = bits, group_size
        agree = all(value in (None, real) for value, real in zip(given, found, strict=True))
        if own is not None and not (agree and parts):
            raise CheckpointError(
                f"{where}: {stated}, but by the shapes of its tensors it has bits {bits} and group_size "
                f"{group_size}; correct config.json, or remove what it says of this layer"
            )
        return found


def _float_scales(name: str, tensor: QuantizedTensor) -> dict[str, NDArray[Any]]:
    return {f"{name}.scales": tensor.scales.view(np.uint8)}


def _check_modes(checkpoint: Checkpoint, settings: Mapping[str, Any], where: str) -> None:
    """Raise CheckpointError if config.json gives a float mode to a layer with biases, which is affine."""
    for stem in _affine_layers(checkpoint):
        own = settings.get(stem)
        is_own = isinstance(own, dict) and "mode" in own
        mode = own["mode"] if isinstance(own, dict) and is_own else settings.get("mode", "affine")
        if mode != "affine":
            key = f"{where}.{stem}.mode" if is_own else f"{where}.mode"
            raise CheckpointError(
                f'{key}" is {shown(mode)}, but layer {stem} has biases, which only affine grids have; '
                f"correct config.json"
            )


def _affine_layers(checkpoint: Checkpoint) -> Iterator[str]:
    """Yield the names of layers that are stored as MLX's affine ones."""
    for name in checkpoint.names():
        stem = name.removesuffix(".biases")
        if (
            stem != name
            and f"{stem}.scales" in checkpoint
            and f"{stem}.weight" in checkpoint
            and checkpoint.dtype(f"{stem}.weight") == np.uint32
        ):
            yield stem


def _holds_layers(checkpoint: Checkpoint) -> bool:
    """Tell whether a layer is stored as MLX does."""
    return any(True for _ in _affine_layers(checkpoint))


FORMATS = (MlxFormat,)
