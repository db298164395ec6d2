"""GGUF's names for the tensors of a model, and the changes that llama.cpp expects in them."""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from bitwright.errors import CheckpointError, UnsupportedModelError, shown
from bitwright.models.config import ModelConfig, RopeConfig


@dataclass(frozen=True)
class GgufFamily:
    """llama.cpp's assumptions about a family.

    Parameters
    ----------
    architecture
        Its name of the family.
    neighbours
        Whether rotary pairs are neighbours there: rows of queries and keys are reordered.
    activation
        Of the MLPs.
    full_width
        Whether the heads together must be as wide as the hidden states.
    tied
        Whether embedding and head must be one matrix, or two; None where they may be either.
    normalized
        Whether the weights of a token's experts add up to 1.
    full_every
        Every how many layers one has full attention; 0 where windows are ignored.
    widest
        The number of layers of the size whose attention is scaled by the width of the model.
    """

    architecture: str
    neighbours: bool = False
    activation: str = "silu"
    full_width: bool = False
    tied: bool | None = None
    normalized: bool = True
    full_every: int = 0
    widest: int = 0


_LLAMA = GgufFamily("llama", neighbours=True)
_GEMMA_3 = GgufFamily("gemma3", activation="gelu_pytorch_tanh", full_every=6, widest=62)
GGUF_FAMILIES: dict[str, GgufFamily] = {
    "llama": _LLAMA,
    "mistral": _LLAMA,
    "mixtral": _LLAMA,
    "qwen2": GgufFamily("qwen2", full_width=True),
    "qwen2_moe": GgufFamily("qwen2moe", full_width=True, tied=False, normalized=False),
    "qwen3": GgufFamily("qwen3"),
    "qwen3_moe": GgufFamily("qwen3moe"),
    "gemma": GgufFamily("gemma", activation="gelu_pytorch_tanh", tied=True),
    "gemma2": GgufFamily(
        "gemma2", activation="gelu_pytorch_tanh", tied=True, full_every=2, widest=46
    ),
    "gemma3_text": _GEMMA_3,
    "gemma3": _GEMMA_3,
    "phi3": GgufFamily("phi3", full_width=True),
}
"""By ``model_type``."""

ROTATION_TENSORS = ("rope_freqs.weight", "rope_factors_long.weight", "rope_factors_short.weight")
"""Divisors of the rotary frequencies: tensors in GGUF, values of config.json in checkpoints."""


