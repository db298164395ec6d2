"""config.json, in its old and new spellings, as one checked description of a decoder."""

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal, Self, cast

import ml_dtypes
import numpy as np

from bitwright.errors import CheckpointError, UnsupportedModelError, shown
from bitwright.models.config_keys import check_keys, check_rope_keys
from bitwright.models.keys import (
    _MOST_EXPERTS,
    _MOST_HEAD_CHANNELS,
    MOST_LAYERS,
    SPELLINGS,
    ConfigRules,
    Keys,
    as_integer,
)

ACTIVATIONS = ("silu", "gelu_pytorch_tanh", "gelu", "relu", "relu2")
ROPE_TYPES = ("default", "linear", "dynamic", "llama3", "yarn", "longrope", "proportional")
MODEL_DTYPES: dict[str, np.dtype[Any]] = {
    "float32": np.dtype(np.float32),
    "float16": np.dtype(np.float16),
    "bfloat16": np.dtype(ml_dtypes.bfloat16),
}
OTHER_FLOATS = ("float64", "float8_e4m3fn", "float8_e5m2")  # that are read, and not written
LayerType = Literal["full_attention", "sliding_attention", "linear_attention", "conv", "mlp", "moe"]
_LAYER_TYPES: tuple[LayerType, ...] = ("full_attention", "sliding_attention")
QUANTIZATION_KEYS = ("quantization", "quantization_config", "compression_config")
SEPARATE_FILES = ("quantize_config.json", "quant_config.json")
"""Where AutoGPTQ and AutoAWQ stored what is in config.json today."""
_COUNT = re.compile(
    r"(num|n|max)_\w+|\w+_(size|dim|rank|embeddings|window|group|scalar|replace|step)"
)
_LLAMA_DEFAULTS: dict[str, Any] = {
    "hidden_size": 4096,
    "intermediate_size": 11008,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "num_key_value_heads": None,
    "head_dim": None,
    "vocab_size": 32000,
    "rms_norm_eps": 1e-6,
    "max_position_embeddings": 2048,
    "original_max_position_embeddings": None,
    "tie_word_embeddings": False,
    "hidden_act": "silu",
    "rope_theta": 10000.0,
    "partial_rotary_factor": 1.0,
    "rope_scaling": None,
    "rope_parameters": None,
    "model_type": None,
    "dtype": None,
}


@dataclass(frozen=True)
class RopeConfig:
    """RoPE parameters.

    The fields carry the names that config.json gives them, except ``theta`` (``rope_theta``).
    Which of them matter depends on ``rope_type``; ``None`` means not given. ``position_scale``
    (``llama_4_scaling_beta``) is by how much queries grow beyond the original length, ``share``
    (``partial_rotary_factor``) how many pairs turn at all with type "proportional", and ``rotary_dim`` how
    many channels are rotated, where layers differ.
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
    short_factor: tuple[float, ...] = ()
    long_factor: tuple[float, ...] = ()
    position_scale: float = 0.0
    share: float = 1.0
    rotary_dim: int | None = None


@dataclass(frozen=True)
class LatentConfig:
    """Sizes of latent attention (DeepSeek V2): ranks of the latents, and of a head's parts; of an indexer,
    if there is one, the heads, their channels, and how many tokens it chooses."""

    query_rank: int | None
    key_value_rank: int
    plain_dim: int
    rotary_dim: int
    value_dim: int
    index_heads: int = 0
    index_dim: int = 0
    chosen_tokens: int = 0


@dataclass(frozen=True)
class RecurrenceConfig:
    """Sizes of a gated delta-net or a Mamba-2 mixer: heads of values and of keys, channels of each, the
    tokens that the convolution sees, and the least that a step of Mamba-2 is."""

    heads: int
    key_heads: int
    key_dim: int
    value_dim: int
    taps: int
    least_step: float = 0.0


@dataclass(frozen=True)
class Multipliers:
    """Fixed factors (Falcon-H1) of what attention and a Mamba-2 mixer read and add, of a gate before its
    activation, of what an MLP adds, and of the five parts of what the mixer's first linear makes."""

    attention_in: float = 1.0
    attention_out: float = 1.0
    mixer_in: float = 1.0
    mixer_out: float = 1.0
    gate: float = 1.0
    down: float = 1.0
    parts: tuple[float, ...] = (1.0,) * 5


