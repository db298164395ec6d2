"""Conversion between config.json and the metadata of a GGUF file."""

import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from bitwright.checkpoint.gguf_general import general_metadata
from bitwright.checkpoint.gguf_names import GGUF_FAMILIES, GgufFamily, GgufNames
from bitwright.checkpoint.gguf_tokenizer import tokenizer_metadata
from bitwright.errors import CheckpointError, UnsupportedModelError, shown
from bitwright.models.config import ModelConfig
from bitwright.models.keys import MOST_LAYERS, Keys
from bitwright.warned import warn

_QUANTIZATION_VERSION = 2  # GGML_QNT_VERSION; blocks of earlier versions were packed differently
# Keys that are read for every architecture, and those for some.
_READ = """
    block_count context_length embedding_length feed_forward_length attention.head_count
    attention.head_count_kv attention.key_length attention.value_length
    attention.layer_norm_rms_epsilon rope.dimension_count rope.freq_base rope.scale_linear
    rope.scaling.type rope.scaling.factor rope.scaling.attn_factor
    rope.scaling.original_context_length expert_count expert_used_count expert_feed_forward_length
    expert_shared_feed_forward_length
"""
_WINDOWS = "attention.sliding_window attention.sliding_window_pattern final_logit_softcapping"
_READ_BY = {
    "gemma2": f"{_WINDOWS} attn_logit_softcapping",
    "gemma3": f"{_WINDOWS} rope.freq_base_swa",
    "phi3": "attention.sliding_window",
    "granite": "attention.scale embedding_scale residual_scale logit_scale",
}
# What config.json calls the biases of queries, keys and values, where that is not attention_bias.
_BIAS_KEYS = {"qwen2_moe": "qkv_bias", "starcoder2": "use_bias"}
_HARMLESS = """
    vocab_size tensor_data_layout pooling_type decoder_start_token_id classifier.output_labels
    rope.scaling.finetuned attention.layer_norm_epsilon expert_shared_count embedding_length_out
"""
_NEUTRAL: dict[
    str, tuple[Any, ...]
] = {  # values that change nothing; for other keys 0, false or empty
    "attention.causal": (True,),
    "attention.scale": (0, 1),
    "attention.output_scale": (0, 1),
    "embedding_scale": (0, 1),
    "residual_scale": (0, 1),
    "logit_scale": (0, 1),
    "rope.scaling.alpha": (0, 1),
    "rope.scaling.yarn_log_multiplier": (0, 1),
    "rope.scaling.yarn_ext_factor": (-1, 1),
    "rope.scaling.yarn_attn_factor": (1,),
    "rope.scaling.yarn_beta_fast": (32,),
    "rope.scaling.yarn_beta_slow": (1,),
    "expert_weights_scale": (0, 1),
    "expert_gating_func": (0, 1),
    "expert_group_count": (0, 1),
    "expert_group_used_count": (0, 1),
    "interleave_moe_layer_step": (0, 1),
    "moe_every_n_layers": (0, 1),
}


