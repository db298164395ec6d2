"""Trains the small model that `bitwright demo` quantizes, and writes its folder.

The demo needs a checkpoint small enough to ship inside the package and trained well enough that
rounding its weights visibly hurts. This script makes one from nothing but the `story` model:

1. sample some megabytes of short stories from it,
2. train a byte-level BPE tokenizer of 512 tokens on them,
3. train a Llama of 0.18 M parameters on them (on the same distribution as the texts that the demo
   calibrates and evaluates on, as a real model would be),
4. write the model in bfloat16, the tokenizer, and two held-out texts to python/bitwright/demo_data.

It is the only part of the project that needs torch, so it wants an environment of its own, on
Linux with torch's CPU build (about 1 GB):

    python3 -m venv /tmp/train
    /tmp/train/bin/pip install torch==2.13.0
    /tmp/train/bin/pip install transformers==5.23.0 tokenizers==0.23.3 safetensors==0.8.0
    nice -n 10 /tmp/train/bin/python bench/models/train_demo_model.py

On one core this takes about 35 minutes. Everything random is seeded; `--stories
FILE` keeps the sampled stories, so that a second run goes straight to the training.
"""

import argparse
import json
import math
import random
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import LlamaConfig, LlamaForCausalLM

PROJECT = Path(__file__).resolve().parents[2]
SEED = 20240

# Sampling. Below temperature 1 the story model invents fewer words, which a model this small
# could not learn anyway. Stories that have not ended by MAX_STORY_TOKENS are dropped.
STORY_BOS, STORY_EOS = 1, 2
# The story model also spells its marks out, in pieces that decode to visible text: the end mark at
# the end of every story, just before the token STORY_EOS, and a start mark in the odd spoiled one.
STORY_END_SPELLED, STORY_MARK = "<|end_story|>", "<|"
TEMPERATURE = 0.8
MAX_STORY_TOKENS = 400
STORIES_PER_BATCH = 256
MIN_STORY_BYTES = 200
SAMPLED_BYTES = 7_950_000

# The texts that ship with the model, taken off the sample before anything is trained on it.
EVALUATION_BYTES = 50_000
CALIBRATION_BYTES = 115_000

END = "<|endoftext|>"
END_ID = 0
VOCABULARY = 512
CONTEXT = 256

STEPS = 6_000
WARMUP_STEPS = 200
WINDOWS_PER_STEP = 16
PEAK_RATE = 4e-3
WEIGHT_DECAY = 0.1


class Perplexity(NamedTuple):
    per_token: float
    per_byte: float

    def __str__(self) -> str:
        return f"{self.per_token:.4f} per token, {self.per_byte:.4f} per byte"


def sample_stories(folder: Path, total_bytes: int) -> list[str]:
    """Distinct, finished stories from the model in `folder`, at least `total_bytes` of them."""
    # Any, for transformers' own type hints do not let a Llama generate.
    model: Any = LlamaForCausalLM.from_pretrained(folder, dtype=torch.float32)
    # This checkpoint stores the tied matrix under the output's name. Were it left untied, the
    # input embeddings would be random and the "stories" noise.
    if model.model.embed_tokens.weight is not model.lm_head.weight:
        raise SystemExit(f"{folder}: transformers did not tie the embeddings of this checkpoint")
    tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))

    prompt = torch.full((STORIES_PER_BATCH, 1), STORY_BOS)
    stories: dict[str, None] = {}  # a dict keeps the order and drops repetitions
    size = 0
    began = time.monotonic()
    while size < total_bytes:
        sampled = model.generate(
            prompt,
            attention_mask=torch.ones_like(prompt),
            do_sample=True,
            temperature=TEMPERATURE,
            top_k=0,
            max_new_tokens=MAX_STORY_TOKENS,
            eos_token_id=STORY_EOS,
            pad_token_id=STORY_EOS,
        )
        for ids in sampled[:, 1:].tolist():
            if STORY_EOS not in ids:
                continue
            story = clean(tokenizer.decode(ids[: ids.index(STORY_EOS)]))
            if is_usable(story) and story not in stories:
                stories[story] = None
                size += len(story)
        print(f"sampled {size / 1e6:.2f} MB in {time.monotonic() - began:.0f} s", flush=True)
    return list(stories)