@dataclass(frozen=True)
class ExpertsConfig:
    """Sizes of a mixture of experts, and how its router chooses.

    ``scores`` turns the router's logits into scores. Experts are chosen from the
    ``kept_groups`` best of ``groups`` groups, by their best score (``"max"``) or the sum of their two best
    (``"top2"``).
    ``shared_size`` is 0 where there is no shared expert.
    """

    count: int
    chosen: int
    intermediate_size: int
    shared_size: int
    scores: Literal["softmax", "sigmoid"]
    normalized: bool
    scale: float
    groups: int
    kept_groups: int
    group_score: Literal["max", "top2"]


@dataclass(frozen=True)
class ModelConfig:
    """A decoder's sizes and choices; build it with `from_dict`.

    ``convolved`` is how many tokens a short convolution sees; ``swiglu_limit`` clamps the MLP's gate and
    up (0: it does not). ``family`` is the key of its `Architecture`: ``model_type``, of a model of several
    kinds of input also that of its text part. ``dtype`` is None where config.json names none: the stored
    tensors decide then. ``raw`` is config.json as it was read, for keys of single families.
    """

    model_type: str
    family: str
    hidden_size: int
    intermediate_size: int
    num_hidden_layers: int
    num_attention_heads: int
    num_key_value_heads: int
    head_dim: int
    vocab_size: int
    norm_eps: float
    rope: RopeConfig
    sliding_rope: RopeConfig
    rotary_dim: int
    interleaved: bool
    max_position_embeddings: int
    tie_word_embeddings: bool
    parallel: bool
    head_norms: bool
    query_bias: bool
    output_bias: bool
    mlp_bias: bool
    hidden_act: str
    layer_types: tuple[LayerType, ...]
    rotates: tuple[bool, ...]
    is_sparse: tuple[bool, ...]
    sliding_window: int | None
    attention_scale: float
    attention_softcap: float | None
    final_softcap: float | None
    embedding_scale: float
    residual_scale: float
    logits_divisor: float
    latent: LatentConfig | None
    recurrence: RecurrenceConfig | None
    convolved: int
    convolution_bias: bool
    projection_bias: bool
    swiglu_alpha: float
    swiglu_limit: float
    experts: ExpertsConfig | None
    dtype: np.dtype[Any] | None
    raw: Mapping[str, Any] = field(repr=False)
    keys_are_values: bool = False
    indexes: tuple[bool, ...] = ()
    gated_norm: bool = True
    norm_first: bool = False
    multipliers: Multipliers = Multipliers()
    layer_sizes: tuple[Mapping[str, Any], ...] = ()

    def at(self, layer: int) -> Self:
        """Return the configuration of one layer, where sizes differ."""
        sizes = self.layer_sizes[layer] if self.layer_sizes else {}
        return replace(self, **sizes, layer_sizes=()) if sizes else self

    @classmethod
    def from_dict(
        cls, raw: Mapping[str, Any], source: Path, families: Mapping[str, ConfigRules]
    ) -> Self:
        """Check and complete a parsed config.json.

        Keys that are absent or null take the defaults of transformers, save where null means none.

        Parameters
        ----------
        raw : mapping
            The parsed file, spelled as transformers 4 or 5 does.
        source : pathlib.Path
            The file, for messages.
        families : mapping of str to ConfigRules
            The rules of each supported ``model_type``.

        Returns
        -------
        ModelConfig
            The checked description.

        Raises
        ------
        CheckpointError
            If a value is absent, of the wrong type or out of range.
        UnsupportedModelError
            If the values are valid but describe something that is not supported.

        Examples
        --------
        >>> rules = {"llama": ConfigRules()}
        >>> ModelConfig.from_dict({"model_type": "llama"}, Path("config.json"), rules).head_dim
        128
        """
        family, rules, top = _opened(raw, source, families)
        hidden_size = top.integer("hidden_size")
        layers = _layer_count(top, rules)
        heads = top.integer("num_attention_heads")
        key_value_heads = top.integer("num_key_value_heads", heads)
        latent = _latent(top) if rules.latent_attention else None
        head_dim, rotary_dim = _head_sizes(top, hidden_size, heads, key_value_heads, latent)
        rope, sliding_rope = _ropes(top, top.integer("max_position_embeddings"), rotary_dim)
        sliding_window = top.optional_integer("sliding_window")
        layer_types = _layer_types(top, rules, layers, sliding_window)
        scalar = top.optional_number("query_pre_attn_scalar")
        attention_scale = (head_dim if scalar is None else scalar) ** -0.5
        if latent is not None:
            attention_scale *= _latent_scale(rope)
        attention_scale *= top.number("key_multiplier", 1.0)
        sizes = _layer_sizes(top, rules, layer_types)
        rope = _sized(rope, sizes, layer_types)
        sparse = _sparse(top, rules, layers)
        return cls(
            model_type=raw["model_type"],
            family=family,
            hidden_size=hidden_size,
            intermediate_size=(
                rules.mlp_width(top) if rules.mlp_width else top.integer("intermediate_size")
            ),
            num_hidden_layers=layers,
            num_attention_heads=heads,
            num_key_value_heads=key_value_heads,
            head_dim=head_dim,
            vocab_size=top.integer("vocab_size"),
            norm_eps=top.number("rms_norm_eps", zero=True),
            rope=rope,
            sliding_rope=sliding_rope,
            rotary_dim=rotary_dim,
            max_position_embeddings=top.integer("max_position_embeddings"),
            tie_word_embeddings=top.boolean("tie_word_embeddings"),
            hidden_act=top.choice("hidden_act", ACTIVATIONS),
            layer_types=layer_types,
            rotates=tuple(rules.rotates(top, layer) for layer in range(layers)),
            is_sparse=sparse,
            sliding_window=sliding_window,
            attention_scale=top.number("attention_multiplier", attention_scale),
            attention_softcap=top.optional_number("attn_logit_softcapping"),
            final_softcap=top.optional_number("final_logit_softcapping"),
            embedding_scale=_embedding_scale(top, hidden_size),
            residual_scale=top.number("residual_multiplier", 1.0),
            logits_divisor=top.number("logits_scaling", 1.0) / top.number("logit_scale", 1.0),
            latent=latent,
            indexes=tuple(rules.indexes(top, each) for each in range(layers) if rules.indexes),
            recurrence=_recurrence(top),
            multipliers=_multipliers(top),
            experts=_experts(top, rules) if any(sparse) else None,
            dtype=_dtype(top),
            raw=raw,
            layer_sizes=sizes,
            **_choices(top, rules),
        )


