#!/usr/bin/env bash
# Seen with transformers 5.23.0, jinja2 3.1.6 and torch 2.13.0.
#
# An assistant message may carry its reasoning as "reasoning_content",
# "thinking" or "reasoning". Before a chat template is rendered, transformers
# copies what it finds under any of the three to "reasoning_content" and
# "thinking", but never to "reasoning". So a template that reads only
# "reasoning" works with messages of just that spelling, and drops the
# reasoning of the other two in silence, while the other templates take all.
#
# It hurts whoever renders chats for calibration or training from data sets of
# mixed spelling: with such a template a part of the text is not there.
set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
python3 -m venv "$work/venv"
"$work/venv/bin/python" -m pip install --quiet torch==2.13.0
"$work/venv/bin/python" -m pip install --quiet transformers==5.23.0 tokenizers==0.23.3 jinja2==3.1.6
export HF_HUB_OFFLINE=1 HF_HUB_DISABLE_PROGRESS_BARS=1 TRANSFORMERS_VERBOSITY=error

"$work/venv/bin/python" - "$work" <<'EOF'
import jinja2
import tokenizers
import transformers

made = tokenizers.Tokenizer(tokenizers.models.WordLevel({"<unk>": 0, "a": 1}, unk_token="<unk>"))
tokenizer = transformers.PreTrainedTokenizerFast(tokenizer_object=made, unk_token="<unk>")
fields = ("reasoning_content", "thinking", "reasoning")
print("transformers", transformers.__version__, "jinja2", jinja2.__version__)
found = {}
for written in fields:
    for read in fields:
        chat = [
            {"role": "user", "content": "ask"},
            {"role": "assistant", "content": "answer", written: "because"},
        ]
        template = "{% for m in messages %}{{ m." + read + " or '' }}/{{ m.content }};{% endfor %}"
        text = tokenizer.apply_chat_template(chat, chat_template=template, tokenize=False)
        assert text in ("/ask;because/answer;", "/ask;/answer;")
        found[written, read] = "because" in text
        print(f"message has {written}, template reads {read}: {text}")

lost = [pair for pair, kept in found.items() if not kept]
assert lost == [("reasoning_content", "reasoning"), ("thinking", "reasoning")]
EOF
