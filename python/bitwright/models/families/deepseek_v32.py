"""DeepSeek V3.2 and GLM 5: DeepSeek V3 with an indexer that chooses the tokens that are attended to, where
there are more than it chooses."""

from bitwright.models.architecture import Relative
from bitwright.models.keys import Keys

_SPARSE = {"index_n_heads": 64, "index_head_dim": 128, "index_topk": 2048, "mlp_layer_types": None}
_HARMLESS = ("layer_types", "indexer_rope_interleave")


def _indexes(keys: Keys, layer: int) -> bool:
    """Tell whether a layer of GLM 5 has an indexer, or takes what an earlier one chose."""
    said = keys.get("indexer_types") or keys.get("index_topk_pattern")
    if said is not None:
        if not isinstance(said, (list, str)) or len(said) != keys.integer("num_hidden_layers"):
            raise keys.wrong("indexer_types", 'must name each layer\'s, "full" or "shared"')
        return str(said[layer]) in ("full", "F")
    step = keys.integer("index_topk_freq")
    return max(layer - keys.integer("index_skip_topk_offset", zero=True) + 1, 0) % step == 0


FAMILIES = (
    Relative(
        model_types=("deepseek_v32",),
        of="deepseek_v3",
        rules={
            "defaults": {**_SPARSE, "max_position_embeddings": 163840, "rope_interleave": ...},
            "harmless": _HARMLESS,
            "interleaved": True,
            "indexes": lambda _keys, _layer: True,
        },
    ),
    Relative(
        model_types=("glm_moe_dsa",),
        of="deepseek_v3",
        rules={
            "defaults": {
                **_SPARSE,
                "vocab_size": 154880,
                "hidden_size": 6144,
                "intermediate_size": 12288,
                "num_hidden_layers": 78,
                "num_attention_heads": 64,
                "num_key_value_heads": 64,
                "q_lora_rank": 2048,
                "qk_nope_head_dim": 192,
                "v_head_dim": 256,
                "n_group": 1,
                "topk_group": 1,
                "rms_norm_eps": 1e-5,
                "max_position_embeddings": 202752,
                "index_n_heads": 32,
                "indexer_types": None,
                "index_topk_pattern": None,
                "index_topk_freq": 1,
                "index_skip_topk_offset": 2,
                "rope_interleave": ...,
            },
            "harmless": _HARMLESS,
            "interleaved": True,
            "indexes": _indexes,
        },
    ),
)
