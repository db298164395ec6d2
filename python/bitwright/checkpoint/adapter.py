"""Adapters of PEFT: LoRA, merged into the weights of its base model when they are read.

W' = W + s·B·A, where s is alpha / r, or alpha / √r with rsLoRA (arXiv:2106.09685, 2312.03732)."""

import math
import os
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from bitwright import _kernels
from bitwright.checkpoint.hub import ADAPTER_NAME, model_place
from bitwright.checkpoint.reader import Checkpoint, _open_shard, _Tensor, read_json_object
from bitwright.errors import CheckpointError, UnsupportedModelError, shown
from bitwright.files.links import check_no_links, check_own
from bitwright.warned import warn

CONFIG_NAME = "adapter_config.json"
_FACTORS = {
    ".lora_A.weight": ("A", ""),
    ".lora_B.weight": ("B", ""),
    ".lora_embedding_A": ("A", "embedding"),
    ".lora_embedding_B": ("B", "embedding"),
}
_PREFIX = "base_model.model."
# What is used here, and what says only where the adapter goes, or how it was trained.
_READ = ("peft_type", "r", "lora_alpha", "rank_pattern", "alpha_pattern", "use_rslora")
_HARMLESS = (
    *("auto_mapping", "base_model_name_or_path", "bias", "corda_config", "eva_config", "revision"),
    *("exclude_modules", "inference_mode", "layers_pattern", "layers_to_transform", "lora_dropout"),
    *("megatron_config", "megatron_core", "modules_to_save", "peft_version", "qalora_group_size"),
    *("runtime_config", "target_modules", "task_type", "ensure_weight_tying", "loftq_config"),
    *("init_lora_weights", "lora_ga_config"),
)
_MERGED = ("F64", "F32", "F16", "BF16")
LONGEST_NAME = 1024  # of a base model
LARGEST_ALPHA = 1e6  # far beyond any that was trained with
# Of a regular expression, so that each look at a name takes milliseconds at most.
MOST_CHOICES, MOST_REPEATS = 12, 3
# How an adapter may have begun without a change of its base model.
_STARTS = (True, False, None, "gaussian", "eva", "orthogonal")


def is_adapter(folder: Path) -> bool:
    """Tell whether a folder holds an adapter, and no model of its own."""
    return (folder / CONFIG_NAME).is_file() and not (folder / "config.json").is_file()


