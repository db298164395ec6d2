"""Tries every decoder of the installed transformers on a tiny random model, and prints a table in Markdown.

Run in an environment with torch, transformers and bitwright::

    python tests/sweep.py [MODEL_TYPE ...]

A model counts as native if `bitwright.load_model` reads it; its logits are then compared with transformers'
in float32. What is not is quantized by rounding through transformers. Types that transformers cannot make
or run this small, encoder-decoders and models in which later tokens change earlier ones are listed below.
"""

import contextlib
import io
import re
import sys
import tempfile
import traceback
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
import transformers
from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForImageTextToText
from transformers.models.auto import modeling_auto

import bitwright

CLOSE = 5e-4
MOST_PARAMETERS = 20_000_000
LENGTH = 16
KINDS = {
    AutoModelForCausalLM: modeling_auto.MODEL_FOR_CAUSAL_LM_MAPPING_NAMES,
    AutoModelForImageTextToText: modeling_auto.MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES,
}
SIZES: dict[str, Any] = {
    **dict.fromkeys(("hidden_size", "d_model", "n_embd", "dim", "embed_dim"), 64),
    **dict.fromkeys(("intermediate_size", "ffn_dim", "n_inner", "d_ff", "mlp_hidden_size"), 128),
    **dict.fromkeys(("num_hidden_layers", "n_layer", "num_layers", "depth", "n_layers"), 4),
    **dict.fromkeys(("num_attention_heads", "n_head", "num_heads", "n_heads"), 4),
    **dict.fromkeys(("num_key_value_heads", "num_kv_heads", "multi_query_group_num"), 2),
    **dict.fromkeys(("num_experts", "num_local_experts", "n_routed_experts", "moe_num_experts"), 4),
    **dict.fromkeys(("num_experts_per_tok", "moe_k", "top_k_experts", "moe_topk"), 2),
    **dict.fromkeys(("moe_intermediate_size", "shared_expert_intermediate_size"), 32),
    **dict.fromkeys(("image_size", "img_size"), 28),
    **dict.fromkeys(("linear_num_key_heads", "index_n_heads"), 2),
    **dict.fromkeys(("linear_key_head_dim", "linear_value_head_dim", "mamba_head_dim"), 16),
    **dict.fromkeys(("mamba_n_heads", "mamba_num_heads", "linear_num_value_heads"), 4),
    "mamba_d_state": 16,
    "mamba_n_groups": 1,
    "mamba_d_ssm": 64,
    "mamba_expand": 1,
    "mamba_d_head": 16,
    "vocab_size": 128,
    "head_dim": 16,
    "global_head_dim": 16,
    "n_group": 1,
    "topk_group": 1,
    "q_lora_rank": 32,
    "kv_lora_rank": 32,
    "qk_nope_head_dim": 16,
    "qk_rope_head_dim": 8,
    "v_head_dim": 16,
    "index_head_dim": 16,
    "patch_size": 14,
    "max_position_embeddings": 64,
    "initializer_range": 0.15,
    "vocab_size_per_layer_input": 128,
    "hidden_size_per_layer_input": 8,
}
AGAIN: dict[str, dict[str, Any]] = {  # what does not fit together otherwise
    "mamba2": {"num_heads": 8, "head_dim": 16, "n_groups": 1, "state_size": 16, "expand": 2},
    "gpt_neo": {"num_layers": 2, "attention_types": [[["global", "local"], 1]]},
    "nemotron_h": {"ssm_state_size": 16, "n_groups": 1, "moe_shared_expert_intermediate_size": 32},
}
LAYERED = ("layer_types", "layers_block_type", "mlp_layer_types", "indexer_types")
LATENT = ("deepseek_v2", "deepseek_v3", "deepseek_v32", "glm_moe_dsa", "glm4_moe_lite", "mistral4")


def shrunk(config: Any, model_type: str) -> None:
    """Make a config and the configs in it tiny."""
    declared = {name: value for name, value in vars(config).items() if not name.startswith("_")}
    for name, value in declared.items():
        if hasattr(value, "model_type") and hasattr(value, "to_dict"):
            shrunk(value, value.model_type)
        elif name in SIZES and value is not None:
            setattr(config, name, SIZES[name])
        elif name.endswith("_token_id") and isinstance(value, int) and value >= 64:
            setattr(config, name, 64 + value % 60)
        elif name in LAYERED and value:
            setattr(config, name, [*dict.fromkeys(value), *value][: SIZES["num_hidden_layers"]])
    for name, value in AGAIN.get(model_type, {}).items():
        setattr(config, name, value)
    if model_type in LATENT:
        config.num_key_value_heads = config.num_attention_heads
    config.pad_token_id = 0


