"""A JSON object of config.json by its keys, in every spelling, and the rules of a family for them."""

from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass, field
from difflib import get_close_matches
from pathlib import Path
from typing import Any, Literal

from bitwright.errors import CheckpointError, UnsupportedModelError, shown

OTHER_MODELS = (
    "What transformers runs can be quantized all the same, by --backend transformers or "
    "bitwright.quantize_with_transformers"
)


MEANINGS: dict[str, dict[str, str]] = {
    "hidden_act": {"swish": "silu", "gelu_new": "gelu_pytorch_tanh"},
    "dtype": {"half": "float16", "float": "float32"},
}


LARGEST_INTEGER = 2**31 - 1


# Far more than any model has: each is looked at before the files can show that it is missing.
MOST_LAYERS, _MOST_EXPERTS, _MOST_HEAD_CHANNELS = 1_000, 4_096, 1 << 20


SPELLINGS: dict[str, tuple[str, ...]] = {
    "num_experts": ("num_experts", "num_local_experts", "n_routed_experts"),
    "dtype": ("dtype", "torch_dtype"),
}


@dataclass(frozen=True)
class ConfigRules:
    """How to read the config.json of a family.

    Parameters
    ----------
    defaults
        Values that transformers assumes for absent keys, where they differ from Llama's. A key that is
        neither here nor common to all families is not read.
    spellings
        The family's own spellings of keys, one or several.
    section
        The object that describes the text part, in multimodal models.
    query_bias, output_bias, mlp_bias, head_bias
        Whether linears have biases, or the key that says so: query, key and value; attention's output;
        the MLP's; the head.
    convolution_bias, projection_bias
        The same for short convolutions, and for the linears around them.
    interleaved
        Whether rotary pairs are neighbours rather than half a head apart, or the key that says so.
    slides
        Whether a layer attends to the last ``sliding_window`` tokens only, where ``layer_types`` does not
        say so.
    parallel
        Whether attention and MLP read the same states, or the key that says so.
    two_norms
        Whether each of them then has a norm of its own.
    alone
        Whether a block holds one of attention, a mixer, an MLP (layer type "mlp") and experts ("moe").
    layer_count
        The number of layers, where ``num_hidden_layers`` does not say it.
    gated_norm, norm_first
        Whether the output of a Mamba-2 mixer is normed, and that before its gate, or the keys that say so.
    indexes
        Whether a layer with latent attention has an indexer of its own.
    head_norms
        Whether queries and keys are normed where the family has such norms, or the key that says so.
    rope_keys
        RoPE parameters that are computed with for this family alone.
    two_ropes
        Whether layers with windows have a rotation of their own, which no scaling changes.
    mlp_width
        The channels between up and down, where ``intermediate_size`` is not their number.
    layer_sizes
        Fields of `ModelConfig` that differ in a layer, given whether it has full attention.
    layer_kind
        The type of a layer where ``layer_types`` does not say it and it has no attention; see
        `Architecture.mixers`.
    layer_kinds
        The types of layers without attention.
    rotates
        Whether a layer applies RoPE to queries and keys.
    is_sparse
        Whether a layer has a mixture of experts.
    topk_methods
        Ways of choosing experts that the family has, by their names in config.json; the first is the
        default.
    harmless, refused, disputed
        Keys that are not computed with, beside those of every family; see
        `bitwright.models.config_keys`.
    uncomputed
        Keys with values that are computed; others, a default included, are refused.
    overlooked
        Keys that transformers declares for the family and does not compute with: a warning names them.
    meanings
        Values that mean others: ``{key: {value: value meant}}``.
    router_scores
        See `ExpertsConfig`.
    always_normalized
        Whether the weights of a token's experts add up to 1, whatever config.json says.
    latent_attention
        Whether queries, keys and values come from latents.
    """

    defaults: Mapping[str, Any] = field(default_factory=dict)
    spellings: Mapping[str, str | tuple[str, ...]] = field(default_factory=dict)
    section: str | None = None
    query_bias: bool | str = "attention_bias"
    convolution_bias: bool | str = "conv_bias"
    projection_bias: bool | str = "conv_bias"
    output_bias: bool | str = "attention_bias"
    mlp_bias: bool | str = False
    head_bias: bool = False
    interleaved: bool | str = False
    slides: "Callable[[Keys, int], bool]" = lambda _keys, _layer: False
    parallel: bool | str = False
    two_norms: bool = False
    alone: bool = False
    layer_count: "Callable[[Keys], int] | None" = None
    gated_norm: bool | str = True
    norm_first: bool | str = False
    indexes: "Callable[[Keys, int], bool] | None" = None
    head_norms: bool | str = True
    rope_keys: tuple[str, ...] = ()
    two_ropes: bool = False
    mlp_width: "Callable[[Keys], int] | None" = None
    layer_sizes: "Callable[[Keys, int, bool], dict[str, Any]] | None" = None
    layer_kind: "Callable[[Keys, int], str | None]" = lambda _keys, _layer: None
    layer_kinds: tuple[str, ...] = ()
    rotates: "Callable[[Keys, int], bool]" = lambda _keys, _layer: True
    is_sparse: "Callable[[Keys, int], bool]" = lambda _keys, _layer: False
    topk_methods: tuple[str, ...] = ()
    harmless: tuple[str, ...] = ()
    refused: Mapping[str, tuple[Any, ...]] = field(default_factory=dict)
    disputed: Mapping[str, tuple[Any, ...]] = field(default_factory=dict)
    uncomputed: Mapping[str, tuple[Any, ...]] = field(default_factory=dict)
    overlooked: tuple[str, ...] = ()
    meanings: Mapping[str, Mapping[str, str]] = field(default_factory=dict)
    router_scores: Literal["softmax", "sigmoid"] = "softmax"
    always_normalized: bool = False
    latent_attention: bool = False