class AdapterCheckpoint(Checkpoint):
    """The base model of an adapter, with the adapter merged into what is read.

    Parameters
    ----------
    place : pathlib.Path
        The adapter's folder.

    Raises
    ------
    CheckpointNotFoundError
        If its base model is neither here nor at the hub.
    UnsupportedModelError
        If it is no LoRA that changes weights only.
    CheckpointError
        If it does not belong to its base model.
    """

    def __init__(self, place: Path) -> None:
        check_no_links(place)
        for name in (CONFIG_NAME, ADAPTER_NAME):
            check_own(place / name, place)
        self.adapter = place
        self.lora: Mapping[str, Any] = read_json_object(place / CONFIG_NAME)
        _check_kind(place / CONFIG_NAME, self.lora)
        if not os.path.isfile(place / ADAPTER_NAME):
            raise UnsupportedModelError(_without_weights(place))
        super().__init__(_base(place / CONFIG_NAME, self.lora))
        file = place / ADAPTER_NAME
        self._shards[file] = shard = self._stack.enter_context(_open_shard(file))
        factors: dict[tuple[str, str], dict[str, str]] = {}
        for name in sorted(shard.keys()):
            end = next((each for each in _FACTORS if name.endswith(each)), None)
            if end is not None:
                which, kind = _FACTORS[end]
                factors.setdefault((name.removesuffix(end), kind), {})[which] = name
            else:
                self._take(name)
        for (layer, kind), found in factors.items():
            self._merge(layer, found, is_embedding=kind == "embedding")
        self._warn_of_tokenizer()

    @property
    def settings(self) -> dict[str, Any]:
        """What decides the model beside its tensors."""
        return {**self.config, CONFIG_NAME: {name: self.lora.get(name) for name in _READ}}

    def input_files(self) -> list[Path]:
        """Return all files that it is read from, the adapter's included."""
        return [*super().input_files(), self.adapter / CONFIG_NAME]

    def _stored(self, name: str) -> str:
        """Return the tensor of the base model that one of the adapter's belongs to."""
        inner = name.removeprefix(_PREFIX)
        for wrapper in (".modules_to_save", ".base_layer"):
            inner = inner.replace(wrapper, "")
        if inner in self._tensors:
            return inner
        # The base model may be stored with another prefix than transformers computes with.
        ends = [each for each in self._tensors if each.endswith(f".{inner.removeprefix('model.')}")]
        if len(ends) != 1:
            raise CheckpointError(
                f"{self.adapter / ADAPTER_NAME}: {shown(name)} belongs to {shown(inner)}, which "
                f"the base model in {self.folder} does not have{' once' if ends else ''}. Give the adapter "
                f"the model that it was trained on (base_model_name_or_path in {CONFIG_NAME})"
            )
        return ends[0]

    def _take(self, name: str) -> None:
        """Take a tensor that was trained as a whole."""
        place, file = self._stored(name), self.adapter / ADAPTER_NAME
        header = self._shards[file].get_slice(name)
        shape = tuple(header.get_shape())
        self._require_shape(name, shape, self._tensors[place].shape)
        self._tensors[place] = _Tensor(file, header.get_dtype(), shape, name)

    def _merge(self, layer: str, names: Mapping[str, str], is_embedding: bool) -> None:
        """Read a layer's weight with its two factors merged from now on."""
        file = self.adapter / ADAPTER_NAME
        if set(names) != {"A", "B"}:
            raise CheckpointError(f"{file}: {shown(layer)} has only one of the two factors of LoRA")
        stored = self._stored(f"{layer}.weight")
        shapes = [tuple(self._shards[file].get_slice(names[each]).get_shape()) for each in "BA"]
        if any(len(each) != 2 for each in shapes) or shapes[0][1] != shapes[1][0]:
            raise CheckpointError(
                f"{file}: the factors of {shown(layer)} have the shapes {list(shapes[1])} and "
                f"{list(shapes[0])}, which do not fit"
            )
        product = (shapes[0][0], shapes[1][1])
        self._require_shape(layer, product[::-1] if is_embedding else product, self.shape(stored))
        base = self._tensors[stored]
        if base.dtype not in _MERGED:
            raise UnsupportedModelError(
                f"{self.folder}: {shown(stored)} is {base.dtype}, but an adapter is merged into floats. "
                f"Give the model that is not quantized as base_model_name_or_path in "
                f"{self.adapter / CONFIG_NAME}"
            )
        scale = self._scale(layer.removeprefix(_PREFIX), shapes[1][0])

        def make(whole: Checkpoint) -> NDArray[Any]:
            weight = whole.read(stored)
            factors = [self._factor(names[each]) for each in "AB"]
            return merged(weight, *factors, scale=scale, is_embedding=is_embedding)

        self.replace([stored], stored, base.dtype, base.shape, make)
        # So that whoever asks which files decide the tensor is told of the adapter's, too.
        self._tensors[stored] = _Tensor(file, base.dtype, base.shape, stored)

    def _factor(self, name: str) -> NDArray[Any]:
        found: NDArray[Any] = self._shards[self.adapter / ADAPTER_NAME].get_tensor(name)
        return found

    def _scale(self, layer: str, rank: int) -> float:
        """Return what the product of a layer's factors is multiplied by."""
        config, place = self.lora, self.adapter / CONFIG_NAME
        expected = _of_layer(place, config.get("rank_pattern"), layer, config.get("r", 8))
        alpha = _of_layer(place, config.get("alpha_pattern"), layer, config.get("lora_alpha", 8))
        is_number = isinstance(alpha, int | float) and abs(alpha) <= LARGEST_ALPHA
        if expected != rank or not is_number or not rank:
            raise CheckpointError(
                f"{place}: says rank {shown(expected)} and alpha {shown(alpha)} of "
                f"{shown(layer)}, whose factors have rank {rank}"
            )
        return float(alpha) / (math.sqrt(rank) if config.get("use_rslora") else rank)

    def _require_shape(self, name: str, found: tuple[int, ...], expected: tuple[int, ...]) -> None:
        if found != expected:
            raise CheckpointError(
                f"{self.adapter / ADAPTER_NAME}: {shown(name)} is for a weight of shape "
                f"{list(found)}, but the base model's has {list(expected)}. Give the adapter "
                f"the model that it was trained on"
            )

    def _warn_of_tokenizer(self) -> None:
        for name in ("tokenizer.json", "chat_template.jinja"):
            own, base = self.adapter / name, self.folder / name
            if own.is_file() and (not base.is_file() or own.read_bytes() != base.read_bytes()):
                warn(
                    f"{own}: is another than the base model's, which is used; copy it to the output if it "
                    f"is meant"
                )


