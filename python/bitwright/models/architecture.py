"""A decoder family as data. The defaults are Llama's pattern, which most families follow, so each states
only where it differs."""

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any, TypeAlias

from bitwright.models.fold import FoldKind
from bitwright.models.keys import ConfigRules


@dataclass(frozen=True)
class Names:
    """Names of the tensors around the blocks, without ``.weight``; ``block`` takes the index, and ``tower``
    is what MLX calls vision_tower, where other files do not."""

    embedding: str = "model.embed_tokens"
    block: str = "model.layers.{}"
    final_norm: str = "model.norm"
    head: str = "lm_head"
    tower: str | None = None


@dataclass(frozen=True)
class Attention:
    """Linears of attention with a query, key and value per head; names within the block.

    Where ``fused`` is set, it holds the rows of all three, queries first, and stands for them; with
    ``by_head`` it holds one head's three after another.
    ``query_norm`` and ``key_norm`` are norms before the rotation, or after it (``norms_last``), over each
    head or over ``whole`` rows. Where the query is ``gated``, each of its heads is followed by a gate of
    the head's output. With a ``value_norm`` values are normed over each head, without a gain. ``sinks``
    are scores per head of a token without a value.
    """

    query: str = "self_attn.q_proj"
    key: str = "self_attn.k_proj"
    value: str = "self_attn.v_proj"
    output: str = "self_attn.o_proj"
    fused: str | None = None
    by_head: bool = False
    query_norm: str | None = None
    key_norm: str | None = None
    whole: bool = False
    norms_last: bool = False
    gated: bool = False
    value_norm: bool = False
    sinks: str | None = None


@dataclass(frozen=True)
class LatentAttention:
    """Linears of latent attention (DeepSeek-V2, arXiv:2405.04434, section 2.1); names within the block.

    Queries come from ``query`` or, where there is a query rank, from ``query_down``, its norm and
    ``query_up``. MLX stores ``key_value_up`` in two stacks with a matrix per head: ``absorbed_key``,
    transposed, and ``absorbed_value``. ``indexer`` is the prefix of what chooses the tokens that a token
    attends to (DeepSeek-V3.2, arXiv:2512.02556, section 2.1): it is carried along in float, and samples are
    so short that it chooses all.
    """

    query: str = "self_attn.q_proj"
    query_down: str = "self_attn.q_a_proj"
    query_norm: str = "self_attn.q_a_layernorm"
    query_up: str = "self_attn.q_b_proj"
    key_value_down: str = "self_attn.kv_a_proj_with_mqa"
    key_value_norm: str = "self_attn.kv_a_layernorm"
    key_value_up: str = "self_attn.kv_b_proj"
    absorbed_key: str = "self_attn.embed_q"
    absorbed_value: str = "self_attn.unembed_out"
    output: str = "self_attn.o_proj"
    indexer: str = "self_attn.indexer"


@dataclass(frozen=True)
class GatedDelta:
    """The gated delta-net (arXiv:2412.06464) in place of attention; names within the block.

    ``inputs`` are queries, keys and values, which a short convolution passes, and the gate of the output:
    one linear for all, of each key head its share of the four in turn, or one for the first three and
    another for the gate. ``controls`` are strengths and decays, in one linear or two. These stay in float:
    they are small, and all later tokens feel them.
    """

    inputs: tuple[str, ...] = ("linear_attn.in_proj_qkv", "linear_attn.in_proj_z")
    controls: tuple[str, ...] = ("linear_attn.in_proj_b", "linear_attn.in_proj_a")
    convolution: str = "linear_attn.conv1d"
    decay: str = "linear_attn.A_log"
    step: str = "linear_attn.dt_bias"
    norm: str = "linear_attn.norm"
    output: str = "linear_attn.out_proj"


@dataclass(frozen=True)
class ShortConvolution:
    """A convolution over the last tokens between two gates, in place of attention (LFM 2); names within
    the block. ``inputs`` holds the rows of both gates and of what is convolved, in their order."""

    inputs: str = "conv.in_proj"
    convolution: str = "conv.conv"
    output: str = "conv.out_proj"


@dataclass(frozen=True)
class Mamba:
    """The mixer of Mamba-2 (arXiv:2405.21060) in place of attention; names within the block.

    ``inputs`` holds the rows of the output's gate, of the values, keys and queries, which a short
    convolution passes, and of the steps. Its output has a norm where the config says so.
    """

    inputs: str = "mamba.in_proj"
    convolution: str = "mamba.conv1d"
    decay: str = "mamba.A_log"
    step: str = "mamba.dt_bias"
    skip: str = "mamba.D"
    norm: str = "mamba.norm"
    output: str = "mamba.out_proj"


Mixer: TypeAlias = GatedDelta | ShortConvolution | Mamba


@dataclass(frozen=True)
class Mlp:
    """Linears of an MLP. Without a ``gate`` it is activation(up), otherwise activation(gate) · up. Where
    ``fused`` is set, it holds the rows of both, the gate's first, and stands for them."""

    gate: str | None = "mlp.gate_proj"
    up: str = "mlp.up_proj"
    down: str = "mlp.down_proj"
    fused: str | None = None


@dataclass(frozen=True)
class Stack:
    """Tensors of all experts of a layer as the family's files have them; names within the block.

    ``gate_up`` is ``[experts, 2 · size, hidden]`` with the gate's rows first, ``down`` ``[experts, hidden,
    size]``; ``interleaved`` takes rows of gate and up in turn. The last two axes may be swapped, which
    shapes say; ``transposed`` is believed where they do not. Biases are ``gate_up_bias`` ``[experts, 2 ·
    size]``, with rows as those of the weights, and ``down_bias``.
    """

    gate_up: str
    down: str
    transposed: bool = False
    interleaved: bool = False
    gate_up_bias: str | None = None
    down_bias: str | None = None