class GgufNames:
    """The tensors of one model, from a checkpoint's names and values to those of GGUF and back.

    Parameters
    ----------
    config : mapping
        config.json.
    source : pathlib.Path
        Its file, for messages.

    Attributes
    ----------
    config : ModelConfig
        The checked configuration.
    family : GgufFamily
        llama.cpp's assumptions.
    architecture : str
        llama.cpp's name for the family.

    Raises
    ------
    CheckpointError
        If a value of the configuration is wrong.
    UnsupportedModelError
        If the family is not read from and written to GGUF.
    """

    def __init__(self, config: Mapping[str, Any], source: Path) -> None:
        # Families are described in terms of checkpoints, so they can only be imported after them.
        from bitwright.models import ARCHITECTURES

        rules = {name: family.rules for name, family in ARCHITECTURES.items()}
        self.source = source
        self.config = ModelConfig.from_dict(config, source, rules)
        if self.config.model_type not in GGUF_FAMILIES:
            raise UnsupportedModelError(
                f'{source}: "model_type" is {shown(self.config.model_type)}, which the gguf format '
                f"does not hold yet; it holds: {', '.join(GGUF_FAMILIES)}. Choose another format"
            )
        family = ARCHITECTURES[self.config.family]
        self.family = GGUF_FAMILIES[self.config.model_type]
        self.architecture = self.family.architecture
        self._offset_norms = family.norm_kind == "offset_rms_norm"
        blocks = _block_names(family)
        self._stored: dict[str, str] = {}
        for names in family.names:
            self._stored |= {names.embedding: "token_embd", names.final_norm: "output_norm"}
            self._stored[names.head] = "token_embd" if self.config.tie_word_embeddings else "output"
            for index in range(self.config.num_hidden_layers):
                prefix = names.block.format(index)
                for name, stored in blocks.items():
                    self._stored[f"{prefix}.{name}"] = f"blk.{index}.{stored}"
        self._layers: dict[str, str] = {}
        for name, stored in self._stored.items():
            self._layers.setdefault(stored, name)

    def __contains__(self, name: object) -> bool:
        """Whether a tensor of the checkpoint has a place in GGUF; a vision tower's have none."""
        layer, _, part = str(name).rpartition(".")
        return layer in self._stored and part in ("weight", "bias")

    def gguf_name(self, name: str) -> str:
        """Return GGUF's name for a tensor of the checkpoint.

        Raises
        ------
        UnsupportedModelError
            If it has no place there.
        """
        if name not in self:
            raise UnsupportedModelError(
                f"{self.source.parent}: tensor {shown(name)} has no place in a GGUF file of the "
                f"architecture {self.architecture}. Choose another format"
            )
        layer, _, part = name.rpartition(".")
        return f"{self._stored[layer]}.{part}"

    def name(self, stored: str) -> str:
        """Return the checkpoint's name for a tensor of a GGUF file.

        Raises
        ------
        UnsupportedModelError
            If there is none of this name in the family.
        """
        layer, _, part = stored.rpartition(".")
        if layer not in self._layers or part not in ("weight", "bias"):
            raise UnsupportedModelError(
                f"{self.source}: tensor {shown(stored)} is not known in the architecture "
                f"{self.architecture}; without it the model would be another one. Convert the "
                f"original model again with a recent llama.cpp, or start from its safetensors files"
            )
        return f"{self._layers[layer]}.{part}"

    def shape(self, stored: str, shape: tuple[int, ...]) -> tuple[int, ...]:
        """Return the shape that a checkpoint gives a tensor of a GGUF file."""
        return (1, *shape) if _is_shared_gate(stored) and len(shape) == 1 else shape

    def to_gguf(self, name: str, array: NDArray[Any]) -> tuple[str, NDArray[Any]]:
        """Return the name and the values that GGUF stores for a tensor of the checkpoint.

        Parameters
        ----------
        name : str
            The checkpoint's, with ``.weight`` or ``.bias``; of stacked experts, MLX's.
        array : numpy.ndarray
            Floats, or blocks ``[out, blocks]`` or ``[experts, out, blocks]``.

        Returns
        -------
        name : str
            What GGUF calls it.
        array : numpy.ndarray
            What is stored: vectors and routers in float32, the others in the dtype given.

        Raises
        ------
        UnsupportedModelError
            If it has no place there.
        """
        stored = self.gguf_name(name)
        if (heads := self._reordered(stored)) is not None:
            array = _swapped(array, heads, (2, len(array) // heads // 2))
        if _is_shared_gate(stored):
            array = array.reshape(-1)
        if array.dtype.names is None and (array.ndim == 1 or "ffn_gate_inp" in stored):
            array = array.astype(np.float32)
        return stored, array + np.float32(1) if self._has_offset(stored) else array

    def from_gguf(self, stored: str, array: NDArray[Any]) -> tuple[str, NDArray[Any]]:
        """Return the name and the values that a checkpoint has for a tensor of a GGUF file.

        Parameters
        ----------
        stored : str
            What GGUF calls it.
        array : numpy.ndarray
            What is stored.

        Returns
        -------
        name : str
            The checkpoint's.
        array : numpy.ndarray
            Its values; what became float32 stays that.

        Raises
        ------
        CheckpointError
            If its rows do not divide into the heads of the configuration.
        UnsupportedModelError
            If there is none of this name in the family.
        """
        name = self.name(stored)
        if (heads := self._reordered(stored)) is not None:
            if len(array) % (2 * heads):
                raise CheckpointError(
                    f"{self.source}: tensor {shown(stored)} has {len(array)} rows, which is not an "
                    f"even number for each of {heads} heads"
                )
            array = _swapped(array, heads, (len(array) // heads // 2, 2))
        if self._has_offset(stored):
            array = array - np.float32(1)
        return name, array.reshape(self.shape(stored, array.shape))

    def extra_tensors(self) -> dict[str, NDArray[np.float32]]:
        """Return the tensors that only GGUF has: the divisors of the rotary frequencies.

        Returns
        -------
        dict
            Vectors by their GGUF names; none for most models.
        """
        from bitwright.models.rope import rope_frequencies

        rope, length = self.config.rope, self.config.max_position_embeddings
        freqs, long, short = ROTATION_TENSORS
        if rope.rope_type == "longrope":
            factors = {long: rope.long_factor, short: rope.short_factor}
            return {name: np.asarray(values, np.float32) for name, values in factors.items()}
        if rope.rope_type != "llama3":
            return {}
        plain, _ = rope_frequencies(RopeConfig(theta=rope.theta), self.config.rotary_dim, length)
        scaled, _ = rope_frequencies(rope, self.config.rotary_dim, length)
        return {freqs: (plain / scaled).astype(np.float32)}

    def _reordered(self, stored: str) -> int | None:
        """Return how many heads a tensor has whose rows are reordered."""
        if not self.family.neighbours:
            return None
        heads = {
            "attn_q": self.config.num_attention_heads,
            "attn_k": self.config.num_key_value_heads,
        }
        return heads.get(stored.split(".")[-2])

    def _has_offset(self, stored: str) -> bool:
        return self._offset_norms and stored.endswith("norm.weight")


def nested(config: Mapping[str, Any], **values: Any) -> dict[str, Any]:
    """Return a config.json with other values, those of its text part too if it has one."""
    text = config.get("text_config")
    return {**config, **values} | (
        {"text_config": {**text, **values}} if isinstance(text, dict) else {}
    )


def _block_names(family: Any) -> dict[str, str]:
    """Return GGUF's names for the layers within a block of an `Architecture`."""
    attention, mlp, experts = family.attention, family.mlp, family.experts
    names = {
        attention.query: "attn_q",
        attention.key: "attn_k",
        attention.value: "attn_v",
        attention.fused: "attn_qkv",
        attention.output: "attn_output",
        attention.query_norm: "attn_q_norm",
        attention.key_norm: "attn_k_norm",
        family.attention_norm: "attn_norm",
        family.attention_post_norm: "post_attention_norm",
        family.mlp_norm: "ffn_norm",
        family.mlp_post_norm: "post_ffw_norm",
        mlp.down: "ffn_down",
    }
    names |= {mlp.fused: "ffn_up"} if mlp.fused else {mlp.gate: "ffn_gate", mlp.up: "ffn_up"}
    if experts is not None:
        names[experts.router] = "ffn_gate_inp"
        for role in ("gate", "up", "down"):
            names[f"{experts.stacked}.{role}_proj"] = f"ffn_{role}_exps"
            if experts.shared is not None:
                names[getattr(experts.shared, role)] = f"ffn_{role}_shexp"
        names[experts.shared_gate] = "ffn_gate_inp_shexp"
    names.pop(None, None)
    return names


def _is_shared_gate(stored: str) -> bool:
    return stored.endswith("ffn_gate_inp_shexp.weight")


def _swapped(array: NDArray[Any], heads: int, halves: tuple[int, int]) -> NDArray[Any]:
    """Swap the two axes that the rows of every head make."""
    parts = array.reshape(heads, *halves, *array.shape[1:])
    return parts.swapaxes(1, 2).reshape(array.shape)