def merged(
    weight: NDArray[Any],
    first: NDArray[Any],
    second: NDArray[Any],
    *,
    scale: float,
    is_embedding: bool = False,
) -> NDArray[Any]:
    """Return a weight with the product of two factors added, in its own dtype; rounded once.

    Parameters
    ----------
    weight
        Float ``[out, in]``, of an embedding ``[vocabulary, width]``.
    first, second
        A ``[rank, in]`` and B ``[out, rank]``; of an embedding ``[rank, vocabulary]`` and
        ``[width, rank]``.
    scale
        What the product is multiplied by.
    is_embedding
        Whether the product is transposed.

    Examples
    --------
    >>> merged(np.zeros((2, 2), np.float16), np.ones((1, 2)), np.ones((2, 1)), scale=0.5).tolist()
    [[0.5, 0.5], [0.5, 0.5]]
    """
    out = np.array(weight, np.float32, order="C")
    left, right = (first.T, second) if is_embedding else (second, first.T)
    _kernels.linear(
        np.ascontiguousarray(left * np.float32(scale), np.float32),
        np.ascontiguousarray(right, np.float32),
        None,
        out,
        True,
    )
    return out.astype(weight.dtype, copy=False)


def _of_layer(place: Path, pattern: object, layer: str, default: Any) -> Any:
    """Return what a pattern of layers says of one: its first key that is the end of the layer's name."""
    for key, value in pattern.items() if isinstance(pattern, dict) else ():
        if _is_end(place, str(key), layer):
            return value
    return default


def _is_end(place: Path, key: str, layer: str) -> bool:
    """Tell whether a regular expression is the end of a name; one that may look for days is refused."""
    bare = re.sub(r"\\.", "", key, flags=re.DOTALL).replace("(?:", "(")
    choices, repeats = len(re.findall(r"[|(]", bare)), len(re.findall(r"[*+?{]", bare))
    if choices > MOST_CHOICES or repeats > MOST_REPEATS or re.search(r"\)[*+{]", bare):
        raise CheckpointError(
            f"{place}: the pattern {shown(key)} is too involved to be looked for safely; write the names "
            f"of its layers instead"
        )
    try:
        return re.match(rf"(.*\.)?({key})$", layer) is not None
    except (re.error, OverflowError) as error:
        raise CheckpointError(f"{place}: {shown(key)} is no pattern of layers: {error}") from error


def _check_kind(path: Path, config: Mapping[str, Any]) -> None:
    kind = config.get("peft_type")
    what = None
    if kind != "LORA":
        what = f"an adapter of kind {shown(kind)}"
    elif config.get("init_lora_weights") not in _STARTS:
        start = config["init_lora_weights"]
        what = f"a LoRA that began by changing its base model (init_lora_weights {shown(start)})"
    else:
        for name, value in config.items():
            if value and name not in (*_READ, *_HARMLESS):
                what = f"a LoRA with {name}"
                break
    if what is not None:
        raise UnsupportedModelError(
            f"{path}: is {what}, and only plain LoRA is merged. Merge it by PEFT, and give the result: "
            f"AutoPeftModelForCausalLM.from_pretrained({str(path.parent)!r}).merge_and_unload()"
            f".save_pretrained(…)"
        )


def _base(path: Path, config: Mapping[str, Any]) -> Path:
    """Return the folder of the base model."""
    name = config.get("base_model_name_or_path")
    if not isinstance(name, str) or not name:
        raise CheckpointError(f"{path}: names no base model; write base_model_name_or_path there")
    if len(name) > LONGEST_NAME:
        raise CheckpointError(f"{path}: {shown(name)} cannot be the name of a base model")
    revision = config.get("revision")
    if isinstance(revision, str) and revision and not os.path.exists(name):
        name = f"{name}@{revision}"
    try:
        place = model_place(name)
    except CheckpointError as error:
        raise type(error)(
            f"{path}: the adapter's base model is not there (base_model_name_or_path): {error}"
        ) from error
    if is_adapter(place):
        raise UnsupportedModelError(f"{path}: its base model {shown(name)} is an adapter itself")
    return place


def _without_weights(place: Path) -> str:
    old = place / "adapter_model.bin"
    if not old.is_file():
        return f"{place}: has {CONFIG_NAME}, but not {ADAPTER_NAME}. Fetch that, too"
    new = str(place / ADAPTER_NAME)
    return (
        f"{old}: is a PyTorch pickle, which can run code when it is opened and is therefore not read. "
        f'Store it as safetensors: pip install torch && python -c "import torch; from safetensors.torch '
        f"import save_file as s; s(torch.load({str(old)!r}, weights_only=True, map_location='cpu'), "
        f'{new!r})"'
    )
