"""config.json, in its old and its new spelling, as one checked description of a decoder."""

from collections.abc import Collection, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Self

import ml_dtypes
import numpy as np

from bitwright.errors import CheckpointError, UnsupportedModelError, shown

ACTIVATIONS = ("silu",)
OTHER_MODELS = (
    "What transformers runs can be quantized all the same, by --backend transformers or "
    "bitwright.quantize_with_transformers"
)
ROPE_TYPES = ("default", "linear", "llama3", "yarn")
MODEL_DTYPES: dict[str, np.dtype[Any]] = {
    "float32": np.dtype(np.float32),
    "float16": np.dtype(np.float16),
    "bfloat16": np.dtype(ml_dtypes.bfloat16),
}
_LARGEST_INTEGER = 2**31 - 1


@dataclass(frozen=True)
class RopeConfig:
    """Rotary position embedding: how fast each pair of channels turns.

    The fields carry the names that config.json gives them, except ``theta`` (``rope_theta``).
    Which of them matter depends on ``rope_type``; ``None`` means not given.
    """

    rope_type: str = "default"
    theta: float = 10000.0
    factor: float = 1.0
    low_freq_factor: float | None = None
    high_freq_factor: float | None = None
    original_max_position_embeddings: int | None = None
    beta_fast: float = 32.0
    beta_slow: float = 1.0
    attention_factor: float | None = None
    mscale: float | None = None
    mscale_all_dim: float | None = None
    truncate: bool = True