def _opened(
    raw: Mapping[str, Any], source: Path, families: Mapping[str, ConfigRules]
) -> tuple[str, ConfigRules, Keys]:
    """Return the family, its rules, and the checked keys that describe the decoder."""
    outer = Keys(raw, source)
    model_type = outer.choice("model_type", sorted({name.partition("/")[0] for name in families}))
    family = _family(outer, model_type, families)
    rules = families[family]
    values = dict(raw)
    if rules.section is not None:
        section = outer.section(rules.section)
        # Keys of the outer object about the whole model, such as its dtype, apply to the part as well.
        values = {**raw, **(section.values if section else {})}
        # The head belongs to the whole model, so the outer object decides whether it is tied.
        values["tie_word_embeddings"] = raw.get("tie_word_embeddings")
    name = f"{rules.section}." if rules.section else ""
    top = Keys(values, source, name, _LLAMA_DEFAULTS | dict(rules.defaults), rules)
    check_keys(top, understood_keys(rules), model_type)
    for key, computed in rules.uncomputed.items():
        if top.get(key) not in computed:
            raise UnsupportedModelError(
                f"{source}: {top.quoted(key)} is {shown(top.get(key))}, which is not computed for "
                f"{model_type}; what is: {', '.join(map(shown, computed))}. transformers does: quantize by "
                f"--backend transformers or bitwright.quantize_with_transformers"
            )
    return family, rules, top