class Keys:
    """A JSON object with defaults for absent keys, and the errors for wrong values; null counts as absent.

    Parameters
    ----------
    values, source, name
        The object, the file it is from and, in messages, the start of its keys.
    defaults
        By key; other keys are not read. None: all keys are read, without defaults.
    rules
        Spellings and meanings of a family.
    """

    def __init__(
        self,
        values: Mapping[str, Any],
        source: Path,
        name: str = "",
        defaults: Mapping[str, Any] | None = None,
        rules: ConfigRules | None = None,
    ) -> None:
        self.values = values
        self.source = source
        self.name = name
        self.defaults = defaults
        self.rules = rules or ConfigRules()

    def spelling(self, key: str) -> str:
        """The spelling of a key that the object uses."""
        known = self.rules.spellings.get(key, (key, *SPELLINGS.get(key, ())))
        known = (known,) if isinstance(known, str) else known
        return next((each for each in known if self.values.get(each) is not None), known[0])

    def get(self, key: str, *, null: bool = False) -> Any:
        """The value at a key or its default; with `null`, null is a value."""
        if self.defaults is not None and key not in self.defaults:
            return None
        spelling = self.spelling(key)
        value = self.values.get(spelling)
        if value is None and self.defaults is not None and not (null and spelling in self.values):
            return self.defaults[key]
        return value

    def section(self, key: str) -> "Keys | None":
        """The object at a key, or None where it is absent, null or empty."""
        values = self.get(key)
        if values is not None and not isinstance(values, dict):
            raise self.wrong(key, "must be an object")
        return Keys(values, self.source, f"{key}.") if values else None

    def integer(
        self,
        key: str,
        default: int | None = None,
        *,
        zero: bool = False,
        most: int = LARGEST_INTEGER,
    ) -> int:
        value = as_integer(self.get(key))
        if value is None and default is not None:
            return default
        least = 0 if zero else 1
        if type(value) is not int or not least <= value <= most:
            raise self.wrong(key, f"must be an integer from {least} to {most}")
        return value

    def optional_integer(self, key: str) -> int | None:
        """As `integer`, but null and 0 mean none."""
        value = self.get(key, null=True)
        return None if value is None else self.integer(key, zero=True) or None

    def number(self, key: str, default: float | None = None, *, zero: bool = False) -> float:
        value = self.get(key)
        if value is None and default is not None:
            return default
        # Compared before it is converted: float() of a huge integer overflows.
        if type(value) not in (int, float) or not (0 if zero else 1e-30) <= value <= 1e30:
            raise self.wrong(key, f"must be a {'non-negative' if zero else 'positive'} number")
        return float(value)

    def optional_number(self, key: str, *, zero: bool = False) -> float | None:
        """As `number`, but null means none."""
        return None if self.get(key, null=True) is None else self.number(key, zero=zero)

    def numbers(self, key: str, count: int) -> tuple[float, ...]:
        value = self.get(key)
        if (
            not isinstance(value, list)
            or len(value) != count
            or not all(type(each) in (int, float) and 1e-30 <= each <= 1e30 for each in value)
        ):
            raise self.wrong(key, f"must be a list of {count} positive numbers")
        return tuple(map(float, value))

    def multipliers(self, key: str, count: int) -> tuple[float, ...]:
        """As `numbers`, and ones where there are none."""
        return (1.0,) * count if self.get(key) is None else self.numbers(key, count)

    def integers(self, key: str) -> tuple[int, ...]:
        """A list of integers, at most one for each layer; empty where there is none."""
        value = self.get(key)
        if value is None:
            return ()
        whole = [as_integer(each) for each in value] if isinstance(value, list) else [None]
        if len(whole) > MOST_LAYERS or not all(type(each) in (int, bool) for each in whole):
            raise self.wrong(key, f"must be a list of integers, {MOST_LAYERS} at most")
        return tuple(int(each) for each in whole if each is not None)

    def boolean(self, key: str, default: bool | None = None) -> bool:
        value = self.get(key)
        if value is None and default is not None:
            return default
        if type(value) is not bool:
            raise self.wrong(key, "must be true or false")
        return value

    def flag(self, rule: bool | str) -> bool:
        """A boolean that a family fixes, or the value of the key that it names."""
        return self.boolean(rule, False) if isinstance(rule, str) else rule

    def choice(self, key: str, choices: Collection[str], default: str | None = None) -> str:
        value = default if self.get(key) is None else self.get(key)
        if not isinstance(value, str):
            raise self.wrong(key, "must be a string")
        value = {**MEANINGS.get(key, {}), **self.rules.meanings.get(key, {})}.get(value, value)
        if value not in choices:
            hint = ""
            if key == "model_type":
                near = get_close_matches(value, choices, 1, 0.5)
                hint = f". Its nearest relative here by name is {near[0]}" if near else ""
                hint += f". {OTHER_MODELS}"
            raise UnsupportedModelError(
                f"{self.source}: {self.quoted(key)} is {shown(value)}, which is not supported; "
                f"supported are: {', '.join(choices)}{hint}"
            )
        return value

    def quoted(self, key: str) -> str:
        return self.named(self.spelling(key))

    def named(self, spelling: str) -> str:
        return f'"{self.name}{shown(spelling)[1:-1]}"'

    def wrong(self, key: str, rule: str) -> CheckpointError:
        spelling = self.spelling(key)
        state = f"is {shown(self.values[spelling])}" if spelling in self.values else "is absent"
        return CheckpointError(f"{self.source}: {self.quoted(key)} {state}, but {rule}")


def as_integer(value: Any) -> Any:
    """Return 4096.0 as 4096, as some tools write it, and anything else as it is."""
    return int(value) if type(value) is float and value.is_integer() else value