def made(model_type: str, kind: Any) -> Any:
    """Return a tiny model of a type, or raise what transformers raises."""
    config = AutoConfig.for_model(model_type)
    if config.is_encoder_decoder:
        raise ValueError("an encoder-decoder")
    shrunk(config, model_type)
    config = type(config)(**config.to_dict())  # what follows from the sizes
    with torch.device("meta"):
        count = sum(each.numel() for each in kind.from_config(config).parameters())
    if count > MOST_PARAMETERS:
        raise ValueError(f"{count // 10**6} million parameters in spite of small sizes")
    torch.manual_seed(0)
    return kind.from_config(config).float().eval()


def logits(model: Any, ids: Any) -> Any:
    with torch.no_grad():
        return model(input_ids=torch.as_tensor(ids), use_cache=False).logits.float().numpy()


def looks_ahead(model: Any, ids: Any) -> bool:
    """Tell whether later tokens change the logits of earlier ones."""
    changed = ids.copy()
    changed[:, -4:] = changed[:, -4:] % 50 + 5
    here = slice(None, LENGTH - 4)
    return bool(np.abs(logits(model, ids)[:, here] - logits(model, changed)[:, here]).max() > 1e-3)


def tried(model_type: str, kind: Any, folder: Path) -> tuple[str, str]:
    """Return how a type goes, and more about it."""
    ids = np.random.default_rng(0).integers(3, 60, (2, LENGTH))
    try:
        model = made(model_type, kind)
        if looks_ahead(model, ids):
            return "not tried", "later tokens change earlier ones"
        model.save_pretrained(folder)
        wanted = logits(kind.from_pretrained(folder, dtype=torch.float32).eval(), ids)
    except Exception as error:  # whatever transformers or torch raise
        return "not tried", shortened(error)
    try:
        ours = bitwright.load_model(folder)
    except bitwright.BitwrightError as error:
        why = shortened(error)
    else:
        apart = float(np.abs(ours.logits(ids) - wanted).max())
        return ("native" if apart < CLOSE else "wrong"), f"{apart:.1e}"
    out = folder.with_name("out")
    try:
        bitwright.quantize_with_transformers(
            folder,
            out,
            "rtn",
            8,
            32,
            format="compressed-tensors",
            allow_unfused=True,
            progress=False,
        )
    except (bitwright.BitwrightError, ValueError) as error:
        return "refused", shortened(error)
    return "through transformers", why


def shortened(error: BaseException) -> str:
    text = " ".join(str(error).split()).rpartition("config.json: ")[2]
    text = re.sub(r"^/tmp/\S+: |; supported are: .*", "", text)
    return (text[:110] + "…" if len(text) > 110 else text).replace("|", "/") or type(error).__name__


def every_type(wanted: list[str]) -> Iterator[tuple[str, Any]]:
    seen: set[str] = set()
    for kind, names in KINDS.items():
        for model_type in names:
            if model_type not in seen and (not wanted or model_type in wanted):
                seen.add(model_type)
                yield model_type, kind


def main(*wanted: str) -> None:
    rows: dict[str, tuple[str, str]] = {}
    for model_type, kind in sorted(every_type([*wanted]), key=lambda each: each[0]):
        with tempfile.TemporaryDirectory() as folder, contextlib.redirect_stdout(io.StringIO()):
            try:
                rows[model_type] = tried(model_type, kind, Path(folder) / "model")
            except Exception:  # which must not happen: a row says where
                last = traceback.format_exc().strip().splitlines()[-1]
                rows[model_type] = "traceback", last[:110].replace("|", "/")
        print(model_type, *rows[model_type], file=sys.stderr, flush=True)
    counts: dict[str, int] = {}
    for how, _ in rows.values():
        counts[how] = counts.get(how, 0) + 1
    said = ", ".join(f"{count} {how}" for how, count in sorted(counts.items()))
    print(f"transformers {transformers.__version__}, bitwright {bitwright.__version__}: {said}\n")
    print("| model_type | how | largest difference of logits, or why |\n| --- | --- | --- |")
    for model_type, (how, more) in rows.items():
        if how != "not tried":
            print(f"| `{model_type}` | {how} | {more} |")
    print("\nNot tried:\n")
    for model_type, (how, more) in rows.items():
        if how == "not tried":
            print(f"- `{model_type}`: {more}")


if __name__ == "__main__":
    warnings.simplefilter("ignore")
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    main(*sys.argv[1:])