def _family(outer: Keys, model_type: str, families: Mapping[str, ConfigRules]) -> str:
    """Return the family of a model type and, if it is a wrapper's, of its text part."""
    if model_type in families:
        return model_type
    wrapped = [name for name in families if name.startswith(f"{model_type}/")]
    text = outer.section(families[wrapped[0]].section or "")
    if text is None or text.get("model_type") is None:
        return wrapped[0]
    texts = [name.partition("/")[2] for name in wrapped]
    said = text.choice("model_type", texts if model_type not in texts else [*texts, model_type])
    return f"{model_type}/{said}" if said in texts else wrapped[0]


def _head_sizes(
    top: Keys, hidden_size: int, heads: int, key_value_heads: int, latent: LatentConfig | None
) -> tuple[int, int]:
    """Return how many channels a head has, and how many of them are rotated."""
    if heads % key_value_heads:
        raise CheckpointError(
            f'{top.source}: "num_attention_heads" is {heads}, which is not a multiple of '
            f'"num_key_value_heads", {key_value_heads}'
        )
    if latent is not None:
        head_dim, rotary_dim = latent.plain_dim + latent.rotary_dim, latent.rotary_dim
        if key_value_heads != heads:
            raise UnsupportedModelError(
                f'{top.source}: "num_key_value_heads" is {key_value_heads}; with latent attention '
                f'it must be that of "num_attention_heads", {heads}'
            )
    else:
        head_dim = top.integer("head_dim", 0)
        if head_dim == 0 and hidden_size % heads:
            raise CheckpointError(
                f'{top.source}: "hidden_size" is {hidden_size}, which is not a multiple of '
                f'"num_attention_heads", {heads}, and there is no "head_dim"'
            )
        head_dim = head_dim or hidden_size // heads
        rotary_dim = top.optional_integer("rotary_dim") or int(
            head_dim * _partial_rotary_factor(top)
        )
    if heads * (head_dim + (latent.value_dim if latent else 0)) > _MOST_HEAD_CHANNELS:
        raise top.wrong(
            "num_attention_heads", f"together heads have at most {_MOST_HEAD_CHANNELS} channels"
        )
    if rotary_dim % 2 or rotary_dim == 0:
        raise CheckpointError(
            f'{top.source}: "head_dim" is {head_dim}, of which {rotary_dim} channels are rotated, but '
            f"rotary position embeddings need an even number of channels"
        )
    return head_dim, rotary_dim


def understood_keys(rules: ConfigRules) -> set[str]:
    """Return the keys that are read for a family, in all their spellings."""
    keys = {*_LLAMA_DEFAULTS, *rules.defaults}
    spelled = {each for key in keys for each in (*SPELLINGS.get(key, ()), key)}
    own: set[str] = set()
    for said in rules.spellings.values():
        own |= {said} if isinstance(said, str) else {*said}
    return spelled - {*rules.spellings} | own | {rules.section or "model_type"}


def _dtype(top: Keys) -> np.dtype[Any] | None:
    said = top.get("dtype")
    if said in (None, "auto"):
        return None
    if isinstance(said, str) and said.startswith("torch."):
        top = Keys({"dtype": said.removeprefix("torch.")}, top.source, top.name)
    if top.get("dtype") in OTHER_FLOATS:
        return None
    return MODEL_DTYPES[top.choice("dtype", list(MODEL_DTYPES))]


