"""Keys of config.json that are not computed with: the values they may have, and those that are refused.

Three lists hold for every family, and a family has more of its own (`ConfigRules`): harmless keys never
enter a forward pass, refused ones are computed by transformers, disputed ones by other families or by
some engines. A key of the last two passes with a value that changes nothing, or with null. Any other
key is declared by no class of transformers, which ignores it, too.
"""

from collections.abc import Collection, Mapping
from typing import Any

from bitwright.errors import UnsupportedModelError, shown
from bitwright.models.keys import Keys
from bitwright.warned import warn

COMPARED_WITH = (5, 23)
"""The transformers whose classes these lists were compared with; newer ones may declare other keys."""

_HARMLESS = """
    architectures auto_map model_type transformers_version dtype torch_dtype name_or_path _name_or_path
    _commit_hash attn_implementation _attn_implementation _attn_implementation_autoset
    experts_implementation torchscript use_bfloat16 tokenizer_class prefix
    bos_token_id eos_token_id pad_token_id sep_token_id cls_token_id unk_token_id decoder_start_token_id
    id2label label2id num_labels problem_type finetuning_task task_specific_params
    initializer_range initializer_factor attention_dropout hidden_dropout embedding_dropout
    residual_dropout embd_pdrop resid_pdrop attn_pdrop classifier_dropout gradient_checkpointing
    router_aux_loss_coef router_jitter_noise router_z_loss_coef aux_loss_alpha seq_aux output_router_logits
    pretraining_tp ep_size num_nextn_predict_layers num_mtp_layers mtp_layer_types
    use_cache cache_implementation return_dict return_dict_in_generate output_attentions
    output_hidden_states output_scores tie_last_hidden_states chunk_size_feed_forward is_decoder
    tie_encoder_decoder cross_attention_hidden_size pruned_heads remove_invalid_values
    keys_to_ignore_at_inference ignore_keys_at_rope_validation
    quantization quantization_config compression_config
    max_length min_length do_sample early_stopping num_beams num_beam_groups diversity_penalty temperature
    top_k top_p typical_p min_p repetition_penalty length_penalty no_repeat_ngram_size
    encoder_no_repeat_ngram_size bad_words_ids num_return_sequences suppress_tokens begin_suppress_tokens
    forced_bos_token_id forced_eos_token_id exponential_decay_length_penalty
    unsloth_version unsloth_fixed use_mrope
"""
HARMLESS = frozenset(_HARMLESS.split())
REFUSED: Mapping[str, tuple[Any, ...]] = {"is_causal": (True,)}
DISPUTED: Mapping[str, tuple[Any, ...]] = {
    "per_layer_config": ({},),
    "block_configs": ([],),
    "is_encoder_decoder": (False,),
    "add_cross_attention": (False,),
    "use_bidirectional_attention": (False,),
    "attention_bias": (False,),
    "mlp_bias": (False,),
    "qkv_bias": (False,),
    "use_bias": (False,),
    "lm_head_bias": (False,),
    "bias": (False,),
    "attn_logit_softcapping": (),
    "final_logit_softcapping": (),
    "query_pre_attn_scalar": (),
    "attention_multiplier": (),
    "embedding_multiplier": (1,),
    "residual_multiplier": (1,),
    "logits_scaling": (1,),
    "logit_scale": (1,),
    "clip_qkv": (),
    "use_qk_norm": (False,),
    "qk_norm": (False,),
    "qk_layernorm": (False,),
    "parallel_residual": (False,),
    "use_parallel_residual": (False,),
    "parallel_attn": (False,),
    "alibi": (False,),
    "rotary_pct": (1,),
    "rope_interleave": (False,),
    "rope_interleaved": (False,),
    "no_rope_layers": ([],),
    "attention_chunk_size": (0,),
    "attn_temperature_tuning": (False,),
    "scoring_func": ("softmax",),
    "moe_layer_freq": (1,),
}
_ROPE_KEYS = """
    rope_type type rope_theta partial_rotary_factor factor original_max_position_embeddings
    attention_factor beta_fast beta_slow mscale mscale_all_dim truncate short_factor long_factor
    low_freq_factor high_freq_factor max_position_embeddings finetuned mrope_section mrope_interleaved
"""
ROPE_KEYS = frozenset(_ROPE_KEYS.split())
"""RoPE parameters by name. Those for images and videos (mrope) do not change text."""


def check_keys(top: Keys, understood: Collection[str], model_type: str) -> None:
    """Raise unless every key that is not understood leaves the mathematics alone.

    Parameters
    ----------
    top : Keys
        config.json, with the rules of its family.
    understood : collection of str
        The keys that are read for the family.
    model_type : str
        For messages.

    Raises
    ------
    UnsupportedModelError
        If a key asks for something that is not computed.
    """
    rules = top.rules
    refused = {**REFUSED, **rules.refused}
    disputed = {**DISPUTED, **rules.disputed}
    unknown = []
    for key, value in top.values.items():
        if value is None or key in understood or key in rules.harmless:
            continue
        said = f"{top.source}: {top.named(key)} is {shown(value)}, which"
        if key in rules.overlooked or (key == "sliding_window" and _slides(top)):
            warn(f"{said} transformers overlooks for {model_type}; so does bitwright")
        elif key in refused:
            if value not in refused[key]:
                raise UnsupportedModelError(
                    f"{said} is not computed for {model_type}. transformers does: quantize by "
                    f"--backend transformers or bitwright.quantize_with_transformers"
                )
        elif key in disputed:
            if value not in disputed[key]:
                raise UnsupportedModelError(
                    f"{said} is not computed for {model_type}, and not by every engine. If the model "
                    f"was made without it, delete the key from config.json"
                )
        elif key not in (*HARMLESS, "sliding_window", "use_sliding_window", "layer_types"):
            unknown.append(key)
    if unknown and _version(top.values.get("transformers_version")) > COMPARED_WITH:
        warn(
            f"{top.source}: was written by transformers {shown(top.values['transformers_version'])[1:-1]}"
            f"; whether these keys change what {model_type} computes is not known: {shown(sorted(unknown))}"
        )


def check_rope_keys(rope: Keys, own: Collection[str] = ()) -> None:
    """Raise UnsupportedModelError if a RoPE section has parameters that are not computed with, of those of
    every family and a family's `own`."""
    for key, value in rope.values.items():
        if key not in ROPE_KEYS and key not in own and value is not None:
            raise UnsupportedModelError(
                f"{rope.source}: {rope.named(key)} is {shown(value)}, which is not computed, and not by "
                f"every engine. If the model was made without it, delete the key from config.json"
            )


def _slides(top: Keys) -> bool:
    return top.values["sliding_window"] != 0 and top.values.get("use_sliding_window") is not False


def _version(said: object) -> tuple[int, ...]:
    parts = said.split(".")[:2] if isinstance(said, str) else []
    return tuple(int(each) for each in parts if each.isdecimal() and len(each) < 4)
