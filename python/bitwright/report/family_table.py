"""The families as a table in Markdown, made from the code."""

from bitwright.checkpoint.gguf_names import GGUF_FAMILIES
from bitwright.models import ARCHITECTURES
from bitwright.models.architecture import (
    Architecture,
    Attention,
    GatedDelta,
    LatentAttention,
    Mamba,
    Mixer,
)

# What mlx-lm 0.32.2 computes as transformers does, where its windows and limits allow; see
# tests/interop/test_families_in_mlx.py.
IN_MLX_LM = frozenset(
    [
        "cohere",
        "cohere2",
        "deepseek_v2",
        "deepseek_v3",
        "ernie4_5",
        "exaone4",
        "gemma",
        "gemma2",
        "gemma3",
        "gemma3_text",
        "gemma4",
        "gemma4_text",
        "glm4",
        "glm4_moe",
        "glm4_moe_lite",
        "gpt_oss",
        "granite",
        "granitemoe",
        "helium",
        "hunyuan_v1_dense",
        "internlm3",
        "kimi_k2",
        "lfm2",
        "lfm2_moe",
        "llama",
        "minimax_m2",
        "mistral",
        "mistral3",
        "mixtral",
        "olmo2",
        "olmo3",
        "olmoe",
        "phi",
        "phi3",
        "qwen2",
        "qwen2_5_vl",
        "qwen2_moe",
        "qwen2_vl",
        "qwen3",
        "qwen3_5",
        "qwen3_5_moe",
        "qwen3_moe",
        "qwen3_next",
        "qwen3_vl",
        "qwen3_vl_moe",
        "seed_oss",
        "smollm3",
        "solar_open",
        "stablelm",
        "starcoder2",
    ]
)
NOT_IN_TRANSFORMERS = frozenset({"kimi_k2"})  # whose code comes with the model


def family_table() -> str:
    """Return the table of docs/architectures.md: family, parts, formats, and what loads them.

    Returns
    -------
    str
        Markdown.

    Examples
    --------
    >>> print(family_table().splitlines()[0])
    | model_type | text part | mixes tokens by | MLP | formats | engines |
    """
    lines = [
        "| model_type | text part | mixes tokens by | MLP | formats | engines |",
        "| --- | --- | --- | --- | --- | --- |",
    ]
    texts: dict[str, list[str]] = {}
    for name in ARCHITECTURES:
        outer, _, text = name.partition("/")
        texts.setdefault(outer, []).extend([text] if text else [])
    for outer, inner in sorted(texts.items()):
        family = ARCHITECTURES[f"{outer}/{inner[0]}" if inner else outer]
        formats = "all" if outer in GGUF_FAMILIES else "all but gguf"
        engines = [
            *(() if outer in NOT_IN_TRANSFORMERS else ("transformers",)),
            *(("mlx-lm",) if outer in IN_MLX_LM else ()),
            *(("llama.cpp",) if outer in GGUF_FAMILIES else ()),
        ]
        cells = (
            f"`{outer}`",
            ", ".join(f"`{each}`" for each in inner),
            _mixing(family),
            _mlp(family),
            formats,
            ", ".join(engines),
        )
        lines.append(f"| {' | '.join(cells)} |".replace("|  |", "| |"))
    return "\n".join(lines) + "\n"


def _mixing(family: Architecture) -> str:
    words = [] if _only_mixes(family) else [_attention(family.attention)]
    words += [] if family.beside is None else [f"{_mixer(family.beside)} beside it"]
    words += dict.fromkeys(_mixer(each) for each in family.mixers.values())
    return ", ".join(words)


def _attention(attention: Attention | LatentAttention) -> str:
    if isinstance(attention, LatentAttention):
        return "latent attention"
    more = []
    if attention.query_norm is not None:
        more.append("normed")
    if attention.gated:
        more.append("gated")
    if attention.sinks is not None:
        more.append("with sinks")
    return " ".join(["attention", f"({', '.join(more)})"] if more else ["attention"])


def _mixer(mixer: Mixer) -> str:
    if isinstance(mixer, GatedDelta):
        return "gated delta-net"
    return "Mamba-2" if isinstance(mixer, Mamba) else "short convolution"


def _only_mixes(family: Architecture) -> bool:
    """Tell whether all blocks hold a mixer and nothing else."""
    return family.rules.alone and family.rules.layer_kinds == ("linear_attention",)


def _mlp(family: Architecture) -> str:
    if _only_mixes(family):
        return "none"
    plain = "gated" if family.mlp.gate is not None or family.mlp.fused is not None else "plain"
    if family.experts is None:
        return plain
    return "experts, one of them shared" if family.experts.shared is not None else "experts"


if __name__ == "__main__":
    print(family_table(), end="")