def _embedding_scale(top: Keys, hidden_size: int) -> float:
    if top.get("scaled_embedding"):
        return float(np.float32(math.sqrt(hidden_size)))
    return top.number("embedding_multiplier", 1.0)


def _partial_rotary_factor(top: Keys) -> float:
    rope = top.section("rope_scaling") or top.section("rope_parameters")
    factor = top.number("partial_rotary_factor")
    if rope is not None:
        factor = rope.number("partial_rotary_factor", factor)
    if factor > 1:
        raise top.wrong("partial_rotary_factor", "must be at most 1")
    if factor != 1 and not top.get("rotates_in_part"):
        raise UnsupportedModelError(
            f'{top.source}: "partial_rotary_factor" is {factor}, but for this model_type only 1 is '
            f"supported"
        )
    return factor


def _layer_count(top: Keys, rules: ConfigRules) -> int:
    if rules.layer_count is not None:
        return rules.layer_count(top)
    return top.integer("num_hidden_layers", most=MOST_LAYERS)


def _layer_types(
    top: Keys, rules: ConfigRules, layers: int, sliding_window: int | None
) -> tuple[LayerType, ...]:
    slides = [sliding_window is not None and rules.slides(top, each) for each in range(layers)]
    computed = tuple(
        cast(LayerType, rules.layer_kind(top, layer))
        or ("sliding_attention" if each else "full_attention")
        for layer, each in enumerate(slides)
    )
    known = (*_LAYER_TYPES, *rules.layer_kinds)
    types = top.values.get("layer_types")
    if types is None:
        return computed
    if not isinstance(types, list) or len(types) != layers:
        raise top.wrong("layer_types", f"must be a list of {layers} strings")
    meant = {"attention": "full_attention"}
    if rules.indexes is not None:
        meant["indexed_attention"] = "full_attention"
    if "linear_attention" in rules.layer_kinds:
        meant["mamba"] = "linear_attention"
    types = [meant.get(each, each) if isinstance(each, str) else each for each in types]
    for each in types:
        if each not in known:
            raise UnsupportedModelError(
                f"{top.source}: {top.quoted('layer_types')} holds {shown(each)}, which is not "
                f"supported; supported are: {', '.join(known)}"
            )
    if "layer_types" not in rules.defaults:
        if types != list(computed):
            raise UnsupportedModelError(
                f"{top.source}: {top.named('layer_types')} asks for other windows than the rest of the "
                f"file; for this model_type transformers overlooks the key, other engines do not. If the "
                f"model was made without it, delete the key from config.json"
            )
        return computed
    if "sliding_attention" in types and sliding_window is None:
        raise top.wrong("sliding_window", 'must be an integer: "layer_types" asks for it')
    if "sliding_attention" in types and top.get("use_sliding_window") is False:
        raise top.wrong("use_sliding_window", 'must be true: "layer_types" asks for windows')
    return tuple(cast(LayerType, each) for each in types)


def _recurrence(top: Keys) -> RecurrenceConfig | None:
    if top.get("mamba_n_heads") is not None:
        return _mamba(top)
    if top.get("linear_num_value_heads") is None:
        return None
    heads, key_heads = top.integer("linear_num_value_heads"), top.integer("linear_num_key_heads")
    if heads % key_heads:
        raise top.wrong(
            "linear_num_value_heads", f"must be a multiple of {key_heads}, the key heads"
        )
    return RecurrenceConfig(
        heads=heads,
        key_heads=key_heads,
        key_dim=top.integer("linear_key_head_dim"),
        value_dim=top.integer("linear_value_head_dim"),
        taps=top.integer("linear_conv_kernel_dim"),
    )