def clean(story: str) -> str:
    """The story without its end mark, and without blank lines: those separate the stories."""
    lines = (line.strip() for line in story.partition(STORY_END_SPELLED)[0].splitlines())
    return "\n".join(line for line in lines if line)


def is_usable(story: str) -> bool:
    return len(story) >= MIN_STORY_BYTES and story.isascii() and STORY_MARK not in story


def read_or_sample(cache: Path | None, folder: Path, total_bytes: int) -> list[str]:
    if cache is not None and cache.exists():
        return cache.read_text(encoding="utf-8").rstrip("\n").split("\n\n")
    stories = sample_stories(folder, total_bytes)
    if cache is not None:
        cache.write_text(join(stories), encoding="utf-8")
    return stories


def join(stories: Sequence[str]) -> str:
    return "\n\n".join(stories) + "\n"


def take(stories: list[str], limit: int) -> list[str]:
    """Removes stories from the front of the list, as many as fit into `limit` bytes."""
    size = count = 0
    while count < len(stories) and size + len(stories[count]) + 2 <= limit:
        size += len(stories[count]) + 2
        count += 1
    taken, stories[:] = stories[:count], stories[count:]
    return taken


def train_tokenizer(stories: Sequence[str]) -> Tokenizer:
    """Byte-level BPE without prefix space or template: encoding adds nothing, decoding inverts."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY,
        special_tokens=[END],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(stories, trainer)
    if tokenizer.get_vocab_size() != VOCABULARY or tokenizer.token_to_id(END) != END_ID:
        raise SystemExit("the tokenizer did not come out as planned")
    return tokenizer


def encode(tokenizer: Tokenizer, text: str) -> list[int]:
    ids: list[int] = tokenizer.encode(text, add_special_tokens=False).ids
    if tokenizer.decode(ids, skip_special_tokens=False) != text:
        raise SystemExit("the tokenizer does not decode a text back to itself")
    return ids


def training_stream(tokenizer: Tokenizer, stories: Sequence[str]) -> torch.Tensor:
    """All stories in one row, a blank line after each and an end mark after every other one.

    Always marked, the model would find the plain blank lines of the demo's texts surprising; never
    marked, its generation would not stop and its beginning-of-text token would be noise.
    """
    coin = random.Random(SEED)
    stream: list[int] = []
    for story in stories:
        stream += encode(tokenizer, story + "\n\n")
        if coin.random() < 0.5:
            stream.append(END_ID)
    return torch.tensor(stream)


def new_model() -> LlamaForCausalLM:
    # Every linear layer's input width is a multiple of 64, so that any usual group size fits.
    config = LlamaConfig(
        vocab_size=VOCABULARY,
        hidden_size=64,
        intermediate_size=192,
        num_hidden_layers=3,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=16,
        max_position_embeddings=CONTEXT,
        initializer_range=0.06,
        rms_norm_eps=1e-5,
        tie_word_embeddings=True,
        bos_token_id=END_ID,
        eos_token_id=END_ID,
        pad_token_id=END_ID,
    )
    return LlamaForCausalLM(config)


def learning_rate(step: int, steps: int) -> float:
    """Linear warm-up, then a cosine down to zero."""
    warmup = min(1.0, (step + 1) / WARMUP_STEPS)
    return PEAK_RATE * warmup * 0.5 * (1 + math.cos(math.pi * step / steps))


def train(model: LlamaForCausalLM, stream: torch.Tensor, steps: int) -> None:
    groups: list[dict[str, Any]] = [
        {"params": [p for p in model.parameters() if p.dim() > 1], "weight_decay": WEIGHT_DECAY},
        {"params": [p for p in model.parameters() if p.dim() == 1], "weight_decay": 0.0},
    ]
    optimizer = torch.optim.AdamW(groups, betas=(0.9, 0.98))
    windows = stream.unfold(0, CONTEXT, 1)
    model.train()
    began = time.monotonic()
    for step in range(steps):
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(step, steps)
        batch = windows[torch.randint(len(windows), (WINDOWS_PER_STEP,))]
        loss = model(input_ids=batch, labels=batch, use_cache=False).loss
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        if (step + 1) % 250 == 0:
            seconds = time.monotonic() - began
            print(f"step {step + 1}: loss {loss.item():.4f} after {seconds:.0f} s", flush=True)


def perplexity(model: LlamaForCausalLM, tokenizer: Tokenizer, text: str) -> Perplexity:
    """Over consecutive windows of the full context; the first token of each is not predicted."""
    model.train(False)
    ids = encode(tokenizer, text)
    count = len(ids) // CONTEXT
    windows = torch.tensor(ids[: count * CONTEXT]).view(count, CONTEXT)
    with torch.inference_mode():
        losses = [
            model(input_ids=batch, labels=batch).loss.item() * len(batch)
            for batch in torch.split(windows, WINDOWS_PER_STEP)
        ]
    nats = sum(losses) / count
    return Perplexity(math.exp(nats), math.exp(nats * len(ids) / len(text.encode())))


def write_json(path: Path, content: dict[str, object]) -> None:
    path.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")


def write_tokenizer(tokenizer: Tokenizer, folder: Path) -> None:
    tokenizer.save(str(folder / "tokenizer.json"))
    # By hand: transformers 5 would write a class name here that transformers 4 does not know.
    write_json(
        folder / "tokenizer_config.json",
        {
            "tokenizer_class": "PreTrainedTokenizerFast",
            "bos_token": END,
            "eos_token": END,
            "pad_token": END,
            "clean_up_tokenization_spaces": False,
            "model_max_length": CONTEXT,
        },
    )


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description="Train the model of `bitwright demo`.",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    parser.add_argument(
        "--story",
        type=Path,
        default=PROJECT.parent / "shared/models/story",
        help="folder of the model that the stories are sampled from",
    )
    parser.add_argument(
        "--stories", type=Path, help="file of the sampled stories: read if it exists, else written"
    )
    parser.add_argument(
        "--output",
        type=Path,
        default=PROJECT / "python/bitwright/demo_data",
        help="folder to write",
    )
    parser.add_argument("--bytes", type=int, default=SAMPLED_BYTES, help="how much to sample")
    parser.add_argument("--steps", type=int, default=STEPS, help="training steps")
    return parser.parse_args()


def main() -> None:
    arguments = parse_arguments()
    torch.set_num_threads(1)
    torch.manual_seed(SEED)

    stories = read_or_sample(arguments.stories, arguments.story, arguments.bytes)
    evaluation = join(take(stories, EVALUATION_BYTES))
    calibration = join(take(stories, CALIBRATION_BYTES))
    tokenizer = train_tokenizer(stories)
    stream = training_stream(tokenizer, stories)
    print(f"{len(stories)} stories, {len(stream)} tokens to train on", flush=True)

    torch.manual_seed(SEED)  # again: the training is the same, whether the stories were read or not
    model = new_model()
    print(f"{sum(p.numel() for p in model.parameters())} parameters", flush=True)
    train(model, stream, arguments.steps)
    before = perplexity(model, tokenizer, evaluation)

    output: Path = arguments.output
    output.mkdir(parents=True, exist_ok=True)
    model.bfloat16().save_pretrained(output)
    (output / "model.safetensors").chmod(0o644)  # written for its owner alone, but shipped to all
    write_tokenizer(tokenizer, output)
    (output / "calibration.txt").write_text(calibration, encoding="utf-8")
    (output / "evaluation.txt").write_text(evaluation, encoding="utf-8")

    stored = LlamaForCausalLM.from_pretrained(output, dtype=torch.float32)
    after = perplexity(stored, tokenizer, evaluation)
    print(f"perplexity of evaluation.txt in float32: {before}")
    print(f"perplexity with the stored bfloat16 weights: {after}")


if __name__ == "__main__":
    main()