def gguf_metadata(config: Mapping[str, Any], folder: Path, file_type: int) -> dict[str, Any]:
    """Describe a model as llama.cpp expects it.

    Where llama.cpp attends to all tokens and the model only to the last ones, the context is as short as
    the model's window: up to there both are the same.

    Parameters
    ----------
    config : mapping
        config.json.
    folder : pathlib.Path
        Where the tokenizer's files are.
    file_type : int
        llama.cpp's number of the mixture of tensor types (llama_ftype), such as 0 for float32.

    Returns
    -------
    dict
        For `bitwright.checkpoint.gguf.write_header`.

    Raises
    ------
    CheckpointError
        If a value of config.json is wrong, or the tokenizer is absent or damaged.
    UnsupportedModelError
        If llama.cpp would compute something else, or does not know the tokenizer.
    """
    names = GgufNames(config, folder / "config.json")
    _check_computable(names)
    model, family = names.config, names.family
    context = model.max_position_embeddings
    slides = [each == "sliding_attention" for each in model.layer_types]
    if not family.full_every and any(slides) and model.sliding_window is not None:
        context = min(context, model.sliding_window)
    values: dict[str, Any] = {
        "vocab_size": model.vocab_size,
        "context_length": context,
        "embedding_length": model.hidden_size,
        "block_count": model.num_hidden_layers,
        "feed_forward_length": model.intermediate_size,
        "attention.head_count": model.num_attention_heads,
        "attention.head_count_kv": model.num_key_value_heads,
        "attention.key_length": model.head_dim,
        "attention.value_length": model.head_dim,
        _norm_key(family): model.norm_eps,
        "rope.dimension_count": model.rotary_dim,
        "rope.freq_base": model.rope.theta,
        **_rope_metadata(model),
    }
    if family.full_every and any(slides):
        values["attention.sliding_window"] = model.sliding_window
        if slides != _usual_windows(family, len(slides)):
            values["attention.sliding_window_pattern"] = slides
    elif family.architecture == "phi3":
        values["attention.sliding_window"] = model.sliding_window or 0
    if family.architecture == "gemma3":
        values["rope.freq_base_swa"] = model.sliding_rope.theta
    if family.scaled:
        values["attention.scale"] = model.attention_scale
        values["embedding_scale"] = model.embedding_scale
        values["residual_scale"] = model.residual_scale
        values["logit_scale"] = model.logits_divisor
    if model.attention_softcap is not None:
        values["attn_logit_softcapping"] = model.attention_softcap
    if model.final_softcap is not None:
        values["final_logit_softcapping"] = model.final_softcap
    if model.experts is not None:
        values["expert_count"] = model.experts.count
        values["expert_used_count"] = model.experts.chosen
        if family.architecture != "llama":
            values["expert_feed_forward_length"] = model.experts.intermediate_size
        if model.experts.shared_size:
            values["expert_shared_feed_forward_length"] = model.experts.shared_size
    return {
        "general.architecture": names.architecture,
        "general.type": "model",
        **general_metadata(folder),
        "general.file_type": file_type,
        "general.quantization_version": _QUANTIZATION_VERSION,
        **{f"{names.architecture}.{key}": value for key, value in values.items()},
        **tokenizer_metadata(folder, model.vocab_size, config),
    }