def _mamba(top: Keys) -> RecurrenceConfig:
    heads, groups = top.integer("mamba_n_heads"), top.integer("mamba_n_groups")
    width = top.get("mamba_d_head")
    if width in (None, "auto"):
        whole = int(top.number("mamba_expand") * top.integer("hidden_size"))
        width = (top.optional_integer("mamba_d_ssm") or whole) // heads
    else:
        width = top.integer("mamba_d_head")
    if heads % groups:
        raise top.wrong("mamba_n_heads", f"must be a multiple of {groups}, the groups")
    return RecurrenceConfig(
        heads=heads,
        key_heads=groups,
        key_dim=top.integer("mamba_d_state"),
        value_dim=width,
        taps=top.integer("mamba_d_conv"),
        least_step=top.number("time_step_min", 0.0, zero=True),
    )


def _multipliers(top: Keys) -> Multipliers:
    gate, down = top.multipliers("mlp_multipliers", 2)
    return Multipliers(
        attention_in=top.number("attention_in_multiplier", 1.0),
        attention_out=top.number("attention_out_multiplier", 1.0),
        mixer_in=top.number("ssm_in_multiplier", 1.0),
        mixer_out=top.number("ssm_out_multiplier", 1.0),
        gate=gate,
        down=down,
        parts=top.multipliers("ssm_multipliers", 5),
    )


def _latent(top: Keys) -> LatentConfig:
    return LatentConfig(
        query_rank=top.optional_integer("q_lora_rank"),
        key_value_rank=top.integer("kv_lora_rank"),
        plain_dim=top.integer("qk_nope_head_dim"),
        rotary_dim=top.integer("qk_rope_head_dim"),
        value_dim=top.integer("v_head_dim"),
        index_heads=top.integer("index_n_heads", 0),
        index_dim=top.integer("index_head_dim", 0),
        chosen_tokens=top.integer("index_topk", 0),
    )


def _latent_scale(rope: RopeConfig) -> float:
    """Return the factor of latent attention's scores: YaRN's attention factor (arXiv:2309.00071),
    which cosines and sines leave out there."""
    if rope.rope_type == "default" or not rope.mscale_all_dim or rope.factor <= 1:
        return 1.0
    return (0.1 * rope.mscale_all_dim * math.log(rope.factor) + 1.0) ** 2


def _choices(top: Keys, rules: ConfigRules) -> dict[str, Any]:
    """Return what is there or not, and the numbers of single parts."""
    flags = (
        "parallel",
        "head_norms",
        "query_bias",
        "output_bias",
        "mlp_bias",
        "interleaved",
        "convolution_bias",
        "projection_bias",
        "gated_norm",
        "norm_first",
    )
    return {
        **{name: top.flag(getattr(rules, name)) for name in flags},
        "convolved": top.integer("conv_L_cache", 0, zero=True),
        "swiglu_alpha": top.number("swiglu_alpha", 1.0),
        "swiglu_limit": top.number("swiglu_limit", 0.0, zero=True),
    }


def _sized(
    rope: RopeConfig, sizes: tuple[Mapping[str, Any], ...], layer_types: tuple[LayerType, ...]
) -> RopeConfig:
    """Return the rotation of layers with full attention, for heads of their size."""
    widths = [
        each["head_dim"]
        for each, kind in zip(sizes, layer_types, strict=False)
        if kind == "full_attention" and "head_dim" in each
    ]
    return replace(rope, rotary_dim=widths[0]) if widths else rope


def _layer_sizes(
    top: Keys, rules: ConfigRules, layer_types: tuple[LayerType, ...]
) -> tuple[Mapping[str, Any], ...]:
    if rules.layer_sizes is None:
        return ()
    return tuple(
        rules.layer_sizes(top, layer, kind == "full_attention")
        for layer, kind in enumerate(layer_types)
    )


def _sparse(top: Keys, rules: ConfigRules, layers: int) -> tuple[bool, ...]:
    """Return which layers have experts."""
    types = top.get("mlp_layer_types")
    if types is None:
        return tuple(rules.is_sparse(top, layer) for layer in range(layers))
    if not isinstance(types, list) or len(types) != layers or not {*types} <= {"dense", "sparse"}:
        raise top.wrong("mlp_layer_types", f'must be a list of {layers} times "dense" or "sparse"')
    return tuple(each == "sparse" for each in types)


