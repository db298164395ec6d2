#!/usr/bin/env bash
# Seen with transformers 5.23.0, tokenizers 0.23.3, gguf 0.19.0, torch 2.13.0.
#
# tokenizer_config.json says whether a BOS token is added ("add_bos_token"), and
# so does the post-processor of tokenizer.json. Where the two disagree,
# transformers goes by tokenizer.json. gguf's SpecialVocab, from which a
# converter has the flag that it writes into a GGUF file, goes by
# tokenizer_config.json. So a text starts with BOS by one and not by the other.
#
# It hurts whoever calibrates or measures with transformers and runs the GGUF
# file: the first token, on which many models lean hard, is not the same.
set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
python3 -m venv "$work/venv"
"$work/venv/bin/python" -m pip install --quiet torch==2.13.0
"$work/venv/bin/python" -m pip install --quiet transformers==5.23.0 gguf==0.19.0 tokenizers==0.23.3
export HF_HUB_OFFLINE=1 HF_HUB_DISABLE_PROGRESS_BARS=1 TRANSFORMERS_VERBOSITY=error

"$work/venv/bin/python" - "$work" <<'EOF'
import json
import pathlib
import sys
from importlib.metadata import version

import gguf
import tokenizers
import transformers
from tokenizers.processors import ByteLevel, TemplateProcessing

top = pathlib.Path(sys.argv[1])


def attempt(processor, declared):
    made = tokenizers.Tokenizer(tokenizers.models.WordLevel({"<s>": 0, "<unk>": 1, "a": 2, "b": 3}, unk_token="<unk>"))
    made.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
    made.add_special_tokens(["<s>", "<unk>"])
    made.post_processor = processor
    folder = top / f"tokenizer-{declared}"
    folder.mkdir()
    made.save(str(folder / "tokenizer.json"))
    (folder / "tokenizer_config.json").write_text(json.dumps({
        "tokenizer_class": "PreTrainedTokenizerFast", "bos_token": "<s>", "unk_token": "<unk>",
        "add_bos_token": declared,
    }))
    tokens = transformers.AutoTokenizer.from_pretrained(folder)("a b")["input_ids"]

    file = top / f"{declared}.gguf"
    writer = gguf.GGUFWriter(file, "llama")
    gguf.SpecialVocab(folder).add_to_gguf(writer, quiet=True)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    field = gguf.GGUFReader(file).fields["tokenizer.ggml.add_bos_token"]
    return tokens, bool(field.contents())


print("transformers", transformers.__version__, "tokenizers", tokenizers.__version__, "gguf", version("gguf"))
without = attempt(ByteLevel(), True)
print("post-processor adds none, add_bos_token true: transformers gives", without[0], "gguf writes", without[1])
adds = TemplateProcessing(single="<s> $A", pair="<s> $A $B:1", special_tokens=[("<s>", 0)])
with_bos = attempt(adds, False)
print("post-processor adds BOS, add_bos_token false: transformers gives", with_bos[0], "gguf writes", with_bos[1])

assert without == ([2, 3], True)
assert with_bos == ([0, 2, 3], False)
EOF