@dataclass(frozen=True)
class ModelConfig:
    """A decoder's sizes and choices; build it with `from_dict`.

    ``dtype`` is None where config.json names none: the stored tensors decide then. ``raw`` is
    config.json as it was read, for what only one family knows.
    """

    model_type: str
    hidden_size: int
    intermediate_size: int
    num_hidden_layers: int
    num_attention_heads: int
    num_key_value_heads: int
    head_dim: int
    vocab_size: int
    rms_norm_eps: float
    rope: RopeConfig
    max_position_embeddings: int
    tie_word_embeddings: bool
    attention_bias: bool
    mlp_bias: bool
    hidden_act: str
    dtype: np.dtype[Any] | None
    raw: Mapping[str, Any] = field(repr=False)

    @classmethod
    def from_dict(cls, raw: Mapping[str, Any], source: Path, supported: Collection[str]) -> Self:
        """Check and complete a parsed config.json.

        Keys that are absent or null take the defaults of transformers' Llama.

        Parameters
        ----------
        raw : mapping
            The parsed file, spelled as transformers 4 or 5 does.
        source : pathlib.Path
            The file, for messages.
        supported : collection of str
            The values of ``model_type`` that are accepted.

        Returns
        -------
        ModelConfig
            The checked description.

        Raises
        ------
        CheckpointError
            If a value is absent, of the wrong type or out of range.
        UnsupportedModelError
            If the values are sound but ask for something that is not supported.

        Examples
        --------
        >>> ModelConfig.from_dict({"model_type": "llama"}, Path("config.json"), {"llama"}).head_dim
        128
        """
        top = _Section(raw, source)
        model_type = top.choice("model_type", sorted(supported))
        hidden_size = top.integer("hidden_size", 4096)
        heads = top.integer("num_attention_heads", 32)
        key_value_heads = top.integer("num_key_value_heads", heads)
        if heads % key_value_heads:
            raise CheckpointError(
                f'{source}: "num_attention_heads" is {heads}, which is not a multiple of '
                f'"num_key_value_heads", {key_value_heads}'
            )
        if top.get("head_dim") is None and hidden_size % heads:
            raise CheckpointError(
                f'{source}: "hidden_size" is {hidden_size}, which is not a multiple of '
                f'"num_attention_heads", {heads}, and there is no "head_dim"'
            )
        head_dim = top.integer("head_dim", hidden_size // heads)
        if head_dim % 2:
            raise CheckpointError(
                f'{source}: "head_dim" is {head_dim}, but rotary position embeddings need an even '
                f"number of channels"
            )
        max_position_embeddings = top.integer("max_position_embeddings", 2048)
        dtype_key = "torch_dtype" if top.get("dtype") is None else "dtype"
        dtype = None
        if top.get(dtype_key) is not None:
            dtype = MODEL_DTYPES[top.choice(dtype_key, list(MODEL_DTYPES))]
        return cls(
            model_type=model_type,
            hidden_size=hidden_size,
            intermediate_size=top.integer("intermediate_size", 11008),
            num_hidden_layers=top.integer("num_hidden_layers", 32),
            num_attention_heads=heads,
            num_key_value_heads=key_value_heads,
            head_dim=head_dim,
            vocab_size=top.integer("vocab_size", 32000),
            rms_norm_eps=top.number("rms_norm_eps", 1e-6, zero=True),
            rope=_rope(top, max_position_embeddings),
            max_position_embeddings=max_position_embeddings,
            tie_word_embeddings=top.boolean("tie_word_embeddings", False),
            attention_bias=top.boolean("attention_bias", False),
            mlp_bias=top.boolean("mlp_bias", False),
            hidden_act=top.choice("hidden_act", ACTIVATIONS, "silu"),
            dtype=dtype,
            raw=raw,
        )


class _Section:
    """A JSON object and the words for what is wrong in it; null counts as absent."""

    def __init__(self, values: Mapping[str, Any], source: Path, name: str = "") -> None:
        self.values = values
        self.source = source
        self.name = name

    def get(self, key: str) -> Any:
        return self.values.get(key)

    def section(self, key: str) -> "_Section | None":
        """The object at a key, or None where it is absent, null or empty."""
        values = self.get(key)
        if values is not None and not isinstance(values, dict):
            raise self.wrong(key, "must be an object")
        return _Section(values, self.source, f"{key}.") if values else None

    def integer(self, key: str, default: int) -> int:
        value = self.get(key)
        if value is None:
            return default
        if type(value) is not int or not 0 < value <= _LARGEST_INTEGER:
            raise self.wrong(key, f"must be an integer from 1 to {_LARGEST_INTEGER}")
        return value

    def number(self, key: str, default: float | None, *, zero: bool = False) -> float:
        value = self.optional_number(key, zero=zero)
        if value is not None:
            return value
        if default is None:
            raise self.wrong(key, "must be a number")
        return default

    def optional_number(self, key: str, *, zero: bool = False) -> float | None:
        value = self.get(key)
        if value is None:
            return None
        # Compared before it is converted: float() of a huge integer overflows.
        if type(value) not in (int, float) or not (0 if zero else 1e-30) <= value <= 1e30:
            raise self.wrong(key, f"must be a {'non-negative' if zero else 'positive'} number")
        return float(value)

    def boolean(self, key: str, default: bool) -> bool:
        value = self.get(key)
        if value is None:
            return default
        if type(value) is not bool:
            raise self.wrong(key, "must be true or false")
        return value

    def choice(self, key: str, choices: Collection[str], default: str | None = None) -> str:
        value = default if self.get(key) is None else self.get(key)
        if not isinstance(value, str):
            raise self.wrong(key, "must be a string")
        if value not in choices:
            hint = f". {OTHER_MODELS}" if key == "model_type" else ""
            raise UnsupportedModelError(
                f"{self.source}: {self.quoted(key)} is {shown(value)}, which is not supported; "
                f"supported are: {', '.join(choices)}{hint}"
            )
        return value

    def quoted(self, key: str) -> str:
        return f'"{self.name}{key}"'

    def wrong(self, key: str, rule: str) -> CheckpointError:
        state = f"is {shown(self.get(key))}" if key in self.values else "is absent"
        return CheckpointError(f"{self.source}: {self.quoted(key)} {state}, but {rule}")


def _rope(top: _Section, max_position_embeddings: int) -> RopeConfig:
    # transformers lets the old key win where a file has both.
    rope = (
        top.section("rope_scaling")
        or top.section("rope_parameters")
        or _Section({}, top.source, "rope_parameters.")
    )
    theta = rope.number("rope_theta", top.number("rope_theta", 10000.0))
    if theta <= 1:
        raise CheckpointError(f'{top.source}: "rope_theta" is {theta}, but must be more than 1')
    if any(isinstance(value, dict) for value in rope.values.values()):
        raise UnsupportedModelError(
            f"{top.source}: {rope.quoted('*')} differ from layer to layer, which is not supported"
        )
    for section in (top, rope):
        if section.number("partial_rotary_factor", 1.0) != 1.0:
            raise UnsupportedModelError(
                f"{top.source}: {section.quoted('partial_rotary_factor')} is "
                f"{section.get('partial_rotary_factor')}, but only 1 is supported"
            )
    type_key = "type" if rope.get("rope_type") is None else "rope_type"
    rope_type = rope.choice(type_key, ROPE_TYPES, "default")
    if rope_type == "default":
        return RopeConfig(theta=theta)
    if rope_type == "linear":
        return RopeConfig(rope_type, theta, rope.number("factor", None))
    # A length beside the rope section wins over the one inside, as in transformers.
    original = top.integer(
        "original_max_position_embeddings",
        rope.integer("original_max_position_embeddings", max_position_embeddings),
    )
    if rope_type == "llama3":
        low, high = rope.number("low_freq_factor", None), rope.number("high_freq_factor", None)
        if low >= high:
            raise CheckpointError(
                f"{top.source}: {rope.quoted('low_freq_factor')} is {low}, but must be less than "
                f"{rope.quoted('high_freq_factor')}, {high}"
            )
        return RopeConfig(rope_type, theta, rope.number("factor", None), low, high, original)
    return RopeConfig(
        rope_type,
        theta,
        rope.number("factor", max_position_embeddings / original),
        original_max_position_embeddings=original,
        beta_fast=rope.number("beta_fast", 32.0),
        beta_slow=rope.number("beta_slow", 1.0),
        attention_factor=rope.optional_number("attention_factor"),
        mscale=rope.optional_number("mscale", zero=True),
        mscale_all_dim=rope.optional_number("mscale_all_dim", zero=True),
        truncate=rope.boolean("truncate", True),
    )