def _experts(top: Keys, rules: ConfigRules) -> ExpertsConfig:
    count = top.integer("num_experts", most=_MOST_EXPERTS)
    chosen = top.integer("num_experts_per_tok")
    if chosen > count:
        raise top.wrong("num_experts_per_tok", f"must be at most {count}, the number of experts")
    size = top.integer("moe_intermediate_size", top.integer("intermediate_size"))
    groups = kept = 1
    group_score: Literal["max", "top2"] = "max"
    if rules.topk_methods:
        method = top.choice("topk_method", rules.topk_methods, rules.topk_methods[0])
        if method != "greedy":
            groups, kept = top.integer("n_group", 1), top.integer("topk_group", 1)
            group_score = "top2" if method == "noaux_tc" else "max"
        if count % groups or kept > groups or count // groups * kept < chosen:
            raise top.wrong(
                "topk_group",
                f"its {kept} of {groups} groups of {count} experts must hold {chosen} to choose",
            )
        if group_score == "top2" and count < 2 * groups:
            raise top.wrong("n_group", f"its groups of {count} experts go by the best two in each")
    shared = top.integer("shared_expert_intermediate_size", 0, zero=True)
    return ExpertsConfig(
        count=count,
        chosen=chosen,
        intermediate_size=size,
        shared_size=shared or size * top.integer("n_shared_experts", 0, zero=True),
        scores=rules.router_scores,
        normalized=rules.always_normalized or top.boolean("norm_topk_prob", False),
        scale=top.number("routed_scaling_factor", 1.0),
        groups=groups,
        kept_groups=kept,
        group_score=group_score,
    )


def _ropes(
    top: Keys, max_position_embeddings: int, rotary_dim: int
) -> tuple[RopeConfig, RopeConfig]:
    """Return the RoPE parameters of full and of sliding layers."""
    # transformers lets the old key win where a file has both.
    rope = (
        top.section("rope_scaling")
        or top.section("rope_parameters")
        or Keys({}, top.source, "rope_parameters.")
    )
    sliding_theta = top.optional_number("rope_local_base_freq")
    if top.rules.two_ropes:
        sliding_theta = top.number("rope_theta")
    if not any(isinstance(value, dict) for value in rope.values.values()):
        if sliding_theta is not None and rope.name == "rope_parameters." and rope.values:
            raise UnsupportedModelError(
                f'{top.source}: {top.named("rope_parameters")} must hold "full_attention" and '
                f'"sliding_attention"; transformers overlooks what else it says'
            )
        full = _rope(top, rope, max_position_embeddings, rotary_dim)
        return full, full if sliding_theta is None else RopeConfig(theta=sliding_theta)
    if sliding_theta is None:
        raise UnsupportedModelError(
            f"{top.source}: {rope.quoted('*')} differ from layer to layer, which is not supported"
        )
    sections = [
        rope.section(each) or Keys({}, top.source, f"{rope.name}{each}.") for each in _LAYER_TYPES
    ]
    for each in sections:
        if (
            each.number("partial_rotary_factor", 1.0) != 1
            and each.get("rope_type") != "proportional"
        ):
            raise UnsupportedModelError(
                f"{top.source}: {each.quoted('partial_rotary_factor')} is not 1, which is not supported"
            )
    full = _rope(top, sections[0], max_position_embeddings, rotary_dim)
    local = Keys({"rope_theta": sliding_theta, **sections[1].values}, top.source, sections[1].name)
    return full, _rope(top, local, max_position_embeddings, rotary_dim)


def _rope_type(top: Keys, rope: Keys) -> str:
    key = "type" if rope.get("rope_type") is None else "rope_type"
    said = rope.get(key)
    if said == "su" or (said == "yarn" and rope.get("short_factor")):
        return "longrope"  # as early Phi-3 models call it
    meant = top.rules.meanings.get("rope_type", {}).get(str(said))
    return rope.choice(key, ROPE_TYPES, "default") if meant is None else meant