@dataclass(frozen=True)
class Experts:
    """Tensors of a mixture of experts; names within the block.

    Parameters
    ----------
    router, router_bias
        The linear whose outputs rank the experts, and whether it has a bias.
    correction, correction_axes
        Bias added to the scores for choosing experts, not for weighing them, if any, and the axes that
        its shape has before that of the experts.
    prefix
        Prefix of an expert's names, up to its index.
    mlp
        Linears of one expert, named within it.
    shared, shared_gate
        The shared expert, which every token passes, and the linear of its gate, if there are any.
    stacked
        Prefix of gate_proj, up_proj and down_proj where MLX stores all experts in one tensor.
    in_stacks
        What MLX calls them there, where it has other names.
    stack
        The stacks of the family's own files; None: ``gate_up_proj`` and ``down_proj`` under the prefix.
    """

    router: str = "mlp.gate"
    router_bias: bool = False
    correction: str | None = None
    correction_axes: tuple[int, ...] = ()
    prefix: str = "mlp.experts"
    mlp: Mlp = field(default_factory=lambda: Mlp("gate_proj", "up_proj", "down_proj"))
    shared: Mlp | None = None
    shared_gate: str | None = None
    stacked: str = "mlp.switch_mlp"
    in_stacks: Mapping[str, str] = field(default_factory=dict)
    stack: Stack | None = None

    @property
    def own_stack(self) -> Stack:
        """The stacks, under these names or those of transformers."""
        return self.stack or Stack(f"{self.prefix}.gate_up_proj", f"{self.prefix}.down_proj")


@dataclass(frozen=True)
class Architecture:
    """One decoder family.

    Parameters
    ----------
    model_types
        Its values of ``model_type`` in config.json.
    rules
        How to read its config.json.
    names
        Of its tensors; the first are those that engines expect and that are written. They are found under
        other prefixes, too.
    attention, mlp, experts
        The parts of its blocks; ``rules`` says which layers have experts.
    mixers
        What some layers have in place of attention, by their ``layer_types``.
    beside
        What reads the states that attention reads, and adds to the same hidden states, if anything does.
    attention_norm, mlp_norm
        Norms before attention and MLP, None where they read the hidden states as they are.
    attention_post_norm, mlp_post_norm
        Norms of the outputs of attention and MLP, before they are added to the hidden states, if any.
    norm_kind
        Of all norms.
    layer_scale
        The factor of the hidden states after a block, if any.
    """

    model_types: tuple[str, ...]
    rules: ConfigRules = field(default_factory=ConfigRules)
    names: tuple[Names, ...] = (Names(),)
    attention: Attention | LatentAttention = field(default_factory=Attention)
    mlp: Mlp = field(default_factory=Mlp)
    experts: Experts | None = None
    mixers: Mapping[str, Mixer] = field(default_factory=dict)
    beside: Mamba | None = None
    attention_norm: str | None = "input_layernorm"
    mlp_norm: str | None = "post_attention_layernorm"
    attention_post_norm: str | None = None
    mlp_post_norm: str | None = None
    norm_kind: FoldKind = "rms_norm"
    layer_scale: str | None = None


@dataclass(frozen=True)
class Relative:
    """A family that is another one with a few changes.

    Parameters
    ----------
    model_types
        Its values of ``model_type``.
    of
        The ``model_type`` of the other.
    rules
        Fields of `ConfigRules`: mappings and lists of keys are added to the other's, the rest replaces. An
        ellipsis in place of a value takes a key away.
    parts
        Fields of `Architecture` that replace the other's.
    """

    model_types: tuple[str, ...]
    of: str
    rules: Mapping[str, Any] = field(default_factory=dict)
    parts: Mapping[str, Any] = field(default_factory=dict)

    def of_family(self, other: Architecture) -> Architecture:
        """Return the description of this family."""
        rules = extended(other.rules, self.rules)
        return replace(other, model_types=self.model_types, rules=rules, **self.parts)


@dataclass(frozen=True)
class Wrapper:
    """A model of several kinds of input whose text part is a decoder of another family.

    Parameters
    ----------
    model_types
        Its values of ``model_type``.
    texts
        Those that its text part may have; the first is meant where config.json does not say.
    names
        Of the decoder's tensors; the first are written.
    harmless
        Keys of config.json that are about the other parts.
    section
        The object in config.json that describes the text part.
    """

    model_types: tuple[str, ...]
    texts: tuple[str, ...]
    names: tuple[Names, ...]
    harmless: tuple[str, ...] = ()
    section: str = "text_config"

    def around(self, text: Architecture) -> Architecture:
        """Return the description of the whole with this text part."""
        rules = extended(text.rules, {"section": self.section, "harmless": self.harmless})
        return replace(text, model_types=self.model_types, rules=rules, names=self.names)


def extended(rules: ConfigRules, changes: Mapping[str, Any]) -> ConfigRules:
    """Return rules with mappings and lists of keys added, and other fields replaced."""
    known: dict[str, Any] = {}
    for name, value in changes.items():
        before = getattr(rules, name)
        if isinstance(before, Mapping):
            known[name] = {k: v for k, v in {**before, **value}.items() if v is not ...}
        else:
            known[name] = (*before, *value) if name in ("harmless", "overlooked") else value
    return replace(rules, **known)


def beside(part: str, head: str = "lm_head", tower: str | None = None) -> Names:
    """Return the names of a decoder that is one part of a model, such as ``model.language_model``."""
    return Names(f"{part}.embed_tokens", f"{part}.layers.{{}}", f"{part}.norm", head, tower)
