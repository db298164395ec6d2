#!/usr/bin/env bash
# Seen with transformers 5.23.0 and torch 2.13.0.
#
# The config of a multimodal gemma3 has "tie_word_embeddings" twice: at the top,
# and in "text_config", which describes the language model with its embedding and
# head. The one in text_config has no effect. With false at the top and true in
# text_config, and no head stored, the head is listed as missing and made up at
# random; with the two the other way round the embedding is the head.
#
# It hurts whoever reads text_config to learn whether a gemma3 has a head of its
# own: a converter then drops a head that counts, or computes with an embedding
# where transformers would make up another matrix.
set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
python3 -m venv "$work/venv"
"$work/venv/bin/python" -m pip install --quiet torch==2.13.0
"$work/venv/bin/python" -m pip install --quiet transformers==5.23.0
export HF_HUB_OFFLINE=1 HF_HUB_DISABLE_PROGRESS_BARS=1 TRANSFORMERS_VERBOSITY=error

"$work/venv/bin/python" - "$work" <<'EOF'
import json
import sys
from pathlib import Path

import torch
import transformers

text = dict(
    vocab_size=32, hidden_size=32, intermediate_size=64, num_hidden_layers=1,
    num_attention_heads=4, num_key_value_heads=2, head_dim=8, max_position_embeddings=64,
)
vision = dict(hidden_size=16, intermediate_size=32, num_hidden_layers=1, num_attention_heads=2, image_size=8, patch_size=4)
torch.manual_seed(0)
config = transformers.Gemma3Config(text_config=text, vision_config=vision, mm_tokens_per_image=4)
made = transformers.Gemma3ForConditionalGeneration(config)
place = Path(sys.argv[1], "model")
made.save_pretrained(place)  # tied, so without a head
written = json.loads((place / "config.json").read_text())


def load(top, inner):
    """Return whether the embedding is the head, and whether the head is listed as missing."""
    changed = {**written, "tie_word_embeddings": top}
    changed["text_config"] = {**written["text_config"], "tie_word_embeddings": inner}
    (place / "config.json").write_text(json.dumps(changed))
    model, said = transformers.Gemma3ForConditionalGeneration.from_pretrained(place, output_loading_info=True)
    same = model.get_output_embeddings().weight is model.get_input_embeddings().weight
    return same, any("lm_head" in name for name in said["missing_keys"])


print("transformers", transformers.__version__, "torch", torch.__version__)
for top in (True, False):
    for inner in (True, False):
        same, missing = load(top, inner)
        print(f"top {top}, text_config {inner}: embedding is the head {same}, head listed as missing {missing}")
        assert same is top
        assert missing is (not top)
EOF