def config_from_gguf(
    metadata: Mapping[str, Any],
    shapes: Mapping[str, tuple[int, ...]],
    extras: Mapping[str, NDArray[np.float32]],
    source: Path,
) -> dict[str, Any]:
    """Make a config.json from the metadata of a GGUF file.

    Parameters
    ----------
    metadata : mapping
        What it says of itself.
    shapes : mapping
        Of its tensors, by their names there.
    extras : mapping
        Those of its tensors that are in `ROTATION_TENSORS`.
    source : pathlib.Path
        The file, for messages.

    Returns
    -------
    dict
        config.json.

    Raises
    ------
    CheckpointError
        If a value is absent or wrong.
    UnsupportedModelError
        If the model is of a kind that is not computed.
    """
    model_type, keys = _described(metadata, source)
    family = GGUF_FAMILIES[model_type]
    _check_keys(keys, family)
    hidden, heads = keys.integer("embedding_length"), keys.integer("attention.head_count")
    layers = keys.integer("block_count", most=MOST_LAYERS)
    width = keys.integer("attention.key_length", max(hidden // heads, 1))
    if keys.integer("attention.value_length", width) != width:
        raise keys.wrong("attention.value_length", f"only {width}, as of keys, is supported")
    if len(embedding := shapes.get("token_embd.weight", ())) != 2:
        raise CheckpointError(f"{source}: there is no matrix token_embd.weight, the embedding")
    biased = "blk.0.attn_q.bias" in shapes
    config: dict[str, Any] = {
        "model_type": model_type,
        "vocab_size": embedding[0],
        "hidden_size": hidden,
        "intermediate_size": keys.integer("feed_forward_length"),
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "num_key_value_heads": keys.integer("attention.head_count_kv", heads),
        "head_dim": width,
        "hidden_act": family.activation,
        "hidden_activation": family.activation,
        "norm_epsilon" if family.layer_norm else "rms_norm_eps": keys.number(
            _norm_key(family), zero=True
        ),
        "max_position_embeddings": keys.integer("context_length"),
        "rope_theta": keys.number("rope.freq_base", 10000.0),
        "rope_scaling": _rope_scaling(keys, extras),
        "tie_word_embeddings": "output.weight" not in shapes,
        _BIAS_KEYS.get(model_type, "attention_bias"): biased,
        "mlp_bias": "blk.0.ffn_gate.bias" in shapes,
        "sliding_window": None,
        "use_sliding_window": False,
    }
    if (rotated := keys.integer("rope.dimension_count", width)) != width:
        config["partial_rotary_factor"] = rotated / width
    if family.full_every or family.architecture == "phi3":
        config |= _window_config(keys, family, layers)
    if family.full_every:
        config |= _gemma_config(keys, family, config)
    if family.scaled:
        config |= {
            "attention_multiplier": keys.number("attention.scale", width**-0.5),
            "embedding_multiplier": keys.number("embedding_scale", 1.0),
            "residual_multiplier": keys.number("residual_scale", 1.0),
            "logits_scaling": keys.number("logit_scale"),
        }
    if keys.integer("expert_count", 0, zero=True):
        config |= _experts_config(keys, family, shapes)
    for key in ("bos", "eos"):
        if type(number := metadata.get(f"tokenizer.ggml.{key}_token_id")) is int:
            config[f"{key}_token_id"] = number
    return {key: value for key, value in config.items() if value is not None}


def _norm_key(family: GgufFamily) -> str:
    kind = "layer_norm" if family.layer_norm else "layer_norm_rms"
    return f"attention.{kind}_epsilon"


def _described(metadata: Mapping[str, Any], source: Path) -> tuple[str, Keys]:
    """Return the model type that a file describes, and its keys without their prefix."""
    architecture = metadata.get("general.architecture")
    known = {family.architecture: name for name, family in reversed(GGUF_FAMILIES.items())}
    if not isinstance(architecture, str) or architecture not in known:
        raise UnsupportedModelError(
            f'{source}: "general.architecture" is {shown(architecture)}, which is not supported; '
            f"supported are: {', '.join(sorted(known))}. Start from the safetensors files of the model"
        )
    prefix = f"{architecture}."
    values = {
        key.removeprefix(prefix): value for key, value in metadata.items() if key.startswith(prefix)
    }
    keys = Keys(values, source, prefix)
    model_type = "gemma3_text" if architecture == "gemma3" else known[architecture]
    if architecture == "llama" and keys.integer("expert_count", 0, zero=True):
        model_type = "mixtral"
    return model_type, keys


def _gemma_config(keys: Keys, family: GgufFamily, config: Mapping[str, Any]) -> dict[str, Any]:
    """Return what is Gemma's own; llama.cpp takes these numbers where a file of Gemma 2 has none, and
    Gemma 3 has no cap on scores."""
    of_two = family.architecture == "gemma2"
    heads, width = config["num_attention_heads"], config["head_dim"]
    widest = config["num_hidden_layers"] == family.widest
    found: dict[str, Any] = {
        "query_pre_attn_scalar": config["hidden_size"] // heads if widest else width,
        "rope_local_base_freq": None,
    }
    if family.architecture == "gemma3":
        found["rope_local_base_freq"] = keys.number("rope.freq_base_swa", 10000.0)
    if of_two:
        found["attn_logit_softcapping"] = keys.number("attn_logit_softcapping", 50.0)
    cap = keys.number("final_logit_softcapping", 30.0 if of_two else 0.0, zero=not of_two)
    return {**found, "final_logit_softcapping": cap or None}


def _experts_config(
    keys: Keys, family: GgufFamily, shapes: Mapping[str, tuple[int, ...]]
) -> dict[str, Any]:
    """Return what is said of experts."""
    size = [*shapes.get("blk.0.ffn_up_exps.weight", ()), 0, 0][1]
    shared = shapes.get("blk.0.ffn_up_shexp.weight", (0,))[0]
    return {
        "num_experts": keys.integer("expert_count"),
        "num_experts_per_tok": keys.integer("expert_used_count"),
        "moe_intermediate_size": keys.integer("expert_feed_forward_length", size),
        "shared_expert_intermediate_size": keys.integer(
            "expert_shared_feed_forward_length", shared, zero=True
        ),
        "norm_topk_prob": family.normalized,
    }


def _check_keys(keys: Keys, family: GgufFamily) -> None:
    """Raise unless every key that is not read has a value that changes nothing."""
    known = f"{_READ} {_HARMLESS} {_READ_BY.get(family.architecture, '')}".split()
    neutral = _NEUTRAL | {"expert_weights_norm": (family.normalized,)}
    for each in ("attention.key_length", "attention.value_length", "rope.dimension_count"):
        neutral[f"{each}_swa"] = (0, keys.values.get(each))
    for key, value in keys.values.items():
        if key in known or key.startswith(("vision.", "audio.", "mm.")):
            continue
        said = f"{keys.source}: {keys.quoted(key)} is {shown(value)}"
        if key == "attention.sliding_window":
            if value:
                warn(f"{said}, which llama.cpp overlooks for this architecture; so does bitwright")
        elif any(
            each not in neutral.get(key, (0, ""))
            for each in (value.tolist() if isinstance(value, np.ndarray) else [value])
        ):
            raise UnsupportedModelError(
                f"{said}, which is not computed. Put the model's config.json beside the file, or start "
                f"from the safetensors files of the model"
            )


def _usual_rotations(family: GgufFamily, layers: int) -> list[bool]:
    every = family.unrotated_every
    return [not every or (index + 1) % every != 0 for index in range(layers)]


def _usual_windows(family: GgufFamily, layers: int) -> list[bool]:
    return [(index + 1) % family.full_every != 0 for index in range(layers)]


def _window_config(keys: Keys, family: GgufFamily, layers: int) -> dict[str, Any]:
    window = keys.integer(
        "attention.sliding_window", 4096 if family.architecture == "gemma2" else 0, zero=True
    )
    if family.architecture == "phi3":
        return {"sliding_window": window or None}
    pattern = keys.get("attention.sliding_window_pattern")
    if not window:
        slides = [False] * layers
    elif pattern is None:
        slides = _usual_windows(family, layers)
    elif type(pattern) is int and pattern > 0:
        slides = [(index + 1) % pattern != 0 for index in range(layers)]
    elif isinstance(pattern, np.ndarray) and len(pattern) == layers:
        slides = [bool(each) for each in pattern]
    else:
        raise keys.wrong("attention.sliding_window_pattern", f"must be a list of {layers} values")
    kinds = ["sliding_attention" if each else "full_attention" for each in slides]
    return {"sliding_window": window, "layer_types": kinds}


def _rope_metadata(model: ModelConfig) -> dict[str, Any]:
    from bitwright.models.rope import rope_frequencies

    rope = model.rope
    if rope.rope_type == "linear":
        return {"rope.scaling.type": "linear", "rope.scaling.factor": rope.factor}
    if rope.rope_type not in ("yarn", "longrope"):
        return {}
    length = model.max_position_embeddings
    _, factor = rope_frequencies(rope, model.rotary_dim, length)
    values: dict[str, Any] = {
        "rope.scaling.type": rope.rope_type,
        "rope.scaling.original_context_length": rope.original_max_position_embeddings or length,
    }
    if rope.rope_type == "yarn":
        values["rope.scaling.factor"] = rope.factor
        factor /= _yarn_temperature(rope.factor)
    if not math.isclose(factor, 1.0):
        values["rope.scaling.attn_factor"] = factor
    return values


def _yarn_temperature(factor: float) -> float:
    """Return llama.cpp's default factor of cosines and sines."""
    return 1.0 if factor <= 1 else 0.1 * math.log(factor) + 1.0


def _rope_scaling(keys: Keys, extras: Mapping[str, NDArray[np.float32]]) -> dict[str, Any] | None:
    kind = keys.choice("rope.scaling.type", ("none", "linear", "yarn", "longrope"), "linear")
    factor = keys.number(
        "rope.scaling.factor", keys.number("rope.scale_linear", 1.0, zero=True), zero=True
    )
    length = keys.integer("rope.scaling.original_context_length", keys.integer("context_length"))
    attention = keys.number("rope.scaling.attn_factor", 1.0)
    divisors = {name.removesuffix(".weight"): each.tolist() for name, each in extras.items()}
    short = divisors.get("rope_factors_short", divisors.get("rope_freqs"))
    long = divisors.get("rope_factors_long", divisors.get("rope_freqs"))
    if kind == "yarn" and not divisors:
        return {
            "rope_type": "yarn",
            "factor": factor or 1.0,
            "original_max_position_embeddings": length,
            "attention_factor": attention * _yarn_temperature(factor),
        }
    scaled = kind == "linear" and factor not in (0, 1)
    if divisors and not scaled and kind != "yarn" and short and long:
        # Whichever type the divisors came from (llama3, longrope), this one takes them as they are.
        return {
            "rope_type": "longrope",
            "factor": 1.0,
            "short_factor": short,
            "long_factor": long,
            "original_max_position_embeddings": length,
            "attention_factor": attention,
        }
    if divisors or attention != 1 or kind == "longrope":
        raise UnsupportedModelError(
            f"{keys.source}: {keys.quoted('rope.scaling.type')} is {shown(kind)} and the tensors for "
            f"rotations are: {', '.join(divisors) or 'none'}, which is not supported together. Put the "
            f"model's config.json beside the file, or start from its safetensors files"
        )
    return {"rope_type": "linear", "factor": factor} if scaled else None


def _check_computable(names: GgufNames) -> None:
    """Raise unless llama.cpp computes the same function as the model."""
    model, family, rope = names.config, names.family, names.config.rope
    scalar = model.hidden_size // model.num_attention_heads
    if not family.widest or model.num_hidden_layers != family.widest:
        scalar = model.head_dim
    capped = (model.attention_softcap is not None, model.final_softcap is not None)
    experts = model.experts
    wrong = {
        f'"hidden_act" is {model.hidden_act}': model.hidden_act != family.activation,
        f"{model.num_attention_heads} heads of {model.head_dim} channels are not as wide as the hidden "
        f"states": family.full_width
        and model.num_attention_heads * model.head_dim != model.hidden_size,
        f'"tie_word_embeddings" is {model.tie_word_embeddings}': family.tied
        not in (None, model.tie_word_embeddings),
        '"query_pre_attn_scalar" is not that of the released models': not family.scaled
        and not math.isclose(model.attention_scale, scalar**-0.5, rel_tol=1e-6),
        "linears other than queries, keys and values have biases": not family.biased
        and (model.output_bias or model.mlp_bias),
        "other layers are without rotation than the family has": [*model.rotates]
        != _usual_rotations(family, model.num_hidden_layers),
        "some layers have experts, others not": any(model.is_sparse) and not all(model.is_sparse),
        "experts are weighed otherwise": experts is not None
        and (experts.normalized != family.normalized or experts.scale != 1),
        "there is no expert that every token passes": names.architecture == "qwen2moe"
        and (experts is None or not experts.shared_size),
        "soft caps are others than the family has": capped
        != {"gemma2": (True, True), "gemma3": (False, capped[1])}.get(
            names.architecture, (False, False)
        ),
        f'"rope_type" is {rope.rope_type}': rope.rope_type
        not in ("default", "dynamic", "linear", "yarn", *_rope_types(names.architecture)),
        '"rope_parameters" has a "beta_fast", "beta_slow" or "truncate" of its own': (
            rope.rope_type == "yarn"
            and (rope.beta_fast, rope.beta_slow, rope.truncate) != (32, 1, True)
        ),
    }
    for what, is_so in wrong.items():
        if is_so:
            raise UnsupportedModelError(
                f"{names.source}: {what}, which llama.cpp does not compute in the architecture "
                f"{names.architecture}. Choose another format than gguf"
            )


def _rope_types(architecture: str) -> tuple[str, ...]:
    """Return the types of RoPE for which llama.cpp reads divisors from tensors."""
    return {"llama": ("llama3", "longrope"), "phi3": ("longrope",)}.get(architecture, ())