def _rope(top: Keys, rope: Keys, max_position_embeddings: int, rotary_dim: int) -> RopeConfig:
    check_rope_keys(rope, top.rules.rope_keys)
    theta = rope.number("rope_theta", top.number("rope_theta"))
    if theta <= 1:
        raise CheckpointError(f'{top.source}: "rope_theta" is {theta}, but must be more than 1')
    rope_type = _rope_type(top, rope)
    if rope_type == "default":
        return RopeConfig(theta=theta)
    if rope_type == "proportional":
        share = rope.number("partial_rotary_factor", 1.0)
        if share > 1:
            raise rope.wrong("partial_rotary_factor", "must be at most 1")
        return RopeConfig(rope_type, theta, rope.number("factor", 1.0), share=share)
    if rope_type == "dynamic" and "alpha" in top.rules.rope_keys and rope.get("alpha") is not None:
        # Hunyuan's: the base grows by a fixed factor, whatever the length.
        return RopeConfig(
            theta=theta * rope.number("alpha") ** (rotary_dim / max(1, rotary_dim - 2))
        )
    if rope_type in ("linear", "dynamic"):
        return RopeConfig(rope_type, theta, rope.number("factor"))
    # A length beside the rope section wins over the one inside, as in transformers.
    original = top.integer(
        "original_max_position_embeddings",
        rope.integer("original_max_position_embeddings", max_position_embeddings),
    )
    if rope_type == "longrope":
        return RopeConfig(
            rope_type,
            theta,
            rope.number("factor", max_position_embeddings / original),
            original_max_position_embeddings=original,
            attention_factor=rope.optional_number("attention_factor"),
            short_factor=rope.numbers("short_factor", rotary_dim // 2),
            long_factor=rope.numbers("long_factor", rotary_dim // 2),
        )
    if rope_type == "llama3":
        low, high = rope.number("low_freq_factor"), rope.number("high_freq_factor")
        if low >= high:
            raise CheckpointError(
                f"{top.source}: {rope.quoted('low_freq_factor')} is {low}, but must be less than "
                f"{rope.quoted('high_freq_factor')}, {high}"
            )
        return RopeConfig(rope_type, theta, rope.number("factor"), low, high, original)
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
        position_scale=rope.number("llama_4_scaling_beta", 0.0, zero=True),
    )


def float_config(config: Mapping[str, Any]) -> dict[str, Any]:
    """Return config.json without its quantization settings, in the whole or in its text part.

    Parameters
    ----------
    config : mapping
        config.json of any checkpoint.

    Returns
    -------
    dict
        The rest, in the same order.
    """
    rest = {key: value for key, value in config.items() if key not in QUANTIZATION_KEYS}
    if isinstance(config.get("text_config"), dict):
        rest["text_config"] = float_config(config["text_config"])
    return rest


def plainly_spelled(config: Mapping[str, Any]) -> dict[str, Any]:
    """Return config.json in spellings that every engine reads, where bitwright reads more of them.

    transformers refuses ``torch.bfloat16`` and ``auto`` as a dtype and counts like 4096.0, and vLLM
    ``swish`` as an activation.

    Parameters
    ----------
    config : mapping
        config.json of any checkpoint.

    Returns
    -------
    dict
        The same, in the same order; most are as they were.
    """
    spelled: dict[str, Any] = {}
    for key, value in config.items():
        if key in ("dtype", "torch_dtype") and isinstance(value, str):
            if value != "auto":
                spelled[key] = value.removeprefix("torch.")
        elif key in ("hidden_act", "hidden_activation") and value == "swish":
            spelled[key] = "silu"
        elif isinstance(value, dict) and key in ("text_config", "rope_scaling", "rope_parameters"):
            spelled[key] = plainly_spelled(value)
        else:
            spelled[key] = as_integer(value) if _COUNT.fullmatch(key) else value
    return spelled
